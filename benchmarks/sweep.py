"""What a sweep costs beside its trainings, what pruning saves, and what promotion is worth.

The task is real: `experiments/digits.py`, on a real server. What a trial costs is measured where it shows best: in
trials of 2 epochs of a small network, each between two trainings of the same by hand (benchmarks/digits_by_hand.py).
Two workers are compared with one by trials of 20 epochs of the file's own network, delivery included: the server,
which has the same two cores, takes its share whoever trains. What is paid once a sweep cancels out, because a sweep of
some trials is taken from one of more. Savings are of studies that differ in their pruner alone: a random sampler
suggests the same trials to all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlflow import MlflowClient

from benchmarks.digits_by_hand import EPOCHS
from benchmarks.measure import Comparison, Row, in_turn, median_ratio, mlflow_server, report

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "experiments/digits.py"
BY_HAND = ROOT / "benchmarks/digits_by_hand.py"
SPACE = ("lr=log(1e-4,1e-1)", "hidden=choice(4,8,16)", "dropout=uniform(0,0.5)")
RANDOM = ("lr=log(1e-3,1e-1)", "--sampler", "random", "--pruner", "none")
WARM_UP, TRIALS = 4, 40  # trials of 2 epochs
LONG_MORE, LONG_FEW = 8, 4  # trials of 20 epochs
COST_LIMIT = 0.05  # seconds a trial
SPEED_UP_LIMIT = 1 / 1.7
SAVED_LIMIT = 0.5


def sweep(
    address: str,
    *words: str,
    trials: int,
    epochs: int,
    workers: int = 1,
    file: Path = DIGITS,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> tuple[float, dict[str, Any]]:
    """Seconds, and the last line, of a sweep of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "tracked.run", "sweep", str(file), *words),
            *("--trials", str(trials), "--epochs", str(epochs), "--workers", str(workers), "--json"),
            *("--tracking-uri", address),
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return seconds, json.loads(done.stdout.splitlines()[-1])


def cost(address: str) -> tuple[float, float]:
    """Seconds of a training of 2 epochs by hand, and of what a trial takes beside it: means over a sweep."""
    with tempfile.NamedTemporaryFile("r") as times:
        environment = {"TIMES": times.name}
        words = (*RANDOM, "hidden=4")
        sweep(address, *words, trials=TRIALS, epochs=EPOCHS, file=BY_HAND, environment=environment)
        began, ended = zip(*([float(word) for word in line.split()] for line in times), strict=True)
    by_hand = [end - begin for begin, end in zip(began, ended, strict=True)][WARM_UP:]
    # The trial between the two trainings that it is compared with.
    trial = [begin - end for begin, end in zip(began[WARM_UP + 1 :], ended[WARM_UP:], strict=False)]
    beside = [ours - (one + other) / 2 for ours, (one, other) in zip(trial, pairwise(by_hand), strict=True)]
    return statistics.mean(by_hand), statistics.mean(beside)


def one_and_two(address: str) -> tuple[float, float]:
    """Seconds of a trial of 20 epochs by one worker and by two, the sweeps of the one around those of the other."""
    seconds: dict[tuple[int, int], float] = {}
    few, more = LONG_FEW, LONG_FEW + LONG_MORE
    for workers, trials in ((1, few), (2, few), (2, more), (1, more)):
        seconds[workers, trials], _ = sweep(address, *RANDOM, trials=trials, epochs=20, workers=workers)
    one, two = ((seconds[workers, more] - seconds[workers, few]) / LONG_MORE for workers in (1, 2))
    return one, two


def costs(address: str, repeat: int) -> list[Row]:
    """What a trial takes beside its training, and two workers beside one; the figures are medians of rounds."""
    variants = {"cost": lambda: cost(address), "workers": lambda: one_and_two(address)}
    found = in_turn(variants, dict.fromkeys(variants, repeat))
    by_hand, beside = zip(*found["cost"], strict=True)
    one, two = zip(*found["workers"], strict=True)
    middle = Comparison("1 s", statistics.median(beside), COST_LIMIT)
    speed_up = Comparison("one worker", median_ratio(two, one), SPEED_UP_LIMIT)
    return [
        Row("a training of 2 epochs, by hand", by_hand),
        Row("what a trial of them takes beside it", beside, comparisons=[middle]),
        Row("a trial of 20 epochs, one worker", one),
        Row("a trial of 20 epochs, two workers", two, comparisons=[speed_up]),
    ]


def savings(address: str, seeds: int, trials: int, epochs: int) -> list[Row]:
    """Epochs of studies with several pruners against those without, and the best accuracy of each."""
    pruners: dict[str, tuple[str, ...]] = {
        "none": ("--pruner", "none"),
        "median": ("--pruner", "median"),
        "sha, not promoting": ("--pruner", "sha", "--no-promote"),
        "sha": ("--pruner", "sha"),
    }
    client = MlflowClient(address)
    trained: dict[str, list[float]] = {name: [] for name in pruners}
    best: dict[str, list[float]] = {name: [] for name in pruners}
    for seed in range(seeds):
        for name, pruner in pruners.items():
            line = (*SPACE, "--sampler", "random", "--seed", str(seed), *pruner)
            _, last = sweep(address, *line, trials=trials, epochs=epochs, workers=2)
            parent = client.get_run(last["run_id"])
            trained[name].append(parent.data.metrics["epochs/trained"])
            best[name].append(parent.data.metrics["best"])
            print(seed, name, trained[name][-1], best[name][-1], file=sys.stderr)
    noise = statistics.stdev(best["none"])
    rows = []
    for name in pruners:
        share = [part / whole for part, whole in zip(trained[name], trained["none"], strict=True)]
        # The pruner that is meant to save; a median spares the first five trials, and half of the others.
        limit = 1 - SAVED_LIMIT if name.startswith("sha") else None
        compared = [] if name == "none" else [Comparison("without pruning", statistics.median(share), limit)]
        rows.append(Row(f"{name}: epochs", trained[name], "epochs", compared))
        lost = statistics.mean(best["none"]) - statistics.mean(best[name])
        within = [] if name == "none" else [Comparison("the noise of seeds, lost", lost / noise, 1.0)]
        rows.append(Row(f"{name}: best accuracy", best[name], "", within))
    return rows


def promotion(address: str, seeds: int, trials: int, epochs: int) -> list[Row]:
    """Epochs until the best validation loss that halving reaches with promotion and without."""
    variants: dict[str, tuple[str, ...]] = {"not promoting": ("--no-promote",), "promoting": ()}
    client = MlflowClient(address)
    until: dict[str, list[float]] = {name: [] for name in variants}
    best: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(seeds):
        line = (*SPACE, "--sampler", "random", "--seed", str(seed), "--pruner", "sha")
        parents = {}
        for name, options in variants.items():
            compared = ("--monitor", "val/loss", "--mode", "min", *options)
            _, last = sweep(address, *line, *compared, trials=trials, epochs=epochs, workers=2)
            parents[name] = last["run_id"]
            best[name].append(client.get_run(last["run_id"]).data.metrics["best"])
        target = max(best[name][-1] for name in variants)
        for name, parent in parents.items():
            until[name].append(_epochs_until(client, parent, target))
        print(seed, {name: (until[name][-1], best[name][-1]) for name in variants}, file=sys.stderr)
    plain, ours = until.values()
    ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    return [
        *(Row(f"sha, {name}: best loss", found, "") for name, found in best.items()),
        Row("sha, not promoting: epochs until the best that both reach", plain, "epochs"),
        Row("sha, promoting: epochs until that", ours, "epochs", [Comparison("not promoting", ratio, 1.0)]),
    ]


def _epochs_until(client: MlflowClient, run_id: str, loss: float) -> float:
    history = sorted(client.get_metric_history(run_id, "best"), key=lambda point: point.step)
    step = next(point.step for point in history if point.value <= loss)
    epochs = {point.step: point.value for point in client.get_metric_history(run_id, "epochs/trained")}
    return epochs[step]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name, mlflow_server(Path(name) / "server") as address:
        if options.only in (None, "costs"):
            yield from costs(address, options.repeat)
        for word, part in (("savings", savings), ("promotion", promotion)):
            if options.only in (None, word):
                yield from part(address, options.seeds, options.trials, options.epochs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of the costs")
    parser.add_argument("--seeds", type=int, default=5, help="studies of each pruner")
    parser.add_argument("--trials", type=int, default=27, help="trials of each study")
    parser.add_argument("--epochs", type=int, default=9, help="epochs of a trial that nothing stops")
    parser.add_argument("--only", choices=["costs", "savings", "promotion"], help="this part alone")
    options = parser.parse_args(arguments)
    return report(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
