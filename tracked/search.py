"""Optuna's samplers and pruners by name, with their options.

A sweep may die and go on anywhere, so nothing that is decided here may depend on how long a process lived: a fresh
sampler is made for each trial, and what it suggests follows from the seed, the trial's number and the trials that the
study holds. Pruners decide from what was reported alone.
"""

from __future__ import annotations

import binascii
import copy
import difflib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import operator
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tracked import params
from tracked.errors import ParamError, UsageError
from tracked.params import Value
from tracked.seeding import derive
from tracked.space import Choice, Dimension, IntRange, LogUniform, Space, Uniform, grid_size

Direction: TypeAlias = Literal["minimize", "maximize"]

# A user attribute of a trial that goes on with an earlier one, in the same run: the number of that trial.
PROMOTED_FROM = "promoted_from"
# A user attribute of every trial: its run, which a promoted trial shares with the one that it goes on with.
RUN = "run"
# A user attribute of a trial that counts for nothing: another machine was quicker.
LOST = "lost"


def direction_of(study: optuna.Study) -> Direction:
    """Whether the study minimizes or maximizes.

    Raises:
        UsageError: It has several objectives.
    """
    if len(study.directions) != 1:
        raise UsageError(
            f"study {study.study_name!r} has {len(study.directions)} objectives; pruning does not go with it",
            expected="one value that is monitored",
            try_next="another --study-name",
        )
    return "maximize" if study.direction == optuna.study.StudyDirection.MAXIMIZE else "minimize"


# -- the space as Optuna sees it -------------------------------------------------------------------


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms. Sequences among the options stand there as JSON; `suggest` gives them back."""
    return {name: _distribution(dimension) for name, dimension in space.items()}


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Value]:
    """A value for each name of the space, as flat values; `space.as_words` makes words for `make_params` of them."""
    values: dict[str, Value] = {}
    for name, dimension in space.items():
        match dimension:
            case Uniform(low, high):
                values[name] = trial.suggest_float(name, low, high)
            case LogUniform(low, high):
                values[name] = trial.suggest_float(name, low, high, log=True)
            case IntRange(low, high, log):
                values[name] = trial.suggest_int(name, low, high, log=log)
            case Choice(options):
                choices = [_choice(option) for option in options]
                values[name] = options[choices.index(trial.suggest_categorical(name, choices))]
    return values


def examples(suggest: Callable[[optuna.Trial], Mapping[str, Any]], count: int) -> Iterator[Mapping[str, Any]]:
    """Params as the first trials of a random search would get them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for _ in range(count):
        yield suggest(study.ask())


def _distribution(dimension: Dimension) -> BaseDistribution:
    match dimension:
        case Uniform(low, high):
            return FloatDistribution(low, high)
        case LogUniform(low, high):
            return FloatDistribution(low, high, log=True)
        case IntRange(low, high, log):
            return IntDistribution(low, high, log=log)
        case Choice(options):
            return CategoricalDistribution([_choice(option) for option in options])


def _choice(option: Value) -> bool | int | float | str | None:
    return json.dumps(option) if isinstance(option, tuple) else option


# -- samplers --------------------------------------------------------------------------------------


class Grid(BaseSampler):
    """Every point of a grid once, in an order that the seed decides; then from the start again.

    The point follows from the trial's number alone, so that two machines never take the same one. (Optuna's own
    forgets which points it took when a study is rebuilt, and stops the study, which only `optimize` may.)
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._distributions = distributions(space)
        self._axes = {name: _points(dimension) for name, dimension in space.items()}
        self._order = np.random.RandomState(seed).permutation(math.prod(map(len, self._axes.values())))

    def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, *_: object) -> dict[str, Any]:
        point = int(self._order[_count_before(study, trial) % len(self._order)])
        values = {}
        for name, axis in self._axes.items():
            point, place = divmod(point, len(axis))
            values[name] = axis[place]
        return values

    def sample_independent(self, *_: object) -> Any:
        raise AssertionError("a grid holds every param of its space")


def _points(dimension: Dimension) -> Sequence[Any]:
    match dimension:
        case IntRange(low, high):
            return range(low, high + 1)
        case Choice(options):
            return [_choice(option) for option in options]
    raise TypeError(dimension)


class QuasiRandom(optuna.samplers.QMCSampler):
    """Optuna's, with the place in the sequence from the trial's number.

    Optuna counts in an attribute of the study, which is lost when the study is rebuilt, and which two machines
    read before either has written.
    """

    def __init__(self, space: Space | None, **options: Any) -> None:
        super().__init__(**options)
        self._distributions = distributions(space or {})
        self._place = 0

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        self._place = _count_before(study, trial)
        return self._distributions or super().infer_relative_search_space(study, trial)

    def _find_sample_id(self, *_: object) -> int:
        return self._place


def _count_before(study: optuna.Study, trial: FrozenTrial) -> int:
    """How many trials before this one were given params that nobody else has."""
    earlier = (other for other in study.get_trials(deepcopy=False) if other.number < trial.number)
    return trial.number - sum(not {PROMOTED_FROM, LOST}.isdisjoint(other.user_attrs) for other in earlier)


_SAMPLER_OPTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "tpe": (
        optuna.samplers.TPESampler,
        ("n_startup_trials", "n_ei_candidates", "multivariate", "group", "constant_liar"),
    ),
    "random": (optuna.samplers.RandomSampler, ()),
    "grid": (Grid, ()),
    "gp": (optuna.samplers.GPSampler, ("n_startup_trials", "deterministic_objective")),
    "cmaes": (
        optuna.samplers.CmaEsSampler,
        (
            *("n_startup_trials", "popsize", "consider_pruned_trials"),
            *("use_separable_cma", "with_margin", "lr_adapt"),
        ),
    ),
    "qmc": (optuna.samplers.QMCSampler, ("qmc_type", "scramble")),
}
SAMPLERS = tuple(_SAMPLER_OPTIONS)

_LARGEST_GRID = 1_000_000  # points, whose order is drawn anew for each trial: 10 ms
_PACKAGES = {"gp": "scipy", "qmc": "scipy", "cmaes": "cmaes"}  # which Optuna imports where it needs them


def make_sampler(
    name: str, options: Sequence[str], *, seed: int, number: int, space: Space | None
) -> BaseSampler:
    """The sampler that suggests the params of one trial.

    Args:
        name: One of `SAMPLERS`.
        options: `name=value` words, under the names of Optuna's own arguments.
        seed: Of the sweep; any whole number.
        number: The trial's.
        space: None for one that the experiment file defines by run.

    Raises:
        UsageError: No such sampler or option, a value that it refuses, a package that is missing, or a grid over
            what is continuous.
    """
    maker, known = _named("sampler", name, _SAMPLER_OPTIONS)
    given = _read_options(f"sampler {name}", maker, known, options)
    package = _PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise UsageError(
            f"sampler {name} needs the package {package}", try_next=f"python -m pip install {package}"
        )
    constant, own = _seed(seed, name), _seed(seed, "trial", number)
    # What these two leave to chance (options that have no order, the first trial) is drawn by the trial's own seed:
    # by the constant one, every trial would draw the same.
    rest = {
        "independent_sampler": optuna.samplers.RandomSampler(own),
        "warn_independent_sampling": False,
    }
    match name:
        case "grid":
            return Grid(_finite(space), constant)
        case "cmaes":
            given |= {"seed": constant, **rest}
        case "qmc":
            maker = functools.partial(QuasiRandom, space)
            given |= {"seed": constant, **rest}
        case "gp":
            given |= {"seed": own, "warn_independent_sampling": False}
        case _:
            given |= {"seed": own}
    sampler: BaseSampler = _made(f"sampler {name}", maker, given)
    return sampler


def _seed(*parts: int | str) -> int:
    return derive(*parts) & 0xFFFFFFFF  # NumPy's generators take 32 bits


def _finite(space: Space | None) -> Space:
    """The space, if a grid over it has an end."""
    if space is None:
        raise UsageError(
            "sampler grid needs to know the space, which suggest(trial) tells only by and by",
            expected="dimensions on the command line",
            try_next="--sampler tpe",
        )
    examples = []
    for name, dimension in space.items():
        if isinstance(dimension, Uniform | LogUniform):
            spaced = np.geomspace if isinstance(dimension, LogUniform) else np.linspace
            points = spaced(dimension.low, dimension.high, 4)
            examples.append(f"{name}=choice({','.join(f'{point:.3g}' for point in points)})")
    if examples:
        continuous = ", ".join(example.partition("=")[0] for example in examples)
        raise UsageError(
            f"sampler grid finds no end in what is continuous: {continuous}",
            expected="choice(…) or int(low,high) for each",
            try_next=" ".join(examples),
        )
    size = grid_size(space) or 0
    if size > _LARGEST_GRID:
        raise UsageError(
            f"the grid has {size:,} points", expected=f"at most {_LARGEST_GRID:,}", try_next="--sampler qmc"
        )
    return space


def memories_of(
    trials: Sequence[FrozenTrial], sampler: Callable[[int], BaseSampler], direction: Direction
) -> list[dict[str, Any]]:
    """What the sampler would have kept in the trials' system attributes, where CMA-ES has its state.

    Args:
        trials: All of a study's, by their numbers from 0 on.
        sampler: The sampler for a trial of that number.
        direction: The study's.

    Returns:
        The attributes of each, as if it had been asked for when all before it had ended.
    """
    if not isinstance(sampler(0), optuna.samplers.CmaEsSampler):
        return [{} for _ in trials]
    study = optuna.create_study(direction=direction)
    for number, told in enumerate(trials):
        if (before := told.user_attrs.get(PROMOTED_FROM)) is not None:
            goes_on = copy.copy(told)
            goes_on.system_attrs = solution_of(study.trials[before])
            study.add_trial(goes_on)
            continue
        study.sampler = sampler(number)
        trial = study.ask()
        _ = trial.relative_params  # the state is kept when they are drawn; what was drawn is known
        for name, each in told.distributions.items():
            value = each.to_internal_repr(told.params[name])
            study._storage.set_trial_param(trial._trial_id, name, value, each)  # noqa: SLF001 - its only way in
        for step, value in told.intermediate_values.items():
            trial.report(value, step)
        if told.state.is_finished():
            study.tell(trial, told.value if told.state == TrialState.COMPLETE else None, told.state)
    return [trial.system_attrs for trial in study.trials]


# -- pruners ---------------------------------------------------------------------------------------


class SuccessiveHalving(BasePruner):
    """Stops at each rung what is not among the best of all that came there; asynchronously, after each report.

    Rungs lie at `min_resource * reduction_factor**k` in the unit of the reports. A trial is judged by the report
    that takes it to a rung or beyond, against the reports with which the others came there, and goes on if it
    is among the best n // reduction_factor of n (the best one while that is none). Equal values stand in order
    of their trials; NaN comes last, and is never good. A trial that was promoted and the one that it goes on
    with count as one.

    Optuna's own keeps the rungs in attributes of its storage, which are lost when a study is rebuilt, counts a
    promoted trial again, and lets all of those pass whose values are equal.

    Li et al.: "A System for Massively Parallel Hyperparameter Tuning" (MLSys 2020), the stopping variant;
    with `promotable`, the promoting one.

    Args:
        min_resource: The first rung, from 1.
        reduction_factor: One of so many goes on, from 2.
        waits: Stop all that come to the first rung before so many have. Else the first trials are trained whole
            for no better reason than that they were the first; but they must be able to go on (`promotable`).
    """

    def __init__(self, min_resource: int = 1, reduction_factor: int = 3, *, waits: bool = False) -> None:
        self.min_resource = min_resource
        self.reduction_factor = reduction_factor
        self.waits = waits

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        others = (other for other in study.get_trials(deepcopy=False) if other.number != trial.number)
        return self.stops([*others, trial], trial, direction_of(study))

    def stops(self, trials: Sequence[FrozenTrial], trial: FrozenTrial, direction: Direction) -> bool:
        """Whether `trial`, one of `trials`, ends with its last report."""
        runs = _runs(trials)
        run = next(run for run in runs if run.root == _root(trial))

        def least(rung: int) -> int:
            return 0 if self.waits and rung == self.min_resource else 1

        return any(run not in self.best(runs, rung, direction, least=least(rung)) for rung in self.rungs(run))

    def rungs(self, run: _Run) -> list[int]:
        """The rungs that the last report took this run to, in ascending order."""
        *before, last = 0, *run.reports
        rungs, rung = [], self.min_resource
        while rung <= last:
            if rung > before[-1]:
                rungs.append(rung)
            rung *= self.reduction_factor
        return rungs

    def best(self, runs: Sequence[_Run], rung: int, direction: Direction, *, least: int = 0) -> list[_Run]:
        """The best n // reduction_factor of the n runs that came to this rung, best first, but `least` of them."""
        sign = -1 if direction == "maximize" else 1
        came = [run for run in runs if rung <= max(run.reports, default=0)]
        good = [run for run in came if not math.isnan(run.at(rung))]
        good.sort(key=lambda run: sign * run.at(rung))
        return good[: max(least, len(came) // self.reduction_factor)]

    def early(self, runs: Sequence[_Run], direction: Direction) -> list[_Run]:
        """Those that came to the first rung before reduction_factor had, and were the best when they came."""
        came = [run for run in runs if self.min_resource <= max(run.reports, default=0)]
        first = came[: self.reduction_factor - 1] if self.waits else []
        return [
            run
            for count, run in enumerate(first, 1)
            if run in self.best(first[:count], self.min_resource, direction, least=1)
        ]


class Hyperband(BasePruner):
    """Successive halving in brackets, each of which begins to stop trials later than the one before.

    A trial's bracket follows from its number and the name of the study, and is the larger the earlier it stops.
    Optuna's own keeps the rungs in attributes of its storage, as its successive halving does.

    Li et al.: "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization" (JMLR 2018).

    Args:
        max_resource: What a trial is trained for if nothing stops it, in the unit of the reports.
        min_resource: The first rung of the first bracket, from 1.
        reduction_factor: One of so many goes on, from 2.
    """

    def __init__(self, max_resource: int, min_resource: int = 1, reduction_factor: int = 3) -> None:
        self._brackets = []
        first = min_resource
        while first <= max_resource:
            self._brackets.append(SuccessiveHalving(first, reduction_factor))
            first *= reduction_factor
        # As many trials to each as give it about the same number of epochs.
        count = len(self._brackets)
        self._shares = [
            math.ceil(count * reduction_factor**left / (left + 1)) for left in reversed(range(count))
        ]

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        mine = self._bracket(study, trial)
        rivals = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number and self._bracket(study, other) == mine
        ]
        return self._brackets[mine].stops([*rivals, trial], trial, direction_of(study))

    def _bracket(self, study: optuna.Study, trial: FrozenTrial) -> int:
        first = trial.user_attrs.get(RUN, trial.number)
        place = binascii.crc32(f"{study.study_name}_{first}".encode()) % sum(self._shares)
        return next(index for index, end in enumerate(itertools.accumulate(self._shares)) if place < end)


Turn = Literal["before", "after"]


def promotable(
    trials: Sequence[FrozenTrial], pruner: BasePruner, direction: Direction, turn: Turn
) -> list[int]:
    """Numbers of pruned trials that by now belong to the best of the rung that they were stopped at.

    Those of the highest rung come first, and of one rung the best. A trial that somebody goes on with is none
    of them; of several of one run only the newest may be.

    Before new trials, only the best of a rung goes on. The others of its best n // reduction_factor are likelier to
    be good than a new one, but the best value is reached later for them: in random searches over
    `experiments/digits.py`, after 1.15 times as many epochs as without promotion if they all go first.

    Args:
        trials: All of the study's.
        pruner: Anything else than `SuccessiveHalving` promotes none.
        direction: The study's.
        turn: Before a new trial is begun, or after the last one. Then those go on, too, that were stopped only
            because too few had come.
    """
    if not isinstance(pruner, SuccessiveHalving):
        return []
    runs = _runs(trials)

    @functools.cache
    def passing(rung: int) -> list[_Run]:
        best = pruner.best(runs, rung, direction)
        if turn == "before":
            return best[:1]
        early = pruner.early(runs, direction) if rung == pruner.min_resource else []
        return [*best, *(run for run in early if run not in best)]

    found = []
    for run in runs:
        rungs = pruner.rungs(run) if run.newest.state == TrialState.PRUNED else []
        if rungs and all(run in passing(rung) for rung in rungs):
            found.append((-rungs[-1], passing(rungs[-1]).index(run), run.newest.number))
    return [number for *_, number in sorted(found)]


@dataclass(frozen=True, eq=False)
class _Run:
    """A trial together with those that it goes on with.

    Attributes:
        root: What they have in common: the number of the first.
        newest: The last of them.
        reports: Of all of them, by step in ascending order.
    """

    root: object
    newest: FrozenTrial
    reports: Mapping[int, float]

    def at(self, rung: int) -> float:
        """The value with which it came to a rung that it has reached."""
        return next(value for step, value in self.reports.items() if step >= rung)


def _runs(trials: Sequence[FrozenTrial]) -> list[_Run]:
    """In order of their first trials."""
    grouped: dict[object, list[FrozenTrial]] = {}
    for trial in counting(trials):
        grouped.setdefault(_root(trial), []).append(trial)
    runs = []
    for root, group in grouped.items():
        reports = {step: value for trial in group for step, value in trial.intermediate_values.items()}
        runs.append(_Run(root, group[-1], dict(sorted(reports.items()))))
    return runs


def counting(trials: Iterable[FrozenTrial]) -> Iterator[FrozenTrial]:
    """Those that count, by their numbers: none that was lost, and of two that go on with one trial the first.

    The second is another machine's, which had the same thought and has not marked it as lost yet.
    """
    continued: set[int] = set()
    for trial in sorted(trials, key=lambda trial: trial.number):
        before = trial.user_attrs.get(PROMOTED_FROM)
        if LOST in trial.user_attrs or before in continued:
            continue
        if before is not None:
            continued.add(before)
        yield trial


def _root(trial: FrozenTrial) -> object:
    return trial.user_attrs.get(RUN, trial.number)


def solution_of(trial: FrozenTrial) -> dict[str, Any]:
    """What CMA-ES knows a trial by, for the one that goes on with it; its own state is in the newest that it made."""
    attributes = trial.system_attrs.items()
    return {name: value for name, value in attributes if name == "x_for_tell" or name.endswith("generation")}


_PRUNER_OPTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "median": (
        optuna.pruners.MedianPruner,
        ("n_startup_trials", "n_warmup_steps", "interval_steps", "n_min_trials"),
    ),
    "percentile": (
        optuna.pruners.PercentilePruner,
        ("percentile", "n_startup_trials", "n_warmup_steps", "interval_steps", "n_min_trials"),
    ),
    "sha": (SuccessiveHalving, ("min_resource", "reduction_factor")),
    "hyperband": (Hyperband, ("max_resource", "min_resource", "reduction_factor")),
    "threshold": (optuna.pruners.ThresholdPruner, ("lower", "upper", "n_warmup_steps", "interval_steps")),
    "none": (optuna.pruners.NopPruner, ()),
}
PRUNERS = tuple(_PRUNER_OPTIONS)


def make_pruner(
    name: str, options: Sequence[str], *, length: int | None = None, waits: bool = False
) -> BasePruner:
    """The pruner of a sweep. Steps are in the unit of the reports: 1 is the first epoch.

    Args:
        name: One of `PRUNERS`.
        options: `name=value` words, under the names of Optuna's own arguments.
        length: Of a trial that is not stopped, in that unit; hyperband's `max_resource` unless an option says it.
        waits: Of successive halving: see there.

    Raises:
        UsageError: No such pruner or option, one that is missing, or a value that it refuses.
    """
    maker, known = _named("pruner", name, _PRUNER_OPTIONS)
    given = _read_options(f"pruner {name}", maker, known, options)
    if name == "hyperband":
        if length is not None:
            given.setdefault("max_resource", length)
        _need_option("pruner hyperband", "max_resource", given, "27")
        if given["max_resource"] < given.get("min_resource", 1):
            raise UsageError(
                f"pruner hyperband: max_resource={given['max_resource']} is below min_resource={given['min_resource']}",
                expected="at most the epochs of a trial as min_resource",
                try_next="min_resource=1",
            )
    if name == "sha":
        given["waits"] = waits
    if name == "percentile":
        _need_option("pruner percentile", "percentile", given, "25")
    if name == "threshold" and not given:
        _need_option("pruner threshold", "upper", given, "10")
    pruner: BasePruner = _made(f"pruner {name}", maker, given)
    return pruner


# -- names and options -----------------------------------------------------------------------------

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "None": types.NoneType}
# The smallest value of an option that is a whole number, where that is not 1.
_LEAST = {
    **dict.fromkeys(("n_startup_trials", "n_warmup_steps", "bootstrap_count"), 0),
    "reduction_factor": 2,
    "popsize": 4,  # below, `cmaes` divides by zero
}

_Table: TypeAlias = Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]]


def _named(kind: str, name: str, table: _Table) -> tuple[Callable[..., Any], tuple[str, ...]]:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4) or [next(iter(table))]
        raise UsageError(
            f"there is no {kind} {name!r}",
            expected=f"one of {', '.join(table)}",
            try_next=f"--{kind} {near[0]}",
        )
    return table[name]


def _read_options(
    what: str, maker: Callable[..., Any], known: Sequence[str], words: Sequence[str]
) -> dict[str, Any]:
    """The options as given, of the types that the constructor is annotated with."""
    for word in words:
        option = word.partition("=")[0].strip()
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
            raise UsageError(
                f"{what} has no option {option!r}",
                expected=f"one of {', '.join(known)}" if known else "no options",
                try_next=f"{near[0]}=…" if near else "",
            )
    if not words:
        return {}  # asked before each trial, and a class made for nothing
    parameters = inspect.signature(maker).parameters
    fields = [(option, _hint(parameters[option].annotation)) for option in known]
    try:
        given = params.parse(make_dataclass("Options", fields, frozen=True), words)
    except ParamError as error:
        raise UsageError(f"{what}: {error.found}", expected=error.expected, try_next=error.try_next) from None
    for option, value in given.items():
        least = _LEAST.get(option, 1)
        if type(value) is int and value < least:
            raise UsageError(
                f"{what}: {option} is {value}",
                expected=f"a whole number from {least}",
                try_next=f"{option}={least}",
            )
    return dict(given)


def _hint(annotation: Any) -> Any:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    # "auto", which some take beside a number, is what must not be taken here
    parts = text.removeprefix("str | ").split(" | ")
    return functools.reduce(operator.or_, (_TYPES[part] for part in parts))


def _need_option(what: str, option: str, given: Mapping[str, Any], example: str) -> None:
    if option not in given:
        raise UsageError(
            f"{what} does not say {option}", expected=f"{option}=…", try_next=f"{option}={example}"
        )


def _made(what: str, maker: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    with warnings.catch_warnings():
        # Whom would it help to read at every trial that Optuna may change this class?
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return maker(**given)
        except ValueError as error:
            raise UsageError(f"{what} refuses its options: {error}") from error
