"""What the benchmarks share: a real server, rounds in turn, and one table of results."""

from __future__ import annotations

import contextlib
import operator
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from json import loads
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import psutil
import torch

SERVER_START_SECONDS = 120.0
QUIET = 0.05  # of the processors' time, taken by the host of a virtual machine
TRIES = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """One figure set against another.

    Attributes:
        against: What the figure is divided by, in words.
        ratio: How many times the other it is.
        limit: The largest ratio that passes; None where nothing was promised.
    """

    against: str
    ratio: float
    limit: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the ratio is within the limit, or nothing was promised."""
        return self.limit is None or self.ratio <= self.limit

    def __str__(self) -> str:
        text = f"{self.ratio:.3f} × {self.against}"
        if self.limit is None:
            return text
        return f"{text} (bar {self.limit:g}: {'PASS' if self.passed else 'FAIL'})"


@dataclass(frozen=True)
class Row:
    """One measured quantity: its values over the rounds, and what they are compared to."""

    name: str
    values: Sequence[float]
    unit: str = "s"
    comparisons: Sequence[Comparison] = field(default_factory=tuple)

    def __str__(self) -> str:
        middle = f"{statistics.median(self.values):.4g} {self.unit}"
        spread = f"{min(self.values):.4g} – {max(self.values):.4g}"
        against = "; ".join(str(comparison) for comparison in self.comparisons)
        return f"| {self.name} | {middle} | {spread} | {len(self.values)} | {against} |"


def table(rows: Sequence[Row]) -> str:
    """The rows as one Markdown table."""
    head = "| what | median | min – max | n | compared |\n| --- | --- | --- | --- | --- |"
    return "\n".join([head, *map(str, rows)])


def failed(rows: Sequence[Row]) -> list[str]:
    """The names of the rows that miss a bar."""
    return [row.name for row in rows if not all(comparison.passed for comparison in row.comparisons)]


def report(measure: Callable[[], Iterable[Row]], *, about: str = "", note: str = "") -> int:
    """Measure and print: the machine, a Markdown table, what missed its bar. The exit status is 1 if something did."""
    where, host = "; ".join(filter(None, [machine(), about])), Host()
    rows = [*measure()]
    print(
        f"{where}; the host took {host.taken():.0%} of the processors' time meanwhile\n\n{table(rows)}{note}"
    )
    missed = failed(rows)
    for name in missed:
        print(f"FAIL: {name}")
    return 1 if missed else 0


def machine() -> str:
    """One line: processor, cores, versions, and how busy others keep it: call it before measuring."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(FileNotFoundError):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), cpu)
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, mlflow {version('mlflow')}, "
        f"{psutil.cpu_percent(1):.0f} % busy beforehand"
    )


class Host:
    """What the host of a virtual machine has taken of its processors' time since this was made."""

    def __init__(self) -> None:
        self._start, self._stolen = time.monotonic(), _stolen()

    def taken(self) -> float:
        """The share of all processors' time, in [0, 1]; 0 where the system does not tell."""
        return (_stolen() - self._stolen) / ((time.monotonic() - self._start) * (os.cpu_count() or 1))


def _stolen() -> float:
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of `values[i] / base[i]`: both of one round, so slow drifts cancel."""
    return statistics.median(value / other for value, other in zip(values, base, strict=False))


def in_turn(variants: Mapping[str, Callable[[], T]], rounds: Mapping[str, int]) -> dict[str, list[T]]:
    """Run every variant once per round; the order moves on by one from round to round.

    A host that is busy elsewhere takes processors away in the middle of what is measured. A round in which it
    took more than `QUIET` of their time is measured again, up to `TRIES` times in all, and the quietest counts.

    Args:
        variants: Name to a call that measures one repetition.
        rounds: Name to its number of repetitions; a variant sits out the rounds beyond.
    """
    names = list(variants)
    results: dict[str, list[T]] = {name: [] for name in names}
    for number in range(max(rounds[name] for name in names)):
        first = number % len(names)
        order = [name for name in names[first:] + names[:first] if number < rounds[name]]
        tries: list[tuple[float, dict[str, T]]] = []
        while len(tries) < TRIES and all(taken > QUIET for taken, _ in tries):
            host = Host()
            found = {name: variants[name]() for name in order}
            tries.append((host.taken(), found))
            print(f"round {number + 1}, {tries[-1][0]:.0%} taken: {found}", file=sys.stderr, flush=True)
        _, quietest = min(tries, key=operator.itemgetter(0))
        for name in order:
            results[name].append(quietest[name])
    return results


def fresh_process() -> ProcessPoolExecutor:
    """One new interpreter for whatever is submitted to it, alive until the `with` block ends."""
    # MLflow prints the run's address on standard output, where the table goes.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))


@contextlib.contextmanager
def mlflow_server(directory: Path, workers: int = 1) -> Iterator[str]:
    """A real `mlflow server` on a free loopback port, SQLite behind it; yields its address.

    Raises:
        RuntimeError: The server ended or did not answer /health in two minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}", "--workers", str(workers)]
    command += ["--artifacts-destination", str(directory / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = f"http://127.0.0.1:{port}"
    log = directory / "server.log"
    with log.open("wb") as output:
        # A session of its own, so that its workers can be ended together with it.
        # It stands for a machine of its own, and these cores are the training's.
        server = subprocess.Popen(
            ["nice", "-n", "19", *command],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    with contextlib.suppress(OSError):  # `nice` counts only within a session where Linux groups by them
        Path(f"/proc/{server.pid}/autogroup").write_text("19")
    try:
        _wait_until_healthy(server, address, log)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + SERVER_START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"no mlflow server at {address}:\n{log.read_text(errors='replace')[-2000:]}")


def check_delivered(address: str, run_id: str, key: str, steps: int) -> None:
    """Read a metric's history back, without MLflow's client: it stays out of the measured process.

    Raises:
        AssertionError: The history does not hold `steps` points at `steps` different steps.
    """
    query = urllib.parse.urlencode({"run_id": run_id, "metric_key": key})
    history = f"{address}/api/2.0/mlflow/metrics/get-history?{query}"
    with urllib.request.urlopen(history, timeout=60) as answer:
        points = loads(answer.read()).get("metrics", [])
    found = len(points), len({point.get("step", 0) for point in points})
    if found != (steps, steps):
        raise AssertionError(f"{key} has {found[0]} points at {found[1]} steps, expected {steps} of both")
