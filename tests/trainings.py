"""Trainings in this process and without a server, their checkpoints and their histories, to be compared bit by bit."""

from __future__ import annotations

import copy
import random
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracked import checkpoint, loop, names
from tracked.attempts import rehearse
from tracked.experiment import Task
from tracked.journal import Reader
from tracked.packing import unpack
from tracked.schedule import Settings
from tracked.seeding import derive, seed_generators
from tracked.tracking import Run
from tracked.training import compare_states

Point = tuple[str, int, str]
"""Key, step, and the text of the value: it is exact, and NaN equals NaN."""
Body = Callable[[Run], None]
State = dict[str, Any]

# Which older files were on the disk when this one was written, and where the run was resumed: of no value.
_BOOKKEEPING = ("checkpoints", "about")


class _EveryCheckpoint(Run):
    """Waits for each checkpoint, which a training does not: its newest replaces one that still waits."""

    def _take_checkpoint(self, *, pinned: bool = False, wait: bool = False) -> None:  # noqa: ARG002
        super()._take_checkpoint(pinned=pinned, wait=True)


@dataclass
class Trained:
    """What a finished attempt left."""

    run: Run
    checkpoints: Path
    points: list[Point]

    @property
    def steps(self) -> list[int]:
        """The steps of its checkpoints."""
        found = (names.step_of(folder.name) for folder in sorted(self.checkpoints.iterdir()))
        return [step for step in found if step is not None]

    def state(self, step: int) -> State:
        """The checkpoint at `step`, read anew: a training changes the tensors it was given."""
        folder = self.checkpoints / names.folder_name(step)
        return checkpoint.load(folder / names.FILE)

    @property
    def last(self) -> State:
        return self.state(max(self.steps))


def fitting(task: Callable[[], Task]) -> Body:
    """The thin loop over a task that is built as a command builds it."""

    def body(run: Run) -> None:
        seed_generators(derive(run.settings.seed, "build"))
        loop.fit(task(), run)

    return body


def train(
    root: Path,
    body: Body,
    settings: Settings,
    restored: State | None = None,
    earlier: Trained | None = None,
) -> Trained:
    """One attempt at a run, fresh or from `restored`, with the best checkpoint of an `earlier` one at hand."""
    scatter_generators()
    attempt = rehearse(root / uuid.uuid4().hex, {}, restored)
    folder = attempt.folder
    if restored is not None and earlier is not None:
        best = names.folder_name(restored["stopping"]["best_step"])
        shutil.copytree(earlier.checkpoints / best, folder.checkpoints / best)
    with _EveryCheckpoint(attempt, settings) as run:
        body(run)
    points = [
        (key, step, repr(value))
        for journal in folder.journals()
        for record in Reader(journal, ("points",)).records("points")
        if record.kind == "points"
        for key, step, _, value in unpack(record.body)
    ]
    return Trained(run, folder.checkpoints, points)


def differences(straight: Trained, resumed: Trained, step: int) -> list[str]:
    """Where a training resumed at `step` differs from the uninterrupted one: state and whole history."""
    a, b = straight.last, resumed.last
    for name in _BOOKKEEPING:
        a.pop(name)
        b.pop(name)
    _, wrong = compare_states(a, b)
    expected = straight.points
    found = [point for point in straight.points if point[1] <= step] + resumed.points
    if found != expected:
        odd = sorted({*expected} ^ {*found}, key=lambda point: point[1])
        wrong.append(f"history: {odd[:3] or 'order'}")
    return wrong


def resume(
    root: Path,
    straight: Trained,
    body: Body,
    settings: Settings,
    step: int,
    spoil: Callable[[State], None] = lambda _: None,
) -> list[str]:
    """Train on from the checkpoint at `step`, after `spoil` had its way with it; what then differs."""
    state = straight.state(step)
    spoil(state)
    return differences(straight, train(root, body, settings, state), step)


def differing(
    root: Path, body: Body, settings: Settings, later: Body | None = None
) -> Mapping[int, list[str]]:
    """Train straight, then resume from every checkpoint with `later` (else the same); what differs, by step."""
    straight = train(root, body, settings)
    steps = straight.steps
    assert len(steps) > 2, steps
    assert steps[-1] == straight.run.step
    return {step: resume(root, straight, later or body, settings, step) for step in steps[:-1]}


def nothing(found: Mapping[int, list[str]]) -> dict[int, list[str]]:
    """What `differing` gives where every resume is exact."""
    return {step: [] for step in found}


def scatter_generators() -> None:
    """Leave the global generators where nobody knows: no attempt may lean on what came before it."""
    seed_generators(random.SystemRandom().getrandbits(63))


def draw_everywhere() -> float:
    """One number out of each of the three generators."""
    return random.random() + float(np.random.random()) + float(torch.rand(()))


def copied(state: State) -> State:
    return copy.deepcopy(state)
