"""The process that drains the spool: one for each outbox, alive while there is something to send.

Four threads share the work, so that none waits for another: the points lanes, the files lanes, the pictures, and the
heartbeats, which tell the server that a run is alive, renew the right to send for it, and fetch what a person asked
for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING

from tracked import children
from tracked.address import redact
from tracked.call_delivery import CallDelivery
from tracked.delivery import REQUEST_SECONDS, Delivery
from tracked.errors import NoSuchRun, RunDeleted, ServerRefused, TrackedError, UsageError
from tracked.spool import Lock, Outbox, is_held

if TYPE_CHECKING:
    from tracked.server import Server

Waits = dict[Path, tuple[float, float]]  # by journal: until when, and for how many seconds

POLL_SECONDS = 0.05
LONGEST_BACK_OFF = 5.0
DRAWING_REST = 20.0
"""For so many times as long as its last picture took, nothing is drawn for a run that is trained."""


def heartbeat_seconds() -> float:
    """How often a run's heartbeat is sent: `TRACKED_HEARTBEAT`, else 3 s."""
    return float(os.environ.get("TRACKED_HEARTBEAT", "3"))


def idle_seconds() -> float:
    """How long a sender stays without work: `TRACKED_SENDER_IDLE`, else 60 s."""
    return float(os.environ.get("TRACKED_SENDER_IDLE", "60"))


_started: dict[Path, subprocess.Popen[bytes]] = {}


def ensure(outbox: Outbox, tracking_uri: str) -> None:
    """Start a sender for `outbox` unless one is alive. Returns at once."""
    if is_held(outbox.sender_lock):
        return
    started = _started.get(outbox.path)
    if started is not None and started.poll() is None:
        return  # on its way to the lock; who waits asks twenty times a second
    # The address may hold a password, which must not show in the list of processes.
    environment = {**children.environment(), "TRACKED_SENDER_URI": tracking_uri}
    with (outbox.path / "sender.log").open("ab") as log:
        _started[outbox.path] = children.start(
            [sys.executable, "-m", "tracked.sender", str(outbox.path)],
            env=environment,
            cwd=outbox.path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a terminal's Ctrl-C, or a scheduler's SIGTERM, is for the training
        )


class Sender:
    """Serves every journal of an outbox, in turn, until there has been nothing to do for a while."""

    def __init__(self, outbox: Outbox, lock: Lock, server: Server) -> None:
        self.outbox = outbox
        self.lock = lock
        self.server = server
        self.deliveries: dict[Path, Delivery] = {}
        self._lock = threading.Lock()
        self._leaving = threading.Event()
        self._refused: set[Path] = set()  # runs: of their journals, one may wait for another
        self._closing: Waits = {}

    def serve(self) -> None:
        """Run the four threads until the outbox has been empty for a while."""
        threads = [
            threading.Thread(
                target=self._work, args=(methodcaller("send_points"),), name="points", daemon=True
            ),
            threading.Thread(target=self._work, args=(methodcaller("send_file"),), name="files", daemon=True),
            threading.Thread(target=self._work, args=(self._send_picture,), name="pictures", daemon=True),
            threading.Thread(target=self._beat, name="heartbeats", daemon=True),
        ]
        for thread in threads:
            thread.start()
        given_way = False
        idle_since = time.monotonic()
        while time.monotonic() - idle_since < idle_seconds() and all(each.is_alive() for each in threads):
            if self._leaving.is_set() or not self.lock.is_in_place():
                break  # the spool was deleted, and whatever stands there now has a sender of its own
            self._look_for_journals()
            self._close_done()
            opened = [each.view is not None for each in self._current()]
            if opened and all(opened) and not given_way:
                children.give_way()  # not before: people wait for the run's ID
                given_way = True
            if self.deliveries:
                idle_since = time.monotonic()
            self._leaving.wait(POLL_SECONDS * 4)
        self._leaving.set()
        for thread in threads:
            thread.join()

    def _current(self) -> list[Delivery]:
        with self._lock:
            return list(self.deliveries.values()) if self.lock.is_in_place() else []

    def _look_for_journals(self) -> None:
        found = self.outbox.journals()
        with self._lock:
            for folder in found:
                if folder not in self.deliveries:
                    kind = CallDelivery if folder.name.startswith("calls-") else Delivery
                    self.deliveries[folder] = kind(folder, self.server)

    def _close_done(self) -> None:
        for delivery in self._current():
            if self._try(methodcaller("close_if_done"), delivery, self._closing):
                with self._lock:
                    del self.deliveries[delivery.folder]

    def _work(self, send: Callable[[Delivery], bool]) -> None:
        """Serve all journals fairly, one request each in turn."""
        waits: Waits = {}
        while not self._leaving.is_set():
            moved = [self._try(send, delivery, waits) for delivery in self._current()]
            if not any(moved):
                self._leaving.wait(POLL_SECONDS)

    def _try(self, send: Callable[[Delivery], bool], delivery: Delivery, waits: Waits) -> bool:
        """Whether it moved anything; what is in trouble waits, for longer each time, without the others."""
        due, back_off = waits.get(delivery.folder, (0.0, 0.0))
        if time.monotonic() < due:
            return False
        try:
            moved = send(delivery)
        except Exception as error:  # noqa: BLE001 - one journal's trouble, whatever it is, is not the others'
            if not isinstance(error, TrackedError | OSError):
                traceback.print_exc()
            back_off = min(max(back_off * 2, 0.2), LONGEST_BACK_OFF)
            waits[delivery.folder] = (time.monotonic() + back_off, back_off)
            self._take_note(delivery, error)
            return False
        waits.pop(delivery.folder, None)
        if moved:
            self._refused.discard(delivery.run.path)
        return moved

    def _send_picture(self, delivery: Delivery) -> bool:
        """Draw what waits there, at a pace that leaves the processors to the trainings, however many there are."""
        began = time.monotonic()
        moved = delivery.send_picture()
        if moved:
            ended = time.monotonic()
            delivery.draws_again = ended + DRAWING_REST * (ended - began) * len(self._current())
        return moved

    def _take_note(self, delivery: Delivery, error: Exception) -> None:
        text = error.found if isinstance(error, TrackedError) else str(error)
        with contextlib.suppress(OSError):  # a disk that is full, or a folder that is gone
            delivery.tell(trouble=redact(text)[:300], deleted=isinstance(error, RunDeleted))
        if not isinstance(error, ServerRefused | NoSuchRun | UsageError):
            return
        self._refused.add(delivery.run.path)
        current = self._current()
        if self._refused.issuperset(each.run.path for each in current) and not any(
            each.reader.is_written() for each in current
        ):
            # The credentials came with the environment: the next `sync` or `resume` may bring better ones.
            self._leaving.set()

    def _beat(self) -> None:
        while not self._leaving.wait(heartbeat_seconds()):
            for delivery in self._current():
                # The lease runs out by itself, and the lanes tell of the trouble.
                with contextlib.suppress(Exception):
                    delivery.beat()


def main() -> None:
    outbox = Outbox(Path(sys.argv[1]))
    lock = Lock(outbox.sender_lock)
    if not lock.acquire({"started": time.time()}):
        return
    from tracked.server import Server  # MLflow: seconds to import, so only by the one sender there is

    server = Server(os.environ["TRACKED_SENDER_URI"], timeout=REQUEST_SECONDS)
    Sender(outbox, lock, server).serve()


if __name__ == "__main__":
    main()
