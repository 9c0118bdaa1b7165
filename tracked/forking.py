"""Where a fork begins: a checkpoint of another run, and that run's history up to there.

The other run is only read, and may be trained meanwhile: what a committed checkpoint counts does not change.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.attempts import drain, local_runs, restore
from tracked.errors import CheckpointError, ServerError
from tracked.inspection import is_trained
from tracked.names import folder_name
from tracked.packing import Point, records
from tracked.place import Place
from tracked.retrieval import Retrieved, retrieve
from tracked.spool import RunFolder

if TYPE_CHECKING:
    from tracked.server import RunView, Server

Say = Callable[[str], None]

_PATIENCE = 20.0  # seconds for an answer: nothing waits for it, and a history may be long


@dataclass(frozen=True)
class Origin:
    """What a fork begins with.

    Attributes:
        view: The other run.
        experiment: The name of its experiment.
        state: What its checkpoint holds, its tensors on the CPU; of the checkpoints that it keeps the best alone.
        history: Packed points, all that the checkpoint knows of, with their own times.
        best: Holds that best checkpoint, in a folder of its step; None if it is the state itself, or there is none.
    """

    view: RunView
    experiment: str
    state: dict[str, Any]
    history: list[dict[str, Any]]
    best: tempfile.TemporaryDirectory[str] | None = None

    def bring_best(self, folder: RunFolder) -> None:
        """Move the best checkpoint among those of another run on this machine."""
        if self.best is not None:
            name = folder_name(self.state["stopping"]["best_step"])
            shutil.move(RunFolder(Path(self.best.name)).checkpoints / name, folder.checkpoints / name)
            self.best.cleanup()


def find_origin(
    place: Place,
    word: str,
    say: Say,
    *,
    step: int | None = None,
    before: Callable[[RunView], None] = lambda _: None,
) -> Origin:
    """Read a run's last committed checkpoint, or the one of `step`, and its history up to there.

    Args:
        place: Where the run stands.
        word: ID, unique prefix of an ID, local handle, name, or `last`.
        say: Told what is waited for, and what is not as it should be.
        step: Of a committed checkpoint.
        before: May still refuse, by raising, with nothing downloaded.

    Raises:
        RunNotFound: There is no such run, or several.
        RunNotResumable: It has no checkpoint, or was not made by this package.
        CheckpointError: None is whole, or there is none of `step`.
        ServerError: The server does not answer, or does not have the run yet.
    """
    from tracked.server import Server

    place.start_sender()
    drain(place, [run for run in local_runs(place, word) if not is_trained(run)], say)
    with tempfile.TemporaryDirectory(prefix="tracked-fork-") as folder:
        found = retrieve(place, word, Path(folder), say, step=step, before=before)
    server = Server(place.tracking_uri, timeout=_PATIENCE, create=False)
    history, counts = _history(server, found.view.run_id, found.state["points"]["last"])
    if counts != found.state["points"]["counts"]:
        say(
            f"the history of run {found.view.run_id} is not as its checkpoint counts it, and is copied as it stands\n"
            f"  try: python -m tracked.run verify {found.view.run_id}"
        )
    points = {**found.state["points"], "counts": counts}
    best = _best(server, found, say)
    kept = {"step": found.state["stopping"]["best_step"], "value": found.state["stopping"]["best"]}
    state = {**found.state, "points": points, "checkpoints": [] if best is None else [kept]}
    return Origin(found.view, server.experiment_name(found.view.experiment_id), state, history, best)


def _best(server: Server, found: Retrieved, say: Say) -> tempfile.TemporaryDirectory[str] | None:
    """The checkpoint that was the best by then; without it a fork does as well, until its patience is out."""
    step = found.state["stopping"]["best_step"]
    if step in (0, found.state["step"]):
        return None
    folder = tempfile.TemporaryDirectory(prefix="tracked-fork-")
    try:
        run = RunFolder(Path(folder.name))
        run.make()
        restore(server, found.view, run, say, step=step)
    except (CheckpointError, ServerError) as error:
        say(f"the best checkpoint, of step {step}, is not brought along: {error.found}")
        folder.cleanup()
        return None
    return folder


def _history(
    server: Server, run_id: str, last: Mapping[str, tuple[int, float]]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The packed points of each key up to its last step, each step once, and how many they are."""
    packed: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for key, (until, _) in last.items():
        points: dict[int, Point] = {}
        for step, time_ms, value in server.history(run_id, key):
            if step <= until:
                points.setdefault(step, (key, step, time_ms, value))
        packed += records(list(points.values()))
        counts[key] = len(points)
    return packed, counts
