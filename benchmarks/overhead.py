"""What logging the loss at every step costs the training loop, beside other ways to log it.

Every row trains the same 784-64-64-10 network with Adam on 938 batches of 64 samples. Timed is the loop
alone: data, model, optimizer and run exist before the clock starts. "delivered" goes on until every point
is on the server, and the history is then read back and counted, untimed.

Each row has had a short discarded repetition before the first timed one: torch is warm, the server has
answered, and the sender process of `tracked`, which imports MLflow once, is running. Rows of one framework
have their turns in one process: two processes of the same program differ by several per cent for good.

Run it on an idle machine: two processes that each keep two threads busy on two cores slow a loop of small
steps tenfold and more, because its threads wait for one another. `OMP_NUM_THREADS=1` takes that out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.measure import (
    Comparison,
    Row,
    check_delivered,
    fresh_process,
    in_turn,
    median_ratio,
    mlflow_server,
    report,
)
from experiments.mnist import SimpleNet

if TYPE_CHECKING:
    from lightning.pytorch.loggers.logger import Logger as LightningLogger

STEPS = 938
WARM_UP_STEPS = 20
BATCH = 64
NO_CHECKPOINT_IN_BETWEEN = "1000000 steps"


class Timing(NamedTuple):
    """Seconds from the loop's start to its end, and until every point was on the server."""

    loop: float
    delivered: float


@functools.lru_cache(maxsize=2)
def samples(steps: int) -> TensorDataset:
    """`steps` batches of MNIST's shape: float32 [784] in [0, 1), int64 labels below 10."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(steps * BATCH, 784, generator=generator)
    return TensorDataset(images, torch.randint(10, (steps * BATCH,), generator=generator))


def built() -> tuple[SimpleNet, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = SimpleNet()
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def now() -> float:
    """The clock, after a collection, so that no row pays for another's garbage."""
    gc.collect()
    return time.perf_counter()


def hand_written(steps: int) -> Timing:
    data, (model, optimizer) = samples(steps), built()
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    start = now()
    for x, y in loader:
        train_step(model, optimizer, x, y)
    loop = time.perf_counter() - start
    return Timing(loop, loop)


def bare(steps: int) -> Timing:
    from tracked.data import Batches

    data, (model, optimizer) = samples(steps), built()
    batches = Batches(data, batch_size=BATCH, seed=0)
    start = now()
    for x, y in batches.epoch(0):
        train_step(model, optimizer, x, y)
    loop = time.perf_counter() - start
    return Timing(loop, loop)


def served(address: str) -> str:
    """The server's own address, which may stand behind `tracked+`."""
    return address.removeprefix("tracked+")


def tracked_own_loop(steps: int, address: str, spool: Path) -> Timing:
    import tracked

    data, (model, optimizer) = samples(steps), built()
    with tracked.start(
        "bench",
        {"lr": 1e-3},
        tracking_uri=address,
        seed=0,
        spool_dir=spool,
        checkpoint_every=NO_CHECKPOINT_IN_BETWEEN,
        progress=False,
    ) as run:
        run.attach(model=model, optimizer=optimizer)
        start = now()
        for x, y in run.batches(data, batch_size=BATCH, epochs=1):
            run.log({"train/loss": train_step(model, optimizer, x, y)})
        loop = time.perf_counter() - start
    delivered = time.perf_counter() - start
    check_delivered(address, run.id, "train/loss", steps)
    return Timing(loop, delivered)


def mlflow_by_hand(steps: int, address: str, synchronous: bool) -> Timing:
    import mlflow

    mlflow.set_tracking_uri(address)
    mlflow.set_experiment("bench")
    data, (model, optimizer) = samples(steps), built()
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    with mlflow.start_run() as run:
        start = now()
        for step, (x, y) in enumerate(loader, 1):
            loss = train_step(model, optimizer, x, y)
            mlflow.log_metric("train/loss", loss.item(), step=step, synchronous=synchronous)
        loop = time.perf_counter() - start
        delivered = loop
        if not synchronous or address != served(address):
            mlflow.flush_async_logging()
            delivered = time.perf_counter() - start
    check_delivered(served(address), run.info.run_id, "train/loss", steps)
    return Timing(loop, delivered)


def a_call_of_the_store(steps: int, address: str) -> Timing:
    """Seconds that the plugin itself takes for as many metrics, below all of MLflow's own layers."""
    import mlflow
    from mlflow.entities import Metric

    mlflow.set_tracking_uri(address)
    mlflow.set_experiment("bench")
    metrics = [Metric("train/loss", 0.5, 1_700_000_000_000 + step, step) for step in range(steps)]
    with mlflow.start_run() as run:
        store = mlflow.tracking._tracking_service.utils._get_store()  # noqa: SLF001
        start = now()
        for metric in metrics:
            store.log_metric(run.info.run_id, metric)
        loop = time.perf_counter() - start
    return Timing(loop, loop)


def lightning_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: TensorDataset,
    logger: LightningLogger | None,
    *,
    logs: bool = True,
) -> float:
    """Seconds that Lightning trains for one epoch.

    Args:
        net: Of `data`'s shapes.
        optimizer: Of its parameters.
        data: Inputs and labels.
        logger: Gets each step's loss, if there is one.
        logs: Whether the module hands each step's loss to Lightning.
    """
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            x, y = batch
            loss = functional.cross_entropy(self.net(x), y)
            if logs:
                self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    class Clock(pl.Callback):
        start = end = 0.0

        def on_train_start(self, *_: object) -> None:
            self.start = now()

        def on_train_end(self, *_: object) -> None:
            self.end = time.perf_counter()

    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=logger or False,
        log_every_n_steps=1,
        callbacks=[clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(data, batch_size=BATCH, shuffle=True))
    return clock.end - clock.start


def lightning(steps: int, address: str) -> Timing:
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow import MlflowClient

    logger = MLFlowLogger(experiment_name="bench", tracking_uri=address)
    assert logger.experiment  # makes the run
    seconds = lightning_epoch(*built(), samples(steps), logger)
    assert logger.run_id is not None
    MlflowClient(address).get_run(logger.run_id)  # the plugin has delivered by then
    check_delivered(served(address), logger.run_id, "train/loss", steps)
    return Timing(seconds, seconds)


def lightning_alone(steps: int) -> Timing:
    seconds = lightning_epoch(*built(), samples(steps), None)
    return Timing(seconds, seconds)


def lightning_idle(steps: int) -> Timing:
    """What Lightning itself pays to hand a loss to a logger, whatever that does with it."""
    from lightning.pytorch.loggers.logger import Logger

    class Idle(Logger):
        name, version = "idle", "0"

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None: ...

        def log_hyperparams(self, *_: object, **__: object) -> None: ...

    seconds = lightning_epoch(*built(), samples(steps), Idle())
    return Timing(seconds, seconds)


def hugging_face(steps: int, address: str | None) -> Timing:
    """Without an address the Trainer reports to nobody."""
    import mlflow
    import transformers

    class Rows(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(samples(steps))

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            x, y = samples(steps)[index]
            return {"x": x, "labels": y}

    class WithLoss(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    class Clock(transformers.TrainerCallback):
        start = end = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.start = now()

        def on_train_end(self, *_: object, **__: object) -> None:
            self.end = time.perf_counter()

    clock, (model, optimizer) = Clock(), built()
    run_id = ""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        if address is not None:
            mlflow.set_tracking_uri(address)
            mlflow.set_experiment("bench")
            run_id = stack.enter_context(mlflow.start_run()).info.run_id
        trainer = transformers.Trainer(
            WithLoss(model),
            transformers.TrainingArguments(
                output_dir=directory,
                num_train_epochs=1,
                per_device_train_batch_size=BATCH,
                logging_steps=1,
                report_to=[] if address is None else ["mlflow"],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                max_grad_norm=0.0,
                remove_unused_columns=False,
            ),
            train_dataset=Rows(),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[clock],
        )
        # It prints every logged loss.
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        if address is None:
            return Timing(clock.end - clock.start, clock.end - clock.start)
        mlflow.flush_async_logging()
        delivered = time.perf_counter() - clock.start
    check_delivered(served(address), run_id, "loss", steps)
    return Timing(clock.end - clock.start, delivered)


def measure(repeat: int, repeat_others: int, workers: int, only: Sequence[str] = ()) -> list[Row]:
    """All rows, or those named in `only`, each measured `repeat` times (other loggers: `repeat_others`)."""
    # Else it would leave while the others have their turns, and start again in the midst of a timed loop.
    os.environ["TRACKED_SENDER_IDLE"] = "600"
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        os.environ["TRACKED_SPOOL"] = str(directory / "spool")
        address = stack.enter_context(mlflow_server(directory / "server", workers))

        # What a library imports, patches or leaves running must cost no row of another.
        processes = defaultdict[str, ProcessPoolExecutor](lambda: stack.enter_context(fresh_process()))

        def apart(of: str, function: Callable[..., Timing], *arguments: object) -> Callable[[int], Timing]:
            return lambda steps: processes[of].submit(function, steps, *arguments).result()

        ours: dict[str, Callable[[int], Timing]] = {
            "hand-written": hand_written,
            "bare": bare,
            "tracked": lambda steps: tracked_own_loop(steps, address, directory / "spool"),
        }
        others: dict[str, Callable[[int], Timing]] = {
            "mlflow-sync": apart("mlflow-sync", mlflow_by_hand, address, True),
            "mlflow-async": apart("mlflow-async", mlflow_by_hand, address, False),
            "lightning": apart("lightning", lightning, address),
            "hugging-face": apart("hugging-face", hugging_face, address),
            "plugin": apart("plugin", mlflow_by_hand, f"tracked+{address}", True),
            "lightning-alone": apart("lightning", lightning_alone),
            "lightning-idle": apart("lightning", lightning_idle),
            "lightning-plugin": apart("lightning", lightning, f"tracked+{address}"),
            "hugging-face-alone": apart("hugging-face", hugging_face, None),
            "hugging-face-plugin": apart("hugging-face", hugging_face, f"tracked+{address}"),
            "plugin-call": apart("plugin", a_call_of_the_store, f"tracked+{address}"),
        }
        chosen = {name: call for name, call in {**ours, **others}.items() if not only or name in only}
        for call in chosen.values():
            call(WARM_UP_STEPS)
        timings = in_turn(
            {name: functools.partial(call, STEPS) for name, call in chosen.items()},
            {name: repeat if name in ours else repeat_others for name in chosen},
        )
    return _rows(timings)


TITLES = {
    "hand-written": "hand-written loop, plain `DataLoader`, nothing logged",
    "bare": "bare loop on `tracked.data.Batches`, nothing logged",
    "tracked": "`tracked.start`, loss logged at every step",
    "mlflow-sync": "hand-written + `mlflow.log_metric`",
    "mlflow-async": "hand-written + `mlflow.log_metric(synchronous=False)`",
    "lightning": "Lightning + `MLFlowLogger`",
    "hugging-face": "Hugging Face `Trainer` + its MLflow callback",
    "plugin": "hand-written + `mlflow.log_metric` to `tracked+http://`",
    "lightning-alone": "Lightning without a logger",
    "lightning-idle": "Lightning + a logger that does nothing",
    "lightning-plugin": "Lightning + `MLFlowLogger` to `tracked+http://`",
    "hugging-face-alone": "Hugging Face `Trainer`, reporting to nobody",
    "hugging-face-plugin": "Hugging Face `Trainer` + its MLflow callback to `tracked+http://`",
    "plugin-call": "the plugin's own part of `mlflow.log_metric`, one call",
}
Limits = dict[str, float | None]  # by the name of the row to compare with
LOOP: dict[str, Limits] = {
    "tracked": {"bare": 1.02, "hand-written": 1.00},
    "plugin": {"hand-written": 1.3},
    "lightning-idle": {"lightning-alone": None},
    "lightning-plugin": {"lightning-alone": 1.15, "lightning-idle": None},
    "hugging-face-plugin": {"hugging-face-alone": 1.15},
}
LONGEST_CALL = 50.0  # µs
DELIVERY: dict[str, Limits] = {"tracked": {"hand-written": 1.25}}
OTHERWISE: Limits = {"hand-written": None}


def _rows(timings: dict[str, list[Timing]]) -> list[Row]:
    loops = {name: [timing.loop for timing in found] for name, found in timings.items()}
    delivered = {name: [timing.delivered for timing in found] for name, found in timings.items()}
    rows = []
    for name in timings:
        if name == "plugin-call":
            calls = [1e6 * seconds / STEPS for seconds in loops[name]]
            part = Comparison(f"{LONGEST_CALL:g} µs", median(calls) / LONGEST_CALL, 1.0)
            rows.append(Row(TITLES[name], calls, "µs", [part]))
            continue
        compared = _compared(name, loops[name], loops, LOOP.get(name, OTHERWISE))
        rows.append(Row(TITLES[name], loops[name], comparisons=compared))
        if delivered[name] != loops[name]:
            compared = _compared(name, delivered[name], loops, DELIVERY.get(name, OTHERWISE))
            rows.append(Row("… until all points are on the server", delivered[name], comparisons=compared))
    return rows


def _compared(
    name: str, values: Sequence[float], loops: dict[str, list[float]], limits: Limits
) -> list[Comparison]:
    return [
        Comparison(base, median_ratio(values, loops[base]), limit)
        for base, limit in limits.items()
        if base in loops and base != name
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="repetitions of our own rows")
    parser.add_argument("--repeat-others", type=int, default=5, help="repetitions of other loggers")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the MLflow server")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=(), help="measure these rows alone")
    options = parser.parse_args(arguments)
    about = f"MLflow server with {options.workers} worker(s)"
    rows = functools.partial(measure, options.repeat, options.repeat_others, options.workers, options.only)
    return report(rows, about=about)


if __name__ == "__main__":
    sys.exit(main())
