"""What a sweep costs beside its trainings, what pruning saves, and what promotion is worth.

The task is real: `experiments/digits.py`, on a real server. "Cost of a trial" is what a sweep takes for some
trials more, less what the same trainings take bare; so what is paid once cancels out. The trials are short for it, 2
epochs of a small network: what a trial costs shows best beside little else. Two workers are compared with one by
trials of 20 epochs of the file's own network, delivery included: the server, which has the same two cores, takes its
share whoever trains. Savings are of studies that differ in their pruner alone: a random sampler suggests the same
trials to all of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.measure import Comparison, Row, in_turn, mlflow_server, report

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "experiments/digits.py"
SPACE = ("lr=log(1e-4,1e-1)", "hidden=choice(4,8,16)", "dropout=uniform(0,0.5)")
MORE, FEW = 24, 4  # trials of 2 epochs
LONG_MORE, LONG_FEW = 8, 4  # trials of 20 epochs
COST_LIMIT = 0.05  # seconds a trial
SPEED_UP_LIMIT = 1 / 1.7
SAVED_LIMIT = 0.5

BARE = """
import sys, time
from tracked import experiment
from tracked.seeding import derive, seed_generators
import torch
digits = experiment.load(sys.argv[1])
def train(**params):
    seed_generators(derive(0, "build"))
    task = digits.task(digits.params_class(**params))
    loader = torch.utils.data.DataLoader(task.train_data, batch_size=task.batch_size, shuffle=True)
    val = torch.utils.data.DataLoader(task.val_data, batch_size=task.batch_size)
    for epoch in range(int(sys.argv[2])):
        task.model.train()
        for x, y in loader:
            task.optimizer.zero_grad()
            task.loss(task.model(x), y).backward()
            task.optimizer.step()
        task.model.eval()
        with torch.no_grad():
            for x, y in val:
                outputs = task.model(x)
                task.loss(outputs, y).item(), task.metrics["accuracy"](outputs, y).item()
        task.scheduler.step()
train(hidden=4)
start = time.perf_counter()
for number in range(int(sys.argv[3])):
    train(hidden=4)
print((time.perf_counter() - start) / int(sys.argv[3]))
"""


def sweep(
    address: str, *words: str, trials: int, epochs: int, workers: int = 1
) -> tuple[float, dict[str, Any]]:
    """Seconds, and the last line, of a sweep of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "tracked.run", "sweep", str(DIGITS), *words),
            *("--trials", str(trials), "--epochs", str(epochs), "--workers", str(workers), "--json"),
            *("--tracking-uri", address),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        start = time.perf_counter()
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return seconds, json.loads(done.stdout.splitlines()[-1])


def bare(epochs: int, trials: int) -> float:
    """Seconds of one training by hand, the second of its process and those after it."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(DIGITS), str(epochs), str(trials)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def costs(address: str, repeat: int) -> list[Row]:
    """A trial's seconds by one worker and by two, beside the bare training."""
    words = ("lr=log(1e-3,1e-1)", "--sampler", "random", "--pruner", "none")
    kinds: dict[str, tuple[int, int, int, int, tuple[str, ...]]] = {
        # workers, epochs, trials of the shorter sweep, and how many more the longer one has
        "short": (1, 2, FEW, MORE, ("hidden=4",)),
        "one": (1, 20, LONG_FEW, LONG_MORE, ()),
        "two": (2, 20, LONG_FEW, LONG_MORE, ()),
    }

    def seconds(kind: str, *, longer: bool) -> float:
        workers, epochs, few, more, fixed = kinds[kind]
        trials = few + more if longer else few
        return sweep(address, *words, *fixed, trials=trials, epochs=epochs, workers=workers)[0]

    variants: dict[str, Callable[[], float]] = {"bare": lambda: bare(2, MORE)}
    for kind in kinds:
        variants[f"{kind}: few"] = functools.partial(seconds, kind, longer=False)
        variants[f"{kind}: more"] = functools.partial(seconds, kind, longer=True)
    found = in_turn(variants, dict.fromkeys(variants, repeat))
    # Each sweep's median first: one that fell into a slow minute would spoil a difference with another.
    medians = {name: statistics.median(values) for name, values in found.items()}

    def a_trial(kind: str) -> float:
        return (medians[f"{kind}: more"] - medians[f"{kind}: few"]) / kinds[kind][3]

    cost = a_trial("short") - medians["bare"]
    speed_up = a_trial("two") / a_trial("one")
    return [
        Row("a training of 2 epochs, by hand", found["bare"]),
        Row("a trial of 2 epochs", [a_trial("short")]),
        Row("… its cost beside the training", [cost], comparisons=[Comparison("1 s", cost, COST_LIMIT)]),
        Row("a trial of 20 epochs, one worker", [a_trial("one")]),
        Row(
            "a trial of 20 epochs, two workers",
            [a_trial("two")],
            comparisons=[Comparison("one worker", speed_up, SPEED_UP_LIMIT)],
        ),
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
