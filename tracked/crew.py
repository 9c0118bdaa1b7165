"""The worker processes of a sweep: kept alive between trials, replaced when they die."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

import torch

from tracked import children
from tracked.worker import COMMAND, Begun, Leave, Order, Over, Ready, Report, Setup, Verdict

Message = Ready | Begun | Report | Over


@dataclass
class Hand:
    """A worker process, and the trial that it trains."""

    process: subprocess.Popen[bytes]
    connection: Connection
    order: Order | None = None
    is_ready: bool = False
    """Whether it has loaded the experiment."""
    has_begun: bool = False
    """Whether its trial has a run, and trains."""

    @property
    def is_free(self) -> bool:
        return self.is_ready and self.order is None

    @property
    def is_gone(self) -> bool:
        return self.connection.closed

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
        """Start them all."""
        self.hands = [self._start(number) for number in range(self._count)]

    @property
    def is_free(self) -> bool:
        """Whether somebody could begin a trial."""
        return any(hand.is_free for hand in self.hands)

    @property
    def numbers(self) -> set[int]:
        """Of the trials that are being trained."""
        return {hand.order.number for hand in self.hands if hand.order}

    def messages(self, timeout: float) -> Iterator[tuple[Hand, Message | None]]:
        """What has come within `timeout` seconds; None from a worker that has died."""
        spoke = wait([hand.connection for hand in self.hands if not hand.is_gone], timeout)
        for hand in [*self.hands]:
            if hand.connection in spoke:
                try:
                    yield hand, hand.connection.recv()
                except (EOFError, OSError):
                    yield hand, None
            elif not hand.is_gone and hand.process.poll() is not None:
                # Without an end of file: processes that it had forked hold the connection open.
                yield hand, None

    def bury(self, hand: Hand) -> int:
        """Let go of a worker that has died; the status that it died with."""
        hand.connection.close()
        hand.is_ready = False
        return hand.process.wait()

    def replace(self, hand: Hand) -> None:
        """Put another process in the place of one that has died."""
        index = self.hands.index(hand)
        self.hands[index] = self._start(index)

    def leave(self, reason: str, *, but: Hand | None = None) -> None:
        """Have every running trial, `but` that of one worker, take a checkpoint and pause.

        What has not begun is cut off: it may wait for a server, or import for minutes, and has trained nothing.
        """
        for hand in self.hands:
            if hand is but:
                continue
            if hand.order is not None and not hand.has_begun:
                hand.process.kill()
            else:
                hand.tell(Leave(reason))

    def kill(self) -> None:
        for hand in self.hands:
            hand.process.kill()

    def end(self, *, at_once: bool = False) -> None:
        """Let the processes go, each when it trains nothing any more; with `at_once`, what they train is paused."""
        for hand in self.hands:
            hand.connection.close()
        for hand in self.hands:
            if at_once:
                hand.process.terminate()
            hand.process.wait()

    def _start(self, number: int) -> Hand:
        ours, theirs = Pipe()
        environment = children.environment()
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._count)))
        if devices := _devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
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
