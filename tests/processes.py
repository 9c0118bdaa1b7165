"""The command line run as real processes, each test in a folder of its own, and the senders ended after it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tracked import spool
from tracked.spool import Outbox

if TYPE_CHECKING:
    from tests.nursery import Nursery

T = TypeVar("T")
ROOT = Path(__file__).parent.parent

# Trains 8 steps an epoch; `pause` is seconds that every step takes, so that a test can come in between.
EXPERIMENT = """
import time
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tracked

@dataclass(frozen=True)
class Params:
    lr: float = 0.1
    pause: float = 0.0

def build(params):
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    def loss(outputs, targets):
        time.sleep(params.pause)
        return nn.functional.mse_loss(outputs, targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=params.lr)
    return tracked.Task(model=model, loss=loss, optimizer=optimizer, train_data=data, val_data=data, batch_size=8)
"""


def wait_until(condition: Callable[[], T | None], what: str, seconds: float = 60.0) -> T:
    """The first true value of `condition`, which is asked 50 times a second."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        pause.wait(0.02)
    return value


@dataclass(frozen=True)
class Result:
    """How a command ended; `json` is the last line of its output, where that is JSON."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout.splitlines()[-1])


@dataclass
class Workplace:
    """A folder in which commands run, with a spool of its own, against one tracking URI."""

    path: Path
    tracking_uri: str
    env: dict[str, str] = field(default_factory=dict)
    nursery: Nursery | None = None
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def spool(self) -> Path:
        return self.path / "mlruns/spool"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TRACKED_"))}
        return {
            **kept,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TRACKED_WATCH": "1",
            "TRACKED_HEARTBEAT": "0.3",
            **self.env,
            **(extra or {}),
        }

    def experiment(self, text: str = EXPERIMENT, name: str = "experiment.py") -> str:
        """Write an experiment file; its name, for the command line."""
        (self.path / name).write_text(text)
        return name

    def start(self, *args: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a command without waiting; it is killed when the test is over, if it still runs."""
        return self.program("-m", "tracked.run", *args, env=env)

    def program(self, *args: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start Python with these arguments, as `start` does."""
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=self.path,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def tracked(
        self,
        *args: object,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout: float = 90.0,
    ) -> Result:
        """Run a command to its end, forked by the nursery if there is one; with `check`, it must exit with 0."""
        if self.nursery is not None and args:
            return self.nursery.run(self, *map(str, args), check=check, env=env, seconds=timeout)
        process = self.start(*args, env=env)
        stdout, stderr = process.communicate(timeout=timeout)
        result = Result(process.returncode, stdout, stderr)
        assert not check or result.returncode == 0, f"{args} exited {result.returncode}\n{stdout}\n{stderr}"
        return result

    def outboxes(self) -> list[Outbox]:
        return list(spool.outboxes(self.spool))

    def sender_pids(self) -> list[int]:
        """Living senders of this spool."""
        return [
            spool.read_json(outbox.sender_lock)["pid"]
            for outbox in self.outboxes()
            if spool.is_held(outbox.sender_lock) and "pid" in spool.read_json(outbox.sender_lock)
        ]

    def _coming_senders(self) -> list[int]:
        """Processes on their way to a lock of this spool, which takes them the seconds of importing MLflow."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                words = entry.read_bytes().decode(errors="replace").split("\0")
                if "tracked.sender" in words and any(word.startswith(f"{self.spool}/") for word in words):
                    found.append(int(entry.parent.name))
        return found

    def end_senders(self) -> None:
        """Kill this spool's senders, wherever they are, and wait until they are gone."""
        for pid in {*self.sender_pids(), *self._coming_senders()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.sender_pids(), "the senders' end")

    def close(self) -> None:
        """End everything that was started here."""
        for process in self._started:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        self.end_senders()
