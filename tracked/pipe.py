"""The training's end of the pipe: what it logs and saves goes into the journal, beside the training.

A thread moves points, tags and checkpoints into the journal every 0.2 s, keeps a sender alive, and
listens to what the sender says. The order in the journal carries the promise of a committed
checkpoint: every point up to its step stands before its record.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracked import sender, spool
from tracked.checkpoint import Writer
from tracked.errors import SpoolError
from tracked.journal import Journal
from tracked.names import DIVERGED_AT, FILE, POINTS, STATE, folder_name, step_of
from tracked.packing import Point, records
from tracked.params import as_text
from tracked.points import PointLog, Replay
from tracked.provenance import redact_values
from tracked.spool import Lock, Outbox, RunFolder

if TYPE_CHECKING:
    from tracked.tracking import Run

log = logging.getLogger("tracked")

FLUSH_SECONDS = 0.2
LOOK_AFTER_SECONDS = 1.0
_STATUS = {
    "finished": "FINISHED",
    "stopped_early": "FINISHED",
    "pruned": "KILLED",
    "stopped": "KILLED",
    "paused": "KILLED",
    "failed": "FAILED",
    "crashed": "FAILED",
}


class Progress:
    """Where a training shows how far it is. This one shows nothing, and logs what must not be missed."""

    def say(self, text: str) -> None:
        """Show a line."""
        log.info("%s", text)

    def warn(self, text: str) -> None:
        """Show a line that the user should not miss."""
        log.warning("%s", text)

    def identify(self, run_id: str, url: str) -> None:
        """The server has given the run its ID."""
        self.say(f"run {run_id}  {url}".rstrip())

    def update(self, run: Run) -> None:
        """Called every 0.2 s, beside the training."""

    def close(self) -> None:
        """The training is over."""


def shown_params(values: Mapping[str, Any]) -> dict[str, str]:
    """Hyperparameters as MLflow shows them, without secrets.

    Raises:
        ParamError: A name that MLflow refuses.
    """
    return redact_values(as_text(values))


@dataclass
class Attempt:
    """One process's turn at a run: its place on this machine, and what it starts from."""

    outbox: Outbox
    tracking_uri: str
    folder: RunFolder
    lock: Lock
    number: int
    nonce: str
    start: dict[str, Any]
    params: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    restored: dict[str, Any] | None = None
    replay: Replay = field(default_factory=dict)
    before: tuple[str, str] | None = None
    """State and reason in which the attempt found the run."""
    overridden: bool = False
    """Whether `params` differ from those that the restored state was trained with."""
    delivers: bool = True
    first_sample: int = 0
    """The number of the next sample of the machine."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Packed points that the run begins with: those of the run that it was forked from."""

    def ensure_sender(self) -> None:
        if self.delivers:
            sender.ensure(self.outbox, self.tracking_uri)

    def said(self) -> dict[str, Any]:
        """What the sender says of this attempt; nothing while it speaks of an earlier one."""
        about = self.folder.about
        return about if about.get("attempt") == self.number else {}


@dataclass
class Retention:
    """Which checkpoints stay: the newest, the best, and the one that the run's tag names."""

    last: int
    best: int
    mode: str
    entries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, entry: dict[str, Any]) -> set[int]:
        """Take a checkpoint that is written; the steps of those to keep."""
        entries = [each for each in self.entries if each["step"] != entry["step"]] + [entry]
        rated = sorted(
            (each for each in entries if each["value"] is not None),
            key=lambda each: each["value"] if self.mode == "min" else -each["value"],
        )
        keep = {each["step"] for each in [*entries[-self.last :], *rated[: self.best]]}
        self.entries = [each for each in entries if each["step"] in keep]
        return keep


class Pipe:
    """Journal, checkpoint writer and the thread between them and the training.

    Args:
        attempt: Whose journal it is.
        retention: Which checkpoints stay.
        progress: Told of what the user should know.
        patience: Seconds that `drain` waits; may be changed while it does.
    """

    def __init__(self, attempt: Attempt, retention: Retention, progress: Progress, patience: float) -> None:
        self.patience = patience
        self.points = PointLog(attempt.replay)
        self.retention = retention
        self._attempt = attempt
        self._progress = progress
        self._journal = Journal(
            attempt.folder.path / f"attempt-{attempt.number:04d}-{attempt.nonce[:8]}",
            {"run": attempt.folder.handle},
        )
        self._journal.append("start", attempt.start)
        self._lock = threading.Lock()
        self._written: list[dict[str, Any]] = []
        self._pictures: dict[str, dict[str, Any]] = {}
        self._writer = Writer(self._written.append, self._tell_failed)
        self._appended = 0
        self._files = 0
        self._told: set[str] = set()
        self._trouble = ""
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.flush()

    def open(self, beside: Callable[[dict[str, Any]], None]) -> None:
        """Start the thread, which calls `beside` with what the sender says, every 0.2 s."""
        self._thread = threading.Thread(
            target=self._work, args=(beside,), name="tracked-journal", daemon=True
        )
        self._thread.start()

    # -- from the training

    def append(self, kind: str, body: Any) -> None:
        """Journal a record of params, tags or the like."""
        with self._lock:
            self._journal.append(kind, body)

    def copy(self, history: Sequence[dict[str, Any]]) -> None:
        """Journal packed points that another run has logged, ahead of all that this one will log."""
        for body in history:
            self.append("points", body)
            self._appended += body["count"]
            self.flush()  # so that a long history comes to stand in several segments

    def add_points(self, points: Sequence[Point]) -> None:
        """Journal points that are no results of the training: no checkpoint counts them."""
        with self._lock:
            for body in records(points):
                self._journal.append("points", body)
            self._appended += len(points)

    def add_file(self, name: str, directory: str, write: Callable[[Path], Any]) -> None:
        """Have a file that `write(path)` makes uploaded as `directory/name`.

        Raises:
            SpoolError: It cannot be made.
        """
        relative = self._make(name, write)
        self.append("artifact", {"file": relative, "directory": directory})

    def add_model(self, write: Callable[[Path], Any], about: Mapping[str, Any]) -> None:
        """Have a module that `write(folder)` packs logged as a model.

        Raises:
            SpoolError: It cannot be packed.
        """
        relative = self._make("model", write)
        self.flush()  # the points of its step stand before it
        self.append("model", {"folder": relative, **about})

    def _make(self, name: str, write: Callable[[Path], Any]) -> str:
        """A file or folder of the journal; its path in there."""
        with self._lock:
            self._files += 1
            relative = f"files/{self._files:06d}/{name}"
        path = self._journal.folder / relative
        try:
            path.parent.mkdir(parents=True)
            write(path)
        except BaseException as error:
            # Half a file would keep the room that the run's last points need on a full disk.
            shutil.rmtree(path.parent, ignore_errors=True)
            if isinstance(error, OSError):
                raise spool.unusable(path, error) from error
            raise
        return relative

    def draw(self, name: str, body: Mapping[str, Any]) -> None:
        """Have the sender draw the picture `name` from all that is logged by now; the newest of a name counts."""
        self._pictures[name] = {"name": name, **body}

    def take_checkpoint(
        self, state: dict[str, Any], manifest: Mapping[str, Any], *, pinned: bool, wait: bool
    ) -> bool:
        """Copy the state between two steps; see `checkpoint.Writer.take`."""
        folder = self._attempt.folder.checkpoints / folder_name(state["step"])
        return self._writer.take(state, folder, manifest, pinned=pinned, wait=wait)

    def settle(self) -> None:
        """Wait until every checkpoint that was taken is on the disk."""
        self._writer.drain()

    # -- beside the training

    def _work(self, beside: Callable[[dict[str, Any]], None]) -> None:
        looked_after = time.monotonic()
        while not self._closing.wait(FLUSH_SECONDS):
            self.flush()
            if time.monotonic() - looked_after > LOOK_AFTER_SECONDS:
                self._look_after_sender()
                looked_after = time.monotonic()
            self._listen(beside)

    def _look_after_sender(self) -> None:
        try:
            self._attempt.ensure_sender()
        except (OSError, SpoolError) as error:
            self._tell_once("sender", f"the spool at {self._attempt.outbox.path} cannot be used: {error}")

    def flush(self) -> None:
        """Move what was logged and written into the journal."""
        with self._lock:
            checkpointed = self._append_new()
            try:
                self._journal.flush(sync=checkpointed)
            except SpoolError as error:
                self._tell_once("spool", f"{error}\n  points are kept in memory meanwhile")

    def _append_new(self) -> bool:
        # The writer's thread may append meanwhile: only what is there now is taken.
        manifests = self._written[:]
        del self._written[: len(manifests)]
        pictures = [self._pictures.popitem()[1] for _ in range(len(self._pictures))]
        # After them: every point up to a written checkpoint's step, or of a picture, stands before its record.
        points = self.points.drain()
        for body in records(points):
            self._journal.append("points", body)
        self._appended += len(points)
        for manifest in manifests:
            self._keep(manifest)
        for picture in pictures:
            self._journal.append("picture", picture)
        if (diverged := self.points.diverged) and "diverged" not in self._told:
            self._journal.append("tags", {DIVERGED_AT: str(diverged.step)})
            self._tell_once(
                "diverged",
                f"{diverged.key} at step {diverged.step} was {diverged.delivered!r}, recomputed it is "
                f"{diverged.recomputed!r}; the delivered value stays. Likely causes: another machine or torch "
                "build, a device without deterministic kernels (--deterministic), or changed code",
            )
        return bool(manifests)

    def _keep(self, manifest: dict[str, Any]) -> None:
        """Journal a checkpoint that is whole on the disk, and delete those it supersedes from the spool."""
        step = manifest["step"]
        entry = {
            **{key: manifest[key] for key in ("step", "epoch", "value", "sha256", "bytes")},
            "path": f"checkpoints/{folder_name(step)}/{FILE}",
        }
        keep = self.retention.add(entry)
        self._journal.append("checkpoint", {**entry, "keep": sorted(keep)})
        committed = self._attempt.said().get("committed", step)
        for folder in self._attempt.folder.checkpoints.glob("step-*"):
            found = step_of(folder.name)
            if found is not None and found < step and found not in keep and found != committed:
                shutil.rmtree(folder, ignore_errors=True)

    def _listen(self, beside: Callable[[dict[str, Any]], None]) -> None:
        said = self._attempt.said()
        if said.get("run_id") and "id" not in self._told:
            self._told.add("id")
            self._progress.identify(said["run_id"], said.get("url", ""))
        trouble, self._trouble = self._trouble, str(said.get("trouble", ""))
        if trouble and not self._trouble:
            self._told.discard(f"trouble {trouble}")  # it may come again
            self._progress.say("the server answers again: what waited is being delivered")
        if trouble := self._trouble:
            self._tell_once(
                f"trouble {trouble}",
                f"nothing is delivered at the moment: {trouble}\n"
                "  the training goes on, and what it logs waits in the spool",
            )
        if said.get("rejected"):
            self._tell_once("rejected", f"left out, as it cannot be delivered: {said.get('rejected_reason')}")
        try:
            beside(said)
        except Exception as error:  # noqa: BLE001 - whatever a display raises, points are journaled
            self._tell_once(f"beside {error}", f"beside the training: {type(error).__name__}: {error}")

    def _tell_failed(self, reason: str) -> None:
        self._tell_once(
            f"checkpoint {reason}",
            f"a checkpoint could not be written: {reason}\n  the training goes on; the last whole one stays",
        )

    def _tell_once(self, what: str, text: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._progress.warn(text)

    # -- how it stands, and its end

    def _is_delivered(self) -> bool:
        """A journal that is gone without the sender's word was deleted by somebody else."""
        said, name = self._attempt.said(), self._journal.folder.name
        return name in (said.get("ended"), said.get("discarded")) and not self._journal.folder.exists()

    def pending(self) -> int:
        """Points that were logged and are not on the server yet."""
        return max(0, self._appended - int(self._attempt.said().get("points", 0)))

    def close(self, state: str, tags: Mapping[str, str], beside: Callable[[dict[str, Any]], None]) -> None:
        """Write what is left, and how the run ended.

        Args:
            state: See `_STATUS`.
            tags: Tags to set with it.
            beside: As in `open`, called once more.
        """
        self._writer.close()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._listen(beside)
        with self._lock:
            self._append_new()
            count = sum(self.points.counts().values())
            ending = {STATE: state, POINTS: str(count), **tags}
            self._journal.append(
                "end", {"status": _STATUS[state], "end_time": int(time.time() * 1000), "tags": ending}
            )
            try:
                self._journal.close()
            except SpoolError as error:
                self._progress.warn(str(error))

    def drain(self, beside: Callable[[dict[str, Any]], None]) -> int:
        """Wait until the closed journal is delivered; how many points are not after `patience`, 1 for files alone."""
        began = time.monotonic()
        while self._attempt.delivers and not self._is_delivered():
            self._look_after_sender()
            if time.monotonic() - began > self.patience:
                return max(1, self.pending())
            self._listen(beside)
            time.sleep(0.05)
        self._listen(beside)
        return 0
