"""Runs every benchmark and prints one Markdown table: `python -m benchmarks` (about a quarter of an hour)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import checkpoint, compare, loop, overhead, startup
from benchmarks.measure import failed, machine, table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of every row")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the MLflow server")
    options = parser.parse_args(arguments)
    where = f"{machine()}; MLflow server with {options.workers} worker(s)"
    rows = [
        *overhead.measure(options.repeat, options.repeat, options.workers),
        *loop.measure(options.repeat),
        *checkpoint.measure(options.repeat, checkpoint.STEPS, checkpoint.EVERY, "server", options.workers),
        *startup.measure(options.repeat),
        *compare.measure(options.repeat, options.workers),
    ]
    print(f"{where}\n\n{table(rows)}")
    missed = failed(rows)
    for name in missed:
        print(f"FAIL: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
