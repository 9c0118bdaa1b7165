"""What MLflow can hold: the names of metrics and params, and the numbers.

Written out here, because the trainer refuses a bad name at once and never imports MLflow.
"""

from __future__ import annotations

import math
import posixpath
import re
import sys
from collections.abc import Mapping

from tracked.errors import MetricError

LONGEST = 250

# Tags that people see.
STATE = "tracked.state"
CHECKPOINT = "tracked.checkpoint"
STOP_REASON = "tracked.stop_reason"
OVERFITTING = "tracked.overfitting"
BEST = "tracked.best"
BEST_RUN = "tracked.best_run"
ORIGIN = "tracked.forked_from"
COMMAND = "tracked.command"
TRIAL_NUMBER = "tracked.trial"
TRIALS = "tracked.trials"
# Tags that MLflow's interface hides.
HANDLE = "mlflow.tracked.handle"
ATTEMPT = "mlflow.tracked.attempt"
HOST = "mlflow.tracked.host"
HEARTBEAT = "mlflow.tracked.heartbeat"
HOLDER = "mlflow.tracked.holder"
EXPERIMENT_FILE = "mlflow.tracked.experiment_file"
OVERRIDE = "mlflow.tracked.override"
DIVERGED_AT = "mlflow.tracked.diverged_at"
POINTS = "mlflow.tracked.points"
SETTINGS = "mlflow.tracked.settings"
RUN_KEY = "mlflow.tracked.run_key"
EXACT = "mlflow.tracked.exact"
FORKED_FROM = "mlflow.tracked.forked_from"
SWEEP = "mlflow.tracked.sweep"
TRIAL = "mlflow.tracked.trial"
CALL = "mlflow.tracked.call"
PARENT = "mlflow.parentRunId"
DESCRIPTION = "mlflow.note.content"
# The SHA-256 of the description that was written last: another one is a person's.
DESCRIBED = "mlflow.tracked.description"
# A tag for each fork, because a list in one tag would lose one of two that are written at the same time.
FORK = "mlflow.tracked.fork."

# Checkpoints, in the spool and among a run's artifacts: checkpoints/step-00000938/checkpoint.pt
FILE = "checkpoint.pt"
MANIFEST = "manifest.json"
# A whole module, exported or on its way to a model of MLflow.
MODULE = "module.pt"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a folder name such as `step-00000938`; None for any other name."""
    digits = name.removeprefix("step-")
    return int(digits) if name == f"step-{digits}" and digits.isdigit() and len(digits) >= 8 else None


OURS = f"tags.`{HANDLE}` LIKE '%'"
"""MLflow's filter for the runs of this package."""

# A param can be written once, so it decides which of several newcomers has the attempt.
_ATTEMPT_PARAM = "tracked.attempt."


def attempt_param(number: int) -> str:
    return f"{_ATTEMPT_PARAM}{number}"


def newest_attempt(params: Mapping[str, str]) -> tuple[int, str]:
    """Number and nonce of a run's newest attempt; the first writes no param, so it is `(1, "")`."""
    claimed = [
        (int(number), nonce)
        for name, nonce in params.items()
        if name.startswith(_ATTEMPT_PARAM) and (number := name.removeprefix(_ATTEMPT_PARAM)).isdigit()
    ]
    return max(claimed, default=(1, ""))


_BEST = re.compile(r"(.+) (\S+) at step (\d+)")


def told_best(tags: Mapping[str, str]) -> tuple[str, float, int] | None:
    """Metric, value to six digits and step in the tag `BEST` of a training: "val/loss 0.04 at step 8".

    None where there is no such tag, and for the parent of a sweep, whose tag names a trial.
    """
    found = _BEST.fullmatch(tags.get(BEST, ""))
    try:
        return found and (found[1], stored(float(found[2])), int(found[3]))
    except ValueError:
        return None  # a person has written it


_SYSTEM = re.compile(r"system/(cpu|system_memory|disk|network|gpu_\d+)_\w+")


def is_system(key: str) -> bool:
    """Whether a metric tells of the machine: it has steps of its own, and is no result of the training."""
    return _SYSTEM.fullmatch(key) is not None


_ALLOWED = re.compile(r"[/\w.\- :]*")
_OTHERS = re.compile(r"[^/\w.\- :]")


def validate_key(key: str) -> None:
    """Refuse a metric's name that MLflow would refuse.

    Raises:
        MetricError: for a name that is empty, is longer than 250 characters, holds other characters than
            letters, digits, ``_ - . / :`` and spaces, or is no path of its own (``a//b``, ``../a``, ``/a``).
    """
    if not isinstance(key, str):
        raise MetricError(
            f"a metric's name is {key!r}", expected="a string", try_next=f"the name {str(key)!r}"
        )
    # One name more than MLflow's own rule is refused: "loss\n", which its pattern lets through.
    if not _ALLOWED.fullmatch(key):
        raise MetricError(
            f"the metric name {key!r} holds a character that MLflow refuses",
            expected="letters, digits, underscores, dashes, periods, slashes, colons and spaces",
            try_next=f"the name {_OTHERS.sub('_', key)!r}",
        )
    path = posixpath.normpath(key)
    if path != key or path == "." or path.startswith(("..", "/")):
        raise MetricError(
            f"the metric name {key!r} is refused by MLflow, which reads names as paths",
            expected="a relative path without empty parts, '.' and '..'",
            try_next="a name like 'train/loss'",
        )
    if len(key) > LONGEST:
        raise MetricError(
            f"a metric's name has {len(key)} characters: {key[:40]!r}…",
            expected=f"at most {LONGEST}",
            try_next="a shorter name",
        )


def stored(value: float) -> float:
    """What MLflow gives back for a value.

    NaN stays NaN, an infinity becomes the largest finite double of its sign, and -0.0 becomes 0.0, because
    SQLite keeps no sign of zero.
    """
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else value + 0.0


def same(a: float, b: float) -> bool:
    """Equal, with NaN equal to NaN."""
    return a == b or (math.isnan(a) and math.isnan(b))
