"""A sweep: one coordinator owns the study, hands its trials to workers, and records it all in a parent run.

What a kill can interrupt is told in this order: a suggestion stands in the study before a worker gets it; a report
stands there before its verdict is given; a run ends before its trial does. So a trial that runs in the study goes
on from its run's last checkpoint, or is only told how its run has ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch

from tracked import children, params, ranking, search, spool
from tracked import experiment as experiments
from tracked import space as spaces
from tracked.address import redact
from tracked.attempts import Asking, begin, begin_or_take_over
from tracked.errors import RunTaken, ServerError, UsageError
from tracked.experiment import Experiment
from tracked.names import BEST, HANDLE, HEARTBEAT, PARENT, STATE, SWEEP, TRIAL, TRIAL_NUMBER, TRIALS
from tracked.pipe import Progress
from tracked.place import Place
from tracked.schedule import Interval, Settings
from tracked.sender import watch_seconds
from tracked.spool import RunFolder
from tracked.storage import open_storage
from tracked.study import Method, Study
from tracked.tracking import Run
from tracked.training import file_tags
from tracked.trial_runs import STATES, described, read
from tracked.trial_runs import children as children_of
from tracked.trials import Trial, TrialState, best_value
from tracked.worker import COMMAND, Leave, Order, Over, Report, Setup, Verdict

if TYPE_CHECKING:
    from tracked.server import RunView, Server

_TRIALS = 20
_LOOK_SECONDS = 1.0
_FAMILY = uuid.UUID("5a1dc9de-2f0c-4f7e-9f2e-2d8f4ab1c0de")
_DRAWING_REST = 20.0
"""For so many times as long as its pictures took, no more are drawn: they are made beside the trainings."""


@dataclass
class Request:
    """What a user asked for.

    Attributes:
        place: Where the runs go.
        file: The experiment.
        words: Dimensions of the space, and fixed `name=value`.
        settings: The loop's, of every trial.
        config: A YAML file of hyperparameters.
        study_name: The same name again goes on with the same study.
        storage: Where the study is kept; None for a file beside the spool.
        trials: To train in all, by whoever takes part; None for 20, or for all points of a grid.
        seconds: After which no trial is begun any more.
        max_epochs: To train in all.
        max_retries: How often a trial goes on whose process has died.
        extend: Train the so many best trials further, to so many epochs.
    """

    place: Place
    file: Path = Path()
    words: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    config: Path | None = None
    experiment_name: str | None = None
    study_name: str | None = None
    storage: str | None = None
    sampler: str = "tpe"
    sampler_options: list[str] = field(default_factory=list)
    pruner: str = "median"
    pruner_options: list[str] = field(default_factory=list)
    promote: bool = True
    trials: int | None = None
    workers: int = 1
    seconds: float | None = None
    max_epochs: int | None = None
    max_retries: int = 3
    extend: tuple[int, int] | None = None
    progress: Progress = field(default_factory=Progress)
    drain_timeout: float = 60.0
    handle: str | None = None
    """Of the parent run, where it exists already."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep stands when the command ends."""

    state: Literal["finished", "paused", "failed"]
    run_id: str
    study_name: str
    metric: str
    mode: Literal["min", "max"]
    trials: list[Trial]
    undelivered: int
    reason: str = ""

    @property
    def best(self) -> Trial | None:
        return ranking.best(self.trials, self.mode)


@dataclass
class _Hand:
    """A worker process, and the trial that it trains."""

    process: subprocess.Popen[bytes]
    connection: Connection
    order: Order | None = None


def sweep(request: Request) -> Outcome:
    """Train the trials of a study, new or continued, until its budget is used up or somebody asks to leave.

    Raises:
        TrackedError: As its text says; what one trial raises fails that trial alone.
    """
    experiment = experiments.load(request.file)
    plan = _Plan.make(request, experiment)
    with open_storage(request.storage, default=request.place.spool.parent / "studies.journal") as storage:
        study = Study(storage.backend, plan.name, plan.mode, plan.method, plan.record)
        plan.check_same(study.record)
        coordinator = _Coordinator(request, experiment, plan, study)
        with coordinator.asked_to_leave():
            return coordinator.run()


def resume(view: RunView, request: Request) -> Outcome:
    """Go on with the sweep of this parent run; what the request leaves open is as it was recorded.

    Raises:
        UsageError: Its experiment file is not found, or its study is kept in a database that is not named.
    """
    recorded = json.loads(view.tags[SWEEP])
    if recorded["storage"] is not None and request.storage is None:
        # A tag may say what it likes: no database is opened, or made, because a server names it.
        raise UsageError(
            f"the study of run {view.run_id} is kept in {recorded['storage']}",
            expected="that it is named here too",
            try_next=f"python -m tracked.run resume {view.run_id} --storage {recorded['storage']}",
        )
    path, warnings = experiments.locate(
        recorded["file"],
        file=request.file if request.file != Path() else None,
        cwd=Path.cwd(),
        run_id=view.run_id,
        line=["resume", view.run_id],
    )
    for text in warnings:
        request.progress.warn(text)
    return sweep(
        replace(
            request,
            file=path,
            words=recorded["words"],
            settings={**recorded["settings"], **request.settings},
            experiment_name=view.experiment_name,
            study_name=recorded["name"],
            sampler=recorded["sampler"],
            sampler_options=recorded["sampler_options"],
            pruner=recorded["pruner"],
            pruner_options=recorded["pruner_options"],
            promote=recorded["promote"],
            trials=request.trials or recorded["trials"],
            handle=view.tags[HANDLE],
        )
    )


@dataclass(frozen=True)
class _Plan:
    """What a sweep is about, all checked before anything trains."""

    name: str
    handle: str
    fixed: list[str]
    space: spaces.Space
    metric: str
    mode: Literal["min", "max"]
    unit: str
    settings: dict[str, Any]
    method: Method
    record: dict[str, Any]

    @classmethod
    def make(cls, request: Request, experiment: Experiment) -> _Plan:
        words = request.words
        if request.config is not None:  # a machine that goes on need not have the file
            typed = {word.partition("=")[0].strip() for word in words}
            read = params.read_yaml(experiment.params_class, request.config)
            words = [*spaces.as_words({name: read[name] for name in read if name not in typed}), *words]
        space, fixed = spaces.parse(words, experiment)
        if not space and experiment.suggest is None:
            raise UsageError(
                "there is nothing to search",
                expected="a parameter's range, or suggest(trial) in the experiment file",
                try_next='"lr=log(1e-4,1e-1)"',
            )
        if space and experiment.suggest is not None:
            request.progress.say(
                f"the ranges that were typed are searched, not suggest() of {experiment.path.name}"
            )
        example = spaces.as_words({name: _first(dimension) for name, dimension in space.items()})
        values = experiment.make_params([*fixed, *example])
        metric, mode = _monitored(request, experiment, values)
        settings = {**request.settings, "monitor": metric, "mode": mode}
        if settings.get("epochs") is None and settings.get("max_steps") is None:
            raise UsageError(
                "it is not said how long a trial trains", expected="epochs or steps", try_next="--epochs 10"
            )
        seed = Settings(**settings).seed

        def suggest(trial: Any) -> Mapping[str, Any]:
            if space:
                return search.suggest(trial, space)
            assert experiment.suggest is not None
            return experiment.suggest(trial)

        pruner = search.make_pruner(request.pruner, request.pruner_options, epochs=settings.get("epochs"))

        def promotable(rows: list[Any]) -> list[int]:
            direction: search.Direction = "minimize" if mode == "min" else "maximize"
            return search.promotable(rows, pruner, direction) if request.promote else []

        method = Method(
            sampler=lambda number: search.make_sampler(
                request.sampler, request.sampler_options, seed=seed, number=number, space=space or None
            ),
            pruner=pruner,
            suggest=suggest,
            promotable=promotable,
        )
        method.sampler(0)  # its options are checked before there is anything to undo
        experiment_name = request.experiment_name or experiment.path.stem
        handle = request.handle or (
            uuid.uuid5(_FAMILY, f"{experiment_name} {request.study_name}").hex
            if request.study_name
            else uuid.uuid4().hex
        )
        name = request.study_name or f"{experiment.path.stem}-{handle[:8]}"
        record: dict[str, Any] = {
            "name": name,
            "handle": handle,
            "file": experiments.describe(experiment),
            "words": words,
            "space": spaces.as_json(space) if space else None,
            "settings": settings,
            "storage": request.storage and redact(request.storage),
            "sampler": request.sampler,
            "sampler_options": request.sampler_options,
            "pruner": request.pruner,
            "pruner_options": request.pruner_options,
            "promote": request.promote,
            "trials": request.trials or (None if request.sampler == "grid" else _TRIALS),
        }
        unit = Interval.parse(Settings(**settings).eval_every).unit
        record = json.loads(json.dumps(record))  # as it will be read back
        return cls(name, handle, fixed, space, metric, mode, unit, settings, method, record)

    def check_same(self, recorded: Mapping[str, Any]) -> None:
        """Refuse to go on with a study that was about something else.

        Raises:
            UsageError: Naming each difference.
        """
        wrong: list[str] = []
        if (recorded["space"] is None) != (not self.space):
            wrong.append("one space is typed, the other comes from suggest()")
        elif self.space:
            wrong += spaces.differences(spaces.from_json(recorded["space"]), self.space)
        for name in ("sampler", "sampler_options", "pruner", "pruner_options"):
            if recorded[name] != self.record[name]:
                wrong.append(f"{name} was {recorded[name]!r}, and is {self.record[name]!r}")
        for name in ("monitor", "mode", "seed", "eval_every"):
            was, now = (settings.get(name) for settings in (recorded["settings"], self.settings))
            if was != now:
                wrong.append(f"{name} was {was!r}, and is {now!r}")
        if wrong:
            raise UsageError(
                f"the study {self.name!r} is not the one asked for: {'; '.join(wrong)}",
                expected="the same line for the same study",
                try_next="another --study-name",
            )

    @property
    def epochs(self) -> int | None:
        """That a trial trains which nothing stops."""
        return self.settings.get("epochs")

    def is_last(self, report: Report, order: Order) -> bool:
        epochs = order.epochs or self.epochs
        steps = self.settings.get("max_steps")
        return bool((epochs and report.epoch >= epochs) or (steps and report.step >= steps))


def _monitored(request: Request, experiment: Experiment, values: Any) -> tuple[str, Literal["min", "max"]]:
    """The metric that trials are compared by."""
    monitor, mode = request.settings.get("monitor"), request.settings.get("mode")
    if experiment.build is not None and (monitor is None or mode is None):
        task = experiment.task(values)
        monitor, mode = monitor or task.monitor, mode or task.mode
    if monitor is None:
        raise UsageError(
            "it is not said by which metric the trials are compared",
            expected="the name of a metric that the loop logs",
            try_next="--monitor val/loss",
        )
    return monitor, mode or "min"


def _first(dimension: spaces.Dimension) -> Any:
    return dimension.options[0] if isinstance(dimension, spaces.Choice) else dimension.low


class _Coordinator:
    """Hands trials out, takes reports in, and records how the sweep stands."""

    def __init__(self, request: Request, experiment: Experiment, plan: _Plan, study: Study) -> None:
        self._request = request
        self._experiment = experiment
        self._plan = plan
        self._study = study
        self._say = request.progress.say
        self._name = request.experiment_name or experiment.path.stem
        self._tags = file_tags(experiments.describe(experiment))
        self._handle = str(study.record["handle"])
        self._outbox = request.place.outbox()
        self._hands: list[_Hand] = []
        self._waiting: list[int] = []
        self._strays: dict[int, tuple[float, float]] = {}
        self._parked: set[int] = set()
        self._began = time.monotonic()
        self._leave = ""
        self._looked = 0.0
        self._recorded = ""
        self._records = 0
        self._idle_deaths = 0
        self._draws_again = 0.0
        self._drawing: threading.Thread | None = None
        self._parent: Run | None = None
        self._parent_id = ""
        self._server_: Server | None = None

    # -- from beginning to end

    def run(self) -> Outcome:
        if self._request.seconds is not None and self._request.seconds <= 0:
            raise UsageError("--timeout is 0", expected="seconds above 0")
        is_new = self._study.count() == 0
        self._open_parent(is_new=is_new and self._request.handle is None and not self._request.study_name)
        try:
            if is_new and (count := self._rebuild()):
                self._say(f"the study was not in its storage: {count} trials are taken from their runs")
            self._hands = [self._start(number) for number in range(self._request.workers)]
            self._work()
        except BaseException as error:
            self._end_workers(at_once=not isinstance(error, UsageError))
            if self._parent is not None:
                self._parent.fail(error)
            raise
        self._end_workers()
        return self._finish()

    def _open_parent(self, *, is_new: bool) -> None:
        """Begin the parent run, or go on with it; somebody else's is left to them."""
        request, plan = self._request, self._plan
        shown = {
            "sweep.sampler": " ".join([request.sampler, *request.sampler_options]),
            "sweep.pruner": " ".join([request.pruner, *request.pruner_options]),
            **{name: value for name, _, value in (word.partition("=") for word in plan.fixed)},
            **{name: str(dimension) for name, dimension in plan.space.items()},
        }
        where: dict[str, Any] = {
            "experiment": self._name,
            "name": plan.name,
            "tags": {**self._tags, SWEEP: json.dumps(plan.record)},
            "params": shown,
        }
        try:
            if is_new:
                attempt = begin(request.place, handle=self._handle, **where)
            else:
                attempt = begin_or_take_over(request.place, self._handle, self._say, **where)
        except RunTaken as taken:
            self._say(f"{taken.found}: this process takes part in its sweep")
            found = Asking(self._say, math.inf)(lambda: self._server.find_by_handle(self._handle))
            assert found is not None
            self._parent_id = found.run_id
            return
        # On from the last one there: how many trials had ended by then may come again, as some go on.
        self._records = max((max(points, default=0) for points in attempt.replay.values()), default=0)
        self._parent = parent = Run(attempt, Settings(**plan.settings), drain_timeout=request.drain_timeout)
        told = False
        while parent.id == parent.handle and not self._leave:
            if not told and time.monotonic() - self._began > 3:
                self._say(f"waiting for the server, which names the parent run: {parent.trouble()}")
                told = True
            time.sleep(0.02)
        self._parent_id = parent.id
        if is_new or attempt.number == 1:
            parent.log_artifact(self._experiment.path, "source")
        loop = {f"loop.{name}": str(value) for name, value in plan.settings.items()}
        parent.log_params(loop)
        self._say(f"sweep {plan.name}: parent run {parent.id}  {parent.url}".rstrip())

    def _work(self) -> None:
        while True:
            self._hand_out()
            busy = [hand for hand in self._hands if hand.order]
            if not busy and (self._leave or not self._lies_ahead()):
                if self._leave or not self._extend():
                    return
                continue
            for connection in wait([hand.connection for hand in self._hands], timeout=0.2):
                self._hear(next(hand for hand in self._hands if hand.connection is connection))
            if self._parent is not None and self._parent.leaves_because:
                self.leave(self._parent.leaves_because)
            if self._is_over_budget():
                self.leave(f"{self._request.max_epochs} epochs are used up")
            self._record()

    def _lies_ahead(self) -> bool:
        """Whether there is, or may come, something to train."""
        return bool(self._waiting or set(self._study.running()) - self._parked or self._ends_elsewhere())

    def _ends_elsewhere(self) -> bool:
        """Whether ends of trials are on their way from other machines; those that will not come are trained again.

        Again means from the last checkpoint, to the same end: the study keeps what it was told.
        """
        told = [trial.number for trial in self._study.trials() if trial.state in ("finished", "pruned")]
        away = {number: folder for number in told if not (folder := self._folder(number)).path.exists()}
        if not away:
            return False
        time.sleep(_LOOK_SECONDS)  # nothing else is to be done, and the server is asked
        views = Asking(self._say, math.inf)(lambda: children_of(self._server, self._parent_id))
        ended = {view.tags.get(HANDLE) for view in views if view.tags.get(STATE) in STATES}
        coming = [number for number, folder in away.items() if folder.handle not in ended]
        self._waiting += [number for number in coming if self._is_stray(number, 0.0)]
        return bool(coming)

    def _finish(self) -> Outcome:
        undelivered = self._wait_for_delivery()
        trials = self._trials()
        running = set(self._study.running())
        state: Literal["finished", "paused", "failed"] = "finished"
        if self._leave or running:
            state = "paused"
        elif not any(trial.state == "finished" for trial in trials):
            state = "failed"
        if self._parent is None and not self._leave:
            self._open_parent(is_new=False)  # whoever had it may be gone
        if self._parent is not None:
            self._record(at_end=True)
            undelivered += self._parent.finish(state, self._leave or self._why_no_more())
        return Outcome(
            state,
            self._parent_id,
            self._plan.name,
            self._plan.metric,
            self._plan.mode,
            trials,
            undelivered,
            self._leave,
        )

    def _wait_for_delivery(self) -> int:
        """Wait until the trials' runs are on the server, as long as a training waits; how many are not."""
        folders = [self._folder(trial.number) for trial in self._study.trials()]
        deadline = time.monotonic() + self._request.drain_timeout
        while (late := sum(bool(folder.journals()) for folder in folders)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if late:
            self._request.progress.warn(
                f"{late} runs are not delivered yet\n  try: python -m tracked.run sync"
            )
        return late

    def _trials(self) -> list[Trial]:
        """All trials, with the runs that this machine's sender has heard of since they ended."""
        return [
            trial if trial.run_id else replace(trial, run_id=self._run_id(trial.number))
            for trial in self._study.trials()
        ]

    def _run_id(self, number: int) -> str:
        return str(self._folder(number).about.get("run_id") or "")

    def _folder(self, number: int) -> RunFolder:
        return self._outbox.run(self._handle_of(number))

    # -- leaving

    @contextlib.contextmanager
    def asked_to_leave(self) -> Iterator[None]:
        """Signals let the running trials take a checkpoint, and pause the sweep; a second SIGINT ends it at once."""

        def leave(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._leave:
                for hand in self._hands:
                    hand.process.kill()
                signal.default_int_handler(number, frame)
            self.leave(signal.Signals(number).name)

        before = {
            each: signal.signal(each, leave) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def leave(self, reason: str) -> None:
        """Have every running trial take a checkpoint and pause."""
        if self._leave:
            return
        self._leave = reason
        for hand in self._hands:
            with contextlib.suppress(OSError):
                hand.connection.send(Leave(reason))

    # -- workers

    def _start(self, number: int) -> _Hand:
        ours, theirs = Pipe()
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._request.workers)))
        if devices := _devices():
            environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        package = str(Path(__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        process = children.start(
            [*COMMAND, str(theirs.fileno())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the coordinator, which asks them to leave
        )
        theirs.close()
        ours.send(Setup(self._experiment.path, self._request.place, self._plan.settings, self._name))
        return _Hand(process, ours)

    def _end_workers(self, *, at_once: bool = False) -> None:
        for hand in self._hands:
            hand.connection.close()
        for hand in self._hands:
            if at_once:
                hand.process.terminate()
            hand.process.wait()

    def _replace(self, hand: _Hand) -> None:
        """Another process for one that has died; its trial goes on, unless it has died too often."""
        hand.connection.close()
        status = hand.process.wait()
        index = self._hands.index(hand)
        if order := hand.order:
            deaths = self._study.count_retry(order.number)
            self._say(f"trial {order.number}: its process died (status {status})")
            if deaths > self._request.max_retries:
                self._tell(
                    order.number, "failed", reason=f"its process died {deaths} times (status {status})"
                )
            else:
                self._waiting.insert(0, order.number)
        elif not self._leave:
            self._idle_deaths += 1
            if self._idle_deaths > self._request.max_retries:
                raise UsageError(
                    f"workers die without a trial (status {status}); see above",
                    expected="processes that can import the experiment",
                    try_next=f"python -m tracked.run train {self._experiment.path.name}",
                )
        self._hands[index] = self._start(index)

    # -- handing out

    def _hand_out(self) -> None:
        for hand in self._hands:
            if hand.order is None and not self._leave and (order := self._next()) is not None:
                hand.order = order
                try:
                    hand.connection.send(order)
                except OSError:
                    self._replace(hand)

    def _next(self) -> Order | None:
        self._look_for_strays()
        if self._is_over_budget():
            return None
        if self._waiting:
            return self._order(self._waiting.pop(0), is_new=False)
        if promotable := [number for number in self._study.promotable() if number not in self._parked]:
            self._study.promote(promotable[0])
            return self._order(promotable[0], is_new=False)
        if self._why_no_more():
            return None
        number = self._study.ask(self._most)
        return None if number is None else self._order(number, is_new=True)

    def _order(self, number: int, *, is_new: bool) -> Order:
        suggested = self._study.reopen(number)
        words = [*self._plan.fixed, *spaces.as_words(suggested)]
        values = params.flatten(self._experiment.make_params(words))
        tags = {
            **self._tags,
            PARENT: self._parent_id,
            TRIAL: self._study.describe(number),
            TRIAL_NUMBER: str(number),
        }
        name = f"{self._plan.name}-{number}"
        return Order(
            number,
            self._handle_of(number),
            values,
            tags,
            name,
            is_new,
            self._study.until(number),
            self._study.goes_on(number),
        )

    def _handle_of(self, number: int) -> str:
        """So that whoever trains the trial finds the one run that it has."""
        return uuid.uuid5(uuid.UUID(self._handle), str(number)).hex

    def _why_no_more(self) -> str:
        """Why no trial is begun any more; empty while there is something to begin."""
        if self._most is not None and self._study.count() >= self._most:
            return f"{self._most} trials"
        if self._request.seconds is not None and time.monotonic() - self._began >= self._request.seconds:
            return f"{self._request.seconds:g} s"
        return ""

    @property
    def _most(self) -> int | None:
        """Trials in all: what was asked for, and no point of a grid twice."""
        grid = spaces.grid_size(self._plan.space) if self._request.sampler == "grid" else None
        return min((each for each in (self._plan.record["trials"], grid) if each is not None), default=None)

    def _is_over_budget(self) -> bool:
        return self._request.max_epochs is not None and self._epochs() >= self._request.max_epochs

    def _epochs(self) -> int:
        return ranking.epochs_trained(self._study.trials())

    def _look_for_strays(self) -> None:
        """Find trials that run in the study, and that nobody trains."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        ours = {hand.order.number for hand in self._hands if hand.order} | {*self._waiting} | self._parked
        running = self._study.running()
        for number in running:
            if number not in ours and self._is_stray(number, running[number]):
                self._waiting.append(number)

    def _is_stray(self, number: int, began: float) -> bool:
        """Whether the trial's process is gone: for certain on this machine, by its heartbeat elsewhere."""
        folder = self._folder(number)
        if folder.path.exists():
            return not spool.is_held(folder.lock)
        try:
            view = self._server.find_by_handle(folder.handle)
        except ServerError:
            return False  # it is asked again
        if view is None:
            beat = began
        elif view.status != "RUNNING":
            return True
        else:
            beat = float(view.tags.get(HEARTBEAT, 0))
        seen, since = self._strays.get(number, (math.nan, 0.0))
        if beat != seen:
            self._strays[number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > watch_seconds()

    # -- taking in

    def _hear(self, hand: _Hand) -> None:
        try:
            message = hand.connection.recv()
        except (EOFError, OSError):
            self._replace(hand)
            return
        order = hand.order
        assert order is not None
        if isinstance(message, Report):
            at = message.epoch if self._plan.unit == "epoch" else message.step
            is_last = self._plan.is_last(message, order)
            ends = self._study.report(order.number, at, message.value, is_last=is_last)
            if self._is_over_budget():
                self.leave(f"{self._request.max_epochs} epochs are used up")  # before it goes on
            with contextlib.suppress(OSError):
                hand.connection.send(Verdict(ends))
        else:
            hand.order = None
            self._take(order, message)

    def _take(self, order: Order, over: Over) -> None:
        number = order.number
        if not order.is_new and over.state not in ("taken", "paused"):
            self._fill(number)
        if run_id := self._run_id(number):
            self._study.identify(number, run_id)
        if over.state == "taken":
            self._strays[number] = (math.nan, 0.0)
        elif over.state == "paused":
            self._parked.add(number)
        else:
            self._tell(number, STATES[over.state], over)

    def _fill(self, number: int) -> None:
        """Take evaluations from the trial's run that no coordinator was there to hear."""
        ask, plan, handle = Asking(self._say, math.inf), self._plan, self._handle_of(number)
        if (view := ask(lambda: self._server.find_by_handle(handle))) is None:
            return
        found = ask(lambda: read(self._server, view, metric=plan.metric, mode=plan.mode, unit=plan.unit))
        for at, value in found.reports.items():
            self._study.fill(number, at, value)

    def _tell(self, number: int, state: TrialState, over: Over | None = None, *, reason: str = "") -> None:
        trial = next(each for each in self._study.trials() if each.number == number)
        value = best_value(trial.reports, self._plan.mode)
        reason = reason or (over.reason if over else "")
        if state == "finished" and value is None:
            logged = ", ".join(sorted(over.metrics)) if over else ""
            raise UsageError(
                f"trial {number} has never logged {self._plan.metric!r}, by which the trials are compared",
                expected=f"one of {logged}" if logged else "a metric that the loop logs",
                try_next="--monitor NAME",
            )
        epochs = (over.epochs if over else 0) or max(trial.reports, default=0)
        self._study.tell(number, state, value, epochs=epochs, reason=reason)
        shown = f"  {self._plan.metric} {value:.6g}" if value is not None else ""
        given = "  ".join(f"{name}={each}" for name, each in trial.params.items())
        self._say(
            f"trial {number}: {state}{shown}  {epochs} epochs  {given}{'  ' + reason if reason else ''}"
        )

    # -- on the parent run

    def _record(self, *, at_end: bool = False) -> None:
        """Log how the sweep stands whenever a trial has ended; draw its pictures now and then."""
        if self._parent is None:
            return
        trials = self._trials() if at_end or self._has_news() else []
        ended = str(
            [(trial.number, trial.state, trial.value) for trial in trials if trial.state != "running"]
        )
        if trials and (ended != self._recorded or at_end):
            self._recorded = ended
            self._records += 1
            self._log(trials, self._records)
        if trials and (at_end or time.monotonic() > self._draws_again):
            self._draw(trials, at_end=at_end)

    def _has_news(self) -> bool:
        return any(hand.order is None for hand in self._hands)

    def _log(self, trials: list[Trial], step: int) -> None:
        assert self._parent is not None
        counts = ranking.counts(trials)
        full = self._plan.epochs or 0
        values: dict[str, float] = {
            **{f"trials/{state}": count for state, count in counts.items() if state != "running"},
            "epochs/trained": ranking.epochs_trained(trials),
            "epochs/without_pruning": ranking.epochs_without_pruning(trials, full),
        }
        best = ranking.best(trials, self._plan.mode)
        tags = {TRIALS: ", ".join(f"{count} {state}" for state, count in counts.items())}
        if best is not None and best.value is not None:
            values["best"] = best.value
            given = ", ".join(f"{name}={value}" for name, value in best.params.items())
            tags[BEST] = f"{self._plan.metric} {best.value:.6g} in trial {best.number}: {given}"
            tags["tracked.best_run"] = best.run_id
        self._parent.log(values, step)
        self._parent.set_tags(tags)

    def _draw(self, trials: list[Trial], *, at_end: bool) -> None:
        if self._drawing is not None:
            if not at_end and self._drawing.is_alive():
                return
            self._drawing.join()
        importance = self._study.importances()
        self._drawing = threading.Thread(target=self._make_pictures, args=(trials, importance), daemon=True)
        self._drawing.start()
        if at_end:
            self._drawing.join()

    def _make_pictures(self, trials: list[Trial], importance: Mapping[str, float]) -> None:
        from tracked.sweep_plots import draw

        assert self._parent is not None
        began = time.monotonic()
        pictures = draw(trials, metric=self._plan.metric, mode=self._plan.mode, importance=importance)
        for name, image in pictures.items():
            self._parent.log_bytes(image, name)
        self._draws_again = time.monotonic() + _DRAWING_REST * (time.monotonic() - began)

    # -- from MLflow alone

    @property
    def _server(self) -> Server:
        if self._server_ is None:
            from tracked.server import Server

            self._server_ = Server(self._request.place.tracking_uri)
        return self._server_

    def _rebuild(self) -> int:
        """Fill the empty study from the parent's children; how many there were."""
        if self._parent is None or self._parent.attempt == 1:
            return 0
        ask, parent, plan = Asking(self._say, math.inf), self._parent_id, self._plan
        found = ask(
            lambda: [
                (
                    described(view),
                    read(self._server, view, metric=plan.metric, mode=plan.mode, unit=plan.unit),
                )
                for view in children_of(self._server, parent)
            ]
        )
        return self._study.rebuild(found)

    def _extend(self) -> bool:
        """Have the best trials trained further, if that was asked for; whether there is one to train."""
        if self._request.extend is None:
            return False
        count, epochs = self._request.extend
        best = ranking.ranked(self._study.trials(), self._plan.mode)[:count]
        further = [trial.number for trial in best if trial.epochs < epochs]
        for number in further:
            self._study.promote(number, until=epochs)
        self._waiting += further
        return bool(further)


def _devices() -> list[str]:
    """CUDA's devices that may be used, to be dealt out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each]
    return [str(number) for number in range(torch.cuda.device_count())]
