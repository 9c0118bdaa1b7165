"""How long `compare` takes for 50 runs of 10,000 points each, picture included: server, and SQLite file.

Each run has its training loss at 9800 steps, its validation loss and accuracy at 100 evaluations. They are
written into the database of the server before it starts. A second pair of rows has no bar: there the runs are
compared by the training loss, so that the whole of it has to be fetched for its best values to be exact.

Seconds are those of the whole command, from its start to its end, Python's and MLflow's imports included.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.measure import Comparison, Row, fresh_process, in_turn, mlflow_server, report

ROOT = Path(__file__).resolve().parent.parent
RUNS = 50
STEPS, EVALUATIONS = 9800, 100
LIMIT = 10.0  # seconds
ROWS = ("server", "sqlite", "server, train/loss", "sqlite, train/loss")


def points(seed: int) -> Iterator[tuple[str, int, float]]:
    """The 10,000 points of a run as (key, step, value)."""
    draw = random.Random(seed)
    rate, floor = draw.uniform(2e-4, 2e-3), draw.uniform(0.05, 0.4)
    for step in range(1, STEPS + 1):
        loss = floor + 2 * math.exp(-rate * step)
        yield "train/loss", step, loss * draw.uniform(0.8, 1.2)
        if step % (STEPS // EVALUATIONS) == 0:
            yield "val/loss", step, loss * draw.uniform(1.0, 1.1) + 1e-5 * step * floor
            yield "val/accuracy", step, 1 - loss / 3 * draw.uniform(0.95, 1.05)


def write_runs(directory: Path) -> list[str]:
    """Make the database that a server in this directory will open, with the runs in it; their IDs."""
    from mlflow.entities import Metric, Param
    from mlflow.store.tracking.dbmodels.models import SqlMetric

    from tracked.embedded import open_database

    file = directory / "mlflow.db"
    store = open_database(f"sqlite:///{file}", file)
    experiment = store.create_experiment("bench", str(directory / "artifacts"))
    now = int(time.time() * 1000)
    run_ids = []
    for number in range(RUNS):
        run = store.create_run(experiment, "", now, [], f"run-{number}")
        run_ids.append(run.info.run_id)
        rows = [
            {"run_uuid": run_ids[-1], "key": key, "step": step, "timestamp": now + step, "value": value}
            for key, step, value in points(number)
        ]
        newest = {row["key"]: row for row in rows}
        first = [{**row, "is_nan": False} for row in rows if row is not newest[row["key"]]]
        with store.engine.begin() as connection:
            connection.execute(SqlMetric.__table__.insert(), first)
        last = [Metric(row["key"], row["value"], row["timestamp"], row["step"]) for row in newest.values()]
        store.log_batch(
            run_ids[-1], last, [Param("lr", f"{10 ** -(1 + number / 25):.3g}"), Param("batch", "64")], []
        )
    store.engine.dispose()
    return run_ids


def seconds_to_compare(uri: str, run_ids: Sequence[str], picture: Path, *options: str) -> float:
    """Seconds that the command takes.

    Raises:
        RuntimeError: It failed, or drew nothing.
    """
    picture.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tracked.run", "compare", *run_ids, "--to", str(picture), *options]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "TRACKED_SPOOL": str(picture.parent / "spool")}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode or not picture.exists():
        raise RuntimeError(f"compare ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return seconds


def measure(repeat: int, workers: int = 1, only: Sequence[str] = ROWS) -> list[Row]:
    """The rows named in `only`, each measured `repeat` times."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with fresh_process() as pool:
            run_ids = pool.submit(write_runs, directory).result()
        with mlflow_server(directory, workers) as address:
            uris = {"server": address, "sqlite": f"sqlite:///{directory / 'mlflow.db'}"}
            hard = ("--metric", "train/loss")
            variants = {
                row: partial(
                    seconds_to_compare,
                    uris[row.partition(",")[0]],
                    run_ids,
                    directory / "curves.png",
                    *(hard if row.endswith("train/loss") else ()),
                )
                for row in only
            }
            found = in_turn(variants, dict.fromkeys(variants, repeat))
    return [
        Row(
            f"`compare` of {RUNS} runs of 10,000 points and their picture, {row}",
            values,
            comparisons=[]
            if row.endswith("train/loss")
            else [Comparison("ten seconds", max(values) / LIMIT, 1.0)],
        )
        for row, values in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the MLflow server")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="measure these rows alone")
    options = parser.parse_args(arguments)
    return report(lambda: measure(options.repeat, options.workers, options.only))


if __name__ == "__main__":
    sys.exit(main())
