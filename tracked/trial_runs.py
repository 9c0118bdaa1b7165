"""The trials of a sweep as their runs on the server tell them, without the study."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from tracked.names import PARENT, STATE, TRIAL, told_best
from tracked.trials import Trial, TrialState, best_value

if TYPE_CHECKING:
    from tracked.server import RunView, Server

STATES: dict[str, TrialState] = {
    "finished": "finished",
    "stopped_early": "finished",
    "pruned": "pruned",
    "failed": "failed",
    "stopped": "failed",
}
"""The state of a run that has ended -> that of its trial."""


def children(server: Server, parent: str) -> list[RunView]:
    """The runs of the trials of a parent run.

    Raises:
        ServerError: The server does not answer.
    """
    found = server.search(filter=f"tags.`{PARENT}` = '{parent}'", limit=sys.maxsize)
    return [view for view in found if TRIAL in view.tags]


def described(view: RunView) -> dict[str, Any]:
    """What the study wrote down of the trial when its run began: number, params, distributions."""
    return dict(json.loads(view.tags[TRIAL]))


def glance(view: RunView) -> Trial:
    """A trial by what its run shows at once; its reports are not read."""
    told = described(view)
    state = STATES.get(view.tags.get(STATE, ""), "running")
    best = told_best(view.tags)
    if state == "failed" and told.get("until") is not None and best is not None:
        state = "finished"  # on its way further, which takes nothing from what it had reached
    value = best[1] if state == "finished" and best is not None else None
    return Trial(int(told["number"]), state, told["params"], {}, value, view.run_id, epochs_in(view) or 0)


def epochs_in(view: RunView) -> int | None:
    """The epochs that a run has completed, by the last value of its metric `epoch`; None if that tells none."""
    latest = view.latest.get("epoch")
    return None if latest is None else _whole(latest.value)


def _whole(value: float) -> int | None:
    """The whole part of a number; None for NaN, and for what is too large to count."""
    return int(value) if abs(value) < 2**53 else None


def read(server: Server, view: RunView, *, metric: str, mode: Literal["min", "max"], unit: str) -> Trial:
    """A trial with all its reports, from the run's histories.

    Args:
        server: Where it stands.
        view: Its run.
        metric: The monitored one.
        mode: Whether smaller or larger values are better.
        unit: "epoch", or "step": what trials are compared at.

    Raises:
        ServerError: The server does not answer.
    """
    history = server.history(view.run_id, "epoch")
    epochs = {step: epoch for step, _, value in history if (epoch := _whole(value)) is not None}
    reports: dict[int, float] = {}
    for step, _, value in server.history(view.run_id, metric):
        at = epochs.get(step) if unit == "epoch" else step
        if at is not None and not math.isnan(value):  # which no study was ever told
            reports[at] = value
    trial = glance(view)
    best = best_value(reports, mode) if trial.state == "finished" else None
    return replace(trial, reports=reports, value=best, epochs=max(epochs.values(), default=0))
