"""Going on with a run: its last checkpoint, and what stands on the server already and is not written twice."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracked.names import CHECKPOINT, same, stored

log = logging.getLogger("tracked")

RESUME = "TRACKED_RESUME"


def resumed_run_id() -> str | None:
    """The run that `resume RUN -- COMMAND` goes on with; None in a program that was started by itself."""
    return os.environ.get(RESUME) or None


def pointer_in(tags: Mapping[str, str]) -> dict[str, Any] | None:
    """What a run's tags name as its last committed checkpoint; None if they name none that can be.

    Returns:
        `step`, `next_step` (the first one that is logged after it), `saved_at` (milliseconds since 1970,
        infinity where it is not known), `path` and `sha256`.
    """
    try:
        pointer = json.loads(tags[CHECKPOINT])
        step = int(pointer["step"])
        return {
            "step": step,
            "next_step": int(pointer.get("next_step", step + 1)),
            "saved_at": float(pointer.get("saved_at", math.inf)),
            "path": str(pointer["path"]),
            "sha256": str(pointer["sha256"]),
        }
    except (KeyError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Edge:
    """Where a checkpoint ends, and what is logged again begins; without a checkpoint that is everything.

    A metric may have steps of its own, such as epochs: what was logged after the checkpoint lies beyond it too.
    """

    step: float = -math.inf
    saved_at: float = math.inf

    @classmethod
    def of(cls, tags: Mapping[str, str]) -> Edge:
        pointer = pointer_in(tags)
        return cls() if pointer is None else cls(pointer["next_step"], pointer["saved_at"])

    def is_before(self, step: int, timestamp: int) -> bool:
        return step >= self.step or timestamp >= self.saved_at


class Resumption:
    """One run that this process goes on with.

    Args:
        params: That it has.
        replay: Its points that will be logged again: key -> step -> the value, as often as it stands there.
    """

    def __init__(self, params: Mapping[str, str], replay: Mapping[str, Mapping[int, list[float]]]) -> None:
        self._params = dict(params)
        self._replay = replay
        self.diverged = ""
        self.overridden: dict[str, list[str]] = {}

    def stands(self, key: str, step: int, value: float) -> bool:
        """Whether an earlier attempt has delivered this point; the first of another value is told, and noted."""
        again = self._replay.get(key, {}).get(step)
        if not again:
            return False
        delivered = again.pop()
        if not same(stored(value), delivered) and not self.diverged:
            self.diverged = f"{key} at step {step}"
            log.warning(
                "%s was %r before and is %r now: the training is not the same to the last bit\n"
                "  what stands on the server stays, and is not written twice",
                *(self.diverged, delivered, value),
            )
        return True

    def keeps(self, name: str, value: str) -> bool:
        """Whether the run has this param with another value, which MLflow never changes: told, and noted."""
        recorded = self._params.get(name, value)
        if recorded != value and name not in self.overridden:
            self.overridden[name] = [recorded, value]
            log.warning("param %s was %s and is %s now; the run keeps the first", name, recorded, value)
        return recorded != value


def points_again(history: Sequence[tuple[int, int, float]], edge: Edge) -> dict[int, list[float]]:
    """Of one key's points (step, timestamp, value) those that would be logged again: step -> its value, repeated.

    None of a key that has several values at one step: it is logged without a step of its own.
    """
    values: dict[int, float] = {}
    if not all(same(values.setdefault(step, value), value) for step, _, value in history):
        return {}
    points: dict[int, list[float]] = {}
    for step, timestamp, value in history:
        if edge.is_before(step, timestamp):
            points.setdefault(step, []).append(value)
    return points
