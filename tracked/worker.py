"""A process that trains the trials of a sweep, one after another, as the coordinator hands them out.

It imports torch and the experiment once. Without a coordinator it has nothing to do: when that is gone, the trial
takes a checkpoint and is paused, and the process ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tracked import experiment as experiments
from tracked import params
from tracked.attempts import begin, begin_or_take_over, fetch_best, find_run
from tracked.deferred_compiler import defer_compiler
from tracked.errors import RunTaken, TrackedError
from tracked.experiment import Experiment
from tracked.names import STATE, STOP_REASON
from tracked.pipe import Attempt, Progress
from tracked.place import Place
from tracked.schedule import Settings
from tracked.tracking import Run
from tracked.training import carry_out, until_over
from tracked.trial_runs import STATES

# Not `-m tracked.worker`: under that name its messages would be of other classes than those that arrive.
COMMAND = (sys.executable, "-c", "from tracked.worker import main; main()")


@dataclass(frozen=True)
class Setup:
    """What all trials of a sweep share; sent to a worker once."""

    file: Path
    place: Place
    settings: dict[str, Any]
    experiment_name: str


@dataclass(frozen=True)
class Order:
    """One trial to train, from its beginning or from where it stands."""

    number: int
    handle: str
    params: dict[str, Any]
    tags: dict[str, str]
    name: str
    is_new: bool
    """Whether nobody can have begun it: then nothing is looked for."""
    epochs: int | None = None
    """Instead of those of the sweep."""
    goes_on: bool = False
    """Whether it has ended, and is to be trained further all the same."""


@dataclass(frozen=True)
class Report:
    """An evaluation; the worker waits for the verdict."""

    step: int
    epoch: int
    value: float


@dataclass(frozen=True)
class Verdict:
    """The answer to a report."""

    ends: bool
    """Whether the trial ends with this evaluation."""


@dataclass(frozen=True)
class Over:
    """How a trial ended; "taken" where another process has it."""

    state: Literal["finished", "stopped_early", "pruned", "failed", "stopped", "paused", "taken"]
    reason: str = ""
    run_id: str = ""
    value: float | None = None
    epochs: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Leave:
    """Take a checkpoint after this step, and pause."""

    reason: str


class _EndedBefore(TrackedError):
    """The trial had ended when it was looked at."""

    def __init__(self, state: str, reason: str, run_id: str) -> None:
        super().__init__(f"run {run_id} has {state}")
        self.over = Over(state, reason, run_id)  # type: ignore[arg-type]


class Worker:
    """Trains what comes over the connection until it is closed."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._run: Run | None = None
        self._leave = ""
        self._about: dict[str, str] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Let what asks to leave overtake a training that looks at nothing else."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = None
            if message is None or isinstance(message, Leave):
                self._leave = message.reason if message else "the sweep's coordinator is gone"
                if run := self._run:
                    run.request_leave("paused", self._leave)
                if message is None:
                    self._inbox.put(None)
                    return
            self._inbox.put(message)

    def serve(self) -> None:
        defer_compiler()
        setup = self._inbox.get()
        if setup is None:
            return
        experiment = experiments.load(setup.file)
        self._about = experiments.describe(experiment)
        while (order := self._inbox.get()) is not None:
            if isinstance(order, Order):
                over = self._train(setup, experiment, order)
                with contextlib.suppress(OSError):  # nobody is there to hear it; the run tells
                    self._connection.send(over)

    def _train(self, setup: Setup, experiment: Experiment, order: Order) -> Over:
        self._leave = ""
        try:
            run = self._opened(setup, order)
        except _EndedBefore as ended:
            return ended.over
        except RunTaken as taken:
            return Over("taken", taken.found)
        try:
            self._run = run
            if self._leave:
                run.request_leave("paused", self._leave)
            with until_over(run):
                values = params.build(experiment.params_class, order.params)
                carry_out(experiment, values, run)
        except RunTaken as taken:
            return Over("taken", taken.found)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - of one trial: its run has the traceback, the others go on
            return self._over(run, f"{type(error).__name__}: {error}")
        finally:
            self._run = None
        return self._over(run)

    def _opened(self, setup: Setup, order: Order) -> Run:
        where: dict[str, Any] = {
            "experiment": setup.experiment_name,
            "name": order.name,
            "tags": order.tags,
            "params": order.params,
        }
        place = setup.place
        if order.is_new:
            attempt = begin(place, handle=order.handle, **where)
        else:
            attempt = begin_or_take_over(
                place, order.handle, _quiet, before_claim=_ended if not order.goes_on else _anything, **where
            )
        attempt.about = attempt.about or self._about
        settings = Settings(**setup.settings)
        if order.epochs is not None:
            settings = Settings(**{**setup.settings, "epochs": order.epochs})
        if settings.patience is not None and attempt.restored is not None:
            _fetch_best(place, attempt, order.handle)
        run = Run(attempt, settings, progress=_Silent(), drain_timeout=0.0)
        run.stopping.pruner = self._ask
        run.draws = False  # half a second each, beside the trainings; the parent shows the curves of all
        if order.goes_on:
            run.stopping.is_pruned, run.stopping.waited = False, 0
        return run

    def _ask(self, step: int, epoch: int, value: float) -> bool:
        try:
            self._connection.send(Report(step, epoch, value))
        except OSError:
            return False  # the listener meets the same end, and has the run leave
        while not isinstance(answer := self._inbox.get(), Verdict):
            if answer is None:
                self._inbox.put(None)  # for `serve`
                return False
        return answer.ends

    def _over(self, run: Run, reason: str = "") -> Over:
        best = run.stopping.best
        state: Any = run.last_state
        return Over(state, reason, run.id, best, run.epochs_done, run.latest())


class _Silent(Progress):
    """Says nothing: of many trials at once no line would be read, and the sweep has a line for each."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


def _quiet(_text: str) -> None:
    """A trial's waiting is no news: the sweep shows how many run."""


def _anything(_view: Any) -> None:
    """Any state will do."""


def _ended(view: Any) -> None:
    if (state := view.tags.get(STATE)) in STATES:
        raise _EndedBefore(state, view.tags.get(STOP_REASON, ""), view.run_id)


def _fetch_best(place: Place, attempt: Attempt, handle: str) -> None:
    from tracked.server import Server

    fetch_best(place, find_run(Server(place.tracking_uri, create=False), handle), attempt, _quiet)


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what the user's code prints is no part of the sweep's own output
    Worker(connection).serve()
