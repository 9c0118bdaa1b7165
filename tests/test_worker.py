"""A worker trains what it is handed, keeps a trial to one run, and leaves when nobody is there to hand out more."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import EXPERIMENT, ROOT, Workplace
from tests.proofs import assert_same_training, curves, runs, state
from tracked.names import TRIAL
from tracked.place import Place
from tracked.worker import COMMAND, Begun, Leave, Order, Over, Ready, Report, Setup, Verdict

SETTINGS = {"epochs": 3, "monitor": "val/loss", "mode": "min", "checkpoint_every": ("1 epoch", "3 steps")}


class Hand:
    """A worker process, and our end of its connection."""

    def __init__(self, place: Workplace, file: Path, **settings: Any) -> None:
        self.connection, theirs = Pipe()
        environment = place.environment({"PYTHONPATH": str(ROOT)})
        self.process = subprocess.Popen(
            [*COMMAND, str(theirs.fileno())],
            env=environment,
            cwd=place.path,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        where = Place.choose(place.tracking_uri, place.spool)
        self.connection.send(Setup(file, where, {**SETTINGS, **settings}, "experiment"))

    def train(
        self, order: Order, answer: Callable[[Report], bool] = lambda _: False
    ) -> tuple[Over, list[Report]]:
        """Hand out a trial, and answer its reports until it is over."""
        self.connection.send(order)
        reports: list[Report] = []
        while isinstance(message := self.heard(), Report):
            reports.append(message)
            self.connection.send(Verdict(answer(message)))
        return message, reports

    def heard(self) -> Any:
        """The next message about a trial's outcome."""
        while isinstance(message := self.connection.recv(), Ready | Begun):
            pass
        return message

    def close(self) -> None:
        self.connection.close()
        self.process.wait(60)


@pytest.fixture
def start(workplace: Workplace) -> Iterator[Callable[..., Hand]]:
    """Starts workers on the small experiment."""
    hands: list[Hand] = []
    file = Path(workplace.experiment(EXPERIMENT))

    def started(**settings: Any) -> Hand:
        hands.append(Hand(workplace, file, **settings))
        return hands[-1]

    yield started
    for hand in hands:
        if hand.process.poll() is None:
            hand.process.kill()
        hand.close()


def order(number: int, **params: Any) -> Order:
    values = {"lr": 0.1, "pause": 0.0, **params}
    return Order(number, uuid.uuid4().hex, values, {TRIAL: "{}"}, f"trial {number}", is_new=True)


def only(place: Workplace, trial: Order) -> str:
    """The ID of the one run of a trial."""
    found = [
        run for run in runs(place.tracking_uri) if run.data.tags["mlflow.tracked.handle"] == trial.handle
    ]
    (run,) = found
    return str(run.info.run_id)


def delivered(place: Workplace) -> None:
    place.tracked("sync")


def test_a_worker_trains_one_trial_after_another_and_ends_those_that_it_is_told_to(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    hand = start()
    whole, reports = hand.train(order(0))
    pruned, early = hand.train(order(1, lr=0.01), lambda report: report.epoch == 2)
    failed, _ = hand.train(replace(order(2), params={"lr": 1e9, "pause": 0.0}))
    delivered(workplace)

    assert [(each.step, each.epoch) for each in reports] == [(8, 1), (16, 2), (24, 3)]
    assert (whole.state, whole.epochs) == ("finished", 3)
    assert (pruned.state, pruned.epochs, [each.epoch for each in early]) == ("pruned", 2, [1, 2])
    assert failed.state == "failed"
    assert "LossNotFinite" in failed.reason
    found = {run.info.run_name: run for run in runs(workplace.tracking_uri)}
    assert {name: run.info.status for name, run in found.items()} == {
        "trial 0": "FINISHED",
        "trial 1": "KILLED",
        "trial 2": "FAILED",
    }
    assert found["trial 1"].data.tags["tracked.state"] == "pruned"
    assert "epoch 2" in found["trial 1"].data.tags["tracked.stop_reason"]


def test_a_trial_whose_worker_was_killed_goes_on_in_the_same_run(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    first, second = start(), start()
    reference, lost = order(0), order(1)
    first.train(reference)
    first.connection.send(lost)
    before = first.heard()
    first.connection.send(Verdict(ends=False))
    assert isinstance(first.heard(), Report)
    os.kill(first.process.pid, signal.SIGKILL)
    over, reports = second.train(replace(lost, is_new=False))
    delivered(workplace)

    assert isinstance(before, Report)
    assert over.state == "finished"
    assert [report.epoch for report in reports][-2:] == [2, 3]
    whole = only(workplace, reference)
    assert_same_training(
        workplace.tracking_uri,
        only(workplace, lost),
        (curves(workplace.tracking_uri, whole), state(workplace.tracking_uri, whole)),
    )


def test_a_trial_killed_before_its_first_checkpoint_begins_anew_in_the_same_run(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    lost = order(0)
    workplace.env["TRACKED_FAILPOINT"] = "archive.before-write"
    first = start()
    del workplace.env["TRACKED_FAILPOINT"]
    first.connection.send(lost)
    # The process that writes its checkpoints has ended itself; the training is ended before it notices.
    message = first.heard()
    os.kill(first.process.pid, signal.SIGKILL)
    over, reports = start().train(replace(lost, is_new=False))
    delivered(workplace)

    assert isinstance(message, Report | Over)
    assert (over.state, len(reports)) == ("finished", 3)
    assert len(runs(workplace.tracking_uri)) == 1
    assert only(workplace, lost)


def test_a_pruned_trial_goes_on_when_it_is_asked_to(workplace: Workplace, start: Callable[..., Hand]) -> None:
    hand = start()
    trial, reference = order(0), order(1)
    hand.train(reference)
    hand.train(trial, lambda report: report.epoch == 1)
    again, nothing = hand.train(replace(trial, is_new=False))
    _, reports = hand.train(replace(trial, is_new=False, goes_on_from=1))
    delivered(workplace)

    assert (again.state, nothing) == ("pruned", [])
    assert [report.epoch for report in reports] == [2, 3]
    whole_id = only(workplace, reference)
    assert_same_training(
        workplace.tracking_uri,
        only(workplace, trial),
        (curves(workplace.tracking_uri, whole_id), state(workplace.tracking_uri, whole_id)),
    )


@pytest.mark.parametrize("how", ["asked", "left alone"])
def test_a_worker_that_is_left_alone_or_asked_to_leave_pauses_its_trial(
    how: str, workplace: Workplace, start: Callable[..., Hand]
) -> None:
    hand = start()
    trial = order(0, pause=0.05)
    hand.connection.send(trial)
    assert isinstance(hand.heard(), Report)
    if how == "asked":
        hand.connection.send(Leave("asked to"))
        hand.connection.send(Verdict(ends=False))
        over = hand.heard()
        assert over.state == "paused"
    hand.close()
    delivered(workplace)

    assert hand.process.returncode == 0
    (run,) = runs(workplace.tracking_uri)
    assert run.data.tags["tracked.state"] == "paused"
    later, _ = start().train(replace(trial, is_new=False))
    assert (later.state, later.epochs) == ("finished", 3)


def test_an_evaluation_that_nobody_answered_is_reported_again(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    hand, trial = start(), order(0)
    hand.connection.send(trial)
    unanswered = hand.heard()
    hand.close()
    over, reports = start().train(replace(trial, is_new=False), lambda report: report.epoch == 1)
    delivered(workplace)

    assert reports == [unanswered]
    assert (over.state, over.epochs) == ("pruned", 1)
    (run,) = runs(workplace.tracking_uri)
    assert run.data.tags["tracked.stop_reason"].startswith("pruned in epoch 1:")


def test_a_worker_that_was_asked_to_leave_begins_no_trial_any_more(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    hand = start()
    assert isinstance(hand.connection.recv(), Ready)
    hand.connection.send(Leave("asked to"))
    over, reports = hand.train(order(0))
    delivered(workplace)

    assert (over.state, reports) == ("paused", [])
    assert runs(workplace.tracking_uri) == []


def test_a_trial_that_cannot_go_on_has_failed_whatever_its_run_was(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    hand, trial = start(), order(0, pause=0.05)
    hand.connection.send(trial)
    assert isinstance(hand.heard(), Report)
    hand.close()
    workplace.experiment(EXPERIMENT.replace("(4, 4)", "(4, 5)").replace("(4, 1)", "(5, 1)"))
    over, _ = start().train(replace(trial, is_new=False))

    assert over.state == "failed"
    assert "StateMismatch" in over.reason


def test_the_writing_process_serves_one_trial_after_another(
    workplace: Workplace, start: Callable[..., Hand]
) -> None:
    hand = start()
    hand.train(order(0))
    before = {child.pid for child in psutil.Process(hand.process.pid).children()}
    hand.train(order(1))
    after = {child.pid for child in psutil.Process(hand.process.pid).children()}

    assert before & after
