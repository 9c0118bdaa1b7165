"""What a sweep is about: what a user asked for, all of it checked before anything trains."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tracked import experiment as experiments
from tracked import params, search
from tracked import space as spaces
from tracked.address import redact
from tracked.errors import ParamError, UsageError
from tracked.experiment import Experiment
from tracked.pipe import Progress
from tracked.place import Place
from tracked.schedule import Interval, Settings
from tracked.study import Method
from tracked.worker import Order, Report

_TRIALS = 20
_EXAMPLES = 20  # combinations to try, before an experiment is said to refuse all
_FAMILY = uuid.UUID("5a1dc9de-2f0c-4f7e-9f2e-2d8f4ab1c0de")


Suggest: TypeAlias = Callable[[Any], Mapping[str, Any]]
"""The params of an Optuna trial, as a user's `suggest(trial)` gives them."""


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
        waits: Whether successive halving stops the first that come to it, as they may go on; None for what the
            budgets of this request leave room for.
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
    waits: bool | None = None
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

    @property
    def is_named(self) -> bool:
        """Whether it may mean a sweep that was begun before, here or elsewhere."""
        return bool(self.study_name or self.storage or self.handle)


@dataclass(frozen=True)
class Plan:
    """What a sweep is about, all checked before anything trains."""

    name: str
    experiment: str
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
    def make(cls, request: Request, experiment: Experiment) -> Plan:
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

        def suggest(trial: Any) -> Mapping[str, Any]:
            if space:
                return search.suggest(trial, space)
            assert experiment.suggest is not None
            return experiment.suggest(trial)

        metric, mode = _monitored(request, experiment, fixed, suggest)
        # Of many trials, the newest and the best checkpoint each: all else is uploaded for nothing.
        settings = {"keep_last": 1, **request.settings, "monitor": metric, "mode": mode}
        if settings.get("epochs") is None and settings.get("max_steps") is None:
            raise UsageError(
                "it is not said how long a trial trains", expected="epochs or steps", try_next="--epochs 10"
            )
        seed = Settings(**settings).seed
        waits = request.waits
        if waits is None:
            # Out of time, or of epochs, nothing goes on: a study that begins with such a budget stops nothing early.
            has_time = request.seconds is None and request.max_epochs is None
            waits = request.pruner == "sha" and request.promote and has_time
        # Where the loop is the user's own, only its steps are counted alike.
        by_epochs = experiment.build is not None and not metric.startswith("train/")
        unit = Interval.parse(Settings(**settings).eval_every).unit if by_epochs else "step"
        length = settings.get("epochs" if unit == "epoch" else "max_steps")
        pruner = search.make_pruner(request.pruner, request.pruner_options, length=length, waits=waits)

        def promotable(rows: list[Any], turn: search.Turn) -> list[int]:
            direction: search.Direction = "minimize" if mode == "min" else "maximize"
            return search.promotable(rows, pruner, direction, turn) if request.promote else []

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
        method_words = (request.sampler, *request.sampler_options, request.pruner, *request.pruner_options)
        asked = [*words, *method_words, str(settings)]
        name = request.study_name
        if name is None and request.storage is not None:
            # The same line on another machine, or once more, means the same study.
            name = f"{experiment.path.stem}-{uuid.uuid5(_FAMILY, ' '.join(asked)).hex[:8]}"
        handle = (
            request.handle or (uuid.uuid5(_FAMILY, f"{experiment_name} {name}") if name else uuid.uuid4()).hex
        )
        name = name or f"{experiment.path.stem}-{handle[:8]}"
        record: dict[str, Any] = {
            "name": name,
            "experiment": experiment_name,
            "handle": handle,
            "file": experiments.describe(experiment),
            "words": words,
            "fixed": fixed,
            "space": spaces.as_json(space) if space else None,
            "settings": settings,
            "storage": request.storage and redact(request.storage),
            "sampler": request.sampler,
            "sampler_options": request.sampler_options,
            "pruner": request.pruner,
            "pruner_options": request.pruner_options,
            "promote": request.promote,
            "waits": waits,
            "trials": request.trials or (None if request.sampler == "grid" else _TRIALS),
        }
        if request.extend is not None and settings.get("epochs") is None:
            raise UsageError(
                "the best can be trained further by epochs alone, and this sweep counts steps",
                expected="a sweep with --epochs",
                try_next="without --top and --extend-epochs",
            )
        record = json.loads(json.dumps(record))  # as it will be read back
        return cls(name, experiment_name, handle, fixed, space, metric, mode, unit, settings, method, record)

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
        for name in ("fixed", "sampler", "sampler_options", "pruner", "pruner_options"):
            if recorded[name] != self.record[name]:
                wrong.append(f"{name} was {recorded[name]!r}, and is {self.record[name]!r}")
        names = [Path(record["file"]["path"]).name for record in (recorded, self.record)]
        if names[0] != names[1]:
            wrong.append(f"its experiment was {names[0]}, and is {names[1]}")
        if self.record["pruner"] == "sha" and recorded["promote"] != self.record["promote"]:
            wrong.append(f"promote was {recorded['promote']!r}, and is {self.record['promote']!r}")
        alike = ["monitor", "mode", "seed", "eval_every"]
        if self.record["pruner"] == "hyperband":
            alike += ["epochs", "max_steps"]  # by which its brackets are laid out
        for name in alike:
            was, now = (settings.get(name) for settings in (recorded["settings"], self.settings))
            if was != now:
                wrong.append(f"{name} was {was!r}, and is {now!r}")
        if wrong:
            raise UsageError(
                f"the study {self.name!r} is not the one asked for: {'; '.join(wrong)}",
                expected="the same line for the same study",
                try_next="another --study-name",
            )

    def continued(self, recorded: Mapping[str, Any], *, trials: int | None) -> Plan:
        """This plan for a study that was begun before: its parent run, and as many trials unless a number is given."""
        record = {**self.record, "handle": recorded["handle"]}
        if trials is None:
            record["trials"] = recorded["trials"]
        return replace(self, handle=str(recorded["handle"]), record=record)

    @property
    def epochs(self) -> int | None:
        """That a trial trains which nothing stops."""
        return self.settings.get("epochs")

    def is_last(self, report: Report, order: Order) -> bool:
        epochs = order.epochs or self.epochs
        steps = self.settings.get("max_steps")
        return bool((epochs and report.epoch >= epochs) or (steps and report.step >= steps))


def _monitored(
    request: Request, experiment: Experiment, fixed: list[str], suggest: Suggest
) -> tuple[str, Literal["min", "max"]]:
    """The metric that trials are compared by.

    Raises:
        ParamError: No trial can have what is fixed.
        UsageError: Nothing says it.
    """
    monitor, mode = request.settings.get("monitor"), request.settings.get("mode")
    if experiment.build is not None and (monitor is None or mode is None):
        task = experiment.task(_example(experiment, fixed, suggest))
        monitor, mode = task.judged_by(monitor, mode)
    if monitor is None:
        raise UsageError(
            "it is not said by which metric the trials are compared",
            expected="the name of a metric that the loop logs",
            try_next="--monitor val/loss",
        )
    if mode is None:
        request.progress.say(f"trials are compared by {monitor}, and smaller is better (else: --mode max)")
    return monitor, mode or "min"


def _example(experiment: Experiment, fixed: list[str], suggest: Suggest) -> Any:
    """Params that a trial may have: the defaults; where there are none, or they are refused, what is suggested.

    Raises:
        ParamError: The experiment takes none of them.
    """
    refused: list[ParamError] = []
    for values in chain([{}], search.examples(suggest, _EXAMPLES)):
        try:
            return experiment.make_params([*fixed, *spaces.as_words(values)])
        except ParamError as error:
            refused.append(error)
    raise refused[-1]
