"""A million points in one run, of 10 metrics: written, delivered and read back whole, in bounded memory.

The delivery runs beside the writing, and its rate is that of all points from the first one written to the last one
on the server. It is set against bare `MlflowClient.log_batch` calls of 1000 points each on a server like it. Memory
is what the training process and the sender take above what they took before the first point.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from benchmarks.measure import Comparison, Row, fresh_process, mlflow_server, report

KEYS = tuple(f"metric/{number}" for number in range(10))
IN_A_REQUEST = 1000  # MLflow's limit
MOST_MEMORY = 150.0  # MB
SLOWEST = 1 / 0.8


def value(step: int, number: int) -> float:
    return math.sin(step / 100 + number)


def write(answers: Connection, go: Connection, address: str, spool: Path, steps: int) -> None:
    """What the training process does: says that it is ready, then how long the loop took, and all of it."""
    import tracked

    run = tracked.start("bench", tracking_uri=address, spool_dir=spool, progress=False, drain_timeout=3600.0)
    with run:
        while not run.url:  # the server has not made it yet
            time.sleep(0.05)
        answers.send(run.id)
        go.recv()
        start = time.perf_counter()
        for step in range(1, steps + 1):
            run.log({key: value(step, number) for number, key in enumerate(KEYS)}, step=step)
        written = time.perf_counter() - start
    answers.send((written, time.perf_counter() - start, run.undelivered))


def bare(address: str, steps: int) -> float:
    """Seconds for as many points by `log_batch` alone."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(address)
    run_id = client.create_run("0").info.run_id
    now, batch = int(time.time() * 1000), []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch += [Metric(key, value(step, number), now, step) for number, key in enumerate(KEYS)]
        if len(batch) == IN_A_REQUEST:
            client.log_batch(run_id, metrics=batch)
            batch = []
    if batch:
        client.log_batch(run_id, metrics=batch)
    return time.perf_counter() - start


class Memory:
    """The most that a process takes above what it took at first, in MB; watched until it is left."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._first = self._process.memory_info().rss
        self.most = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            try:
                self.most = max(self.most, (self._process.memory_info().rss - self._first) / 1e6)
            except psutil.NoSuchProcess:
                return

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        return self.most


def check_whole(address: str, run_id: str, steps: int) -> None:
    """Read every point back.

    Raises:
        AssertionError: One is missing, there twice, or another.
    """
    from mlflow import MlflowClient

    client = MlflowClient(address)
    for number, key in enumerate(KEYS):
        points = client.get_metric_history(run_id, key)
        found = sorted((point.step, point.value) for point in points)
        if found != [(step, value(step, number)) for step in range(1, steps + 1)]:
            raise AssertionError(f"{key} of run {run_id} is not what was logged: {len(found)} points")


def measure(points: int) -> list[Row]:
    steps = points // len(KEYS)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        address = stack.enter_context(mlflow_server(Path(name) / "server"))
        context = get_context("spawn")
        answers, theirs = context.Pipe()
        go, waits = context.Pipe()
        arguments = (theirs, waits, address, Path(name) / "spool", steps)
        training = context.Process(target=write, args=arguments)
        training.start()
        run_id = answers.recv()
        assert training.pid is not None
        # The sender is a session of its own, but the trainer's child.
        [sender] = [
            child
            for child in psutil.Process(training.pid).children(recursive=True)
            if "tracked.sender" in child.cmdline()
        ]
        trainer_memory, sender_memory = Memory(training.pid), Memory(sender.pid)
        go.send(None)
        written, delivered, undelivered = answers.recv()
        memory = trainer_memory.end(), sender_memory.end()
        training.join()
        if undelivered:
            raise AssertionError(f"{undelivered} points were not delivered")
        check_whole(address, run_id, steps)
        # A server of its own: a database that holds a million points already takes the next ones slower.
        other = stack.enter_context(mlflow_server(Path(name) / "other"))
        by_hand = stack.enter_context(fresh_process()).submit(bare, other, steps).result()
    rate = Comparison("bare log_batch", delivered / by_hand, SLOWEST)
    return [
        Row(f"{points:,} points of {len(KEYS)} metrics: written", [written]),
        Row("… and delivered, all read back equal", [delivered], comparisons=[rate]),
        Row("bare `log_batch` of 1000 points each", [by_hand]),
        *(
            Row(
                f"memory of the {who} above its start",
                [most],
                "MB",
                [Comparison("1 MB", most, MOST_MEMORY)],
            )
            for who, most in zip(("trainer", "sender"), memory, strict=True)
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.volume", description=__doc__)
    parser.add_argument("--points", type=int, default=1_000_000, help="points in all")
    options = parser.parse_args(arguments)
    return report(lambda: measure(options.points))


if __name__ == "__main__":
    sys.exit(main())
