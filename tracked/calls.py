"""What MLflow code other than this package's loop logs, on its way into journals: one for each run it writes.

The thread that logs only appends to a list. Another moves what is there into the journals every
0.2 s, where a kill of this process cannot reach it, and sees to it that a sender is alive. The order
of the calls of a run is kept, over several journals and processes too, where one ended before the other.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from tracked import sender
from tracked.errors import NotDelivered, SpoolError
from tracked.journal import START, Journal, Place, Reader
from tracked.packing import linked_records, records
from tracked.place import Place as Destination
from tracked.spool import Outbox, RunFolder, read_json

log = logging.getLogger("tracked")

FLUSH_SECONDS = 0.2
"""Of what is older than this, a kill of the process takes nothing."""
LOOK_AFTER_SECONDS = 1.0
LONGEST_IDLE_SECONDS = 30.0
_POLL_SECONDS = 0.005

Entry = tuple[str, Any]
"""A call: `points` or `linked` and one point, or the kind of a record and its body."""


def read_timeout() -> float:
    """How long a call waits that needs the server's answer: `TRACKED_READ_TIMEOUT`, else 300 s.

    Whether for what was written before a read, or for the ID of a new run: not shorter than MLflow itself does.
    """
    return float(os.environ.get("TRACKED_READ_TIMEOUT", "300"))


def drain_timeout() -> float:
    """How long the end of the process waits for the delivery: `TRACKED_DRAIN_TIMEOUT`, else 60 s."""
    return float(os.environ.get("TRACKED_DRAIN_TIMEOUT", "60"))


class _Writer:
    """The calls of one run, in the order in which they were made."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self.undelivered = False
        self.trouble = ""
        """Why what was logged is in memory alone."""
        self.rejected = folder.about.get("rejected", 0)
        self.told: set[str] = set()
        self._journal: Journal | None = None
        self._written = 0.0

    def flush(self, *, close: bool = False) -> None:
        """Move what is there into the journal, which ends with the run, and after a while without a call.

        Raises:
            SpoolError: It cannot be written; what was not taken stays.
        """
        # A call may append meanwhile: only what is there now is taken, and only once it has been.
        count = len(self.entries)
        if count:
            self.undelivered = True
            if self._journal is None:
                name = f"calls-{time.time_ns():020d}-{os.getpid()}"
                self._journal = Journal(self.folder.path / name, {"run": self.folder.handle})
            ended = self._append(self._journal, self.entries[:count])
            del self.entries[:count]
            self._written = time.monotonic()
            close = close or ended
        if self._journal is not None:
            self._journal.flush()
            if close or time.monotonic() - self._written > LONGEST_IDLE_SECONDS:
                self._journal.close()
                self._journal = None

    def holds_checkpoints(self) -> bool:
        """Whether one that was saved is on its way to the server."""
        # Where the disk refuses records, none may tell of it, and then nobody sends it.
        return not self.trouble and _holds_checkpoints(self.folder)

    @staticmethod
    def _append(journal: Journal, entries: list[Entry]) -> bool:
        """Journal the entries, neighbours of a kind together; whether the run has ended with them."""
        ended = False
        for kind, group in groupby(entries, key=itemgetter(0)):
            bodies = [body for _, body in group]
            if kind == "points":
                for body in records(bodies):
                    journal.append("points", body)
            elif kind == "linked":
                for body in linked_records(bodies):
                    journal.append("linked", body)
            elif kind in ("params", "tags"):
                journal.append(kind, {key: value for body in bodies for key, value in body.items()})
            else:
                for body in bodies:
                    journal.append(kind, body)
            ended = kind == "status"
        return ended


class Calls:
    """All that this process writes to one tracking URI. Safe to use from several threads, and after a fork."""

    def __init__(self, outbox: Outbox, tracking_uri: str) -> None:
        self.outbox = outbox
        self.tracking_uri = tracking_uri
        self._writers: dict[str, _Writer] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._finished = False
        self._flushed = time.monotonic()
        os.register_at_fork(after_in_child=self._begin_anew)
        _everywhere.append(self)

    def _begin_anew(self) -> None:
        """What the process that forked this one has not written yet, it will write itself."""
        self._writers = {}
        self._lock = threading.Lock()
        self._thread = None
        self._finished = False

    # -- from whoever logs

    def add(self, run_id: str, *entries: Entry) -> None:
        """Have calls journaled."""
        writer = self._writers.get(run_id) or self._begin(run_id)
        writer.entries.extend(entries)
        # The thread that flushes may be late on a busy machine, or waiting for a sender to start.
        if self._finished or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def _begin(self, run_id: str) -> _Writer:
        self.ensure_sender()
        with self._lock:
            writer = self._writers.setdefault(run_id, _Writer(self.outbox.called(run_id)))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tracked-calls", daemon=True)
                self._thread.start()
                _finish_with_a_child_process()
        return writer

    def wait(self, run_id: str | None = None) -> None:
        """Return once what this process wrote before is on the server.

        Args:
            run_id: Only for this run, and then for other processes of this machine too; None: for all runs, but
                those that were deleted on the server.

        Raises:
            NotDelivered: It is not after `TRACKED_READ_TIMEOUT`.
        """
        self.flush()
        for writer in list(self._writers.values()):
            if writer.trouble and run_id in (None, writer.folder.handle):
                raise NotDelivered(
                    f"what was logged to run {writer.folder.handle} is in memory alone: {writer.trouble}",
                    expected="a spool that can be written to",
                    try_next="the same again, once it can be",
                )
        folders = self._undelivered() if run_id is None else [self.outbox.called(run_id)]
        waiting = [end for folder in folders for end in _ends(folder)]
        seconds, of_deleted = read_timeout(), 0.0 if run_id is None else sender.LONGEST_BACK_OFF
        for folder in self._await(partial(_behind, waiting), seconds, of_deleted):
            if _is_deleted(folder):
                if run_id is None:
                    continue
                raise NotDelivered(
                    f"run {folder.handle} was deleted on the server; what was logged to it since waits for it",
                    expected="a run that is not in the bin",
                    try_next=f"mlflow runs restore --run-id {folder.handle}",
                )
            trouble = folder.about.get("trouble")
            raise NotDelivered(
                f"what was logged to run {folder.handle} has not reached the server after {seconds:g} s"
                + (f": {trouble}" if trouble else ""),
                expected="the server that the tracking URI names, answering",
                try_next="the same again: nothing is lost, and TRACKED_READ_TIMEOUT=… waits for longer",
            )

    def _await(
        self, late: Callable[[], list[RunFolder]], seconds: float, of_deleted: float = 0.0
    ) -> list[RunFolder]:
        """The runs that are still late after so many seconds.

        Where all that is left is of deleted runs, after `of_deleted` seconds: one may have been restored just now.
        """
        began = time.monotonic()
        urged = 0.0
        while waiting := late():
            now = time.monotonic()
            if now > began + seconds or (now > began + of_deleted and all(map(_is_deleted, waiting))):
                break
            if now - urged > LOOK_AFTER_SECONDS:
                urged = now
                for folder in waiting:
                    folder.want()
                self.ensure_sender()
            time.sleep(_POLL_SECONDS)
        return waiting

    # -- beside it

    def _work(self) -> None:
        looked_after = time.monotonic()
        while not self._finished:
            time.sleep(FLUSH_SECONDS / 2)
            self.flush()
            if time.monotonic() - looked_after > LOOK_AFTER_SECONDS:
                looked_after = time.monotonic()
                self._look_after()

    def flush(self, *, close: bool = False) -> None:
        """Move what was added into the journals, where a kill of this process cannot reach it."""
        with self._lock:
            self._flushed = time.monotonic()
            for writer in list(self._writers.values()):
                try:
                    writer.flush(close=close)
                    writer.trouble = ""
                except SpoolError as error:
                    writer.trouble = error.found
                    _tell_once(writer, f"{error}\n  what is logged is kept in memory meanwhile")

    def _undelivered(self) -> list[RunFolder]:
        """The runs of which something may not be on the server yet."""
        with self._lock:
            return [writer.folder for writer in self._writers.values() if writer.undelivered]

    def _look_after(self) -> None:
        """Have a sender running while there is work for one, and say what is in its way."""
        with self._lock:  # nothing may be flushed between the look and the note
            found = [writer for writer in self._writers.values() if writer.undelivered]
            for writer in found:
                writer.undelivered = bool(writer.trouble or _ends(writer.folder)) or _holds_checkpoints(
                    writer.folder
                )
        found = [writer for writer in found if writer.undelivered]
        for writer in found:
            about = writer.folder.about
            if trouble := about.get("trouble"):
                _tell_once(
                    writer,
                    f"nothing is delivered at the moment: {trouble}\n"
                    "  the program goes on, and what it logs waits in the spool",
                )
            _tell_rejected(writer)
        if found:
            self.ensure_sender()

    def ensure_sender(self) -> None:
        """Have a sender on its way; called early, because it takes seconds to begin."""
        try:
            sender.ensure(self.outbox, self.tracking_uri)
        except (OSError, SpoolError) as error:
            log.warning("the spool at %s cannot be used: %s", self.outbox.path, error)

    # -- the end of the process

    def finish(self) -> None:
        """Write what is left, wait for its delivery, and say on standard error what stays behind."""
        self._finished = True
        if not self._writers:
            return
        self.flush(close=True)
        writers = [writer for writer in self._writers.values() if writer.undelivered]
        waiting = [end for writer in writers for end in _ends(writer.folder)]

        def late() -> list[RunFolder]:
            return [*_behind(waiting), *(each.folder for each in writers if each.holds_checkpoints())]

        with suppress(KeyboardInterrupt):
            self._await(late, drain_timeout())
        for writer in self._writers.values():
            _tell_rejected(writer)
        for writer in writers:
            folder = writer.folder
            writer.undelivered = False  # a child of `multiprocessing` comes here twice
            if writer.trouble:
                sys.stderr.write(
                    f"tracked: what was logged last to run {folder.handle} is lost: {writer.trouble}\n"
                )
            behind = [journal for journal, _ in _ends(folder)]
            if not behind and not writer.holds_checkpoints():
                continue
            trouble = folder.about.get("trouble")
            sys.stderr.write(
                f"tracked: what was logged to run {folder.handle} is not all delivered"
                f"{f' ({trouble})' if trouble else ''}; it is kept in {behind[0] if behind else folder.path}\n"
                "  try: python -m tracked.run sync\n"
            )


_everywhere: list[Calls] = []


def to(place: Destination) -> Calls:
    """What this process writes there: the same for all who ask, so that one order holds for all of it.

    Raises:
        SpoolError: The spool cannot be made or written to.
    """
    for calls in _everywhere:
        if (
            calls.tracking_uri == place.tracking_uri
        ):  # not by the spool: the program may be in another folder by now
            return calls
    return Calls(place.outbox(), place.tracking_uri)


def finish() -> None:
    """Deliver what this process has logged, wherever it goes."""
    for each in _everywhere:
        each.finish()


def _finish_with_a_child_process() -> None:
    """A process of `multiprocessing` ends without what was registered for an exit."""
    multiprocessing = sys.modules.get("multiprocessing.process")
    if multiprocessing is not None and multiprocessing.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, finish, exitpriority=10)


def _ends(folder: RunFolder) -> list[tuple[Path, Place]]:
    """The run's journals that are not all delivered, each with the place behind what has been flushed."""
    found = []
    for journal in folder.journals():
        try:
            end = Reader(journal, ("points",)).end()
        except FileNotFoundError:
            continue  # delivered meanwhile
        if not _is_delivered(journal, end):
            found.append((journal, end))
    return found


def _behind(waiting: list[tuple[Path, Place]]) -> list[RunFolder]:
    """The runs of the journals that have not been delivered up to their place; the others are taken off the list."""
    waiting[:] = [each for each in waiting if not _is_delivered(*each)]
    return [RunFolder(journal.parent) for journal, _ in waiting]


def _is_delivered(journal: Path, end: Place) -> bool:
    cursor = read_json(journal / "cursor.json").get("points", START)
    return tuple(cursor) >= end or not journal.exists()


def _holds_checkpoints(folder: RunFolder) -> bool:
    """Whether one that other code has saved is not on the server yet."""
    # Without a journal nothing tells of it: a program was killed while it saved.
    return bool(folder.journals()) and any(folder.checkpoints.glob("step-*"))


def _is_deleted(folder: RunFolder) -> bool:
    """Whether the server has the run in its bin, and takes nothing for it until it is restored."""
    about = folder.about
    return bool(about.get("deleted") and about.get("trouble"))


def _tell_rejected(writer: _Writer) -> None:
    about = writer.folder.about
    if about.get("rejected", 0) > writer.rejected:
        _tell_once(writer, f"left out, as it cannot be delivered: {about.get('rejected_reason')}")


def _tell_once(writer: _Writer, text: str) -> None:
    if text not in writer.told:
        writer.told.add(text)
        log.warning("%s", text)
