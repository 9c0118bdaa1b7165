"""Where a fork begins: a checkpoint of another run, and that run's history up to there.

The other run is only read, and may be trained meanwhile: what a committed checkpoint counts does not change.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.attempts import drain, local_runs
from tracked.inspection import is_trained
from tracked.packing import Point, records
from tracked.place import Place
from tracked.retrieval import retrieve

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
        state: What its checkpoint holds, its tensors on the CPU; the checkpoints that it keeps are not the fork's.
        history: Packed points, all that the checkpoint knows of, with their own times.
    """

    view: RunView
    experiment: str
    state: dict[str, Any]
    history: list[dict[str, Any]]


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
    state = {**found.state, "points": points, "checkpoints": []}
    return Origin(found.view, server.experiment_name(found.view.experiment_id), state, history)


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
