"""Going on with a run: its last checkpoint, and what stands on the server already and is not written twice."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
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
        `step`, `next_step` (the first one that is logged after it), `path` and `sha256`.
    """
    try:
        pointer = json.loads(tags[CHECKPOINT])
        step = int(pointer["step"])
        return {
            "step": step,
            "next_step": int(pointer.get("next_step", step + 1)),
            "path": str(pointer["path"]),
            "sha256": str(pointer["sha256"]),
        }
    except (KeyError, ValueError, TypeError):
        return None


def first_step(tags: Mapping[str, str]) -> float:
    """The first step that is logged again; without a checkpoint all of them are."""
    pointer = pointer_in(tags)
    return -math.inf if pointer is None else pointer["next_step"]


class Resumption:
    """One run that this process goes on with.

    Args:
        params: That it has.
        replay: Its points from the first step that is logged again: key -> step -> value.
    """

    def __init__(self, params: Mapping[str, str], replay: Mapping[str, Mapping[int, float]]) -> None:
        self._params = dict(params)
        self._replay = replay
        self.diverged = ""
        self.overridden: dict[str, list[str]] = {}

    def stands(self, key: str, step: int, value: float) -> bool:
        """Whether an earlier attempt has delivered this point; the first of another value is told, and noted."""
        delivered = self._replay.get(key, {}).get(step)
        if delivered is None:
            return False
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


def points_again(history: list[tuple[int, float]], first: float) -> dict[int, float]:
    """Of one key's points those that would be logged again: step -> value.

    None of a key that has several values at one step: it is logged without a step of its own.
    """
    points: dict[int, float] = {}
    beyond = [(step, value) for step, value in history if step >= first]
    return points if all(same(points.setdefault(step, value), value) for step, value in beyond) else {}
