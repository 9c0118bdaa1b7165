"""The loop's settings, and when something is due: "1 epoch", "200 steps", "5 min"."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from tracked.errors import UsageError

Unit = Literal["epoch", "step", "second"]
_UNITS: dict[str, tuple[Unit, float]] = {
    "epoch": ("epoch", 1),
    "step": ("step", 1),
    "s": ("second", 1),
    "sec": ("second", 1),
    "second": ("second", 1),
    "min": ("second", 60),
    "minute": ("second", 60),
    "h": ("second", 3600),
    "hour": ("second", 3600),
}
_LONGEST_RUN_OF_EVERY_STEP = 10_000
# Longer ones are looked after beside the training, a few times a second.
_SHORT_SECONDS = 1.0


@dataclass(frozen=True)
class Interval:
    """Every so many epochs, steps or seconds."""

    every: float
    unit: Unit

    @classmethod
    @cache
    def parse(cls, text: str) -> Interval:
        """Read "1 epoch", "200 steps" or "5 min".

        Raises:
            UsageError: It is none of these, or not positive.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+?)s?\s*", text.lower())
        unit, factor = _UNITS.get(match[2], (None, 0.0)) if match else (None, 0.0)
        every = float(match[1]) * factor if match else 0.0
        if unit is None or every <= 0 or (unit != "second" and every != int(every)):
            raise UsageError(
                f"the interval {text!r} cannot be read",
                expected='a whole number of epochs or steps, or a time: "1 epoch", "200 steps", "5 min"',
                try_next='"1 epoch"',
            )
        return cls(every, unit)


@dataclass(frozen=True)
class Settings:
    """How long a training goes on, and what it does on the way. Recorded as `loop.…`.

    Raises:
        UsageError: A value that cannot work.
    """

    seed: int = 0
    epochs: int | None = None
    max_steps: int | None = None
    eval_every: str = "1 epoch"
    checkpoint_every: str | tuple[str, ...] = ("1 epoch",)
    log_every: int | str = "auto"
    keep_last: int = 3
    keep_best: int = 1
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    patience: int | None = None
    min_delta: float = 0.0
    deterministic: bool = False
    device: str = "auto"
    log_model: bool = True
    register: str | None = None
    system_metrics: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("max_steps", 1),
            ("patience", 1),
            ("keep_last", 1),
            ("keep_best", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(
                    f"{name} is {value}",
                    expected=f"{least} or more",
                    try_next=f"--{name.replace('_', '-')} {least}",
                )
        if isinstance(self.log_every, int):
            if self.log_every < 1:
                raise UsageError(f"log_every is {self.log_every}", expected="1 or more, or auto")
        elif self.log_every != "auto" and Interval.parse(self.log_every).unit == "second":
            raise UsageError(
                f"log_every is {self.log_every!r}",
                expected="steps or epochs, so that a resumed training logs the same",
            )
        if self.mode not in (None, "min", "max"):
            raise UsageError(f"mode is {self.mode!r}", expected="min or max")
        if not self.min_delta >= 0:
            raise UsageError(f"min_delta is {self.min_delta}", expected="0 or more")
        every = self.checkpoint_every
        object.__setattr__(self, "checkpoint_every", (every,) if isinstance(every, str) else tuple(every))
        for text in self.checkpoint_every:
            Interval.parse(text)
        if Interval.parse(self.eval_every).unit == "second":
            raise UsageError(
                f"eval_every is {self.eval_every!r}",
                expected="epochs or steps: what an evaluation decides must not depend on the machine's speed",
            )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Settings:
        """The settings that a checkpoint recorded; names of other versions are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: item for name, item in value.items() if name in known})

    @property
    def logs_model(self) -> bool:
        """Whether the best weights become a model of MLflow at the end."""
        return self.log_model or self.register is not None

    def logs_at(self, step: int, ended: int | None) -> bool:
        """Whether the training loss is logged at `step`, which completed the epoch `ended`, if any.

        `auto` is every step up to 10,000, every 10th up to 100,000, and so on.
        """
        if isinstance(self.log_every, int):
            return step % self.log_every == 0
        if self.log_every != "auto":
            interval = Interval.parse(self.log_every)
            number = step if interval.unit == "step" else ended
            return number is not None and number % interval.every == 0
        every, until = 1, _LONGEST_RUN_OF_EVERY_STEP
        while step > until:
            every, until = every * 10, until * 10
        return step % every == 0


class Due:
    """Which of several intervals have passed, counted in steps, epochs and seconds since the last time."""

    def __init__(self, texts: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        intervals = [Interval.parse(text) for text in texts]
        self._steps = [int(each.every) for each in intervals if each.unit == "step"]
        self._epochs = [int(each.every) for each in intervals if each.unit == "epoch"]
        self._seconds = min((each.every for each in intervals if each.unit == "second"), default=None)
        self._clock = clock
        self.happened()

    def happened(self) -> None:
        """Count seconds from now on."""
        self._since = self._clock()

    def is_due(self, *, step: int, epoch: int, epoch_ended: bool) -> bool:
        """Whether one of the intervals ends here.

        Args:
            step: Completed steps.
            epoch: Completed epochs.
            epoch_ended: Whether this step completed that epoch.
        """
        by_step = any(step % every == 0 for every in self._steps)
        return (
            by_step or (epoch_ended and any(epoch % every == 0 for every in self._epochs)) or self.is_late()
        )

    def is_late(self) -> bool:
        """Whether an interval of time is over."""
        return self._seconds is not None and self._clock() - self._since >= self._seconds

    def next_step(self, step: int) -> float:
        """The first step after `step` at which to ask whether anything is due, `is_late` apart."""
        if self._seconds is not None and self._seconds < _SHORT_SECONDS:
            return step + 1
        return min((step - step % every + every for every in self._steps), default=math.inf)
