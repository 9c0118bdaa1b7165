"""The study of a sweep: every suggestion, report and verdict stands in its storage before it takes effect.

So whoever opens the storage after a kill goes on with the same trials, by the same numbers. A sampler is made anew
for each trial and seeded by its number; what it suggests is then the same however often the sweep was killed.
"""

from __future__ import annotations

import contextlib
import json
import math
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracked.search import (
    LOST,
    PROMOTED_FROM,
    RUN,
    Turn,
    counting,
    direction_of,
    memories_of,
    solution_of,
)
from tracked.trials import Trial
from tracked.trials import TrialState as State

optuna.logging.set_verbosity(optuna.logging.WARNING)

# Of a study.
_RECORD = "tracked"
_IS_WHOLE = "whole"

# Of a trial.
_RETRIES = "retries"
_PRUNED_AT = "pruned_at"
_EPOCHS = "epochs"
_REASON = "reason"
_UNTIL = "until"
_BY = "promoted_by"
_RUN_ID = "mlflow_run_id"
_OPTUNAS: dict[State, TrialState] = {
    "running": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_STATES: dict[TrialState, State] = {theirs: ours for ours, theirs in _OPTUNAS.items()}


@dataclass(frozen=True)
class Method:
    """How a study searches: made by name elsewhere, so that the study knows no names.

    Attributes:
        sampler: The sampler for a trial of that number.
        pruner: Decides which trials end early.
        suggest: The params of a trial.
        promotable: Numbers of pruned trials whose turn it is to go on, best first.
    """

    sampler: Callable[[int], optuna.samplers.BaseSampler]
    pruner: optuna.pruners.BasePruner
    suggest: Callable[[optuna.Trial], Mapping[str, Any]]
    promotable: Callable[[list[FrozenTrial], Turn], list[int]] = lambda *_: []


class Study:
    """An Optuna study, its trials known by the number of the run that trains them.

    A pruned trial that is continued has a second row in Optuna, where nothing that has ended can change; here it is
    one trial, by its first number.

    Args:
        storage: Where it is kept.
        name: Of the study in there.
        mode: Whether smaller ("min") or larger ("max") values are better.
        method: How it searches.
        record: What a continuation must find again; kept with the study when it is new.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        mode: Literal["min", "max"],
        method: Method,
        record: Mapping[str, Any],
    ) -> None:
        direction: Literal["minimize", "maximize"] = "minimize" if mode == "min" else "maximize"
        self._study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, load_if_exists=True, pruner=method.pruner
        )
        direction_of(self._study)  # with several objectives nothing can be pruned
        self._method = method
        self._open: dict[int, optuna.Trial] = {}
        self.is_new = _RECORD not in self._study.user_attrs
        if self.is_new:
            self._study.set_user_attr(_RECORD, json.dumps(dict(record)))

    def forget(self) -> None:
        """Delete it from its storage."""
        optuna.delete_study(study_name=self._study.study_name, storage=self._study._storage)  # noqa: SLF001

    def go_by(self, method: Method) -> None:
        """Search by another method from here on."""
        self._method = method
        self._study.pruner = method.pruner

    @property
    def record(self) -> dict[str, Any]:
        """What was kept with the study when it was new, or since."""
        return dict(json.loads(self._study.user_attrs[_RECORD]))

    def record_again(self, record: Mapping[str, Any]) -> None:
        """Keep another record in the place of the one from before."""
        self._study.set_user_attr(_RECORD, json.dumps(dict(record)))

    @property
    def is_whole(self) -> bool:
        """Whether trials may be asked for: it was found empty, and filled with what the runs tell."""
        return bool(self._study.user_attrs.get(_IS_WHOLE))

    def declare_whole(self) -> None:
        self._study.set_user_attr(_IS_WHOLE, True)

    # -- one trial

    def ask(self, most: int | None = None) -> int | None:
        """A new trial's number; None, if by now there are as many as `most` of whoever asked before.

        It has no params before `reopen`, so that what the user's `suggest` raises is about a trial that is known.
        """
        expected = len(self._all())
        self._study.sampler = self._method.sampler(expected)
        with _unwarned():
            trial = self._study.ask()
            if trial.number != expected:  # another machine asked at the same moment, and would draw the same
                self._study.sampler = self._method.sampler(trial.number)
                trial = optuna.Trial(self._study, trial._trial_id)  # noqa: SLF001
            trial.set_user_attr(RUN, trial.number)
            before = sum(number < trial.number for number in self._newest_rows())
            if most is not None and before >= most:  # another machine has asked at the same moment
                self._lose(trial)
                return None
            self._open[trial.number] = trial
            return trial.number

    def reopen(self, number: int) -> dict[str, Any]:
        """The params of a trial that runs in the storage; those that it had not been given yet are suggested now."""
        trial = self._trial(number)
        with _unwarned():
            return dict(self._method.suggest(trial))

    def promote(self, number: int, *, until: int | None = None) -> bool:
        """Have a trial that has ended go on, with what it has reported; whether nobody else was quicker.

        Args:
            number: Of the trial.
            until: The last epoch that it is to train, if that is further than for the others.
        """
        frozen = self._newest(number)
        if not frozen.state.is_finished():
            return False
        ours = uuid.uuid4().hex
        attributes = {
            **frozen.user_attrs,
            PROMOTED_FROM: frozen.number,
            RUN: number,
            _UNTIL: until,
            _BY: ours,
        }
        for name in (_PRUNED_AT, _REASON):
            attributes.pop(name, None)
        template = create_trial(
            state=TrialState.RUNNING,
            params=frozen.params,
            distributions=frozen.distributions,
            intermediate_values=frozen.intermediate_values,
            user_attrs=attributes,
            system_attrs=solution_of(frozen),
        )
        self._study.add_trial(template)
        rows = [each for each in self._all() if each.user_attrs.get(PROMOTED_FROM) == frozen.number]
        # Of several machines that had the same thought, the first has it.
        for late in rows[1:]:
            if not late.state.is_finished():
                self._lose(optuna.Trial(self._study, late._trial_id))  # noqa: SLF001
        return bool(rows[0].user_attrs[_BY] == ours)

    def _lose(self, trial: optuna.Trial) -> None:
        """Have a row count for nothing."""
        with _ended_elsewhere():
            trial.set_user_attr(LOST, True)
        self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def goes_on_from(self, number: int) -> int | None:
        """The epoch in which this trial had ended, if it was promoted since; None for any other."""
        attributes = self._newest(number).user_attrs
        if PROMOTED_FROM not in attributes:
            return None
        return _row(number, self._all()[attributes[PROMOTED_FROM]]).epochs

    def until(self, number: int) -> int | None:
        """The last epoch of this trial, if it is not that of all."""
        epoch = self._newest(number).user_attrs.get(_UNTIL)
        return None if epoch is None else int(epoch)

    def report(
        self, number: int, at: int, value: float, *, epochs: int | None = None, is_last: bool = False
    ) -> bool:
        """Keep an evaluation's value; whether the trial ends with it.

        What was reported before a kill comes again after it: a verdict that ended the trial stands, and where there
        was none it is sought again. A trial that trains further than the others is compared with nobody.

        Args:
            number: Of the trial.
            at: Epoch, or step where evaluations come by steps: trials are compared at equal ones.
            value: The monitored value.
            epochs: That are trained by then; None if `at` says it.
            is_last: The trial is complete with it, so that nothing is left to be saved by pruning.
        """
        trial = self._trial(number)
        frozen = self._frozen(trial)
        known, pruned_at = frozen.intermediate_values, frozen.user_attrs.get(_PRUNED_AT)
        if not frozen.state.is_finished() and at not in known:
            with _ended_elsewhere():
                trial.report(value, at)
                if epochs is not None or _EPOCHS in frozen.user_attrs:
                    trial.set_user_attr(_EPOCHS, at if epochs is None else epochs)
        elif known and at < max(known):
            return False
        if pruned_at is not None:
            return bool(at >= pruned_at)
        if is_last or frozen.state.is_finished() or frozen.user_attrs.get(_UNTIL) is not None:
            return False
        with _unwarned():
            prunes = bool(trial.should_prune())  # NumPy's, of some pruners
        if prunes:
            with _ended_elsewhere():
                trial.set_user_attr(_PRUNED_AT, at)
        return prunes

    def fill(self, number: int, reports: Mapping[int, float], *, epochs: int | None = None) -> None:
        """Keep evaluations that nobody was there to report; what is known, or has ended, stays.

        Args:
            number: Of the trial.
            reports: Their values, by what trials are compared at.
            epochs: That are trained by the last of them; None if that says it.
        """
        frozen, trial = self._newest(number), self._trial(number)
        if frozen.state.is_finished():
            return
        with _ended_elsewhere():
            for at, value in reports.items():
                if at not in frozen.intermediate_values:
                    trial.report(value, at)
            if epochs is not None:
                trial.set_user_attr(_EPOCHS, epochs)

    def tell(
        self, number: int, state: State, value: float | None = None, *, epochs: int = 0, reason: str = ""
    ) -> None:
        """End a trial; a second time it changes nothing. One that fails on its way further keeps its result."""
        trial = self._trial(number)
        frozen = self._frozen(trial)
        if frozen.state.is_finished():
            return
        if state == "failed" and value is not None and frozen.user_attrs.get(_UNTIL) is not None:
            state = "finished"
        with _ended_elsewhere():
            trial.set_user_attr(_EPOCHS, epochs)
            if reason:
                trial.set_user_attr(_REASON, reason[:500])
        if state == "finished" and (value is None or math.isnan(value)):
            state = "failed"
        result = value if state == "finished" else None
        with _unwarned():
            self._study.tell(trial, result, _OPTUNAS[state], skip_if_finished=True)

    def count_retry(self, number: int) -> int:
        """How often the trial's process has died, this time included."""
        trial = self._trial(number)
        frozen = self._frozen(trial)
        count = int(frozen.user_attrs.get(_RETRIES, 0)) + 1
        if not frozen.state.is_finished():
            with _ended_elsewhere():
                trial.set_user_attr(_RETRIES, count)
        return count

    def identify(self, number: int, run_id: str) -> None:
        """Keep which MLflow run trains it, while it runs; what has ended cannot be changed."""
        frozen = self._newest(number)
        if not frozen.state.is_finished() and frozen.user_attrs.get(_RUN_ID) != run_id:
            with _ended_elsewhere():
                self._trial(number).set_user_attr(_RUN_ID, run_id)

    def describe(self, number: int) -> str:
        """All of a trial that a study rebuilt from its run needs, as the text of a tag.

        Not what Optuna's samplers keep beside it: of some that is a pickle, and nothing from a server is executed.
        """
        rows = self._all()
        count = [*counting(rows)]
        *before, frozen = [each for each in count if self._root(each) == number]
        return json.dumps(
            {
                "number": number,
                "row": frozen.number,
                "before": [_ended(each) for each in before],
                "until": frozen.user_attrs.get(_UNTIL),
                # Of no trial: nothing else tells that these numbers are not still to be trained.
                "lost": sorted({each.number for each in rows} - {each.number for each in count}),
                "params": frozen.params,
                "distributions": {
                    name: distribution_to_json(each) for name, each in frozen.distributions.items()
                },
            }
        )

    # -- all of them

    def trials(self) -> list[Trial]:
        """A row for each, by their numbers."""
        rows = self._newest_rows()
        return [_row(number, rows[number]) for number in sorted(rows)]

    def running(self) -> dict[int, float]:
        """Numbers of the trials that have not ended, and when they began: seconds since the epoch."""
        return {
            number: frozen.datetime_start.timestamp() if frozen.datetime_start else 0.0
            for number, frozen in sorted(self._newest_rows().items())
            if not frozen.state.is_finished()
        }

    def count(self) -> int:
        """How many trials were asked for, whoever asked."""
        return len(self._newest_rows())

    def promotable(self, turn: Turn) -> list[int]:
        """Pruned trials whose turn it is to go on by what the others have reached since, best first."""
        rows = self._all()
        return [self._root(rows[number]) for number in self._method.promotable(rows, turn)]

    def finished(self) -> list[FrozenTrial]:
        """The trials that have finished, as Optuna has them."""
        return [each for each in self._all() if each.state == TrialState.COMPLETE]

    def rebuild(self, found: Iterable[tuple[Mapping[str, Any], Trial]]) -> int:
        """Fill a study with trials as their runs tell them; how many. One that was interrupted in it goes on.

        Args:
            found: What `describe` gave, and the row, of each.
        """
        known: dict[int, FrozenTrial] = {}
        for told, trial in (found := [*found]):
            known |= {number: _lost() for number in told.get("lost", ()) if number not in known}
            known |= _rebuilt(told, trial)
        rows = [known.get(number) or _untold(number) for number in range(max(known, default=-1) + 1)]
        with _unwarned():
            memories = memories_of(rows, self._method.sampler, direction_of(self._study))
        for number in range(len(self._all()), len(rows)):
            rows[number].system_attrs = memories[number]
            self._study.add_trial(rows[number])
        return len(found)

    # -- Optuna's rows

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _root(self, frozen: FrozenTrial) -> int:
        return int(frozen.user_attrs.get(RUN, frozen.number))

    def _newest_rows(self) -> dict[int, FrozenTrial]:
        return {self._root(frozen): frozen for frozen in counting(self._all()) if frozen.state in _STATES}

    def _newest(self, number: int) -> FrozenTrial:
        return self._newest_rows()[number]

    def _trial(self, number: int) -> optuna.Trial:
        frozen = self._newest(number)
        # Another machine may have had it go on since it was opened here.
        if number not in self._open or self._open[number].number != frozen.number:
            self._study.sampler = self._method.sampler(frozen.number)
            with _unwarned():
                self._open[number] = optuna.Trial(self._study, frozen._trial_id)  # noqa: SLF001 - its only way in
        return self._open[number]

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return trial.storage.get_trial(trial._trial_id)  # noqa: SLF001


def _ended(frozen: FrozenTrial) -> dict[str, Any]:
    """What a rebuilt study needs of a row that another one goes on with."""
    row = _row(frozen.number, frozen)
    at = max(row.reports, default=None)
    return {"row": frozen.number, "state": row.state, "value": row.value, "at": at, "epochs": row.epochs}


def _rebuilt(told: Mapping[str, Any], trial: Trial) -> dict[int, FrozenTrial]:
    """The rows of a trial, by their numbers."""
    number = int(told["number"])
    state = "failed" if trial.state == "finished" and trial.value is None else trial.state
    newest = {"row": told.get("row", number), "state": state, "value": trial.value, "epochs": trial.epochs}
    rows: dict[int, FrozenTrial] = {}
    for each in [*told.get("before", []), newest]:
        reports = trial.reports.items()
        attributes = {_EPOCHS: each["epochs"], _RUN_ID: trial.run_id, RUN: number}
        if rows:
            attributes[PROMOTED_FROM] = max(rows)
        if each is newest and told.get("until") is not None:
            attributes[_UNTIL] = told["until"]
        last = each.get("at")
        rows[int(each["row"])] = create_trial(
            state=_OPTUNAS[each["state"]],
            value=each["value"] if each["state"] == "finished" else None,
            params=dict(told["params"]),
            distributions={name: json_to_distribution(text) for name, text in told["distributions"].items()},
            intermediate_values={at: value for at, value in reports if last is None or at <= last},
            user_attrs=attributes,
        )
    return rows


def _untold(number: int) -> FrozenTrial:
    """One that was asked for, and gone before anything of it was on the server: it is suggested when it begins."""
    return create_trial(state=TrialState.RUNNING, user_attrs={RUN: number})


def _lost() -> FrozenTrial:
    """One that two machines asked for, and one had."""
    return create_trial(state=TrialState.FAIL, user_attrs={LOST: True})


def _row(number: int, frozen: FrozenTrial) -> Trial:
    reports = dict(sorted(frozen.intermediate_values.items()))
    value = frozen.value if frozen.state == TrialState.COMPLETE else None
    row = Trial(number, _STATES[frozen.state], dict(frozen.params), reports, value)
    epochs = int(frozen.user_attrs.get(_EPOCHS, max(reports, default=0)))
    return replace(row, run_id=str(frozen.user_attrs.get(_RUN_ID, "")), epochs=epochs)


def _ended_elsewhere() -> contextlib.suppress:
    """Where another machine may have ended a trial since it was looked at: what has ended stays as it is."""
    return contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError)


def _unwarned() -> warnings.catch_warnings[None]:
    """Without what Optuna says of its experimental parts, which the user has not chosen."""
    return warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore")
