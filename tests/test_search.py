"""Samplers go on after any death as if nothing had happened; successive halving promotes what it stopped too early."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracked import search
from tracked.errors import UsageError
from tracked.search import SuccessiveHalving, promotable
from tracked.space import Choice, IntRange, LogUniform, Space, Uniform

optuna.logging.set_verbosity(optuna.logging.ERROR)

GRID: Space = {"hidden": IntRange(1, 4), "layers": Choice(((64, 32), (128,), "none"))}
SPACE: Space = {**GRID, "lr": LogUniform(1e-4, 1e-1), "momentum": Uniform(0.0, 1.0)}
OPTIONS = {"tpe": ["n_startup_trials=3"], "gp": ["n_startup_trials=5"], "cmaes": ["popsize=4"]}
TRIALS = 10


def space_of(sampler: str) -> Space:
    return GRID if sampler == "grid" else SPACE


def fresh(sampler: str, number: int, seed: int = 7) -> optuna.samplers.BaseSampler:
    return search.make_sampler(
        sampler, OPTIONS.get(sampler, []), seed=seed, number=number, space=space_of(sampler)
    )


def score(trial: FrozenTrial) -> float:
    params = trial.params
    return float(abs(params["hidden"] - 3) + abs(math.log10(params.get("lr", 1e-2)) + 2))


def sweep(
    sampler: str, opened: Callable[[], optuna.Study], *, first: int = 0, last: int = TRIALS, seed: int = 7
) -> None:
    """Trials with two running at a time, the study opened and the sampler made anew for each; every third is pruned."""
    for number in range(first, last + 1):
        study = opened()
        if number < last:
            study.sampler = fresh(sampler, number, seed)
            search.suggest(study.ask(), space_of(sampler))
        if number:
            told = study.trials[number - 1]
            if number % 3:
                study.tell(told.number, score(told))
            else:
                study.tell(told.number, state=TrialState.PRUNED)


def suggested(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


def in_memory() -> Callable[[], optuna.Study]:
    study = optuna.create_study()
    return lambda: study


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_a_sampler_suggests_the_same_whether_its_process_lives_or_dies_after_every_trial(
    sampler: str, tmp_path: Path
) -> None:
    def opened() -> optuna.Study:
        storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
        return optuna.create_study(storage=storage, study_name="digits", load_if_exists=True)

    lives, dies = in_memory(), opened
    sweep(sampler, lives)
    sweep(sampler, dies)

    assert suggested(dies()) == suggested(lives())
    assert len({str(params) for params in suggested(lives())}) == TRIALS


@pytest.mark.parametrize("sampler", [name for name in search.SAMPLERS if name != "cmaes"])
def test_a_study_that_is_rebuilt_from_params_and_values_goes_on_as_it_would_have(sampler: str) -> None:
    lives, rebuilt = optuna.create_study(), optuna.create_study()
    sweep(sampler, lambda: lives, last=9)
    for trial in lives.trials:
        rebuilt.add_trial(as_told(trial))

    for study in (lives, rebuilt):
        study.sampler = fresh(sampler, 9)
        search.suggest(study.ask(), space_of(sampler))

    assert suggested(rebuilt) == suggested(lives)


def as_told(trial: FrozenTrial) -> FrozenTrial:
    """What a run tells of its trial."""
    return create_trial(
        state=trial.state,
        value=trial.value,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
    )


def test_a_strategy_that_evolves_is_in_the_generation_that_it_was_in_when_its_study_is_rebuilt() -> None:
    def sampler(number: int) -> optuna.samplers.BaseSampler:
        return search.make_sampler(
            "cmaes", ["popsize=4", "n_startup_trials=2"], seed=1, number=number, space=SPACE
        )

    def train(study: optuna.Study, promoted: int, last: int) -> None:
        while (number := len(study.trials)) < last:
            study.sampler = sampler(number)
            trial = study.ask()
            search.suggest(trial, SPACE)
            told = study.trials[number]
            if number % 5 != promoted:
                study.tell(trial, score(told))
                continue
            study.tell(trial, state=TrialState.PRUNED)
            goes_on = create_trial(
                value=score(told),
                params=told.params,
                distributions=told.distributions,
                user_attrs={search.PROMOTED_FROM: number},
                system_attrs=search.solution_of(study.trials[number]),
            )
            study.add_trial(goes_on)

    lives, rebuilt = optuna.create_study(), optuna.create_study()
    train(lives, 3, 17)
    rows = [as_told(trial) for trial in lives.trials]
    for row, memory in zip(rows, search.memories_of(rows, sampler, "minimize"), strict=True):
        row.system_attrs = memory
        rebuilt.add_trial(row)
    for study in (lives, rebuilt):
        train(study, 2, 33)

    assert lives.trials[-1].system_attrs["cma:generation"] > 4
    assert suggested(rebuilt) == suggested(lives)


@pytest.mark.parametrize("sampler", search.SAMPLERS)
def test_another_seed_suggests_something_else(sampler: str) -> None:
    one, other = in_memory(), in_memory()
    sweep(sampler, one, last=3, seed=1)
    sweep(sampler, other, last=3, seed=-(2**70))

    same = suggested(one()) == suggested(other())
    assert same == (sampler == "qmc")  # whose sequence is one and the same, unless it is scrambled


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "cmaes"])
def test_trials_that_start_at_once_in_a_space_defined_by_run_differ(sampler: str) -> None:
    study = optuna.create_study()
    values = []
    for number in range(4):
        study.sampler = search.make_sampler(sampler, [], seed=0, number=number, space=None)
        trial = study.ask()
        values.append((trial.suggest_float("lr", 1e-4, 1e-1, log=True), trial.suggest_int("hidden", 1, 99)))

    assert len(set(values)) == 4


@pytest.mark.parametrize("sampler", ["grid", "qmc"])
def test_a_promoted_trial_takes_no_place_in_a_sequence(sampler: str) -> None:
    undisturbed, promoting = in_memory(), in_memory()
    sweep(sampler, undisturbed)
    study = promoting()
    for number in range(TRIALS + 2):
        if number in (2, 6):
            study.add_trial(
                create_trial(
                    state=TrialState.PRUNED,
                    params=study.trials[0].params,
                    distributions=study.trials[0].distributions,
                    user_attrs={search.PROMOTED_FROM: 0},
                )
            )
        else:
            study.sampler = fresh(sampler, number)
            search.suggest(study.ask(), space_of(sampler))

    own = [trial.params for trial in study.trials if search.PROMOTED_FROM not in trial.user_attrs]
    assert own == suggested(undisturbed())


def test_a_grid_visits_every_point_once_and_then_begins_again() -> None:
    study = optuna.create_study()
    values = []
    for number in range(24):
        study.sampler = fresh("grid", number)
        values.append(search.suggest(study.ask(), GRID))

    assert len({str(value) for value in values[:12]}) == 12
    assert values[12:] == values[:12]
    assert values[0] != {"hidden": 1, "layers": (64, 32)} or values[1] != {"hidden": 2, "layers": (64, 32)}
    assert {value["layers"] for value in values} == {(64, 32), (128,), "none"}


def test_no_sampler_warns_of_what_a_user_cannot_change(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level("WARNING", logger="optuna"):
        logging.getLogger("optuna").addHandler(caplog.handler)
        warnings.simplefilter("error")
        for sampler in search.SAMPLERS:
            sweep(sampler, in_memory(), last=6)
        search.make_sampler("tpe", ["group=true"], seed=0, number=0, space=None)
        search.make_sampler("gp", ["deterministic_objective=yes"], seed=0, number=0, space=None)
        logging.getLogger("optuna").removeHandler(caplog.handler)

    assert caplog.messages == []


def test_suggested_values_lie_in_the_space_and_have_its_types() -> None:
    study = optuna.create_study()
    space: Space = {"hidden": IntRange(2, 900, log=True), "one": Choice((True,)), **SPACE}
    for number in range(20):
        study.sampler = search.make_sampler("random", [], seed=0, number=number, space=space)
        values = search.suggest(study.ask(), space)

        assert type(values["hidden"]) is int
        assert values["one"] is True
        assert values["layers"] in ((64, 32), (128,), "none")
        assert isinstance(values["lr"], float)
        assert 1e-4 <= values["lr"] <= 1e-1


# -- names and options -----------------------------------------------------------------------------


def make(kind: str, name: str, options: Sequence[str]) -> object:
    if kind == "pruner":
        return search.make_pruner(name, options)
    return search.make_sampler(name, options, seed=0, number=0, space=SPACE)


@pytest.mark.parametrize(
    ("kind", "name", "options", "found", "try_next"),
    [
        ("sampler", "tpee", "", "no sampler 'tpee'", "--sampler tpe"),
        ("pruner", "asha", "", "no pruner 'asha'", "--pruner sha"),
        ("sampler", "tpe", "multivariat=true", "no option 'multivariat'", "multivariate=…"),
        ("sampler", "random", "seed=3", "no option 'seed'", ""),
        ("sampler", "tpe", "multivariate=maybe", "cannot be read", "multivariate=true"),
        ("sampler", "tpe", "n_ei_candidates=0", "n_ei_candidates is 0", "n_ei_candidates=1"),
        ("sampler", "tpe", "group=true multivariate=false", "refuses its options", ""),
        ("sampler", "tpe", "group", "no override", "group=…"),
        ("sampler", "tpe", "group=true group=true", "given twice", "leave out 'group=true'"),
        ("sampler", "cmaes", "popsize=3", "popsize is 3", "popsize=4"),
        ("sampler", "qmc", "qmc_type=dice", "refuses its options", ""),
        ("sampler", "grid", "", "lr, momentum", "lr=choice(0.0001,0.001,0.01,0.1)"),
        ("pruner", "percentile", "", "does not say percentile", "percentile=25"),
        ("pruner", "percentile", "percentile=120", "refuses its options", ""),
        ("pruner", "threshold", "", "does not say upper", "upper=10"),
        ("pruner", "threshold", "lower=2 upper=1", "refuses its options", ""),
        ("pruner", "hyperband", "", "does not say max_resource", "max_resource=27"),
        ("pruner", "hyperband", "max_resource=auto", "cannot be read", "max_resource=64"),
        ("pruner", "hyperband", "max_resource=3 min_resource=9", "below", "min_resource=1"),
        ("pruner", "sha", "min_resource=0", "min_resource is 0", "min_resource=1"),
        ("pruner", "sha", "reduction_factor=1", "reduction_factor is 1", "reduction_factor=2"),
        ("pruner", "median", "n_warmup_steps=-1", "n_warmup_steps is -1", "n_warmup_steps=0"),
        ("pruner", "none", "patience=3", "no option 'patience'", ""),
    ],
)
def test_a_name_or_option_that_cannot_work_is_told(
    kind: str, name: str, options: str, found: str, try_next: str
) -> None:
    with pytest.raises(UsageError) as error:
        make(kind, name, options.split())

    assert found in error.value.found
    assert error.value.expected or "refuses" in found  # which is followed by Optuna's own words
    assert error.value.try_next.startswith(try_next)
    assert bool(error.value.try_next) == bool(try_next)


def test_those_that_exist_are_listed() -> None:
    with pytest.raises(UsageError, match="one of tpe, random, grid, gp, cmaes, qmc"):
        make("sampler", "bayes", [])
    with pytest.raises(UsageError, match="one of median, percentile, sha, hyperband, threshold, none"):
        make("pruner", "bayes", [])
    with pytest.raises(UsageError, match="one of n_startup_trials, n_ei_candidates, multivariate"):
        make("sampler", "tpe", ["gamma=3"])


@pytest.mark.parametrize(("sampler", "package"), [("gp", "scipy"), ("qmc", "scipy"), ("cmaes", "cmaes")])
def test_a_missing_package_is_told_with_the_line_that_installs_it(
    sampler: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"python -m pip install {package}"):
        make("sampler", sampler, [])


def test_a_grid_needs_a_space_that_is_known_and_of_a_size_that_can_be_counted() -> None:
    with pytest.raises(UsageError, match="--sampler tpe"):
        search.make_sampler("grid", [], seed=0, number=0, space=None)
    with pytest.raises(UsageError, match="1,000,001 points"):
        search.make_sampler("grid", [], seed=0, number=0, space={"hidden": IntRange(0, 1_000_000)})


@pytest.mark.parametrize(
    ("name", "options", "stopped_at"),
    [
        pytest.param("median", ["n_startup_trials=2"], 1, id="median"),
        pytest.param("median", ["n_startup_trials=9"], None, id="median, too few trials"),
        pytest.param("percentile", ["percentile=60", "n_startup_trials=1", "n_warmup_steps=2"], 2, id="%"),
        pytest.param("sha", ["min_resource=2", "reduction_factor=2"], 2, id="sha"),
        pytest.param("hyperband", [], 1, id="hyperband"),
        pytest.param("threshold", ["upper=3.5"], 4, id="threshold"),
        pytest.param("none", [], None, id="none"),
    ],
)
def test_a_pruner_stops_the_worst_of_four_where_its_options_say(
    name: str, options: list[str], stopped_at: int | None
) -> None:
    study = optuna.create_study(study_name="digits", pruner=search.make_pruner(name, options, length=2))
    stopped: dict[int, int] = {}
    for slope in (0.1, 0.2, 0.3, 1.0):
        trial = study.ask()
        for epoch in range(1, 6):
            trial.report(slope * epoch, epoch)
            if trial.should_prune():
                stopped[trial.number] = epoch
                break
        pruned = trial.number in stopped
        study.tell(trial, None if pruned else slope, TrialState.PRUNED if pruned else None)

    assert stopped.get(3) == stopped_at


def test_hyperband_stops_by_what_was_reported_alone_in_each_bracket_from_its_first_rung_on() -> None:
    study = optuna.create_study(study_name="digits")
    pruner = search.make_pruner("hyperband", [], length=9)
    ranks = np.random.default_rng(0).permutation(60)
    stopped: dict[int, int] = {}
    for number in range(60):
        trial, stops = study.ask(), False
        for epoch in range(1, 10):
            trial.report(float(ranks[number]), epoch)
            rebuilt = optuna.create_study(study_name="digits")
            rebuilt.add_trials(
                [
                    create_trial(state=TrialState.RUNNING, intermediate_values=each.intermediate_values)
                    for each in study.trials
                ]
            )
            stops = pruner.prune(study, study.trials[number])
            assert stops == pruner.prune(rebuilt, rebuilt.trials[number])
            if stops:
                stopped[number] = epoch
                break
        study.tell(trial, None if stops else 0.0, TrialState.PRUNED if stops else None)

    # Each of the three brackets gets some of the worst, and lets them go at once.
    assert {epoch for number, epoch in stopped.items() if ranks[number] > 40} == {1, 3, 9}
    assert not [number for number in stopped if ranks[number] < 3]


def test_a_study_of_several_objectives_is_refused() -> None:
    assert search.direction_of(optuna.create_study()) == "minimize"
    assert search.direction_of(optuna.create_study(direction="maximize")) == "maximize"
    with pytest.raises(UsageError, match="2 objectives; pruning does not go with it"):
        search.direction_of(optuna.create_study(directions=["minimize", "maximize"]))


# -- successive halving ----------------------------------------------------------------------------

NAN = float("nan")


def frozen(
    number: int,
    reports: Mapping[int, float],
    state: TrialState = TrialState.RUNNING,
    *,
    run: str | None = None,
) -> FrozenTrial:
    value = 0.0 if state == TrialState.COMPLETE else None
    attrs = {} if run is None else {search.RUN: run}
    trial = create_trial(state=state, value=value, intermediate_values=dict(reports), user_attrs=attrs)
    trial.number = number
    return trial


@pytest.mark.parametrize(
    ("others", "reports", "stops"),
    [
        pytest.param([], {1: 9.0}, False, id="the first of all goes on"),
        pytest.param([], {1: NAN}, True, id="but not with NaN"),
        pytest.param([{1: NAN}, {1: NAN}], {1: 9.0}, False, id="and NaN is worse than anything"),
        pytest.param([{1: 1.0}], {1: 2.0}, True, id="one of two"),
        pytest.param([{1: 1.0}], {1: 1.0}, True, id="of equal ones the first"),
        pytest.param([{1: 2.0}], {1: 1.0}, False, id="better than all"),
        pytest.param([{1: 1.0}] * 5, {1: 2.0}, True, id="third of six"),
        pytest.param([{1: 1.0}] + [{1: 3.0}] * 4, {1: 2.0}, False, id="second of six"),
        pytest.param([{1: 1.0}], {1: 0.5, 2: 9.0}, False, id="between rungs nobody is judged"),
        pytest.param([{3: 1.0}], {1: 0.5, 2: 9.0, 4: 2.0}, True, id="at the first report beyond a rung"),
        pytest.param([{1: 9.0, 4: 1.0}], {1: 8.0, 3: 2.0}, True, id="the other one's too"),
        pytest.param(
            [{1: 0.0, 2: 0.0}], {3: 1.0}, True, id="one that jumps over a rung is judged there as well"
        ),
        pytest.param([], {}, False, id="nothing reported"),
    ],
)
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_trial_is_stopped_at_a_rung_unless_it_is_among_the_best_third(
    others: list[dict[int, float]], reports: dict[int, float], stops: bool, direction: search.Direction
) -> None:
    sign = -1 if direction == "maximize" else 1
    trials = [
        frozen(number, {step: sign * value for step, value in given.items()})
        for number, given in enumerate([*others, reports])
    ]

    assert SuccessiveHalving().stops(trials, trials[-1], direction) == stops


def test_rungs_lie_at_powers_of_the_factor() -> None:
    halving = SuccessiveHalving(min_resource=2, reduction_factor=2)
    worse = dict.fromkeys(range(1, 17), 2.0)
    better = frozen(0, dict.fromkeys(range(1, 17), 1.0))

    judged = [
        last
        for last in worse
        if halving.stops(
            [better, trial := frozen(1, {step: worse[step] for step in range(1, last + 1)})],
            trial,
            "minimize",
        )
    ]

    assert judged == [2, 4, 8, 16]


PRUNED, RUNNING, COMPLETE, WAITING = (
    *(TrialState.PRUNED, TrialState.RUNNING),
    *(TrialState.COMPLETE, TrialState.WAITING),
)
BAD = [frozen(number, {1: 9.0}, PRUNED) for number in range(10, 15)]


@pytest.mark.parametrize(
    ("trials", "numbers"),
    [
        pytest.param([frozen(0, {1: 1.0}, PRUNED), *BAD[:2]], [0], id="the best third"),
        pytest.param([frozen(0, {1: 1.0}, PRUNED), *BAD[:1]], [], id="there is no third of two"),
        pytest.param(
            [frozen(0, {1: 1.0}, RUNNING), *BAD], [10], id="others of the best third have passed already"
        ),
        pytest.param([frozen(0, {1: NAN}, PRUNED), *BAD], [10, 11], id="NaN is never promoted"),
        pytest.param([frozen(n, {1: NAN}, PRUNED) for n in range(6)], [], id="not even where all are"),
        pytest.param(
            [frozen(0, {1: 2.0}, PRUNED), frozen(1, {1: 1.0}, PRUNED), *BAD[:4]], [1, 0], id="best first"
        ),
        pytest.param(
            [*(frozen(n, {1: 0.0, 3: float(n)}, PRUNED) for n in range(3)), *BAD[:3]],
            [0],
            id="stopped at the second rung",
        ),
        pytest.param(
            [
                frozen(0, {1: -1.0}, PRUNED),
                *(frozen(n, {1: 0.0, 3: float(n)}, PRUNED) for n in (1, 2, 3)),
                *BAD[:3],
            ],
            [1, 0],
            id="the higher rung first",
        ),
        pytest.param([frozen(0, {1: 1.0, 2: 1.0}, PRUNED), *BAD], [10], id="not stopped by a rung"),
        pytest.param([frozen(0, {}, PRUNED), *BAD[:3]], [10], id="nothing reported"),
        pytest.param(
            [frozen(0, {1: 1.0}, PRUNED, run="a"), *BAD[:2], frozen(20, {}, WAITING, run="a")],
            [],
            id="somebody will go on with it",
        ),
        pytest.param(
            [
                frozen(0, {1: 1.0}, PRUNED, run="a"),
                *(frozen(n, {1: 9.0, 3: 9.0}, COMPLETE) for n in (1, 2)),
                frozen(20, {2: 1.0, 3: 1.0}, PRUNED, run="a"),
            ],
            [20],
            id="stopped again, one rung higher, and again too early",
        ),
    ],
)
def test_what_was_stopped_too_early_is_promotable(trials: list[FrozenTrial], numbers: list[int]) -> None:
    assert promotable(trials, SuccessiveHalving(), "minimize", "after") == numbers
    assert promotable(trials, optuna.pruners.MedianPruner(), "minimize", "after") == []


def test_a_promoted_trial_and_the_one_it_goes_on_with_count_once() -> None:
    stopped = frozen(0, {1: 1.0}, PRUNED, run="a")
    promoted = frozen(5, {1: 1.0, 2: 1.0}, RUNNING, run="a")
    trials = [stopped, promoted, frozen(1, {1: 2.0}, PRUNED), newcomer := frozen(6, {1: 0.0})]

    assert (
        promotable(trials, SuccessiveHalving(), "minimize", "after") == []
    )  # of three, the newcomer is the best
    assert promotable(trials, SuccessiveHalving(reduction_factor=2), "minimize", "after") == []
    assert not SuccessiveHalving().stops(trials, newcomer, "minimize")


values = st.sampled_from([0.0, 1.0, 2.0, 3.0, NAN, math.inf]) | st.floats(0, 1)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), factor=st.integers(2, 4), direction=st.sampled_from(["minimize", "maximize"]), waits=...
)
def test_in_the_end_the_best_of_every_rung_have_passed_it_and_no_epoch_was_trained_twice(
    data: st.DataObject, factor: int, direction: search.Direction, waits: bool
) -> None:
    """Whatever the curves are, and in whatever order trials report: with promotion, none ends too early."""
    epochs, sign = 9, -1 if direction == "maximize" else 1
    curves = data.draw(st.lists(st.lists(values, min_size=epochs, max_size=epochs), min_size=1, max_size=12))
    halving = SuccessiveHalving(min_resource=1, reduction_factor=factor, waits=waits)
    trials = [frozen(number, {}, run=str(number)) for number in range(len(curves))]
    trained = dict.fromkeys(range(len(curves)), 0)
    while True:
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        if not running:
            turns = (promotable(trials, halving, direction, turn) for turn in ("before", "after"))
            waiting = next(filter(None, turns), None)
            if waiting is None:
                break
            run = trials[waiting[0]].user_attrs[search.RUN]
            trials.append(frozen(len(trials), {}, run=run))
            continue
        trial = data.draw(st.sampled_from(running)) if len(running) > 1 else running[0]
        curve = int(trial.user_attrs[search.RUN])
        trained[curve] += 1
        trial.intermediate_values = {
            **trial.intermediate_values,
            trained[curve]: curves[curve][trained[curve] - 1],
        }
        if halving.stops(trials, trial, direction):
            trial.state = TrialState.PRUNED
        elif trained[curve] == epochs:
            trial.state = TrialState.COMPLETE

    rung = 1
    while rung < epochs:
        came = [curve for curve in trained if trained[curve] >= rung]
        good = [curve for curve in came if not math.isnan(curves[curve][rung - 1])]
        best = sorted(good, key=lambda curve: sign * curves[curve][rung - 1])[: len(came) // factor]
        assert all(trained[curve] > rung for curve in best)
        assert all(trained[curve] == rung for curve in {*came} - {*good})
        rung *= factor


def test_where_stops_are_not_final_the_first_trials_wait_for_each_other() -> None:
    halving = SuccessiveHalving(waits=True)
    first, second, third = (frozen(number, {1: value}) for number, value in enumerate([2.0, 1.0, 3.0]))

    assert halving.stops([first], first, "minimize")
    first.state = PRUNED
    assert halving.stops([first, second], second, "minimize")
    second.state = PRUNED
    assert promotable([first, second], halving, "minimize", "before") == []
    assert promotable([first, second], halving, "minimize", "after") == [
        0,
        1,
    ]  # either was the best when it came

    assert halving.stops([first, second, third], third, "minimize")
    third.state = PRUNED
    assert promotable([first, second, third], halving, "minimize", "before") == [1]
    assert promotable([first, second, third], halving, "minimize", "after") == [1, 0]
    fourth = frozen(3, {1: 0.0})
    assert not halving.stops([first, second, third, fourth], fourth, "minimize")
    assert not SuccessiveHalving().stops([frozen(0, {1: 2.0})], frozen(0, {1: 2.0}), "minimize")


def test_a_study_of_optunas_own_stops_and_promotes() -> None:
    study = optuna.create_study(pruner=search.make_pruner("sha", []), direction="maximize")
    for number, accuracy in enumerate([0.9, 0.5, 0.6, 0.4, 0.3, 0.2]):
        trial = study.ask()
        trial.set_user_attr(search.RUN, f"run-{number}")
        trial.report(accuracy, 1)
        assert trial.should_prune() == (number > 0)
        study.tell(trial, state=TrialState.PRUNED) if number else None

    assert promotable(study.trials, study.pruner, "maximize", "after") == [2]
    assert (
        promotable(study.trials, study.pruner, "maximize", "before") == []
    )  # it is not the best of its rung

    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            intermediate_values={1: 0.6},
            user_attrs={search.RUN: "run-2", search.PROMOTED_FROM: 2},
        )
    )
    assert promotable(study.trials, study.pruner, "maximize", "after") == []
