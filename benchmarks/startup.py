"""How long it takes until training trains: from the command line, and on a resume in mid-epoch.

From the command line: seconds from spawning `python -m tracked.run train …` to the first forward of the model
in training mode. An experiment file made for this wraps experiments/digits.py and hooks its model. Beside it,
in turn: an interpreter that imports torch and the same file, and a script without `tracked` that builds the
same network and takes its first step. Every round has a new spool, so each starts a sender; the store has
been set up by a discarded round.

On resume: from the moment the state is loaded (`run.attach` has returned) to the first batch in the loop's
body, in the middle of an epoch of 10 million samples.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.measure import Comparison, Row, fresh_process, in_turn, median_ratio, report

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "experiments" / "digits.py"
SAMPLES = 10_000_000
BATCH = 64
STOP_AT = 1000  # step
ROWS = ("train", "import", "script", "resume")

# All three load digits.py by its path, as `tracked` loads an experiment file.
LOAD_DIGITS = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("digits", {str(DIGITS)!r})
digits = importlib.util.module_from_spec(spec)
sys.modules["digits"] = digits
spec.loader.exec_module(digits)

def reached():
    with open(os.environ["REACHED"], "x") as file:
        file.write(repr(time.time()))
"""
EXPERIMENT = f"""
{LOAD_DIGITS}
Params = digits.Params

def build(params):
    task = digits.build(params)

    def first_forward(module, _):
        if module.training:
            hook.remove()
            reached()

    hook = task.model.register_forward_pre_hook(first_forward)
    return task
"""
IMPORT_ONLY = f"""
import torch
{LOAD_DIGITS}
reached()
"""
WITHOUT_TRACKED = f"""
import gzip, os, time
from pathlib import Path
from importlib.util import find_spec
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

table = np.loadtxt(Path(find_spec("sklearn").origin).parent / "datasets/data/digits.csv.gz",
                   delimiter=",", dtype=np.float32)
rows = torch.from_numpy(table)
data = TensorDataset(rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64].long())
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
for x, y in DataLoader(data, batch_size={BATCH}, shuffle=True):
    with open(os.environ["REACHED"], "x") as file:
        file.write(repr(time.time()))
    break
"""


class Interrupted(Exception):
    """Ends a training that is to be resumed."""


def seconds_to(command: Sequence[str], reached: Path) -> float:
    """Seconds from spawning `command` until it wrote the time to `reached`; waits for its end.

    Raises:
        RuntimeError: The command failed or never got there.
    """
    start = time.time()
    environment = {**os.environ, "REACHED": str(reached)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not reached.exists():
        raise RuntimeError(
            f"{' '.join(command[:3])[:80]} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return float(reached.read_text()) - start


def first_step(repeat: int, only: Sequence[str]) -> list[Row]:
    """The rows of the command line that are named in `only`."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        experiment = directory / "experiment.py"
        experiment.write_text(EXPERIMENT)
        number = count()

        def script(text: str) -> float:
            return seconds_to([sys.executable, "-c", text], directory / f"reached-{next(number)}")

        def tracked_run() -> float:
            this = next(number)
            store = f"sqlite:///{directory / 'mlflow.db'}"
            options = ["--tracking-uri", store, "--spool-dir", str(directory / f"spool-{this}")]
            command = [sys.executable, "-m", "tracked.run", "train", str(experiment), *options]
            command += ["--epochs", "1", "--max-steps", "1", "--no-progress"]
            return seconds_to(command, directory / f"reached-{this}")

        variants: dict[str, Callable[[], float]] = {
            "train": tracked_run,
            "import": partial(script, IMPORT_ONLY),
            "script": partial(script, WITHOUT_TRACKED),
        }
        chosen = {name: call for name, call in variants.items() if name in only}
        for call in chosen.values():
            call()
        found = in_turn(chosen, dict.fromkeys(chosen, repeat))
    titles = {
        "train": "`tracked train experiments/digits.py`, to the first step",
        "import": "`import torch` and the experiment file, no more",
        "script": "the same without `tracked`, to the first step",
    }
    return [
        Row(
            titles[name],
            values,
            comparisons=[
                Comparison(titles[other], median_ratio(values, found[other]))
                for other in found
                if name == "train" and other != "train"
            ],
        )
        for name, values in found.items()
    ]


def interrupted_run(uri: str, spool: Path) -> str:
    """Train to mid-epoch and leave by an exception; the run's ID."""
    import tracked

    model, optimizer = _tiny()
    run = tracked.start(
        "bench",
        {},
        tracking_uri=uri,
        seed=0,
        spool_dir=spool,
        checkpoint_every=f"{STOP_AT} steps",
        progress=False,
    )
    with suppress(Interrupted), run:
        run.attach(model=model, optimizer=optimizer)
        for step, (x,) in enumerate(run.batches(_many(), batch_size=BATCH, epochs=1), 1):
            _step(model, optimizer, x)
            if step > STOP_AT:
                raise Interrupted
    return run.id


def resumed(uri: str, spool: Path, run_id: str) -> float:
    """Seconds from the loaded state to the first batch of the loop, then leave by an exception again."""
    import tracked

    model, optimizer = _tiny()
    data = _many()
    seconds = []
    with (
        suppress(Interrupted),
        tracked.resume(run_id, tracking_uri=uri, spool_dir=spool, progress=False) as run,
    ):
        run.attach(model=model, optimizer=optimizer)
        start = time.perf_counter()
        for _ in run.batches(data, batch_size=BATCH, epochs=1):
            seconds.append(time.perf_counter() - start)
            raise Interrupted
    return seconds[0]


def resume_in_mid_epoch(repeat: int) -> list[Row]:
    """One row: `repeat` resumes of one run, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        uri, spool = f"sqlite:///{directory / 'mlflow.db'}", directory / "spool"
        with fresh_process() as pool:
            run_id = pool.submit(interrupted_run, uri, spool).result()
        seconds = []
        for _ in range(repeat):
            with fresh_process() as pool:
                seconds.append(pool.submit(resumed, uri, spool, run_id).result())
            print(f"resume: {seconds[-1]:.3f} s", file=sys.stderr, flush=True)
    middle = sorted(seconds)[len(seconds) // 2]
    return [
        Row(
            f"resume in the middle of an epoch of {SAMPLES:,} samples, loaded state to first batch",
            seconds,
            comparisons=[Comparison("one second", middle, 1.0)],
        )
    ]


def _many() -> TensorDataset:
    return TensorDataset(torch.arange(SAMPLES, dtype=torch.float32).unsqueeze(1))


def _tiny() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1e-20)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def measure(repeat: int, only: Sequence[str] = ROWS) -> list[Row]:
    """The rows named in `only`, each measured `repeat` times."""
    from_command_line = [name for name in only if name != "resume"]
    rows = first_step(repeat, from_command_line) if from_command_line else []
    return rows + (resume_in_mid_epoch(repeat) if "resume" in only else [])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="measure these rows alone")
    options = parser.parse_args(arguments)
    return report(lambda: measure(options.repeat, options.only))


if __name__ == "__main__":
    sys.exit(main())
