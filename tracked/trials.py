"""What a sweep knows of its trials: one row each, whatever the study is stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TrialState = Literal["running", "finished", "pruned", "failed"]


def best_value(reports: Mapping[int, float], mode: Literal["min", "max"]) -> float | None:
    """The smallest or largest of the reported values; None where none is a number."""
    sound = [value for value in reports.values() if not math.isnan(value)]
    return (min if mode == "min" else max)(sound, default=None)


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep, which is one run.

    Attributes:
        number: Its number in the study, from 0 on.
        state: How it stands; one that was stopped by patience has finished.
        params: The values that were suggested for it.
        reports: Epoch (or step, where evaluations come by steps) -> monitored value, in ascending order.
        value: The best of them; None while there is none.
        run_id: Its MLflow run; empty while the server has not given it one.
        epochs: That were trained.
    """

    number: int
    state: TrialState
    params: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[int, float] = field(default_factory=dict)
    value: float | None = None
    run_id: str = ""
    epochs: int = 0
