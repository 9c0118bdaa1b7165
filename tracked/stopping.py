"""One verdict after each evaluation: go on, out of patience, or not a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["go on", "patience", "nan"]


@dataclass
class Stopping:
    """The best value so far, and how many evaluations it has stood.

    Args:
        mode: Whether smaller ("min") or larger ("max") is better.
        patience: Evaluations without improvement after which to stop; None never stops.
        min_delta: An improvement by this much or less does not count.
    """

    mode: Literal["min", "max"] = "min"
    patience: int | None = None
    min_delta: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    judged_step: int = -1

    def judge(self, step: int, value: float) -> Verdict:
        """Take the monitored value of the evaluation at `step`; an evaluation is judged once."""
        if math.isnan(value):
            return "nan"
        if step == self.judged_step:
            return "go on"
        self.judged_step = step
        if self._improves(value):
            self.best, self.best_step, self.waited = value, step, 0
            return "go on"
        self.waited += 1
        return "patience" if self.is_out_of_patience else "go on"

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the training is to end, as the last verdict said."""
        return self.patience is not None and self.waited >= self.patience

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "judged_step": self.judged_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
