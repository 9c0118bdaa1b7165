"""A process that trains the trials of a sweep, one after another, as the coordinator hands them out.

It imports torch and the experiment once, and says when it is ready. Without a coordinator it has nothing to do: when
that is gone, the trial takes a checkpoint and is paused, and the process ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from tracked import experiment as experiments
from tracked import params
from tracked.attempts import begin, begin_or_take_over, fetch_best
from tracked.checkpoint import keep_process
from tracked.deferred_compiler import defer_compiler
from tracked.errors import RunTaken, TrackedError, UsageError
from tracked.experiment import Experiment
from tracked.names import STATE, STOP_REASON, TRIAL
from tracked.pipe import Progress
from tracked.place import Place
from tracked.schedule import Settings
from tracked.tracking import Run
from tracked.training import carry_out, until_over
from tracked.trial_runs import STATES

if TYPE_CHECKING:
    from tracked.server import RunView

# Not `-m tracked.worker`: under that name its messages would be of other classes than those that arrive.
COMMAND = (sys.executable, "-c", "from tracked.worker import main; main()")


@dataclass(frozen=True)
class Setup:
    """What all trials of a sweep share; sent to a worker once."""

    file: Path
    place: Place
    settings: dict[str, Any]
    experiment_name: str
    is_shared: bool = False
    """Whether other machines take part, which may have taken a trial over before it has a run."""


@dataclass(frozen=True)
class Ready:
    """The experiment is loaded: trials may come."""


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
    goes_on_from: int | None = None
    """The epoch in which it had ended, if it is to be trained further all the same."""


@dataclass(frozen=True)
class Begun:
    """The trial has its run, and trains: from here on it can be asked to leave."""


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


Ending = Literal["finished", "stopped_early", "pruned", "failed", "stopped", "paused", "taken"]
"""How a trial ended; "taken" where another process has it."""


@dataclass(frozen=True)
class Over:
    """The trial has ended, or is given back."""

    state: Ending
    reason: str = ""
    epochs: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    usage: UsageError | None = None
    """What it failed by, where that is how it was asked for, which would fail every trial."""
    is_given_up: bool = False
    """Whether its process has died too often."""


@dataclass(frozen=True)
class Leave:
    """Take a checkpoint after this step, and pause."""

    reason: str


class _EndedBefore(TrackedError):
    """The trial had ended when it was looked at."""

    def __init__(self, state: Ending, reason: str) -> None:
        super().__init__(f"the trial has ended: {state}")
        self.over = Over(state, reason)


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
        keep_process()
        setup = self._inbox.get()
        if setup is None:
            return
        experiment = experiments.load(setup.file)
        self._about = experiments.describe(experiment)
        self._send(Ready())
        while (order := self._inbox.get()) is not None:
            if isinstance(order, Order):
                self._send(self._train(setup, experiment, order))

    def _send(self, message: Ready | Begun | Over) -> None:
        with contextlib.suppress(OSError):  # nobody is there to hear it; the run tells
            self._connection.send(message)

    def _train(self, setup: Setup, experiment: Experiment, order: Order) -> Over:
        if self._leave:
            return Over("paused", self._leave)
        run: Run | None = None
        try:
            run = self._opened(setup, order)
            self._run = run
            self._send(Begun())
            if self._leave:
                run.request_leave("paused", self._leave)
            with until_over(run):
                values = params.build(experiment.params_class, order.params)
                carry_out(experiment, values, run)
        except _EndedBefore as ended:
            return ended.over
        except RunTaken as taken:
            return Over("taken", taken.found)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - of one trial: its run has the traceback, the others go on
            if run is None or not isinstance(error, SystemExit) or run.last_state != "finished":
                reason = f"{type(error).__name__}: {error}"
                epochs = 0 if run is None else run.epochs_done
                # As plain as it can be: a class of the user's may not come through a pipe.
                if isinstance(error, UsageError):
                    usage = UsageError(error.found, expected=error.expected, try_next=error.try_next)
                else:
                    usage = None
                return Over("failed", reason, epochs, usage=usage)
        finally:
            self._run = None
        state: Any = run.last_state
        return Over(state, "", run.epochs_done, run.latest())

    def _opened(self, setup: Setup, order: Order) -> Run:
        where: dict[str, Any] = {
            "experiment": setup.experiment_name,
            "name": order.name,
            "tags": order.tags,
            "params": order.params,
        }
        place = setup.place
        if order.is_new:
            attempt = begin(place, handle=order.handle, may_exist=setup.is_shared, **where)
        else:
            attempt, view = begin_or_take_over(
                place, order.handle, _quiet, before_claim=lambda view: _refuse_ended(view, order), **where
            )
            if setup.settings.get("patience") is not None and attempt.restored is not None:
                fetch_best(place, view, attempt, _quiet)
        attempt.about = attempt.about or self._about
        # The model worth having is that of the best trial.
        settings = Settings(**{**setup.settings, "log_model": False, "register": None})
        if order.epochs is not None:
            settings = replace(settings, epochs=order.epochs)
        run = Run(attempt, settings, progress=_Silent(), drain_timeout=0.0)
        if not order.is_new:
            run.record({TRIAL: order.tags[TRIAL]})  # it has another row in the study since it was promoted
        run.stopping.pruner = self._ask
        run.presents = False  # half a second each, beside the trainings; the parent shows the curves of all
        if order.goes_on_from is not None and run.epochs_done <= order.goes_on_from:
            run.stopping.pruned_in, run.stopping.waited = None, 0
        return run

    def _ask(self, step: int, epoch: int, value: float) -> bool | None:
        try:
            self._connection.send(Report(step, epoch, value))
        except OSError:
            return None  # the listener meets the same end, and has the run leave
        while not isinstance(answer := self._inbox.get(), Verdict):
            if answer is None:
                self._inbox.put(None)  # for `serve`
                return None
        return answer.ends


class _Silent(Progress):
    """Says nothing: of many trials at once no line would be read, and the sweep has a line for each."""

    def say(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


def _quiet(_text: str) -> None:
    """A trial's waiting is no news: the sweep shows how many run."""


def _refuse_ended(view: RunView, order: Order) -> None:
    """Nothing is trained further that has ended, unless it is to go on from there."""
    state = view.tags.get(STATE, "")
    if state not in STATES:
        return
    epoch = view.latest.get("epoch")
    if order.goes_on_from is None or (epoch is not None and epoch.value > order.goes_on_from):
        raise _EndedBefore(cast(Ending, state), view.tags.get(STOP_REASON, ""))


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    os.dup2(2, 1)  # what the user's code prints is no part of the sweep's own output
    Worker(connection).serve()
