"""What a checkpoint of 200 MB every 50 steps costs: the stall, the steps in between, the memory.

The state is 60 float32 matrices, of which a step trains one, so a step stays short beside a large state. The
loop is the user's own; `run.batches` takes the checkpoint between two steps. The stall is therefore the time
from the end of a step's body to the start of the next, fetching the next batch included. It is compared with
copying the state once in memory, measured in the same process right before the loop.

Memory is measured in a repetition of its own, because looking at it disturbs the timing: proportional set
size, shared pages included, of the training process and the processes of its session, beyond what they had
in mid-loop before the first checkpoint. The sender has a session of its own and is reported apart.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from os import getpid
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.measure import Comparison, Row, fresh_process, in_turn, median_ratio, mlflow_server, report

MATRICES = 60
SIDE = 913  # 60 × 913² float32 values are 200 MB
BATCH = 128
STEPS = 551
EVERY = 50
MIB = 2**20
COPIES = 7  # repetitions of the in-memory copy
SAMPLE_EVERY = 0.02  # seconds


class MostlyIdle(nn.Module):
    """`MATRICES` square parameters, of which the first is used: [batch, SIDE] to [batch, SIDE]."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(SIDE, SIDE) / SIDE**0.5 for _ in range(MATRICES))

    def forward(self, x: Tensor) -> Tensor:
        """The first matrix applied to `x`, [batch, SIDE]."""
        return torch.tanh(x @ self.matrices[0])


@dataclass(frozen=True)
class Measured:
    """One repetition.

    Attributes:
        stalls: Seconds between two steps where a checkpoint was due, in order.
        between: Seconds of every other step, from the start of its body to the start of the next one.
        clone: Seconds for one copy of the state into new memory, as by `clone()`.
        copy: Seconds for one copy of the state into memory that exists.
        state_bytes: Size of the state.
        memory: Bytes of the training's processes in mid-loop, before the first checkpoint.
    """

    stalls: list[float]
    between: list[float]
    clone: float
    copy: float
    state_bytes: int
    memory: int

    def __str__(self) -> str:
        stall = f"{statistics.median(self.stalls):.4f} s" if self.stalls else "none"
        return f"step {statistics.median(self.between):.4f} s, stall {stall}, clone {self.clone:.4f} s"


def copies(state: Sequence[Tensor]) -> tuple[float, float]:
    """Median seconds for one copy of `state` into new memory, and into memory that exists."""
    fresh, reused = [], []
    target = [tensor.clone() for tensor in state]
    for _ in range(COPIES):
        start = time.perf_counter()
        new = [tensor.clone() for tensor in state]
        fresh.append(time.perf_counter() - start)
        del new
        start = time.perf_counter()
        for to, tensor in zip(target, state, strict=True):
            to.copy_(tensor)
        reused.append(time.perf_counter() - start)
    return statistics.median(fresh), statistics.median(reused)


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a training process and the processes it started, and those of its sender."""
    training = sender = 0
    trainer = psutil.Process(pid)
    for process in [trainer, *trainer.children(recursive=True)]:
        # A process may end while it is being looked at.
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            pss = process.memory_full_info().pss
            if "tracked.sender" in process.cmdline():
                sender += pss
            else:
                training += pss
    return training, sender


def train(uri: str, spool: Path, steps: int, every: int, checkpoints: bool) -> Measured:
    """One run of `steps` steps, with a checkpoint every `every` steps or with none before the end."""
    import tracked

    torch.manual_seed(0)
    model = MostlyIdle()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.randn(steps * BATCH, SIDE))
    state = [parameter.detach() for parameter in model.parameters()]
    clone, copy = copies(state)
    begins: list[float] = []
    ends: list[float] = []
    memory = 0
    with tracked.start(
        "bench",
        {"every": every},
        tracking_uri=uri,
        seed=0,
        spool_dir=spool,
        checkpoint_every=f"{every} steps" if checkpoints else "1000000 steps",
        progress=False,
    ) as run:
        run.attach(model=model, optimizer=optimizer)
        gc.collect()
        for (x,) in run.batches(data, batch_size=BATCH, epochs=1):
            begins.append(time.perf_counter())
            optimizer.zero_grad()
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            run.log({"train/loss": loss})
            if len(begins) == every // 2:
                memory, _ = memory_of(getpid())
            ends.append(time.perf_counter())
    # The step at which the memory was looked at, and the first one, are no ordinary steps.
    odd = {0, every // 2 - 1}
    due = [step for step in range(len(begins) - 1) if checkpoints and (step + 1) % every == 0]
    return Measured(
        stalls=[begins[step + 1] - ends[step] for step in due],
        between=[begins[i + 1] - begins[i] for i in range(len(begins) - 1) if i not in {*odd, *due}],
        clone=clone,
        copy=copy,
        state_bytes=sum(tensor.nbytes for tensor in state),
        memory=memory,
    )


def watch(pid: int, training: Future[Measured]) -> tuple[Measured, int, int]:
    """The repetition's result, the training's peak beyond its middle, and the sender's whole peak: bytes."""
    peak, sender = 0, 0
    while not training.done():
        training_now, sender_now = memory_of(pid)
        peak, sender = max(peak, training_now), max(sender, sender_now)
        time.sleep(SAMPLE_EVERY)
    result = training.result()
    return result, peak - result.memory, sender


@contextlib.contextmanager
def store(directory: Path, kind: str, workers: int) -> Iterator[str]:
    """The tracking URI of a new store: a server's (`kind` "server") or a SQLite file's ("sqlite")."""
    if kind == "sqlite":
        yield f"sqlite:///{directory / 'mlflow.db'}"
        return
    with mlflow_server(directory / "server", workers) as address:
        yield address


def measure(repeat: int, steps: int, every: int, kind: str, workers: int) -> list[Row]:
    """Stall, steps in between and memory, from `repeat` pairs of runs with checkpoints and without."""
    with tempfile.TemporaryDirectory() as name, store(Path(name), kind, workers) as uri:
        with fresh_process() as pool:

            def repetition(steps: int, checkpoints: bool) -> Measured:
                return pool.submit(train, uri, Path(name) / "spool", steps, every, checkpoints).result()

            repetition(every + 1, True)
            found = in_turn(
                {"checkpoints": partial(repetition, steps, True), "none": partial(repetition, steps, False)},
                {"checkpoints": repeat, "none": repeat},
            )
        # Another process, without the buffers of the timed runs, and another spool, for a new sender.
        with fresh_process() as pool:
            pid = pool.submit(getpid).result()
            training = pool.submit(train, uri, Path(name) / "spool-watched", 6 * every + 1, every, True)
            watched, extra, sender = watch(pid, training)
    return _rows(found["checkpoints"], found["none"], watched.state_bytes, extra, sender)


def _rows(
    with_checkpoints: list[Measured], without: list[Measured], state_bytes: int, extra: int, sender: int
) -> list[Row]:
    stalls = [stall for run in with_checkpoints for stall in run.stalls]
    clones = [run.clone for run in with_checkpoints]
    stall = statistics.median(stalls)
    between = [statistics.median(run.between) for run in with_checkpoints]
    undisturbed = [statistics.median(run.between) for run in without]
    size = f"{state_bytes / MIB:.0f} MiB"
    return [
        Row(f"copy of the state ({size}) into new memory", clones),
        Row("copy of the state into memory that exists", [run.copy for run in with_checkpoints]),
        Row(
            "stall of the loop at a checkpoint",
            stalls,
            comparisons=[
                Comparison("one copy into new memory", stall / statistics.median(clones), 1.5),
                Comparison(
                    "one copy into memory that exists",
                    stall / statistics.median(run.copy for run in with_checkpoints),
                ),
            ],
        ),
        Row("… at the first checkpoint of a run", [run.stalls[0] for run in with_checkpoints]),
        Row("step without checkpoints", undisturbed),
        Row(
            "step between two checkpoints",
            between,
            comparisons=[Comparison("without checkpoints", median_ratio(between, undisturbed), 1.05)],
        ),
        Row(
            "peak extra memory of the training",
            [extra / MIB],
            "MiB",
            [Comparison("the state", extra / state_bytes, 2.0)],
        ),
        Row(
            "peak memory of the sender, MLflow included",
            [sender / MIB],
            "MiB",
            [Comparison("the state", sender / state_bytes)],
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs with and without checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a run")
    parser.add_argument("--every", type=int, default=EVERY, help="steps from checkpoint to checkpoint")
    parser.add_argument("--store", choices=("server", "sqlite"), default="server", help="where MLflow writes")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the MLflow server")
    options = parser.parse_args(arguments)
    rows = functools.partial(
        measure, options.repeat, options.steps, options.every, options.store, options.workers
    )
    return report(rows, about=f"MLflow on {options.store}")


if __name__ == "__main__":
    sys.exit(main())
