"""The process that draws a sweep's pictures, so that the one that leads the sweep answers its workers meanwhile.

What it imports for them takes seconds, during which no other thread of its process gets far.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tracked import children
from tracked.ranking import Mode
from tracked.trials import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_COMMAND = (sys.executable, "-c", "from tracked.drawing import main; main()")
_ENOUGH = 4  # finished trials that tell which params matter


@dataclass(frozen=True)
class Sweep:
    """What there is to draw.

    Attributes:
        trials: In any order.
        finished: The same as the study has them, those that have finished: they tell which params matter.
        metric: The name of the monitored value.
        mode: Whether smaller ("min") or larger ("max") is better.
    """

    trials: Sequence[Trial]
    finished: Sequence[FrozenTrial]
    metric: str
    mode: Mode


def drawn(sweep: Sweep) -> dict[str, bytes]:
    """Every picture that has something to show, as name -> PNG file, drawn by a process of its own.

    Raises:
        OSError: The process cannot be started.
        subprocess.CalledProcessError: It failed; `stderr` says why.
    """
    package = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    process = children.start(
        _COMMAND,
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C pauses the sweep, and its pictures are drawn once more
    )
    pictures, complaint = process.communicate(pickle.dumps(sweep))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, _COMMAND, stderr=complaint)
    found: dict[str, bytes] = pickle.loads(pictures)  # noqa: S301 - by the process started here
    return found


def importances(sweep: Sweep) -> dict[str, float]:
    """How much each param matters for the value, in all 1; empty while too few trials have finished.

    The method is PED-ANOVA (Watanabe, Bansal and Hutter, 2023), as Optuna has it.
    """
    if len(sweep.finished) < _ENOUGH:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if sweep.mode == "min" else "maximize")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.add_trials(sweep.finished)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def main() -> None:
    children.give_way()
    answer, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever a library prints is no picture
    sweep: Sweep = pickle.load(sys.stdin.buffer)  # noqa: S301 - by the process that started this one
    from tracked.sweep_plots import draw

    pictures = draw(sweep.trials, metric=sweep.metric, mode=sweep.mode, importance=importances(sweep))
    answer.write(pickle.dumps(pictures))
    answer.flush()
