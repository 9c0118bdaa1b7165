"""The worker processes of a sweep: kept alive between trials, replaced when they die."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import torch

from tracked import children
from tracked.worker import COMMAND, Leave, Order, Over, Report, Setup, Verdict


@dataclass
class Hand:
    """A worker process, and the trial that it trains."""

    process: subprocess.Popen[bytes]
    connection: Connection
    order: Order | None = None

    def tell(self, message: Order | Verdict | Leave) -> bool:
        """Send it a message; whether it was there to take it."""
        try:
            self.connection.send(message)
        except OSError:
            return False
        return True


class Crew:
    """So many worker processes, each with a CUDA device of its own where there are several.

    Args:
        setup: What all trials share.
        count: How many work side by side.
    """

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup = setup
        self._count = count
        self.hands: list[Hand] = []

    def start(self) -> None:
        self.hands = [self._start(number) for number in range(self._count)]

    @property
    def numbers(self) -> set[int]:
        """Of the trials that are being trained."""
        return {hand.order.number for hand in self.hands if hand.order}

    def messages(self, timeout: float) -> Iterator[tuple[Hand, Report | Over | None]]:
        """What has come within `timeout` seconds; None from a worker that has died."""
        ready = wait([hand.connection for hand in self.hands], timeout)
        for hand in [each for each in self.hands if each.connection in ready]:
            try:
                yield hand, hand.connection.recv()
            except (EOFError, OSError):
                yield hand, None

    def replace(self, hand: Hand) -> int:
        """Put another process in the place of one that has died; the status that it died with."""
        hand.connection.close()
        status = hand.process.wait()
        index = self.hands.index(hand)
        self.hands[index] = self._start(index)
        return status

    def leave(self, reason: str) -> None:
        """Have every running trial take a checkpoint and pause."""
        for hand in self.hands:
            hand.tell(Leave(reason))

    def kill(self) -> None:
        for hand in self.hands:
            hand.process.kill()

    def end(self, *, at_once: bool = False) -> None:
        """Let the processes go; a trial that one still trains is paused, or with `at_once` cut off."""
        for hand in self.hands:
            hand.connection.close()
        for hand in self.hands:
            if at_once:
                hand.process.terminate()
            hand.process.wait()

    def _start(self, number: int) -> Hand:
        ours, theirs = Pipe()
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._count)))
        if devices := _devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        package = str(Path(__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        process = children.start(
            [*COMMAND, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the coordinator, which asks them to leave
        )
        theirs.close()
        hand = Hand(process, ours)
        with contextlib.suppress(OSError):  # it has died already, which is met when it is listened to
            ours.send(self._setup)
        return hand


def _devices() -> list[str]:
    """CUDA's devices that may be used, to be dealt out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each]
    return [str(number) for number in range(torch.cuda.device_count())]
