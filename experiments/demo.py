"""The proof in a minute: train, kill the same training with SIGKILL, resume it by its ID, compare every bit.

`make demo` runs it on the default tracking URI, or on MLFLOW_TRACKING_URI; exit status 1 if anything differs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tracked import spool
from tracked.inspection import undelivered

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parent.parent
TRACKING_URI = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlruns/mlflow.db"
COMMAND = [sys.executable, "-m", "tracked.run"]
QUIET = ["--json", "--no-progress"]
# Small batches, so that an epoch lasts long enough to be killed in its middle.
TRAIN = [
    *("train", "experiments/digits.py", "batch_size=4", "lr=0.002", "--epochs", "6", "--seed", "0"),
    *("--device", "cpu", "--experiment-name", "demo", "--tracking-uri", TRACKING_URI, *QUIET),
]
# So small a step gains nothing from a second thread, and loses a lot where other processes want the core.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TIMEOUT = 300.0  # seconds for one training; it takes about ten


class DemoFailed(Exception):
    """The promise did not hold, or could not be tried."""


def main() -> None:
    os.chdir(ROOT)  # the default tracking URI is relative
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)

        print("1  train 6 epochs without interruption", flush=True)
        whole = Training([*TRAIN, "--run-name", "uninterrupted"], scratch / "whole").result()
        print(f"   run {whole['run_id']}: {summary(whole)}", flush=True)

        print("2  train the same again, and kill it with SIGKILL in the middle of an epoch", flush=True)
        id_file = scratch / "run-id"
        options = ["--run-name", "killed and resumed", "--run-id-file", str(id_file)]
        victim = Training([*TRAIN, *options], scratch / "victim")
        client = connect()  # while both trainings' imports go on
        run_id, seen, committed = kill_in_mid_epoch(victim, client, id_file)
        print(f"   run {run_id}: killed after step {seen}, its last checkpoint is of step {committed}")

        print(f"3  python -m tracked.run resume {run_id}", flush=True)
        resume = ["resume", run_id, "--tracking-uri", TRACKING_URI, *QUIET]
        resumed = Training(resume, scratch / "resumed").result()
        print(f"   {resumed['replayed_equal']} points stood beyond it; recomputed, and all equal")
        print(f"   {summary(resumed)}", flush=True)

        check(whole, resumed, run_id)
        tensors = compare_checkpoints(client, whole, resumed, scratch)
        points = compare_histories(client, whole["run_id"], run_id)

    print("4  killed and resumed = uninterrupted")
    print(f"   weights, optimizer and scheduler: {tensors} values and tensors, all equal bit for bit")
    print(f"   history: {points} points, each step of each key exactly once, all equal")
    print(f"   {time.monotonic() - started:.0f} s in all; see both runs at")
    print(f"   {address(client, run_id)}")


class Training:
    """A trainer in a process of its own, its output in the files `log`.out and `log`.err."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.out, self.err = log.with_suffix(".out"), log.with_suffix(".err")
        # Files, not pipes: whatever outlives the trainer could hold a pipe open.
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen([*COMMAND, *arguments], stdout=out, stderr=err, env=ENVIRONMENT)

    def result(self) -> dict[str, object]:
        """What `--json` says, once the training has ended well."""
        try:
            status = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise self.failure(f"the training did not end within {TIMEOUT:.0f} s") from None
        finally:
            self.process.kill()  # does nothing to a process that has ended
        lines = self.out.read_text().splitlines()
        if status != 0 or not lines:
            raise self.failure(f"the training ended with exit status {status}")
        result: dict[str, object] = json.loads(lines[-1])
        return result

    def failure(self, found: str) -> DemoFailed:
        """What was found, with the last words of the trainer."""
        words = (self.out.read_text() + self.err.read_text()).splitlines()[-20:]
        return DemoFailed("\n".join([found, *(f"  | {line}" for line in words)]))


def connect() -> MlflowClient:
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient  # takes seconds

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return MlflowClient(TRACKING_URI)


def kill_in_mid_epoch(victim: Training, client: MlflowClient, id_file: Path) -> tuple[str, int, int]:
    """Kills `victim` beyond its second epoch, where points that the server has are beyond the last checkpoint.

    It is stopped again and again to look at it, or it would be somewhere else by the time it is killed.

    Returns:
        Its run ID, the last step seen on the server, and the step of its last checkpoint.
    """
    deadline = time.monotonic() + TIMEOUT
    run_id = ""
    while victim.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
        run_id = run_id or (id_file.read_text().strip() if id_file.exists() else "")
        if not run_id or not client.get_metric_history(run_id, "train/loss"):
            continue
        victim.process.send_signal(signal.SIGSTOP)
        while not is_delivered(run_id) and time.monotonic() < deadline:
            time.sleep(0.05)
        pointer = json.loads(client.get_run(run_id).data.tags.get("tracked.checkpoint", "{}"))
        seen = max(point.step for point in client.get_metric_history(run_id, "train/loss"))
        if pointer.get("epoch", 0) >= 2 and seen >= pointer["step"] + 20:
            victim.process.kill()
            victim.process.wait()
            return run_id, seen, int(pointer["step"])
        victim.process.send_signal(signal.SIGCONT)
    victim.process.kill()
    raise victim.failure("the training was over before it could be killed")


def is_delivered(run_id: str) -> bool:
    """Whether the server has all that this machine's spool has of a run."""
    runs = [run for outbox in spool.outboxes(spool.root()) for run in outbox.runs()]
    return not any(undelivered(run) for run in runs if run.about.get("run_id") == run_id)


def check(whole: dict[str, object], resumed: dict[str, object], run_id: str) -> None:
    """Both ended well, the second in the run that was killed and having recomputed what stood there."""
    for result in (whole, resumed):
        if result["state"] != "finished":
            raise DemoFailed(f"run {result['run_id']} is {result['state']}, not finished")
        if accuracy(result) < 0.95:
            raise DemoFailed(f"run {result['run_id']} ends at {accuracy(result):.4f} accuracy, below 0.95")
    if resumed["run_id"] != run_id:
        raise DemoFailed(f"the resumed run is {resumed['run_id']}, not {run_id}")
    if not resumed["replayed_equal"]:
        raise DemoFailed("no point was recomputed, though points stood beyond the checkpoint")


def compare_checkpoints(
    client: MlflowClient, whole: dict[str, object], resumed: dict[str, object], scratch: Path
) -> int:
    """The number of values in the states of both last checkpoints, all equal."""
    import torch

    states = []
    for result in (whole, resumed):
        path = f"checkpoints/step-{result['step']:08d}/checkpoint.pt"
        folder = scratch / str(result["run_id"])
        folder.mkdir()
        file = client.download_artifacts(str(result["run_id"]), path, str(folder))
        content = torch.load(file, map_location="cpu", weights_only=True)
        parts = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict")
        states.append(dict(leaves({part: content[part] for part in parts})))
    ours, theirs = states
    differing = sorted(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            equal = a.dtype == b.dtype and torch.equal(a, b)
        else:
            equal = type(a) is type(b) and a == b
        if not equal:
            differing.append(name)
    if differing:
        raise DemoFailed(f"{len(differing)} values in the last checkpoints differ, one is {differing[0]}")
    return len(ours)


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Everything in nested dicts, lists and tuples, under a dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{name}.{index}")
    else:
        yield name, value


def compare_histories(client: MlflowClient, whole: object, resumed: object) -> int:
    """The number of points in the histories of both runs, all equal and none twice."""
    ours, theirs = history(client, str(whole)), history(client, str(resumed))
    for points, run_id in ((ours, whole), (theirs, resumed)):
        steps = [point[:2] for point in points]
        if len(set(steps)) != len(steps):
            raise DemoFailed(f"run {run_id} has {len(steps) - len(set(steps))} points that stand twice")
    differing = sorted(set(ours) ^ set(theirs))
    if differing:
        raise DemoFailed(f"{len(differing)} points of the histories differ, the first: {differing[0]}")
    return len(ours)


def history(client: MlflowClient, run_id: str) -> list[tuple[str, int, str]]:
    """All (key, step, value) of a run, values in hexadecimal, so that NaN equals NaN and no bit is lost."""
    # Measurements of the machine (system/…) depend on the clock.
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith("system/")]
    return [
        (key, point.step, float(point.value).hex())
        for key in keys
        for point in client.get_metric_history(run_id, key)
    ]


def accuracy(result: dict[str, object]) -> float:
    metrics = result["metrics"]
    if not isinstance(metrics, dict) or "val/accuracy" not in metrics:
        raise DemoFailed(f"run {result['run_id']} has no metric val/accuracy, only {metrics}")
    return float(metrics["val/accuracy"])


def summary(result: dict[str, object]) -> str:
    return f"{result['state']} at step {result['step']}, validation accuracy {accuracy(result):.4f}"


def address(client: MlflowClient, run_id: str) -> str:
    """Where the UI shows the run."""
    page = f"#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    server = TRACKING_URI.removeprefix("tracked+").rstrip("/")
    if server.startswith(("http://", "https://")):
        return f"{server}/{page}"
    return f"http://127.0.0.1:5000/{page}, once `{os.path.relpath(sys.executable)} -m tracked.run ui` runs"


if __name__ == "__main__":
    try:
        main()
    except DemoFailed as failure:
        sys.exit(f"demo failed: {failure}")
