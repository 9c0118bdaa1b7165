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
from typing import TYPE_CHECKING, Any, Literal

from tracked import experiment as experiments
from tracked import params, ranking, spool
from tracked import space as spaces
from tracked.attempts import Asking
from tracked.crew import Crew, Hand, Message
from tracked.delivery import watch_seconds
from tracked.errors import RunTaken, ServerError, ServerUnavailable, UsageError
from tracked.experiment import Experiment
from tracked.names import (
    HANDLE,
    HEARTBEAT,
    PARENT,
    STATE,
    STOP_REASON,
    SWEEP,
    TRIAL,
    TRIAL_NUMBER,
    newest_attempt,
)
from tracked.spool import RunFolder
from tracked.storage import open_storage
from tracked.study import Study
from tracked.sweep_parent import Parent
from tracked.sweep_plan import Plan, Request
from tracked.training import file_tags, from_tag
from tracked.trial_runs import STATES, described, read
from tracked.trial_runs import children as children_of
from tracked.trials import Trial, TrialState, best_value
from tracked.worker import Begun, Order, Over, Ready, Report, Setup, Verdict

if TYPE_CHECKING:
    from tracked.search import Turn
    from tracked.server import RunView, Server

_LOOK_SECONDS = 1.0
_REFUSED_IN_A_ROW = 10
"""Trials whose params the experiment does not take, before any that it takes: a sweep of these has no end but this."""


@dataclass(frozen=True)
class Outcome:
    """How a sweep stands when the command ends."""

    state: Literal["finished", "paused", "stopped", "failed"]
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
        with storage.translated():
            study = Study(storage.backend, plan.name, plan.mode, plan.method, plan.record)
        recorded = ({} if study.is_whole else _recorded(request, plan)) or study.record
        try:
            plan.check_same(recorded)
        except UsageError:
            if study.is_new:
                study.forget()
            raise
        if plan.record["waits"] != (waits := recorded.get("waits", plan.record["waits"])):
            # Whatever this machine, or this continuation, has for a budget: all stop alike.
            plan = Plan.make(replace(request, waits=waits), experiment)
            study.go_by(plan.method)
        plan = plan.continued(recorded, trials=request.trials)
        study.record_again(plan.record)
        coordinator = _Coordinator(request, experiment, plan, study)
        with coordinator.asked_to_leave(), storage.translated():
            return coordinator.run()


def _recorded(request: Request, plan: Plan) -> dict[str, Any]:
    """What the parent run says that the sweep is about, which may outlive the study; empty if there is none."""
    if not request.is_named:
        return {}
    from tracked.server import Server

    server = Server(request.place.tracking_uri)
    view = Asking(request.progress.say, math.inf)(lambda: server.find_by_handle(plan.handle))
    return from_tag(view, SWEEP) if view is not None else {}


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
            experiment_name=recorded["experiment"],
            study_name=recorded["name"],
            sampler=recorded["sampler"],
            sampler_options=recorded["sampler_options"],
            pruner=recorded["pruner"],
            pruner_options=recorded["pruner_options"],
            promote=recorded["promote"],
            waits=recorded.get("waits"),
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
        is_shared = request.storage is not None
        setup = Setup(experiment.path, request.place, plan.settings, plan.experiment, is_shared)
        self._crew = Crew(setup, request.workers)
        self._waiting: list[int] = []
        self._asked: set[int] = set()
        self._overs: list[tuple[Order, Over]] = []
        self._strays: dict[int, tuple[float, float]] = {}
        self._parked: set[int] = set()
        self._began = time.monotonic()
        self._leave = ""
        self._looked = 0.0
        self._asks_again = 0.0
        self._in_vain = 0
        self._has_news = True
        self._has_extended = False
        self._is_done = False  # nothing lies ahead: who asks to leave while it is delivered pauses nothing
        self._parent: Parent | None = None
        self._parent_id = ""

    # -- from beginning to end

    def run(self) -> Outcome:
        self._open_parent()
        try:
            self._fill_study()
            self._crew.start()
            self._work()
        except BaseException as error:
            self._crew.end(at_once=not isinstance(error, UsageError))
            if self._parent is not None and isinstance(error, KeyboardInterrupt):
                self._parent.run.leave_at_once()
                self._parent.run.finish("paused", "interrupted")
            elif self._parent is not None:
                self._parent.run.fail(error)
            raise
        self._crew.end()
        return self._finish()

    def _open_parent(self) -> None:
        """Begin the parent run, or go on with it; somebody else's is left to them."""
        try:
            self._parent = Parent(
                self._request,
                self._plan,
                source=self._experiment.path,
                tags=self._tags,
                is_new=not self._request.is_named and not self._study.is_whole,
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

    def _fill_study(self) -> None:
        """See that the study knows all trials there are: where it was empty, from their runs."""
        while not self._study.is_whole and not self._leave:
            if self._parent is None:  # whoever has the parent run does it, or dies over it
                time.sleep(_LOOK_SECONDS)
                self._open_parent()
            else:
                if count := self._rebuild():
                    self._say(f"the study was not in its storage: {count} trials are taken from their runs")
                self._study.declare_whole()

    def _work(self) -> None:
        while True:
            self._take_overs()
            self._hand_out()
            self._tell_parent()
            if not self._crew.numbers and self._leave:
                return
            if not self._crew.numbers and not self._overs and self._is_over_budget():
                # Whatever runs in the study, and nobody trains, stays there: it is for a larger budget.
                self._leave = self._leave or self._epochs_used_up()
                return
            if not self._crew.numbers and self._crew.is_free and not self._lies_ahead():
                if not self._extend():
                    self._is_done = True
                    return
                continue
            for hand, message in self._crew.messages(timeout=0.2):
                self._hear(hand, message)
            if self._parent is not None and self._parent.run.leaves_because:
                self.leave(self._parent.run.leaves_because)

    def _tell_parent(self) -> None:
        if self._parent is not None and self._has_news:
            self._has_news = False
            self._parent.tell(self._trials(), self._study.finished)

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
        with contextlib.suppress(ServerError):
            self._waiting += [number for number in coming if self._is_stray(number, 0.0)]
        return bool(coming)

    def _finish(self) -> Outcome:
        undelivered = self._wait_for_delivery()
        trials = self._trials()
        running = set(self._study.running())
        state: Literal["finished", "paused", "stopped", "failed"] = "finished"
        if running or (self._leave and not self._is_done and not self._is_over_budget()):
            is_stopped = self._parent is not None and self._parent.run.leaves_as == "stopped"
            state = "stopped" if is_stopped else "paused"
        elif not any(trial.state == "finished" for trial in trials):
            state = "failed"
        if self._parent is None and not self._leave:
            self._open_parent()  # whoever had it may be gone
        if self._parent is not None:
            reason = self._leave or self._why_no_more()
            undelivered += self._parent.finish(self._trials(), self._study.finished(), state, reason)
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

    def leave(self, reason: str, *, but: Hand | None = None) -> None:
        """Have every running trial take a checkpoint and pause, `but` that of one worker, which ends by itself."""
        if self._leave:
            return
        self._leave = reason
        self._crew.leave(reason, but=but)

    # -- handing out

    def _hand_out(self) -> None:
        for hand in self._crew.hands:
            if hand.is_free and not self._leave and (order := self._next()) is not None:
                hand.order, hand.has_begun = order, False
                hand.tell(order)  # if it has died meanwhile, its message says so

    def _next(self) -> Order | None:
        self._look_for_strays()
        while not self._is_over_budget():
            if (number := self._choose()) is None:
                return None
            try:
                order = self._order(number)
            except Exception as error:  # noqa: BLE001 - the user's suggest(), or params that refuse a combination
                self._tell(number, "failed", reason=f"{type(error).__name__}: {error}")
                if not any(trial.run_id for trial in self._trials()):
                    expected = "params that the experiment takes"
                    self._count_in_vain(f"trials cannot begin: {error}", expected, most=_REFUSED_IN_A_ROW)
                continue
            self._in_vain = 0
            return order
        return None

    def _choose(self) -> int | None:
        """The trial that is trained next."""
        if self._waiting:
            return self._waiting.pop(0)
        if self._is_out_of_time:
            return None
        if (promoted := self._promoted("before")) is not None:
            return promoted
        if not self._why_no_more() and (number := self._study.ask(self._most)) is not None:
            self._asked.add(number)
            return number
        return self._promoted("after")

    def _promoted(self, turn: Turn) -> int | None:
        """A trial that had been stopped, and goes on now."""
        for number in self._study.promotable(turn):
            if number not in self._parked and self._study.promote(number):
                return number
        return None

    def _order(self, number: int) -> Order:
        suggested = self._study.reopen(number)
        words = [*self._plan.fixed, *spaces.as_words(suggested)]
        values = params.flatten(self._experiment.make_params(words))
        tags = {
            **self._tags,
            PARENT: self._parent_id,
            TRIAL: self._study.describe(number),
            TRIAL_NUMBER: str(number),
        }
        is_new = number in self._asked
        self._asked.discard(number)
        return Order(
            number,
            self._handle_of(number),
            values,
            tags,
            f"{self._plan.name}-{number}",
            is_new,
            self._study.until(number),
            self._study.goes_on_from(number),
        )

    def _handle_of(self, number: int) -> str:
        """So that whoever trains the trial finds the one run that it has."""
        return uuid.uuid5(uuid.UUID(self._plan.handle), str(number)).hex

    def _why_no_more(self) -> str:
        """Why no trial is begun any more; empty while there is something to begin."""
        if self._most is not None and self._study.count() >= self._most:
            return f"{self._most} trials"
        return f"{self._request.seconds:g} s" if self._is_out_of_time else ""

    @property
    def _most(self) -> int | None:
        """Trials in all: what was asked for, and no point of a grid twice."""
        grid = spaces.grid_size(self._plan.space) if self._request.sampler == "grid" else None
        return min((each for each in (self._plan.record["trials"], grid) if each is not None), default=None)

    @property
    def _is_out_of_time(self) -> bool:
        seconds = self._request.seconds
        return seconds is not None and time.monotonic() - self._began >= seconds

    def _is_over_budget(self) -> bool:
        most = self._request.max_epochs
        return most is not None and ranking.epochs_trained(self._study.trials()) >= most

    def _epochs_used_up(self) -> str:
        return f"{self._request.max_epochs} epochs are used up"

    def _look_for_strays(self) -> None:
        """Find trials that run in the study, and that nobody trains."""
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        ours = (
            self._crew.numbers | {*self._waiting} | {order.number for order, _ in self._overs} | self._parked
        )
        running = self._study.running()
        with contextlib.suppress(
            ServerError
        ):  # asked again at the next look: trials wait for verdicts meanwhile
            for number in running:
                if number not in ours and self._is_stray(number, running[number]):
                    self._waiting.append(number)

    def _is_stray(self, number: int, began: float) -> bool:
        """Whether the trial's process is gone: for certain where it was on this machine, else by its heartbeat.

        Raises:
            ServerError: The server does not say.
        """
        folder = self._folder(number)
        if spool.is_held(folder.lock):
            return False
        view = self._server.find_by_handle(folder.handle)
        was_here = newest_attempt(view.params)[0] <= folder.about.get("attempt", 0) if view else False
        if (
            was_here
            or (view is not None and view.status != "RUNNING")
            or (view is None and folder.path.exists())
        ):
            return True
        beat = began if view is None else float(view.tags.get(HEARTBEAT, 0))
        seen, since = self._strays.get(number, (math.nan, 0.0))
        if beat != seen:
            self._strays[number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > watch_seconds()

    # -- taking in

    def _hear(self, hand: Hand, message: Message | None) -> None:
        match message:
            case None:
                self._replace(hand)
            case Ready():
                hand.is_ready = True
            case Begun():
                hand.has_begun = True
            case Report():
                self._judge(hand, message)
            case Over():
                assert hand.order is not None
                self._overs.append((hand.order, message))
                hand.order = None

    def _judge(self, hand: Hand, report: Report) -> None:
        order = hand.order
        assert order is not None
        at, epochs = (report.epoch, None) if self._plan.unit == "epoch" else (report.step, report.epoch)
        is_last = self._plan.is_last(report, order)
        ends = self._study.report(order.number, at, report.value, epochs=epochs, is_last=is_last)
        if self._is_over_budget():  # before the trial goes on
            reason = self._epochs_used_up()
            self.leave(reason, but=hand if ends or is_last else None)
        hand.tell(Verdict(ends))

    def _replace(self, hand: Hand) -> None:
        """Another process for one that has died; its trial goes on, unless it has died too often."""
        status, order = self._crew.bury(hand), hand.order
        hand.order = None
        if self._leave:
            return
        if order is not None:
            deaths = self._study.count_retry(order.number)
            self._say(f"trial {order.number}: its process died (status {status})")
            if deaths > self._request.max_retries:
                reason = f"its process died {deaths} times (status {status})"
                self._overs.append((order, Over("failed", reason, is_given_up=True)))
            else:
                self._waiting.insert(0, order.number)
        elif not hand.is_ready:
            found = f"workers die before they have a trial (status {status}); see above"
            expected = "processes that can import the experiment"
            self._count_in_vain(found, expected, most=self._request.max_retries)
        self._crew.replace(hand)

    def _count_in_vain(self, found: str, expected: str, *, most: int) -> None:
        """Take note that nothing came of something; too often without a trial between, it never will."""
        self._in_vain += 1
        if self._in_vain > most:
            raise UsageError(
                found,
                expected=expected,
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
        if over.is_given_up:
            self._mark_failed(number, over.reason)
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

    def _mark_failed(self, number: int, reason: str) -> None:
        """Have the run say that nobody goes on with it, once its own end has arrived: nothing lives that could."""
        folder = self._folder(number)
        if folder.journals():
            raise ServerUnavailable(f"the end of trial {number} is not delivered yet")
        if (view := self._server.find_by_handle(folder.handle)) is not None:
            self._server.set_tags(view.run_id, {STATE: "failed", STOP_REASON: reason})

    def _fill(self, number: int) -> None:
        """Take evaluations from the trial's run that no coordinator was there to hear."""
        plan = self._plan
        if (view := self._server.find_by_handle(self._handle_of(number))) is None:
            return
        found = read(self._server, view, metric=plan.metric, mode=plan.mode, unit=plan.unit)
        self._study.fill(number, found.reports, epochs=None if plan.unit == "epoch" else found.epochs)

    def _tell(self, number: int, state: TrialState, over: Over | None = None, *, reason: str = "") -> None:
        trial = next(each for each in self._study.trials() if each.number == number)
        value = best_value(trial.reports, self._plan.mode)
        reason = reason or (over.reason if over else "")
        usage = over.usage if over else None
        if state == "finished" and value is None:
            logged = ", ".join(sorted(over.metrics)) if over else ""
            usage = UsageError(
                f"trial {number} has never logged {self._plan.metric!r}, by which the trials are compared",
                expected=f"one of {logged}" if logged else "a metric that the loop logs before it ends",
                try_next="--monitor NAME, or --eval-every with a shorter interval",
            )
            state, reason = "failed", usage.found
        epochs = (over.epochs if over else 0) or trial.epochs
        self._study.tell(number, state, value, epochs=epochs, reason=reason)
        self._has_news = True
        shown = f"  {self._plan.metric} {value:.6g}" if value is not None else ""
        given = "  ".join(f"{name}={each}" for name, each in trial.params.items())
        why = next(iter(reason.splitlines()), "")
        self._say(f"trial {number}: {state}{shown}  {epochs} epochs  {given}  {why}".rstrip())
        if usage is not None and not any(each.reports for each in self._study.trials()):
            raise usage  # which every trial would meet

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
        """Have the best trials trained further, once, if that was asked for; whether there is one to train."""
        if self._request.extend is None or self._has_extended:
            return False
        self._has_extended = True
        count, epochs = self._request.extend
        best = ranking.ranked(self._study.trials(), self._plan.mode)[:count]
        further = [trial.number for trial in best if trial.epochs < epochs]
        self._waiting += [number for number in further if self._study.promote(number, until=epochs)]
        return bool(further)
