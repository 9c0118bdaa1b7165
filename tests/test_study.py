"""A study knows its trials by their runs, counts what they train, and is filled from the runs where it was lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from tracked.names import BEST, STATE, TRIAL
from tracked.search import make_pruner, make_sampler, promotable, suggest
from tracked.server import RunView
from tracked.space import Choice, Space
from tracked.storage import StudyStorage, open_storage
from tracked.study import Method, Study
from tracked.trial_runs import glance
from tracked.trials import Trial

SPACE: Space = {"quality": Choice((0.1, 0.2, 0.3, 0.4))}


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StudyStorage]:
    with open_storage(None, default=tmp_path / "studies.journal") as storage:
        yield storage


@pytest.fixture
def opened(storage: StudyStorage) -> Callable[..., Study]:
    """Opens the study as one machine after another would: a grid, its pruner by name."""

    def opened(pruner: str = "none", *options: str, name: str = "study") -> Study:
        chosen = make_pruner(pruner, list(options), length=9)
        method = Method(
            sampler=lambda number: make_sampler("grid", [], seed=0, number=number, space=SPACE),
            pruner=chosen,
            suggest=lambda trial: suggest(trial, SPACE),
            promotable=lambda rows, turn: promotable(rows, chosen, "maximize", turn),
        )
        return Study(storage.backend, name, "max", method, {"name": name})

    return opened


def begun(study: Study) -> tuple[int, Mapping[str, Any]]:
    number = study.ask()
    assert number is not None
    return number, study.reopen(number)


def by_number(study: Study) -> dict[int, Trial]:
    return {trial.number: trial for trial in study.trials()}


def finished(study: Study, value: float, epochs: int = 3) -> int:
    number, _ = begun(study)
    for epoch in range(1, epochs + 1):
        study.report(number, epoch, value, is_last=epoch == epochs)
    study.tell(number, "finished", value, epochs=epochs)
    return number


def test_of_two_machines_that_promote_a_trial_at_once_one_does(opened: Callable[..., Study]) -> None:
    one, two = opened(), opened()
    number = finished(one, 0.5)

    assert one.promote(number, until=9)
    assert not two.promote(number, until=9)
    assert [trial.state for trial in one.trials()] == ["running"]
    assert one.running().keys() == {number}
    assert two.count() == 1


def test_of_two_promotions_at_the_same_moment_the_first_counts_for_who_made_it(
    opened: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = opened(), opened()
    number = finished(one, 0.5)
    add = one._study.add_trial

    def add_and_be_followed(row: optuna.trial.FrozenTrial) -> None:
        add(row)
        two._study.add_trial(row_of_another(row))

    monkeypatch.setattr(one._study, "add_trial", add_and_be_followed)

    assert one.promote(number, until=9), "the first row is its own, so it trains"
    assert len(one._study.trials) == 3, "its end, its promotion, and the other's"
    assert one.running().keys() == {number}


def row_of_another(row: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
    """The row that another machine would add for the same promotion."""
    attributes = {**row.user_attrs, "promoted_by": "another"}
    return optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=attributes)


def test_a_promotion_that_came_late_takes_no_effect(
    storage: StudyStorage, opened: Callable[..., Study]
) -> None:
    study = opened("sha", "reduction_factor=2")
    number = finished(study, 0.5)
    study.promote(number)
    plain = optuna.load_study(study_name="study", storage=storage.backend)
    rows = plain.get_trials()
    attributes = {**rows[0].user_attrs, "promoted_from": number, "run": number, "lost": True}
    plain.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL, user_attrs=attributes))

    assert by_number(study)[number].state == "running"
    assert study.count() == 1
    _, params = begun(study)
    first = by_number(study)[number].params
    assert params != first, "what was lost took no point of the grid"


def test_a_trial_that_is_trained_further_is_compared_with_nobody(opened: Callable[..., Study]) -> None:
    study = opened("median", "n_startup_trials=0")
    good, bad = finished(study, 0.9), finished(study, 0.1)
    study.promote(good, until=9)
    study.promote(bad, until=9)

    assert not study.report(good, 4, 0.9)
    assert not study.report(bad, 4, 0.0), "it is not pruned for being worse than the best"
    assert study.until(bad) == 9
    assert study.goes_on_from(bad) == 3


def test_a_trial_that_fails_on_its_way_further_keeps_its_result(opened: Callable[..., Study]) -> None:
    study = opened()
    number = finished(study, 0.9)
    study.promote(number, until=9)
    study.report(number, 4, 0.8)
    study.tell(number, "failed", 0.9, epochs=4, reason="out of memory")

    trial = by_number(study)[number]
    assert (trial.state, trial.value, trial.epochs) == ("finished", 0.9, 4)


def test_epochs_are_counted_where_evaluations_come_by_steps_and_after_a_promotion(
    opened: Callable[..., Study],
) -> None:
    study = opened()
    by_steps, _ = begun(study)
    study.report(by_steps, 200, 0.5, epochs=1)
    study.report(by_steps, 400, 0.5, epochs=2)
    assert by_number(study)[by_steps].epochs == 2
    unheard, _ = begun(study)
    study.fill(unheard, {200: 0.5, 400: 0.6}, epochs=2)
    assert by_number(study)[unheard].epochs == 2

    number = finished(study, 0.9)
    study.promote(number, until=9)
    study.report(number, 4, 0.9)
    study.report(number, 5, 0.9)
    assert by_number(study)[number].epochs == 5


def test_what_comes_after_the_end_of_a_trial_changes_nothing(opened: Callable[..., Study]) -> None:
    study = opened()
    number = finished(study, 0.9)
    before = by_number(study)[number]

    assert not study.report(number, 4, 0.1)
    study.fill(number, {5: 0.1})
    assert study.count_retry(number) == 1
    study.tell(number, "failed")
    assert by_number(study)[number] == before


def test_what_another_machine_ends_while_it_is_judged_here_stays_as_it_ended(
    opened: Callable[..., Study],
) -> None:
    class Ending(optuna.pruners.BasePruner):
        def prune(self, *_: object) -> bool:
            opened().tell(0, "finished", 0.7, epochs=1)
            return True

    here = opened()
    number, _ = begun(here)
    here.go_by(
        Method(lambda _: optuna.samplers.RandomSampler(0), Ending(), lambda trial: suggest(trial, SPACE))
    )
    here.report(number, 1, 0.7)

    trial = by_number(here)[number]
    assert (trial.state, trial.value, trial.epochs) == ("finished", 0.7, 1)


@pytest.mark.parametrize(("until", "state", "value"), [(9, "finished", 0.9), (None, "failed", None)])
def test_a_run_that_failed_on_its_way_further_tells_of_its_result(
    until: int | None, state: str, value: float | None
) -> None:
    told = {"number": 3, "params": {"quality": 0.1}, "until": until}
    tags = {TRIAL: json.dumps(told), STATE: "failed", BEST: "val/score 0.9 at step 12"}
    trial = glance(RunView("1" * 32, "0", "", "FAILED", 0, 1, "", tags=tags))

    assert (trial.number, trial.state, trial.value) == (3, state, value)


def test_what_was_enqueued_elsewhere_is_no_trial_before_it_is_asked_for(
    storage: StudyStorage, opened: Callable[..., Study]
) -> None:
    study = opened()
    optuna.load_study(study_name="study", storage=storage.backend).enqueue_trial({"quality": 0.3})

    assert study.trials() == []
    assert begun(study) == (0, {"quality": 0.3})


def told(study: Study, number: int) -> tuple[Mapping[str, Any], Trial]:
    return json.loads(study.describe(number)), by_number(study)[number]


def test_a_rebuild_that_is_interrupted_goes_on_and_gives_each_trial_its_number_and_its_point(
    opened: Callable[..., Study],
) -> None:
    study = opened()
    points = {}
    for value in (0.1, 0.2, 0.3, 0.4):
        number, params = begun(study)
        points[number] = params
        study.report(number, 1, value)
        study.tell(number, "finished", value, epochs=1)
    found = [told(study, number) for number in (0, 1, 3)]  # of 2 nothing had reached the server

    again = opened(name="again")
    assert again.rebuild(found[:1]) == 1
    assert not again.is_whole
    assert again.rebuild(found) == 3
    again.declare_whole()

    assert opened(name="again").is_whole
    assert [trial.number for trial in again.trials()] == [0, 1, 2, 3]
    assert {number: trial.value for number, trial in by_number(again).items()} == {
        0: 0.1,
        1: 0.2,
        2: None,
        3: 0.4,
    }
    assert again.running().keys() == {2}
    assert again.reopen(2) == points[2], "the point of the grid that nobody has trained"


def stopped(study: Study, value: float) -> int:
    """A trial that its first report ends."""
    number, _ = begun(study)
    study.report(number, 1, value)
    study.tell(number, "pruned", epochs=1)
    return number


def test_a_rebuild_knows_which_trials_were_promoted_and_what_is_left_to_begin(
    opened: Callable[..., Study],
) -> None:
    study = opened("sha", "reduction_factor=2")
    first = stopped(study, 0.2)
    assert study.promote(first)
    study.report(first, 2, 0.4)
    second = finished(study, 0.3)
    assert (first, second) == (0, 2), "the promotion took a number"
    third = stopped(study, 0.1)
    assert study.promote(third, until=9)
    told = [
        (json.loads(study.describe(trial.number)), Trial(**{**vars(trial), "run_id": "run"}))
        for trial in study.trials()
    ]

    again = opened("sha", "reduction_factor=2", name="again")
    assert again.rebuild(told) == 3

    assert by_number(again) == {trial.number: trial for _, trial in told}
    assert again.count() == study.count() == 3
    assert again.running().keys() == study.running().keys()
    assert [again.goes_on_from(number) for number in (first, second, third)] == [1, None, 1]
    assert again.until(third) == 9
    assert begun(again) == begun(study), "the last point of the grid"


def test_a_rebuild_trains_nothing_for_a_promotion_that_came_late(
    storage: StudyStorage, opened: Callable[..., Study]
) -> None:
    study = opened("sha", "reduction_factor=2")
    stopped(study, 0.2)
    assert study.promote(0)
    plain = optuna.load_study(study_name="study", storage=storage.backend)
    plain.add_trial(row_of_another(plain.trials[1]))
    assert finished(study, 0.3) == 3
    found = [told(study, number) for number in (0, 3)]

    again = opened("sha", "reduction_factor=2", name="again")
    assert again.rebuild(found) == 2
    assert list(by_number(again)) == [0, 3]
    assert begun(again) == begun(study)


def test_what_another_machine_had_go_on_is_reported_to_where_it_goes_on(opened: Callable[..., Study]) -> None:
    one, two = opened("sha", "reduction_factor=2"), opened("sha", "reduction_factor=2")
    number = stopped(one, 0.2)
    one.describe(number)
    one._trial(number)  # as where the machine was thought dead, and was not
    assert two.promote(number)

    assert not one.report(number, 3, 0.9)
    one.tell(number, "finished", 0.9, epochs=3)
    row = by_number(two)[number]
    assert (row.state, row.value, row.reports) == ("finished", 0.9, {1: 0.2, 3: 0.9})


def test_a_promotion_that_nobody_has_marked_as_late_yet_takes_no_effect(
    storage: StudyStorage, opened: Callable[..., Study]
) -> None:
    study = opened("sha", "reduction_factor=2")
    number = stopped(study, 0.5)
    assert study.promote(number)
    plain = optuna.load_study(study_name="study", storage=storage.backend)
    plain.add_trial(row_of_another(plain.get_trials()[1]))

    assert not study.report(number, 2, 0.9)
    study.tell(number, "finished", 0.9, epochs=9)
    assert by_number(study)[number].state == "finished"
    assert not study.running()


def test_a_finished_run_without_a_value_does_not_stop_a_rebuild(opened: Callable[..., Study]) -> None:
    study = opened()
    number = finished(study, 0.9)
    words, row = told(study, number)
    again = opened(name="again")
    again.rebuild([(words, Trial(number, "finished", row.params, {}, None, "run", 3))])

    assert [trial.state for trial in again.trials()] == ["failed"]
