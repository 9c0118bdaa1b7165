"""One committed checkpoint of a run, downloaded and verified, to be looked at or passed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked.attempts import restore
from tracked.errors import CheckpointError, ServerUnavailable
from tracked.inspection import find, object_in, refuse_foreign
from tracked.names import FILE, HANDLE, MANIFEST, SETTINGS, folder_name, step_of
from tracked.place import Place
from tracked.resumption import pointer_in
from tracked.spool import RunFolder, read_json

if TYPE_CHECKING:
    from tracked.server import RunView, Server

Say = Callable[[str], None]

_PATIENCE = 20.0  # seconds for an answer: nothing waits for these commands


@dataclass(frozen=True)
class Retrieved:
    """A checkpoint that has the recorded hash.

    Attributes:
        view: Its run.
        state: What it holds, its tensors on the CPU.
        file: `checkpoint.pt`.
        manifest: `manifest.json`.
    """

    view: RunView
    state: dict[str, Any]
    file: Path
    manifest: Path


def retrieve(
    place: Place,
    word: str,
    folder: Path,
    say: Say,
    *,
    step: int | None = None,
    best: bool = False,
    before: Callable[[RunView], None] = lambda _: None,
) -> Retrieved:
    """Download a run's last committed checkpoint, the one of `step`, or its best one.

    Where the last one is damaged, it is the newest that verifies, as for a resume; one that was asked for has
    to be whole itself.

    Args:
        place: Where the run stands.
        word: ID, unique prefix of an ID, local handle, name, or `last`.
        folder: Where to download it, and what is needed to choose it.
        say: Told what was passed over, and why.
        step: Of a committed checkpoint.
        best: The one with the best monitored value, of those that are kept.
        before: May still refuse, by raising, with nothing downloaded.

    Raises:
        RunNotFound: There is no such run, or several.
        RunNotResumable: It has no checkpoint, or was not made by this package.
        CheckpointError: None is whole, there is none of `step`, or none was rated.
        ServerError: The server does not answer, or does not have the run yet.
    """
    from tracked.server import Server

    server = Server(place.tracking_uri, timeout=_PATIENCE, create=False)
    view, _ = find(server, place, word, say)
    if not view.status:
        raise ServerUnavailable(
            f"run {view.run_id or view.tags[HANDLE]} is not to be seen on its server",
            expected="a server that answers, and has the run and its checkpoints",
            try_next="python -m tracked.run sync",
        )
    refuse_foreign(view)
    before(view)
    downloads = RunFolder(folder)
    downloads.make()
    while True:
        try:
            chosen = _best_step(server, view, downloads) if best else step
            state = restore(server, view, downloads, say, step=chosen)
            where = f"checkpoints/{folder_name(state['step'])}"
            manifest = server.download(view.run_id, f"{where}/{MANIFEST}", folder / where / MANIFEST)
            if state["step"] == (pointer := pointer_in(view.tags) or {}).get("step"):
                _check_manifest(manifest, pointer)
            return Retrieved(view, state, folder / where / FILE, manifest)
        except CheckpointError:
            # A training deletes what is superseded, also while this looks.
            seen, view = pointer_in(view.tags), server.get_run(view.run_id)
            if pointer_in(view.tags) == seen:
                raise


def _check_manifest(manifest: Path, pointer: Mapping[str, Any]) -> None:
    """An older checkpoint was verified by its manifest; the committed one by the run's tag."""
    if read_json(manifest).get("sha256") != pointer["sha256"]:
        raise CheckpointError(
            f"the manifest of step {pointer['step']} names another file than the run's tag",
            expected=f"the SHA-256 {pointer['sha256'][:16]}…",
        )


def _best_step(server: Server, view: RunView, downloads: RunFolder) -> int | None:
    """The step of the committed checkpoint that was the best when it was taken; None if there is no checkpoint."""
    pointer = pointer_in(view.tags)
    if pointer is None:
        return None
    rated: dict[int, float] = {}
    for name in server.directories(view.run_id, "checkpoints"):
        step = step_of(name)
        if step is None or step > pointer["step"]:
            continue
        manifest = downloads.checkpoints / name / MANIFEST
        server.download(view.run_id, f"checkpoints/{name}/{MANIFEST}", manifest)
        value = read_json(manifest).get("value")
        if isinstance(value, int | float):
            rated[step] = value
    if not rated:
        raise CheckpointError(
            f"no checkpoint of run {view.run_id} is its best one: no metric was monitored, or none is kept",
            expected="a run with val_data, or --monitor METRIC, and --keep-best 1",
            try_next=f"python -m tracked.run show {view.run_id}, and --step N",
        )
    choose = max if object_in(view.tags.get(SETTINGS)).get("mode") == "max" else min
    return choose(rated, key=lambda step: rated[step])
