"""A run that other code logs to through the plugin: the checkpoints of that code, and going on from them.

A checkpoint is whatever that code writes, a file or a folder (which becomes a tar file); nothing here looks into it.
It takes the way of this package's own: verified on the server by hash and size, then named by the run's tag, behind
all points that were logged before it. `resume RUN -- COMMAND` has the command find it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tracked import calls, spool
from tracked.archive import digest
from tracked.errors import CheckpointError, NoSuchRun, ServerUnavailable
from tracked.names import HANDLE, HOST, MANIFEST, OURS, PARENT, folder_name, step_of
from tracked.place import Place
from tracked.provenance import host_name
from tracked.resumption import pointer_in, resumed_run_id
from tracked.spool import RunFolder, unusable, write_json

if TYPE_CHECKING:
    from tracked.server import RunView, Server

_NAME = "checkpoint"
_SAVING = ".saving-"
_PATIENCE = 60.0  # seconds for an answer
_LOOKED_THROUGH = 200


class LoggedRun:
    """The checkpoints of one run, by its ID.

    Args:
        run_id: As MLflow has it.
        tracking_uri: With or without `tracked+`; else `MLFLOW_TRACKING_URI`.
    """

    def __init__(self, run_id: str, tracking_uri: str | None = None) -> None:
        self.run_id = run_id
        self._place = Place.choose(tracking_uri)

    def save_checkpoint(
        self,
        path: str | Path,
        step: int,
        *,
        next_step: int | None = None,
        epoch: int = 0,
        keep_last: int = 1,
    ) -> None:
        """Have a copy of `path` sent, behind all points that this process has logged to the run so far.

        Costs the caller the copy and its hash. Those that a newer one overtakes while the server is away are
        not sent at all.

        Args:
            path: A file, or a folder.
            step: That it was taken after.
            next_step: The first one that whatever goes on from here logs; `step + 1` by default.
            epoch: Whole epochs that it holds, for people.
            keep_last: So many of these checkpoints stay on the server.

        Raises:
            CheckpointError: There is nothing at `path`.
            SpoolError: The spool cannot be written to.
        """
        source = Path(path).resolve()
        if not source.exists():
            raise CheckpointError(f"there is no checkpoint at {source}", expected="a file or a folder")
        journaled = calls.to(self._place)
        folder = journaled.outbox.called(self.run_id)
        folder.make()
        try:
            # Among the checkpoints, so that a sender with nothing else to send leaves the folder where it is.
            with tempfile.TemporaryDirectory(
                dir=folder.checkpoints, prefix=f"{_SAVING}{os.getpid()}-"
            ) as temp:
                copy = Path(temp) / folder_name(step) / _NAME
                copy.parent.mkdir()
                _copy(source, copy)
                sha256 = digest(copy)
                about = {
                    "step": step,
                    "next_step": step + 1 if next_step is None else next_step,
                    "epoch": epoch,
                    "sha256": sha256,
                    "bytes": copy.stat().st_size,
                }
                # Another one of the same step must not lie in this one's place while the run's tag names this.
                suffix = ".tar" if source.is_dir() else source.suffix
                name = f"{_NAME}-{sha256[:8]}{suffix}"
                copy.rename(copy.with_name(name))
                write_json(copy.parent / MANIFEST, about)
                target = folder.checkpoints / copy.parent.name
                shutil.rmtree(target, ignore_errors=True)
                copy.parent.rename(target)
                path_there = f"checkpoints/{folder_name(step)}/{name}"
                saved_at = time.time_ns() // 1_000_000
                body = {
                    **about,
                    "saved_at": saved_at,
                    "file": name,
                    "path": path_there,
                    "keep_last": keep_last,
                }
                # While the folder stands that says who saves: what no journal tells of is freed otherwise.
                journaled.add(self.run_id, ("checkpoint", body))
                journaled.flush()
        except OSError as error:
            raise unusable(folder.path, error) from error
        waiting = sorted(
            each for path in folder.checkpoints.iterdir() if (each := step_of(path.name)) is not None
        )
        for overtaken in waiting[1:-1]:  # the oldest may be on its way, and would begin anew for ever
            shutil.rmtree(folder.checkpoints / folder_name(overtaken), ignore_errors=True)

    def fetch_checkpoint(self) -> Path | None:
        """The last checkpoint that arrived whole, downloaded: a file, or a folder; it is there until this process ends.

        None where the run has none yet: what goes on with it begins at the start.

        Raises:
            CheckpointError: Its hash is another than that in the run's tag.
            ServerError: The server does not answer.
        """
        from tracked.server import Server

        server = Server(self._place.tracking_uri, create=False)
        pointer = pointer_in(server.get_run(self.run_id).tags)
        if pointer is None:
            return None
        folder = Path(tempfile.mkdtemp(prefix="tracked-checkpoint-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        try:
            found = server.download(self.run_id, pointer["path"], folder / Path(pointer["path"]).name)
        except (CheckpointError, NoSuchRun, ServerUnavailable):
            if pointer_in(server.get_run(self.run_id).tags) == pointer:
                raise
            return self.fetch_checkpoint()  # a newer one has taken its place meanwhile
        if (sha256 := digest(found)) != pointer["sha256"]:
            raise CheckpointError(
                f"the checkpoint {pointer['path']} of run {self.run_id} is damaged: its SHA-256 is {sha256[:16]}…",
                expected=f"{str(pointer['sha256'])[:16]}…, as recorded when it was saved",
            )
        if found.suffix != ".tar":
            return found
        with tarfile.open(found) as archive:
            archive.extractall(folder / _NAME, filter="data")
        found.unlink()
        return folder / _NAME


def fetch_checkpoint(run_id: str | None = None, tracking_uri: str | None = None) -> Path | None:
    """The last checkpoint of a run as `LoggedRun.fetch_checkpoint` gives it; None where nothing is resumed.

    Args:
        run_id: Else the run that `resume RUN -- COMMAND` goes on with.
        tracking_uri: As for `LoggedRun`.
    """
    run_id = run_id or resumed_run_id()
    return None if run_id is None else LoggedRun(run_id, tracking_uri).fetch_checkpoint()


def find(place: Place, word: str, say: Callable[[str], None]) -> RunView:
    """The run that is to be gone on with, once all that this machine still held of it has been delivered.

    `last` is the newest of this package's own and of those that other code has made on this host: elsewhere one
    may be alive, and nobody could tell. It is none that lies below another.

    Raises:
        RunNotFound: There is no such run, or several.
        RunTaken: A process on this machine logs to it.
        ServerError: The server does not answer.
    """
    from tracked.attempts import Asking, drain, find_run
    from tracked.server import Server

    server = Server(place.tracking_uri, create=False)
    view = Asking(say, _PATIENCE)(lambda: _newest(server) if word == "last" else find_run(server, word))
    if HANDLE not in view.tags:
        drain(place, [box.called(view.run_id) for box in spool.outboxes(place.spool)], say)
    return view


def _newest(server: Server) -> RunView:
    from tracked.attempts import find_run

    of_others = f"tags.`{HOST}` = '{host_name()}'"
    looked_at = [
        view for only in (of_others, OURS) for view in server.search(filter=only, limit=_LOOKED_THROUGH)
    ]
    found = [view for view in looked_at if PARENT not in view.tags]
    return max(found, key=lambda view: view.start_time) if found else find_run(server, "last")


def left_behind(folder: RunFolder) -> list[Path]:
    """What programs that were killed while they saved a checkpoint have left of it."""
    saving = {path: _is_alive(path.name.split("-")[1]) for path in folder.checkpoints.glob(f"{_SAVING}*")}
    # Without a journal no record tells of it, and where nobody saves none will.
    whole = [] if folder.journals() or any(saving.values()) else folder.checkpoints.glob("step-*")
    return [*(path for path, alive in saving.items() if not alive), *whole]


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _copy(source: Path, copy: Path) -> None:
    if source.is_dir():
        with tarfile.open(copy, "w") as archive:
            archive.add(source, arcname=".")
        return
    shutil.copyfile(source, copy)  # no link: many a loop writes the next one into the same file
