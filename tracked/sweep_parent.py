"""The parent run of a sweep: how the sweep stands, as metrics, tags and pictures, renewed while it goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, Any

from tracked import ranking
from tracked.attempts import Say, begin, begin_or_take_over
from tracked.drawing import Drawing, Sweep
from tracked.names import BEST, BEST_RUN, SWEEP, TRIALS
from tracked.schedule import Settings
from tracked.sweep_plan import Plan, Request
from tracked.tracking import Run
from tracked.trials import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_FIRST_PICTURES = 60.0
"""Seconds before which none are drawn: a sweep that is over by then has those of its end."""
_DRAWING_REST = 20.0
"""For so many times as long as its pictures took, no more are drawn: they are made beside the trainings."""
_LONGEST_LAST_DRAWING = 30.0
"""Seconds after which a sweep ends without its last pictures: whoever has asked it to leave may not wait longer."""


class Parent:
    """The parent run, begun or gone on with; it is ours to write until `finish`.

    Args:
        request: What the user asked for.
        plan: What the sweep is about.
        source: The experiment file.
        tags: That the run has from the start.
        is_new: Whether nobody can have begun it.
        say: Told what is waited for.

    Raises:
        RunTaken: Another process has the sweep.
    """

    def __init__(
        self, request: Request, plan: Plan, *, source: Path, tags: Mapping[str, str], is_new: bool, say: Say
    ) -> None:
        self._plan = plan
        self._say = say
        self._draws_again = time.monotonic() + _FIRST_PICTURES
        self._drawing: Drawing | None = None
        self._drawer = threading.Thread()
        shown = {
            "sweep.sampler": " ".join([request.sampler, *request.sampler_options]),
            "sweep.pruner": " ".join([request.pruner, *request.pruner_options]),
            **{name: value for name, _, value in (word.partition("=") for word in plan.fixed)},
            **{name: str(dimension) for name, dimension in plan.space.items()},
        }
        where: dict[str, Any] = {
            "experiment": plan.experiment,
            "name": plan.name,
            "tags": {**tags, SWEEP: json.dumps(plan.record)},
            "params": shown,
        }
        if is_new:
            attempt = begin(request.place, handle=plan.handle, **where)
        else:
            attempt, _ = begin_or_take_over(request.place, plan.handle, say, **where)
        # On from the last one there: how many trials had ended by then may come again, as some go on.
        self._records = max((max(points, default=0) for points in attempt.replay.values()), default=0)
        self.run = Run(attempt, Settings(**plan.settings), drain_timeout=request.drain_timeout)
        if not attempt.replay:  # the first that logs anything
            self.run.log_artifact(source, "source")
            self.run.log_params({f"loop.{name}": str(value) for name, value in plan.settings.items()})
        else:
            self.run.set_tags({SWEEP: json.dumps(plan.record)})  # so many trials may be others by now

    def wait_for_id(self, is_leaving: Callable[[], bool]) -> str:
        """The run's ID, which the trials' runs name; its handle if it is left before the server answers."""
        began, told = time.monotonic(), False
        while self.run.id == self.run.handle and not is_leaving():
            if not told and time.monotonic() - began > 3:
                trouble = self.run.trouble()
                self._say(f"waiting for the server, which names the parent run{trouble and f': {trouble}'}")
                told = True
            time.sleep(0.02)
        return self.run.id

    def tell(self, trials: list[Trial], finished: Callable[[], Sequence[FrozenTrial]]) -> None:
        """Log how the sweep stands; have its pictures drawn now and then.

        Args:
            trials: In any order.
            finished: Gives those that have finished as the study has them.
        """
        if not trials:
            return
        self._records += 1
        self._log(trials, self._records)
        if time.monotonic() > self._draws_again and not self._drawer.is_alive():
            self._drawing = self._begin_drawing(trials, finished(), gives_way=True)
            if self._drawing is not None:
                self._drawer = threading.Thread(target=self._take, args=(self._drawing,), daemon=True)
                self._drawer.start()

    def finish(self, trials: list[Trial], finished: Sequence[FrozenTrial], state: str, reason: str) -> int:
        """Log and draw how the sweep has ended; the number of points that are not delivered yet."""
        self._records += 1
        self._log(trials, self._records)
        if self._drawing is not None and self._drawer.is_alive():
            self._drawing.end()
            self._drawer.join()
        # Nothing trains beside the last one.
        last = self._begin_drawing(trials, finished, gives_way=False)
        if last is not None:
            self._take(last, timeout=_LONGEST_LAST_DRAWING)
        return self.run.finish(state, reason)

    def _log(self, trials: list[Trial], step: int) -> None:
        counts = ranking.counts(trials)
        full = self._plan.epochs or max((trial.epochs for trial in trials), default=0)
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
            tags[BEST_RUN] = best.run_id
        self.run.log(values, step)
        self.run.set_tags(tags)

    def _begin_drawing(
        self, trials: list[Trial], finished: Sequence[FrozenTrial], *, gives_way: bool
    ) -> Drawing | None:
        try:
            sweep = Sweep(trials, finished, self._plan.metric, self._plan.mode)
            return Drawing(sweep, gives_way=gives_way)
        except OSError as error:
            self._say_undrawn(error)
            self._draws_again = time.monotonic() + _FIRST_PICTURES
            return None

    def _take(self, drawing: Drawing, timeout: float | None = None) -> None:
        """Log the pictures as soon as they are drawn."""
        began = time.monotonic()
        try:
            for name, image in drawing.pictures(timeout).items():
                self.run.log_bytes(image, name)
        except Exception as error:  # noqa: BLE001 - no sweep ends because of its pictures
            self._say_undrawn(error)
        finally:
            self._draws_again = time.monotonic() + _DRAWING_REST * (time.monotonic() - began)

    def _say_undrawn(self, error: Exception) -> None:
        told = error.stderr.decode(errors="replace") if isinstance(error, CalledProcessError) else ""
        *_, why = (told.strip() or str(error) or repr(error)).splitlines()
        self._say(f"the sweep's pictures could not be drawn: {why}")
