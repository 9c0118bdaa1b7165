"""Runs every benchmark and prints one Markdown table: `python -m benchmarks` (about a quarter of an hour)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from benchmarks import checkpoint, compare, loop, overhead, startup
from benchmarks.measure import Row, report


def measure(repeat: int, workers: int) -> Iterator[Row]:
    yield from overhead.measure(repeat, repeat, workers)
    yield from loop.measure(repeat)
    yield from checkpoint.measure(repeat, checkpoint.STEPS, checkpoint.EVERY, "server", workers)
    yield from startup.measure(repeat)
    yield from compare.measure(repeat, workers)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of every row")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the MLflow server")
    options = parser.parse_args(arguments)
    about = f"MLflow server with {options.workers} worker(s)"
    return report(lambda: measure(options.repeat, options.workers), about=about)


if __name__ == "__main__":
    sys.exit(main())
