"""What a training logs: stamped once, checked, compared with what an earlier attempt delivered."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import time_ns
from typing import Any

import torch

from tracked.errors import MetricError
from tracked.names import same, stored, validate_key
from tracked.packing import Point

Replay = Mapping[str, Mapping[int, float]]
"""What stands on the server beyond the checkpoint: key -> step -> stored value."""


_Logged = tuple[str, int, int, float | torch.Tensor]
"""A point whose value may be on a device still."""


@dataclass(frozen=True)
class Divergence:
    """The first recomputed point that differs from the one an earlier attempt delivered."""

    key: str
    step: int
    delivered: float
    recomputed: float


@dataclass(slots=True)
class _Series:
    """What is known of a key: its last point, and how many it has had."""

    step: int
    value: float | torch.Tensor
    count: int = 0


class PointLog:
    """The buffer between `Run.log` and the journal.

    `log` is called by the training thread, `drain` by the one that writes the journal. The order of
    points is the order of logging, the steps of a key only grow, and a (key, step) is taken once.
    """

    def __init__(self, replay: Replay | None = None) -> None:
        self._buffer: list[_Logged] = []
        self._has_tensors = False
        self._series: dict[str, _Series] = {}
        self._replay = dict(replay or {})
        self.replayed_equal = 0
        self.diverged: Divergence | None = None
        self.must_be_finite: set[str] = set()
        self.not_finite: tuple[int, float] | None = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take values for `step`: numbers or tensors with one element, read now (on CUDA: copied now).

        Raises:
            MetricError: No scalar, a name that MLflow refuses, another value for a (key, step) that is
                taken, or a step before the key's last one.
        """
        now = time_ns() // 1_000_000
        for key, value in values.items():
            # The way of every step, without a call: after a step's kernels each one finds cold caches.
            if type(value) is torch.Tensor and value.is_cpu and value.numel() == 1:
                value = value.item()  # noqa: PLW2901
            if type(value) is float:
                number: float | torch.Tensor = value
            else:
                number = scalar(key, value)
                if isinstance(number, torch.Tensor):
                    self._has_tensors = True
            series = self._series.get(key)
            if series is None:
                validate_key(key)
                series = self._series[key] = _Series(step, number)
            elif step <= series.step:
                _check_repeated(key, step, number, series)
                continue
            series.step, series.value = step, number
            series.count += 1
            self._buffer.append((key, step, now, number))

    def last(self, key: str) -> float | torch.Tensor | None:
        """The value last logged under `key`."""
        series = self._series.get(key)
        return None if series is None else series.value

    def latest(self) -> dict[str, float]:
        """The last value of each key."""
        # A copy, here and below: `log` may add a key while a value is fetched from its device.
        return {key: float(series.value) for key, series in list(self._series.items())}

    def counts(self) -> dict[str, int]:
        """How many points each key has."""
        return {key: series.count for key, series in list(self._series.items())}

    def drain(self) -> list[Point]:
        """Take out what was logged, less what already stands on the server."""
        # `log` may append meanwhile: only what is there now is taken, never the list itself.
        count = len(self._buffer)
        taken = self._buffer[:count]
        del self._buffer[:count]
        # Without a tensor, what was logged are the points; a loop over them would hold the training's lock.
        points: list[Point] = _fetched(taken) if self._has_tensors else taken  # type: ignore[assignment]
        for key, step, _, value in points if self.must_be_finite else ():
            if key in self.must_be_finite and self.not_finite is None and not math.isfinite(value):
                self.not_finite = (step, value)
        return [point for point in points if not self._stands(point)] if self._replay else points

    def _stands(self, point: Point) -> bool:
        key, step, _, value = point
        delivered = self._replay.get(key, {}).get(step)
        if delivered is None:
            return False
        if same(stored(value), delivered):
            self.replayed_equal += 1
        elif self.diverged is None:
            self.diverged = Divergence(key, step, delivered, value)
        # Either way the server has a point for this (key, step), and none can be deleted there.
        return True

    def state_dict(self) -> dict[str, Any]:
        last = {key: (series.step, float(series.value)) for key, series in self._series.items()}
        return {"counts": self.counts(), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._series = {
            key: _Series(step, value, state["counts"][key]) for key, (step, value) in state["last"].items()
        }


def scalar(key: str, value: Any) -> float | torch.Tensor:
    """The one number that is to be logged under `key`; on CUDA still there, as a copy.

    Raises:
        MetricError: It is no number, or more than one.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            raise _no_scalar(key, f"a tensor of shape {tuple(value.shape)} and {value.dtype}")
        if value.is_cpu:
            return float(value.item())
        # `.item()` would wait for the device; a copy there keeps the value as it is now.
        return value.detach().clone()
    if isinstance(value, (str, bytes)):
        raise _no_scalar(key, f"the text {value!r:.60}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise _no_scalar(key, f"a {type(value).__name__}: {value!r:.60}") from None


def whole(step: Any) -> int:
    """A step as MLflow can store it.

    Raises:
        MetricError: It is no whole number, or needs more than 64 bits.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = None
    if number is None or not -(1 << 63) <= number < 1 << 63:
        raise MetricError(
            f"a metric is logged at step {step!r:.60}",
            expected="a whole number of at most 64 bits",
            try_next="run.log(values) for the step that is being made",
        )
    return number


def _no_scalar(key: str, what: str) -> MetricError:
    return MetricError(
        f"the metric {key!r} is {what}",
        expected="one number: a float, an int, or a tensor with one element",
        try_next=f"run.log({{{key!r}: value.mean()}}), or run.log_artifact for anything larger",
    )


def _check_repeated(key: str, step: int, value: float | torch.Tensor, last: _Series) -> None:
    if step < last.step:
        raise MetricError(
            f"the metric {key!r} is logged at step {step} after step {last.step}",
            expected="steps that do not go back: a point on the server cannot be replaced",
        )
    if not same(float(value), float(last.value)):
        raise MetricError(
            f"the metric {key!r} is logged twice at step {step}: {float(last.value)!r} and {float(value)!r}",
            expected="one value for a key and step",
            try_next="two names, if these are two things",
        )


def _fetched(taken: Sequence[_Logged]) -> list[Point]:
    """The points with values read from their devices."""
    pending: dict[torch.device, list[torch.Tensor]] = {}
    for *_, value in taken:
        if isinstance(value, torch.Tensor):
            pending.setdefault(value.device, []).append(value.double().reshape(()))
    try:
        # CPU-GPU sync: one for everything that was logged since the last flush.
        arrived = {device: iter(torch.stack(values).tolist()) for device, values in pending.items()}
    except RuntimeError:
        # The device has failed, as the training is about to find out: what is on it cannot be read any more.
        arrived = {}
        taken = [point for point in taken if not isinstance(point[3], torch.Tensor)]
    return [
        (key, step, time_ms, next(arrived[value.device]) if isinstance(value, torch.Tensor) else value)
        for key, step, time_ms, value in taken
    ]
