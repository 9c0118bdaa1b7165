"""How fast the thin loop trains, beside a loop by hand, Lightning and accelerate, without tracking and with it.

A small step (SimpleNet on vectors of 784) shows what a loop costs by itself; a large one (ResNet-18 on pictures
of 32×32) what is left of that. Every row trains the same model with Adam on the same shuffled batches of 64.
"With tracking" logs the loss at every step to a real server: `tracked` its own way, the others with what they
bring for MLflow. Timed is the training of one epoch; what exists before it is made before the clock starts.
The smallest step of all is `experiments/iris.py`'s: there it is the whole batch of 120 flowers for 4,000 epochs,
with the intervals that the file proposes, against the same loop bare.
`OMP_NUM_THREADS=1` keeps threads from waiting for each other on two cores.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Comparison, Row, fresh_process, in_turn, median_ratio, mlflow_server, report
from benchmarks.overhead import BATCH, lightning_epoch, now
from experiments import iris
from experiments.mnist import SimpleNet

STEPS = {"SimpleNet": 938, "ResNet-18": 200}
MODELS = (*STEPS, "iris")
AT_LEAST_AS_FAST = 1.0
IRIS_EPOCHS, IRIS_LIMIT = 4000, 1.3


@functools.lru_cache(maxsize=2)
def samples(model: str, steps: int) -> TensorDataset:
    """`steps` batches: float32 [784] or [3, 32, 32] in [0, 1), int64 labels below 10."""
    generator = torch.Generator().manual_seed(0)
    shape = (784,) if model == "SimpleNet" else (3, 32, 32)
    inputs = torch.rand(steps * BATCH, *shape, generator=generator)
    return TensorDataset(inputs, torch.randint(10, (steps * BATCH,), generator=generator))


def built(model: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    if model == "SimpleNet":
        network: nn.Module = SimpleNet()
    else:
        from torchvision.models import resnet18

        network = resnet18(num_classes=10)
    return network, torch.optim.Adam(network.parameters(), lr=1e-3)


def by_hand(model: str, steps: int) -> float:
    network, optimizer = built(model)
    loader = DataLoader(samples(model, steps), batch_size=BATCH, shuffle=True)
    network.train()
    start = now()
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return time.perf_counter() - start


def bare_iris(epochs: int) -> float:
    """The experiment's training with nothing around it, evaluated every 200 epochs."""
    task = iris.build(iris.Params())
    (x, y), (val_x, val_y) = (data.tensors for data in iris.load())
    start = now()
    for epoch in range(1, epochs + 1):
        task.optimizer.zero_grad()
        functional.cross_entropy(task.model(x), y).backward()
        task.optimizer.step()
        if epoch % 200 == 0:
            with torch.inference_mode():
                outputs = task.model(val_x)
                functional.cross_entropy(outputs, val_y).item()
                iris.accuracy(outputs, val_y).item()
    return time.perf_counter() - start


def tracked_iris(address: str, spool: Path, epochs: int) -> float:
    """The same as its experiment file is trained, with the intervals of the line in it."""
    import tracked
    from tracked.loop import fit

    run = tracked.start(
        "iris",
        tracking_uri=address,
        spool_dir=spool,
        epochs=epochs,
        log_every=10,
        eval_every="200 epochs",
        patience=50,
        checkpoint_every="2000 epochs",
        device="cpu",
        progress=False,
    )
    with run:
        task = iris.build(iris.Params())
        start = now()
        fit(task, run)
        return time.perf_counter() - start


def thin_loop(model: str, steps: int, address: str | None, spool: Path) -> float:
    """The loop of an experiment file; without an address its journal stays on the disk."""
    from tracked import Task, start
    from tracked.attempts import rehearse
    from tracked.loop import fit
    from tracked.schedule import Settings
    from tracked.tracking import Run

    network, optimizer = built(model)
    data = samples(model, steps)
    task = Task(
        model=network, optimizer=optimizer, loss=functional.cross_entropy, train_data=data, batch_size=BATCH
    )
    if address is None:
        settings = Settings(epochs=1, checkpoint_every="1000000 steps", device="cpu")
        run = Run(rehearse(spool / f"{time.time_ns()}", {}), settings)
    else:
        run = start(
            "bench",
            tracking_uri=address,
            spool_dir=spool,
            epochs=1,
            checkpoint_every="1000000 steps",
            device="cpu",
            progress=False,
        )
    with run:
        begin = now()
        fit(task, run)
        return time.perf_counter() - begin


def lightning(model: str, steps: int, address: str | None) -> float:
    if address is None:
        return lightning_epoch(*built(model), samples(model, steps), None, logs=False)
    from lightning.pytorch.loggers import MLFlowLogger

    logger = MLFlowLogger(experiment_name="bench", tracking_uri=address)
    return lightning_epoch(*built(model), samples(model, steps), logger)


def accelerated(model: str, steps: int, address: str | None) -> float:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    if address is not None:
        os.environ["MLFLOW_TRACKING_URI"] = address
    accelerator: Any = Accelerator(cpu=True, log_with=None if address is None else "mlflow")
    if address is not None:
        accelerator.init_trackers("bench")
    loader = DataLoader(samples(model, steps), batch_size=BATCH, shuffle=True)
    network, optimizer, batches = accelerator.prepare(*built(model), loader)
    network.train()
    start = now()
    for step, (x, y) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(x), y)
        accelerator.backward(loss)
        optimizer.step()
        if address is not None:
            accelerator.log({"train/loss": loss.item()}, step=step)
    seconds = time.perf_counter() - start
    if address is not None:
        accelerator.end_training()
    return seconds


TITLES = {
    "hand-written": "by hand, plain `DataLoader`",
    "tracked-offline": "the thin loop, nothing sent",
    "lightning": "Lightning, no logger",
    "accelerate": "accelerate, no tracker",
    "tracked": "the thin loop, every loss tracked",
    "lightning-mlflow": "Lightning + `MLFlowLogger`",
    "accelerate-mlflow": "accelerate + its MLflow tracker",
}


def measure(repeat: int, models: Sequence[str] = MODELS, only: Sequence[str] = ()) -> list[Row]:
    """All rows of each model, or those named in `only` (not of iris, which has two), `repeat` times each."""
    os.environ["TRACKED_SENDER_IDLE"] = "600"  # else it would leave while the others have their turns
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        spool = Path(name) / "spool"
        address = stack.enter_context(mlflow_server(Path(name) / "server"))

        def apart(function: Callable[..., float], *arguments: object) -> Callable[[str, int], float]:
            # A process each: what a library imports, patches or leaves running must cost no other row.
            pool = stack.enter_context(fresh_process())
            return lambda model, steps: pool.submit(function, model, steps, *arguments).result()

        calls: dict[str, Callable[[str, int], float]] = {
            "hand-written": apart(by_hand),
            "tracked-offline": apart(thin_loop, None, spool / "offline"),
            "lightning": apart(lightning, None),
            "accelerate": apart(accelerated, None),
            "tracked": apart(thin_loop, address, spool),
            "lightning-mlflow": apart(lightning, address),
            "accelerate-mlflow": apart(accelerated, address),
        }
        calls = {name: call for name, call in calls.items() if not only or name in only}
        rows = [
            row for model in models if model in STEPS for row in _rows(model, _timed(model, calls, repeat))
        ]
        return rows if "iris" not in models else [*rows, *_iris_rows(repeat, address, spool)]


def _iris_rows(repeat: int, address: str, spool: Path) -> list[Row]:
    with fresh_process() as bare, fresh_process() as ours:

        def seconds(epochs: int) -> dict[str, Callable[[], float]]:
            return {
                "bare": lambda: bare.submit(bare_iris, epochs).result(),
                "tracked": lambda: ours.submit(tracked_iris, address, spool, epochs).result(),
            }

        in_turn(seconds(200), {"bare": 1, "tracked": 1})
        found = in_turn(seconds(IRIS_EPOCHS), {"bare": repeat, "tracked": repeat})
    ratio = median_ratio(found["tracked"], found["bare"])
    return [
        Row("iris: the bare loop", found["bare"]),
        Row("iris: tracked", found["tracked"], comparisons=[Comparison("bare", ratio, IRIS_LIMIT)]),
    ]


def _timed(model: str, calls: dict[str, Callable[[str, int], float]], repeat: int) -> dict[str, list[float]]:
    for call in calls.values():
        call(model, 2)
    variants = {name: functools.partial(call, model, STEPS[model]) for name, call in calls.items()}
    return in_turn(variants, dict.fromkeys(calls, repeat))


def _rows(model: str, seconds: dict[str, list[float]]) -> Iterator[Row]:
    base = seconds.get("hand-written")
    for name, found in seconds.items():
        ours = name.startswith("tracked")
        compared = (
            []
            if base is None or name == "hand-written"
            else [Comparison("hand-written", median_ratio(found, base), AT_LEAST_AS_FAST if ours else None)]
        )
        speeds = [STEPS[model] * BATCH / each for each in found]
        yield Row(f"{model}: {TITLES[name]}", speeds, "samples/s", compared)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of every row")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="these alone")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=(), help="measure these rows alone")
    options = parser.parse_args(arguments)
    note = "\n\nThe ratios are those of the times."
    return report(lambda: measure(options.repeat, options.models, options.only), note=note)


if __name__ == "__main__":
    sys.exit(main())
