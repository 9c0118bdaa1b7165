"""A sweep: one coordinator owns the study, hands its trials to workers, and records it all in a parent run.

What a kill can interrupt is told in this order: a suggestion stands in the study before a worker gets it; a report
stands there before its verdict is given; a run ends before its trial does. So a trial that runs in the study goes
on from its run's last checkpoint, or is only told how its run has ended.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from tracked import experiment as experiments
from tracked import params, ranking, spool
from tracked import space as spaces
from tracked.attempts import Asking
from tracked.crew import Crew, Hand
from tracked.errors import RunTaken, ServerError, ServerUnavailable, UsageError
from tracked.experiment import Experiment
from tracked.names import HANDLE, HEARTBEAT, PARENT, STATE, SWEEP, TRIAL, TRIAL_NUMBER
from tracked.sender import watch_seconds
from tracked.spool import RunFolder
from tracked.storage import open_storage
from tracked.study import Study
from tracked.sweep_parent import Parent
from tracked.sweep_plan import Plan, Request
from tracked.training import file_tags
from tracked.trial_runs import STATES, described, read
from tracked.trial_runs import children as children_of
from tracked.trials import Trial, TrialState, best_value
from tracked.worker import Order, Over, Report, Setup, Verdict

if TYPE_CHECKING:
    from tracked.server import RunView, Server

_LOOK_SECONDS = 1.0


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


def sweep(request: Request) -> Outcome:
    """Train the trials of a study, new or continued, until its budget is used up or somebody asks to leave.

    Raises:
        TrackedError: As its text says; what one trial raises fails that trial alone.
    """
    experiment = experiments.load(request.file)
    plan = Plan.make(request, experiment)
    with open_storage(request.storage, default=request.place.spool.parent / "studies.journal") as storage:
        study = Study(storage.backend, plan.name, plan.mode, plan.method, plan.record)
        plan.check_same(study.record)
        plan = replace(plan, handle=str(study.record["handle"]))
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


class _Coordinator:
    """Hands trials out, takes reports in, and records how the sweep stands."""

    def __init__(self, request: Request, experiment: Experiment, plan: Plan, study: Study) -> None:
        self._request = request
        self._experiment = experiment
        self._plan = plan
        self._study = study
        self._say = request.progress.say
        self._tags = file_tags(experiments.describe(experiment))
        self._outbox = request.place.outbox()
        setup = Setup(experiment.path, request.place, plan.settings, plan.experiment)
        self._crew = Crew(setup, request.workers)
        self._waiting: list[int] = []
        self._overs: list[tuple[Order, Over]] = []
        self._strays: dict[int, tuple[float, float]] = {}
        self._parked: set[int] = set()
        self._began = time.monotonic()
        self._leave = ""
        self._looked = 0.0
        self._asks_again = 0.0
        self._idle_deaths = 0
        self._parent: Parent | None = None
        self._parent_id = ""

    # -- from beginning to end

    def run(self) -> Outcome:
        if self._request.seconds is not None and self._request.seconds <= 0:
            raise UsageError("--timeout is 0", expected="seconds above 0")
        is_new = self._study.count() == 0
        self._open_parent(is_new=is_new and self._request.handle is None and not self._request.study_name)
        try:
            if is_new and (count := self._rebuild()):
                self._say(f"the study was not in its storage: {count} trials are taken from their runs")
            self._crew.start()
            self._work()
        except BaseException as error:
            self._crew.end(at_once=not isinstance(error, UsageError))
            if self._parent is not None:
                self._parent.run.fail(error)
            raise
        self._crew.end()
        return self._finish()

    def _open_parent(self, *, is_new: bool) -> None:
        """Begin the parent run, or go on with it; somebody else's is left to them."""
        try:
            self._parent = Parent(
                self._request,
                self._plan,
                source=self._experiment.path,
                tags=self._tags,
                is_new=is_new,
                say=self._say,
            )
        except RunTaken as taken:
            self._say(f"{taken.found}: this process takes part in its sweep")
            found = Asking(self._say, math.inf)(lambda: self._server.find_by_handle(self._plan.handle))
            assert found is not None
            self._parent_id = found.run_id
            return
        self._parent_id = self._parent.wait_for_id(lambda: bool(self._leave))
        self._say(f"sweep {self._plan.name}: parent run {self._parent_id}  {self._parent.run.url}".rstrip())

    def _work(self) -> None:
        while True:
            self._hand_out()
            self._take_overs()
            if not self._crew.numbers and (self._leave or not self._lies_ahead()):
                if self._leave or not self._extend():
                    return
                continue
            for hand, message in self._crew.messages(timeout=0.2):
                self._hear(hand, message)
            if self._parent is not None and self._parent.run.leaves_because:
                self.leave(self._parent.run.leaves_because)
            self._heed_budget()
            if self._parent is not None and any(hand.order is None for hand in self._crew.hands):
                self._parent.tell(self._trials(), self._study.importances)

    def _lies_ahead(self) -> bool:
        """Whether there is, or may come, something to train."""
        return bool(
            self._waiting
            or self._overs
            or set(self._study.running()) - self._parked
            or self._ends_elsewhere()
        )

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
            reason = self._leave or self._why_no_more()
            undelivered += self._parent.finish(self._trials(), self._study.importances(), state, reason)
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
                self._crew.kill()
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
        self._crew.leave(reason)

    # -- handing out

    def _hand_out(self) -> None:
        for hand in self._crew.hands:
            if hand.order is None and not self._leave and (order := self._next()) is not None:
                hand.order = order
                hand.tell(order)  # if it has died meanwhile, its message says so

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
        return uuid.uuid5(uuid.UUID(self._plan.handle), str(number)).hex

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
        most = self._request.max_epochs
        return most is not None and ranking.epochs_trained(self._study.trials()) >= most

    def _heed_budget(self) -> None:
        if self._is_over_budget():
            self.leave(f"{self._request.max_epochs} epochs are used up")

    def _look_for_strays(self) -> None:
        """Find trials that run in the study, and that nobody trains."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        ours = (
            self._crew.numbers | {*self._waiting} | {order.number for order, _ in self._overs} | self._parked
        )
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

    def _hear(self, hand: Hand, message: Report | Over | None) -> None:
        order = hand.order
        if message is None:
            self._replace(hand)
            return
        assert order is not None
        if isinstance(message, Over):
            hand.order = None
            self._overs.append((order, message))
            return
        at = message.epoch if self._plan.unit == "epoch" else message.step
        ends = self._study.report(order.number, at, message.value, is_last=self._plan.is_last(message, order))
        self._heed_budget()  # before it goes on
        hand.tell(Verdict(ends))

    def _replace(self, hand: Hand) -> None:
        """Another process for one that has died; its trial goes on, unless it has died too often."""
        status = self._crew.replace(hand)
        if order := hand.order:
            deaths = self._study.count_retry(order.number)
            self._say(f"trial {order.number}: its process died (status {status})")
            if deaths > self._request.max_retries:
                reason = f"its process died {deaths} times (status {status})"
                self._tell(order.number, "failed", reason=reason)
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

    def _take_overs(self) -> None:
        """Tell the study which trials are over; those whose runs must be read wait for the server, and nobody else."""
        if time.monotonic() < self._asks_again:
            return
        overs, self._overs = self._overs, []
        for order, over in overs:
            try:
                self._take(order, over)
            except ServerUnavailable as error:
                if not self._asks_again:
                    self._say(f"waiting for the server: {error.found}")
                self._overs.append((order, over))
        self._asks_again = time.monotonic() + _LOOK_SECONDS if self._overs else 0.0

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
        plan = self._plan
        if (view := self._server.find_by_handle(self._handle_of(number))) is None:
            return
        found = read(self._server, view, metric=plan.metric, mode=plan.mode, unit=plan.unit)
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

    # -- from MLflow alone

    @cached_property
    def _server(self) -> Server:
        from tracked.server import Server

        return Server(self._request.place.tracking_uri)

    def _rebuild(self) -> int:
        """Fill the empty study from the parent's children; how many there were."""
        if self._parent is None or self._parent.run.attempt == 1:
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
