"""Forks trainers from a process that has torch and MLflow imported, so that a test can kill many of them.

A forked trainer is a process of its own, in a session of its own: it is killed, watched and exits
as one that was typed. Only its imports are not paid again.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from tests.processes import ROOT, Result, Workplace, wait_until
from tracked import failpoints
from tracked.address import normalise_uri
from tracked.spool import is_held, open_outbox

_SENDER = "sender"
_LOGS = {"train", "resume", "fork", "sweep"}
"""Commands that have a sender; one that they find alive they need not start, and pay its imports."""
_HANGS = 150.0
"""After so many seconds a command is taken to hang; the first of a checkout reads PyTorch from a cold disk."""


@dataclass
class Trainer:
    """A command that runs, or ran."""

    pid: int
    output: Path
    nursery: Nursery
    _code: int | None = None

    @property
    def returncode(self) -> int | None:
        """Its exit status (minus the signal's number, if one killed it); None while it runs."""
        if self._code is None:
            self._code = self.nursery.ask({"poll": self.pid})
        return self._code

    def kill(self) -> None:
        """End it by SIGKILL, if it still runs, and wait until it is gone."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self, seconds: float = _HANGS) -> Result:
        """Let it run to its end."""
        wait_until(
            lambda: self.returncode is not None, f"the end of process {self.pid}: {self.errors}", seconds
        )
        assert self._code is not None
        return Result(self._code, self.output.read_text(), self.errors)

    @property
    def errors(self) -> str:
        """What it has written to standard error."""
        return self.output.with_suffix(".err").read_text()


class Nursery:
    """The process that forks; leaving the block ends it and every trainer that still runs."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        self._started: list[Trainer] = []
        return self

    def __exit__(self, *_: object) -> None:
        for trainer in self._started:
            trainer.kill()
        # Not by closing its input: what a test forked, and left, would hold that open.
        with self._process:
            self._tell({"end": True})

    def start(self, workplace: Workplace, *args: str | Path, env: Mapping[str, str] | None = None) -> Trainer:
        """Run a command in a workplace without waiting; a sender is alive already where it logs to one of its runs."""
        # Without reading the locks: a test that holds one itself would lose it when it closes the file again.
        is_alive = any(is_held(outbox.sender_lock) for outbox in workplace.outboxes())
        if args[0] in _LOGS and workplace.tracking_uri and not is_alive:
            self.start_sender(workplace, env)
        output = workplace.path / f"output-{len(list(workplace.path.glob('output-*')))}.out"
        (workplace.path / "mlruns").mkdir(exist_ok=True)
        output.touch()
        output.with_suffix(".err").touch()
        order = {
            "args": [str(each) for each in args],
            "env": workplace.environment(env),
            "cwd": str(workplace.path),
            "output": str(output),
        }
        trainer = Trainer(self.ask(order), output, self)
        self._started.append(trainer)
        return trainer

    def start_sender(self, workplace: Workplace, env: Mapping[str, str] | None = None) -> Trainer:
        """Start the workplace's sender, and return once it has the lock, or is over already."""
        outbox = open_outbox(workplace.spool, normalise_uri(workplace.tracking_uri))
        address = {"TRACKED_SENDER_URI": workplace.tracking_uri}
        sender = self.start(workplace, _SENDER, outbox.path, env={**address, **(env or {})})
        wait_until(
            lambda: workplace.sender_pids() == [sender.pid] or sender.returncode is not None,
            "the sender's lock",
        )
        return sender

    def run(
        self,
        workplace: Workplace,
        *args: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        seconds: float = _HANGS,
    ) -> Result:
        """Run a command to its end; with `check`, it must exit with 0."""
        result = self.start(workplace, *args, env=env).wait(seconds)
        assert not check or result.returncode == 0, f"{args}: {result}"
        return result

    def ask(self, order: dict[str, Any]) -> Any:
        self._tell(order)
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()


def _poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _carry_out(order: dict[str, Any]) -> int:
    """In the child: become the command."""
    from tracked import cli, sender

    os.setsid()
    # Ignored, where the tests themselves run behind a shell's `&`: a child of a terminal listens.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for number, path in ((1, order["output"]), (2, order["output"].removesuffix(".out") + ".err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    failpoints._remaining.update(failpoints._armed())
    if "KILLED_AT_STEP" in os.environ:
        _die_at(int(os.environ["KILLED_AT_STEP"]))
    sys.argv = ["tracked", *order["args"]]
    try:
        if order["args"][0] == _SENDER:
            sys.argv = order["args"]
            sender.main()
        else:
            cli.main(order["args"])
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def _die_at(last: int) -> None:
    """End this process by SIGKILL when it logs at step `last`, once the server has a checkpoint and those points."""
    from tracked.tracking import Run

    log = Run.log

    def fatal(self: Run, values: Mapping[str, Any], step: int | None = None) -> None:
        log(self, values, step)
        if self.step >= last:
            folder, known = self._attempt.folder, self.resumed_from or 0
            wait_until(lambda: folder.about.get("committed", 0) > known, "a checkpoint")
            wait_until(lambda: self.pending() == 0, "all points on the server")
            os.kill(os.getpid(), signal.SIGKILL)

    Run.log = fatal  # type: ignore[method-assign]


def _serve(orders: IO[str], answers: IO[str]) -> None:
    for line in orders:
        order = json.loads(line)
        if "end" in order:
            return
        if "poll" in order:
            answer = _poll(order["poll"])
        elif not (answer := os.fork()):
            code = 1
            try:
                code = _carry_out(order)
            except BaseException:  # noqa: BLE001 - nobody above it would show the traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What takes its time is imported once, here: MLflow, matplotlib, torch, and what torch's optimizers import.
    for module in (
        "torch._dynamo",
        "tracked.embedded",
        "tracked.plots",
        "tracked.training",
        "tracked.progress",
        "tracked.upkeep",
        "tracked.inspection",
        "tracked.sweep",
        "tracked.sweep_plots",
    ):
        importlib.import_module(module)
    _serve(sys.stdin, sys.stdout)
