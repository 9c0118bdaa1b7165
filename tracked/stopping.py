"""What an evaluation says of the training: one verdict whether it goes on, and whether it overfits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["go on", "patience", "pruned", "nan"]
Pruner = Callable[[int, int, float], bool | None]
"""Whether a trial is to end, or None where nobody says: told completed steps, completed epochs, the monitored value."""


@dataclass
class Stopping:
    """The best value so far, and how many evaluations it has stood.

    Args:
        mode: Whether smaller ("min") or larger ("max") is better.
        patience: Evaluations without improvement after which to stop; None never stops.
        min_delta: An improvement by this much or less does not count.
        pruner: Asked after each evaluation; what is no trial of a sweep has none.
    """

    mode: Literal["min", "max"] = "min"
    patience: int | None = None
    min_delta: float = 0.0
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    judged_step: int = -1
    pruner: Pruner | None = None
    pruned_in: int | None = None
    unanswered: tuple[int, int, float] | None = None

    def judge(self, step: int, epoch: int, value: float) -> Verdict:
        """Take the monitored value of the evaluation at `step`, in epoch `epoch`; an evaluation is judged once.

        Patience goes before the pruner: a training that has got as good as it will has a result.
        """
        if math.isnan(value):
            return "nan"
        if step == self.judged_step:
            return "go on"
        self.judged_step = step
        if self._improves(value):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        self._ask((step, epoch, value))
        if self.is_out_of_patience:
            return "patience"
        return "pruned" if self.is_pruned else "go on"

    def ask_again(self) -> None:
        """Have the pruner answer for an evaluation that it was not there to hear of."""
        if self.unanswered is not None:
            self._ask(self.unanswered)

    def _ask(self, evaluation: tuple[int, int, float]) -> None:
        answer = self.pruner(*evaluation) if self.pruner is not None else False
        self.pruned_in = evaluation[1] if answer else None
        self.unanswered = evaluation if answer is None else None

    @property
    def is_out_of_patience(self) -> bool:
        """Whether the training is to end, as the last verdict said."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def is_pruned(self) -> bool:
        """Whether the training is to end because others were better; `pruned_in` is the epoch."""
        return self.pruned_in is not None

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
            "pruned_in": self.pruned_in,
            "unanswered": self.unanswered,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class Overfitting:
    """Whether the validation loss rises while the training loss falls, evaluation after evaluation.

    It is told when both went on for `window` evaluations, and taken back when validation improves on its best.

    Args:
        window: Evaluations in a row that decide.
    """

    window: int = 3
    said: str = ""
    overfits: bool = False
    rises: int = 0
    since: int = 0
    best: float = math.inf
    last_step: int = -1
    last_train: float = math.nan
    last_val: float = math.nan
    total: Any = 0.0
    count: int = 0

    def add(self, loss: Any) -> None:
        """Take the training loss of a step: a float or a scalar tensor, which is not read before `judge`."""
        self.total = self.total + loss
        self.count += 1

    def judge(self, step: int, key: str, val: float) -> bool:
        """Take the validation loss of the evaluation at `step`; whether there is something new in `said`.

        Args:
            step: Completed steps.
            key: The name that the loss is logged under.
            val: The loss.
        """
        if not self.count:
            return False  # no step since the last evaluation
        train = float(self.total) / self.count  # CPU-GPU sync: once in an evaluation, which has its own
        # A NaN is neither less nor more than anything.
        rose = val > self.last_val and train < self.last_train
        if rose and not self.rises:
            self.since = self.last_step
        self.rises = self.rises + 1 if rose else 0
        self.last_step, self.last_train, self.last_val = step, train, val
        self.total, self.count = 0.0, 0
        improved, self.best = val < self.best, min(self.best, val)
        if self.overfits and improved:
            self.overfits, self.said = False, f"no longer: {key} has a new best at step {step}"
            return True
        if not self.overfits and self.rises >= self.window:
            self.overfits = True
            self.said = (
                f"since step {self.since}: {key} rose in {self.window} evaluations in a row "
                "while train/loss fell"
            )
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "window"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
