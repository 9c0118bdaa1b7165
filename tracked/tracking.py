"""`Run`: what a training loop holds to log, to draw its batches, and to be saved between two steps."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.data import Dataset

from tracked.checkpoint import check_loadable, load
from tracked.data import Batches, in_groups
from tracked.datasets import described, merged
from tracked.errors import CheckpointError, LossNotFinite, RunTaken, SpoolError, TrackedError, UsageError
from tracked.names import BEST, EXACT, FILE, MANIFEST, OVERFITTING, SETTINGS, STOP_REASON, folder_name
from tracked.pipe import Attempt, Pipe, Progress, Retention, shown_params
from tracked.points import whole
from tracked.provenance import boot_id, host_name, redact_text
from tracked.schedule import Due, Settings
from tracked.seeding import (
    derive,
    determinism,
    differences,
    environment,
    generator_states,
    have_drawn,
    make_deterministic,
    restore_determinism,
    restore_generators,
    seed_generators,
    seeds,
)
from tracked.spool import read_json
from tracked.state import Parts
from tracked.stopping import Overfitting, Stopping
from tracked.streams import Stream, batches_of
from tracked.system_metrics import INSTALL, Monitor

PAUSED_EXIT = 75


class Paused(SystemExit):
    """The training left between two steps, and can be resumed; a script that lets it pass exits with 75."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(PAUSED_EXIT if state == "paused" else 0)
        self.state = state
        self.reason = reason


def not_finite(step: int, value: float) -> LossNotFinite:
    """The error for a training loss that is no number any more."""
    return LossNotFinite(
        f"the training loss is {value} at step {step}",
        expected="a finite number",
        try_next="`train` again with a smaller learning rate (lr=…) or clip_norm; what was logged is kept",
    )


class Run:
    """One run, as its training sees it.

    Nothing here calls MLflow or waits for a network, `finish` apart.

    Args:
        attempt: Where it is written, and what it continues.
        settings: How long it goes on, and what it does on the way.
        progress: Shows how far it is.
        drain_timeout: Seconds that `finish` waits for the last points to be delivered.
    """

    def __init__(
        self,
        attempt: Attempt,
        settings: Settings,
        *,
        progress: Progress | None = None,
        drain_timeout: float = 60.0,
    ) -> None:
        self.handle = attempt.folder.handle
        self.settings = settings
        self.attempt = attempt.number
        self.state: dict[str, Any] = {}
        self.step = 0
        self.epochs_done = 0
        self.step_ended = True
        self.total_steps: int | None = None
        self.stopping = Stopping(settings.mode or "min", settings.patience, settings.min_delta)
        self.overfitting = Overfitting()
        self.presents = True
        """Whether pictures are drawn of it, and its data sets named: of trials side by side, their parent says more."""
        self.progress = progress or Progress()
        self.last_state = "running"
        self.undelivered = 0
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0
        """How long this attempt trained, once it has ended."""
        self._attempt = attempt
        self._epochs: int | None = None
        self._steps_in_epoch = math.inf
        self._epoch_start, self._epoch_end = 0, math.inf
        self._accumulate = 0
        self._source: Batches | Stream | None = None
        self._place: Any = None
        self._place_before: Any = None
        self._began: tuple[float, int | None] | None = None
        self._generators: dict[str, Any] = {}
        self._parts = Parts()
        # The one thing that a step between two due ones looks at.
        self._next_due = 0.0
        self._attention = False
        self._wants_checkpoint = False
        self._taken_at = -1
        self._improved = False
        self._leave: tuple[str, str] | None = None
        self._ends_after_step = ""
        self._facts: dict[str, Any] = {}
        self._recorded: dict[str, str] = {}
        self._inputs: list[tuple[Dataset[Any], str]] = []
        self._looping = False
        self._over = False
        self._due = Due(settings.checkpoint_every)
        self._restored = attempt.restored
        # It may refuse its settings; with the pipe the attempt begins.
        self._monitor = self._monitored(attempt.first_sample) if settings.system_metrics else None
        retention = Retention(settings.keep_last, settings.keep_best, self.stopping.mode)
        self._pipe = Pipe(attempt, retention, self.progress, drain_timeout)
        self._points = self._pipe.points
        if self._restored is not None:
            self._continue(self._restored)
        if (self.attempt == 1 or self._restored is None) and attempt.params:
            self._pipe.append("params", shown_params(attempt.params))
            self._pipe.flush()  # at once: a run that dies in its first moment should say what it was
        self._pipe.copy(attempt.history)
        attempt.history = []  # it may be long, and the training is
        self._pipe.open(self._beside)

    # -- what it is

    @property
    def id(self) -> str:
        """The run's ID in MLflow; the local handle until the server has given one."""
        return str(self._attempt.said().get("run_id") or self._attempt.start["run_id"] or self.handle)

    @property
    def url(self) -> str:
        """Where a browser shows the run; empty until that is known, and for an SQLite file."""
        return str(self._attempt.said().get("url", ""))

    @property
    def epoch(self) -> int:
        """The epoch that the current step belongs to, counted from 1."""
        return self.epochs_done + 1

    @property
    def epoch_ended(self) -> bool:
        """Whether the current step is the last one of its epoch."""
        return self.step == self._epoch_end and self.step_ended

    @property
    def epoch_steps(self) -> int:
        """Steps of the current epoch, the current one included."""
        return self.step - self._epoch_start

    @property
    def total_epochs(self) -> int | None:
        """How many epochs will be completed in all; None where nobody knows."""
        if self.total_steps is None or self._steps_in_epoch == math.inf:
            return self._epochs
        return self.epochs_done + int((self.total_steps - self._epoch_start) // self._steps_in_epoch)

    @property
    def should_stop(self) -> bool:
        """Whether the loop will be left behind this step: paused, stopped, preempted, or out of patience."""
        return self._leave is not None or bool(self._ends_after_step)

    @property
    def leaves_because(self) -> str:
        """Why the loop was asked to leave; empty if it was not."""
        return self._leave[1] if self._leave else ""

    @property
    def leaves_as(self) -> str:
        """The state that the loop was asked to leave with: "paused" or "stopped"; empty if it was not."""
        return self._leave[0] if self._leave else ""

    @property
    def is_over(self) -> bool:
        """Whether the training has ended, and at most the delivery is waited for."""
        return self._over

    @property
    def replayed_equal(self) -> int:
        """Recomputed points that an earlier attempt had delivered with the very same value."""
        return self._points.replayed_equal

    @property
    def resumed_from(self) -> int | None:
        """The step of the checkpoint that this attempt started from."""
        return None if self._attempt.restored is None else int(self._attempt.restored["step"])

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """The newest checkpoint that is written: step, epoch, path, sha256, bytes."""
        entries = self._pipe.retention.entries
        return entries[-1] if entries else None

    @property
    def samples(self) -> int | None:
        """How many samples this attempt trained on; None where the data alone decides how many a batch has."""
        done, begun = self._samples_done(), self._began and self._began[1]
        return None if done is None or begun is None else done - begun

    @property
    def points(self) -> int:
        """How many points all attempts have logged."""
        return sum(self._points.counts().values())

    # -- what a loop calls

    def configure(self, settings: Settings, **facts: Any) -> None:
        """Take the settings with what the code itself says filled in; the first batch records them as `loop.…`.

        Args:
            settings: Before the first batch.
            facts: More to record beside them, such as `batch_size`.
        """
        self._facts = facts
        self.settings = settings
        self.stopping.mode = self._pipe.retention.mode = settings.mode or "min"
        self.stopping.patience, self.stopping.min_delta = settings.patience, settings.min_delta

    def record(self, tags: Mapping[str, str]) -> None:
        """Set tags with the first batch: a resume that cannot begin changes nothing."""
        self._recorded |= tags

    def log_input(self, data: Dataset[Any], context: str = "validation") -> None:
        """Name a data set that the run reads, as an input of the run; the one of `batches` is named anyway.

        Call it before the first batch. It is told once, by the attempt that begins the run.

        Args:
            data: A data set. See `datasets.described` for what is looked at.
            context: What it is for; the metrics `CONTEXT/…` were measured on it (of "validation": `val/…`).
        """
        self._inputs.append((data, context))

    def changed(self, values: Mapping[str, float]) -> dict[str, float]:
        """Those of `values` that differ from what was last logged under their key."""
        return {key: value for key, value in values.items() if self._points.last(key) != value}

    def attach(self, **parts: Any) -> None:
        """Name what is saved and resumed: anything with `state_dict` and `load_state_dict`.

        In a resumed run the parts get their state back here. Attach a model before, or together with, the
        optimizer of its parameters, and a scheduler together with its optimizer.

        Raises:
            UsageError: A part cannot be saved, comes after the first batch, or drives an optimizer that is
                attached in another call.
            StateMismatch: The checkpoint does not fit.
        """
        if self._looping:
            raise UsageError(
                "attach was called inside the loop", expected="every part before the first batch"
            )
        for name, part in parts.items():
            self._parts.attach(name, part)
        self._parts.check_together(tuple(parts))
        if self._restored is not None:
            self._parts.restore(self._restored, tuple(parts), overridden=self._attempt.overridden)
        else:
            check_loadable(self._parts.capture())

    def batches(
        self,
        data: Dataset[Any],
        *,
        batch_size: int,
        epochs: int | None = None,
        max_steps: int | None = None,
        accumulate: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        **loader: Any,
    ) -> Iterator[Any]:
        """The batches of the training, from where it stands to its end, each step seeded.

        A checkpoint is taken between two of them. With `accumulate`, a step has that many batches, and
        `step_ended` tells the last one.

        Args:
            data: A data set, map-style or iterable.
            batch_size: Samples in a batch.
            epochs: How often the data is gone through; `--epochs` goes first.
            max_steps: How many steps at most; `--max-steps` goes first.
            accumulate: Batches in a step.
            shuffle: A new order for each epoch.
            drop_last: Leave out a smaller last batch.
            loader: Further arguments of `DataLoader`, such as `num_workers`.

        Raises:
            UsageError: It is not said how long to go on, or the arguments do not go together.
        """
        batches = self._batches(data, batch_size, loader, shuffle=shuffle, drop_last=drop_last)
        if accumulate == 1:
            return self._train(batches, epochs, max_steps, 1, lambda source: source)
        return self._one_by_one(self._windows(batches, epochs, max_steps, accumulate))

    def windows(
        self,
        data: Dataset[Any],
        *,
        batch_size: int,
        epochs: int | None = None,
        max_steps: int | None = None,
        accumulate: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        loader: Mapping[str, Any] | None = None,
    ) -> Iterator[Sequence[Any]]:
        """Like `batches`, with the batches of each step in a sequence (shorter at the end of an epoch)."""
        batches = self._batches(data, batch_size, loader or {}, shuffle=shuffle, drop_last=drop_last)
        return self._windows(batches, epochs, max_steps, accumulate)

    def steps(self, count: int | None = None) -> Iterator[int]:
        """The numbers of the steps still to do, for a loop that draws its own data by each step's seed.

        Args:
            count: How many steps in all; `--max-steps` goes first.
        """
        _, self.total_steps = self._length(None, count)
        if self.total_steps is None:
            raise UsageError("steps() does not know how many", expected="steps(n), or --max-steps N")
        self._accumulate = 0
        self._begin({})
        while self.step < self.total_steps and not self._ends_after_step:
            self.step += 1
            seed_generators(next(self._step_seeds))
            yield self.step
            if self.step >= self._next_due and self._settle():
                return

    def _batches(
        self,
        data: Dataset[Any],
        batch_size: int,
        loader: Mapping[str, Any],
        *,
        shuffle: bool,
        drop_last: bool,
    ) -> Batches | Stream:
        seed = self.settings.seed
        self._inputs.insert(0, (data, "training"))
        return batches_of(
            data, batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last, loader=loader
        )

    def _windows(
        self, batches: Batches | Stream, epochs: int | None, max_steps: int | None, accumulate: int
    ) -> Iterator[Sequence[Any]]:
        if accumulate < 1:
            raise UsageError(f"accumulate is {accumulate}", expected="1 or more")
        return self._train(
            batches, epochs, max_steps, accumulate, lambda source: in_groups(source, accumulate)
        )

    def _one_by_one(self, windows: Iterator[Sequence[Any]]) -> Iterator[Any]:
        for *others, last in windows:
            self.step_ended = not others
            yield from others
            self.step_ended = True
            yield last

    def _train(
        self,
        batches: Batches | Stream,
        epochs: int | None,
        max_steps: int | None,
        accumulate: int,
        grouped: Callable[[Iterator[Any]], Iterator[Any]],
    ) -> Iterator[Any]:
        """What every step is handed, up to the end of the training; `grouped` makes it from an epoch's batches."""
        self._epochs, max_steps = self._length(epochs, max_steps)
        if batches.length is not None:
            self._steps_in_epoch = -(-batches.length // accumulate)
        lengths = [self._epochs * self._steps_in_epoch if self._epochs else math.inf, max_steps or math.inf]
        self.total_steps = None if min(lengths) == math.inf else int(min(lengths))
        self._epoch_start = self.step - self._batch // accumulate
        self._accumulate = accumulate
        self._epoch_end = self._epoch_start + self._steps_in_epoch
        self._source = batches
        self._begin({**batches.facts, "accumulate": accumulate})
        if self._is_complete and self.resumed_from is not None:
            self.progress.say(f"nothing is left to do: the run is complete at step {self.step}")
        draws, step_seeds = batches.draws, self._step_seeds
        with closing(batches):
            while not self._is_complete:
                before = self.step
                try:
                    for item in grouped(batches.epoch(self.epochs_done, self._batch)):
                        self.step += 1
                        # Not that of a window whose batches cannot all be built.
                        self._place_before, self._place = self._place, batches.state
                        # Else who builds the batches, main process or worker, would decide what the step draws.
                        if draws:
                            seed_generators(next(step_seeds))
                        if batches.at_end:
                            self._epoch_end = self._next_due = self.step
                        yield item
                        if self.step >= self._next_due and self._settle():
                            return
                except TrackedError:
                    raise
                except Exception:
                    self._rescue()
                    raise
                if self.step == before:
                    raise UsageError(
                        f"the data gave no batch in epoch {self.epoch}",
                        expected="a data set, or a sampler, that begins anew in each epoch",
                    )

    @property
    def _is_complete(self) -> bool:
        """Whether there is no step to do any more."""
        by_steps = self.total_steps is not None and self.step >= self.total_steps
        by_epochs = self._epochs is not None and self.epochs_done >= self._epochs
        return by_steps or by_epochs or bool(self._ends_after_step)

    def undo_step(self) -> None:
        """Save the state before the step being made: it has failed, and the loop has put back what it changed."""
        self.step -= 1
        self._place = self._place_before
        draws = self._source is not None and self._source.draws
        # Where no step is seeded, what the failed one drew in Python and NumPy cannot be put back.
        if draws or not have_drawn(self._generators):
            self._rescue()

    def _rescue(self) -> None:
        """Save what stands where no batch could be built: the state is still that of the last step."""
        if self.step == self._taken_at:
            return
        try:
            if self._points.must_be_finite:
                self._pipe.flush()
            if self._points.not_finite is None:
                self._take_checkpoint(wait=True)
        except Exception as error:  # noqa: BLE001 - the user is to see what the data raised
            self.progress.warn(f"no checkpoint could be taken of step {self.step}: {error}")

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers or one-element tensors at `step` (by default the one being made). Never waits.

        Raises:
            MetricError: See `PointLog.log`.
        """
        self._points.log(self.step if step is None else whole(step), values)
        monitor = self.settings.monitor
        if monitor is not None and monitor in values:
            self.judge(float(values[monitor]))

    def require_finite(self, key: str) -> None:
        """Fail the run when a NaN or an infinity has been logged under `key`, also where reading it is deferred."""
        self._points.must_be_finite.add(key)

    def judge(self, value: float) -> None:
        """Take the monitored value of an evaluation: a new best is saved; patience or a pruner may end the loop.

        Raises:
            LossNotFinite: It is not a number.
        """
        verdict = self.stopping.judge(self.step, self.epoch, value)
        if verdict == "nan":
            raise LossNotFinite(
                f"the monitored metric {self.settings.monitor!r} is NaN at step {self.step}",
                expected="a number",
                try_next="a new run with a smaller learning rate",
            )
        self._heed_verdict()
        self._improved = self.settings.keep_best > 0 and self.stopping.best_step == self.step
        self._ask_for_attention()

    def best_state(self) -> dict[str, Any] | None:
        """What the checkpoint of the best step holds; None, with a warning, where it is not on this machine."""
        self._pipe.settle()
        folder = self._attempt.folder.checkpoints / folder_name(self.stopping.best_step)
        try:
            return load(folder / FILE, read_json(folder / MANIFEST).get("sha256"))
        except CheckpointError as error:
            self.progress.warn(f"the best weights cannot be restored: {error.found}")
            return None

    def _heed_verdict(self) -> None:
        if self.stopping.is_out_of_patience:
            self._ends_after_step = (
                f"no improvement of {self.settings.monitor} in {self.stopping.waited} evaluations"
            )
        elif self.stopping.is_pruned:
            self._ends_after_step = f"pruned in epoch {self.stopping.pruned_in}: other trials were better"

    def log_artifact(self, path: str | Path, directory: str = "") -> None:
        """Have a copy of the file uploaded, as `directory/name` among the run's artifacts.

        Raises:
            SpoolError: The copy cannot be made.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"there is no file {path}", expected="a file to log")
        self._pipe.add_file(path.name, directory, lambda to: shutil.copyfile(path, to))

    def log_figure(self, figure: Any, name: str) -> None:
        """Have a matplotlib figure uploaded; `name` is a path such as `plots/curves.png`."""
        self._add_file(name, lambda to: figure.savefig(to, bbox_inches="tight"))

    def log_text(self, text: str, name: str) -> None:
        """Have a text uploaded; `name` is a path such as `notes/data.txt`, and a later text of that name replaces it.

        Raises:
            SpoolError: The file cannot be made.
        """
        self._add_file(name, lambda to: to.write_text(text, encoding="utf-8"))

    def log_bytes(self, content: bytes, name: str) -> None:
        """Have `content` uploaded under `name`, such as `plots/history.png`, among the run's artifacts.

        Raises:
            SpoolError: The spool cannot be written.
        """
        self._add_file(name, lambda path: path.write_bytes(content))

    def add_model(self, write: Callable[[Path], None], *, step: int, register: str | None = None) -> None:
        """Have a module that `write(folder)` packs logged as a model of MLflow's PyTorch flavour.

        Args:
            write: See `modelling`.
            step: The step of its weights.
            register: The name in the model registry under which it becomes a version; the best has the alias `best`.

        Raises:
            SpoolError: The spool cannot be written.
        """
        self._stop_clock()
        self._pipe.add_model(write, {"step": step, "register": register})

    def _stop_clock(self) -> None:
        """The training is over, whatever is still done with what has become of it."""
        if self._began is not None and not self.seconds:
            self.seconds = time.monotonic() - self._began[0]

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Have further params shown; MLflow keeps the first value of each.

        Raises:
            ParamError: A name that MLflow refuses.
        """
        self._pipe.append("params", shown_params(values))

    def _add_file(self, name: str, write: Callable[[Path], Any]) -> None:
        where = Path(name)
        directory = "" if str(where.parent) == "." else where.parent.as_posix()
        self._pipe.add_file(where.name, directory, write)

    def draw_curves(self, *panels: Sequence[str], name: str = "plots/curves.png") -> None:
        """Have the curves of these metrics drawn, with the best step and the gap, beside the training.

        The sender draws them from what stands on the server, so the picture shows all attempts of the run.
        Of several pictures of a name the newest is drawn: at the end of the run for certain, before that as
        often as costs nearly nothing.

        Args:
            panels: The keys of each panel, from above; `["train/loss", "val/loss"]` shows the gap between them.
            name: A path among the run's artifacts that ends in `.png`.
        """
        if not self.presents:
            return
        best = None if self.stopping.best is None else self.stopping.best_step
        attempts = self._attempt.about.get("resumed_at", [])
        self._pipe.draw(
            name, {"panels": [[*keys] for keys in panels], "best_step": best, "attempts": attempts}
        )

    def draw_confusion(
        self, counts: Sequence[Sequence[int]], classes: Sequence[str] = (), name: str = "plots/confusion.png"
    ) -> None:
        """Have a picture drawn, beside the training, of which classes were taken for which at this step.

        Args:
            counts: Samples of each class (row) by what they were taken for (column), shape `[C, C]`.
            classes: Their names; by default their numbers.
            name: A path among the run's artifacts that ends in `.png`; a later picture of that name replaces it.
        """
        if self.presents:
            counted = [[int(each) for each in row] for row in counts]
            self._pipe.draw(name, {"confusion": counted, "classes": [*map(str, classes)], "step": self.step})

    def judge_overfitting(self, key: str, val: float) -> None:
        """Take the validation loss of an evaluation; what there is to say of it becomes the run's tag.

        The training losses since the evaluation before are those given to `overfitting.add`.
        """
        if self.overfitting.judge(self.step, key, val):
            self.set_tags({OVERFITTING: self.overfitting.said})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._pipe.append("tags", dict(tags))

    def save(self) -> None:
        """Have a checkpoint taken when this step ends, which a `break` out of the loop does not do."""
        self._wants_checkpoint = True
        self._ask_for_attention()

    def request_leave(self, state: str, reason: str) -> None:
        """Ask the loop to checkpoint and leave when this step ends. May be called from a signal handler.

        Args:
            state: "paused" (comes back with `resume`) or "stopped".
            reason: Why; shown to the user and kept as a tag.
        """
        self._leave = self._leave or (state, reason)
        self._ask_for_attention()

    def leave_at_once(self) -> None:
        """Do not wait, or not any longer, for the delivery at the end: the sender goes on by itself."""
        self._pipe.patience = 0.0

    # -- the end

    def finish(self, state: str = "finished", reason: str = "") -> int:
        """Write what is left, and wait until it is delivered or `drain_timeout` is over.

        Args:
            state: finished, stopped_early, pruned, stopped, paused or failed.
            reason: Why it ended, for people.

        Returns:
            Points that are not delivered yet, 1 if it is files alone; they stay in the spool.
        """
        if self._over:
            return self.undelivered
        self._over = True
        self._stop_clock()
        if state == "finished" and self._ends_after_step:
            state = "stopped_early" if self.stopping.is_out_of_patience else "pruned"
            reason = self._ends_after_step
        tags = {STOP_REASON: reason} if reason else {}
        if self.stopping.best is not None:
            tags[BEST] = f"{self.settings.monitor} {self.stopping.best:.6g} at step {self.stopping.best_step}"
        self._monitor = None  # what it took from here on would never be sent
        self._pipe.close(state, tags, self._beside)
        self.last_state = state
        self.metrics = self.latest()
        self._attempt.lock.release()
        self.undelivered = self._pipe.drain(self._beside)
        self.progress.close()
        if self.undelivered:
            why, pending = self.trouble() or "they are on their way", self.pending()
            what = f"{pending} points are" if pending else "all points are there, the last files are"
            self.progress.warn(f"{what} not delivered yet ({why})\n  try: python -m tracked.run sync")
        if state == "finished" and self._attempt.said().get("superseded"):
            raise self._taken()
        return self.undelivered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, Paused):
            self.finish(error.state, error.reason)
        elif isinstance(error, KeyboardInterrupt):
            self.finish("paused", "interrupted")
        elif isinstance(error, SystemExit) and error.code in (0, None):
            self.finish()
        elif isinstance(error, TrackedError) and not self._looping and self._attempt.before:
            self.finish(*self._attempt.before)  # a resume that cannot begin changes nothing
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> int:
        """Finish as failed, with the traceback as an artifact."""
        text = redact_text("".join(traceback.format_exception(error)))
        try:
            self.log_text(text, "traceback.txt")
        except SpoolError as spool_error:
            self.progress.warn(str(spool_error))
        return self.finish("failed", redact_text(f"{type(error).__name__}: {error}")[:500])

    # -- between two steps

    def _length(self, epochs: int | None, max_steps: int | None) -> tuple[int | None, int | None]:
        """How long to go on: the settings (the command line) go before what the code says."""
        if self.settings.epochs is not None or self.settings.max_steps is not None:
            epochs, max_steps = self.settings.epochs, self.settings.max_steps
        if epochs is None and max_steps is None:
            raise UsageError(
                "it is not said how long to train", expected="epochs or steps", try_next="--epochs 10"
            )
        return epochs, max_steps

    def _begin(self, data: dict[str, int]) -> None:
        if self._looping:
            raise UsageError("this run has had its loop", expected="one batches() or steps() loop in a run")
        if self.settings.patience is not None and self.settings.monitor is None:
            raise UsageError(
                f"patience is {self.settings.patience}, and no metric is monitored",
                expected="the name of a metric that is logged",
                try_next="--monitor val/loss, or monitor=… in a script",
            )
        self._data = data
        self._step_seeds = seeds(derive(self.settings.seed, "step"), self.step + 1)
        if self.settings.deterministic:
            make_deterministic()
        if is_new := self.attempt == 1 or self._restored is None:
            loop = {**asdict(self.settings), **self._facts}
            self._pipe.append("params", {f"loop.{name}": _as_text(value) for name, value in loop.items()})
            if self._inputs and self.presents:
                self._pipe.append("inputs", merged([described(*each) for each in self._inputs]))
        self._inputs = []
        if self._restored is None:
            seed_generators(derive(self.settings.seed, "loop"))
            source = self._source.probe() if self._source is not None else None
            if self.state or source is not None:
                check_loadable({"state": self.state, "source": source})
        else:
            self._check_data(self._restored, data)
            if self._source is not None:
                self._source.restore(self._restored.get("source"))
                self._place = self._source.state
            self._compare_environment(self._restored)
            restore_determinism(self._restored["determinism"])
            restore_generators(self._restored["generators"])
            self._generators = self._restored["generators"]
            if self.overfitting.said:
                self.record({OVERFITTING: self.overfitting.said})  # which a run forked from there has not
            self.stopping.ask_again()
            self._heed_verdict()  # it may have been killed between the last step and its end
            self._restored = None  # as large as the model and the optimizer
            if self._attempt.restored is not None:
                self._attempt.restored = {"step": self.step}
        if is_new:
            # Also of a fork, which can then be resumed without the other run.
            self._take_checkpoint(wait=True)
        self._looping = True
        self._began = time.monotonic(), self._samples_done()
        if self._source is not None and not self._source.is_exact:
            self.progress.warn(
                "the data cannot say where it stands: a resume reads it again from the beginning of the epoch, "
                "and what it then gives may differ\n  to be exact: state_dict() and load_state_dict() on the "
                "IterableDataset or the sampler"
            )
            self.set_tags({EXACT: "false"})
        self.set_tags({SETTINGS: json.dumps(asdict(self.settings)), **self._recorded})
        self._improved = False
        self._plan_next()

    def _settle(self) -> bool:
        """Do what is due between two steps; whether the training is over."""
        self._attention = False  # first: what happens from here on is for the next step
        if epoch_ended := self.step == self._epoch_end:
            self.epochs_done += 1
            self._epoch_start, self._epoch_end = self.step, self.step + self._steps_in_epoch
        leave = self._leave  # may be set at any moment: what leaves has been saved
        if leave is not None and leave[0] == "superseded":
            raise self._taken()
        ends = self._is_complete or leave is not None
        if ends and self.settings.patience is not None and self.stopping.judged_step < 0:
            logged = ", ".join(sorted(self.latest())) or "nothing"
            self.progress.warn(
                f"patience waited for {self.settings.monitor!r}, which was never logged: there is {logged}"
            )
        if ends and self._points.must_be_finite:
            self._pipe.flush()  # reads what is still on the device
        if self._points.not_finite is not None:
            raise not_finite(*self._points.not_finite)
        due = self._due.is_due(step=self.step, epoch=self.epochs_done, epoch_ended=epoch_ended)
        if due or ends or self._improved or self._wants_checkpoint:
            self._due.happened()
            self._take_checkpoint(pinned=self._improved, wait=ends)
        self._improved = False
        self._plan_next()
        if leave is not None and not self._is_complete:  # with its last step made, there is nothing to pause
            raise Paused(*leave)
        return ends

    @property
    def _batch(self) -> int:
        """How many batches of the epoch are done, after this step."""
        return (self.step - self._epoch_start) * self._accumulate

    def _samples_done(self) -> int | None:
        if not isinstance(self._source, Batches) or self._source.length is None:
            return None
        size = self._source.batch_size
        in_epoch = min(self._source.samples, self._source.length * size)
        return self.epochs_done * in_epoch + min(self._batch * size, in_epoch)

    def _ask_for_attention(self) -> None:
        """Have `_settle` called when this step ends; from any thread, after the reason is in place."""
        self._attention = True
        self._next_due = 0.0

    def _plan_next(self) -> None:
        last = math.inf if self.total_steps is None else self.total_steps
        self._next_due = min(self._due.next_step(self.step), self._epoch_end, last)
        if self._attention:  # asked for meanwhile, and overwritten
            self._next_due = 0.0

    def _taken(self) -> RunTaken:
        return RunTaken(
            f"run {self.id} has been taken over by another process",
            expected="one process for a run",
            try_next=f"python -m tracked.run show {self.id}",
        )

    def _take_checkpoint(self, *, pinned: bool = False, wait: bool = False) -> None:
        """Copy the state; everything else happens beside the training."""
        manifest = {
            "step": self.step,
            "epoch": self.epochs_done,
            "handle": self.handle,
            "attempt": self.attempt,
            "value": self.stopping.best if self.stopping.best_step == self.step else None,
            "metrics": self._points.latest(),
            "points": self._points.counts(),
            "environment": self._environment(),
        }
        taken = self._pipe.take_checkpoint(self._compose(), manifest, pinned=pinned, wait=wait)
        self._wants_checkpoint = not taken
        if taken:
            self._taken_at = self.step
        else:
            self._ask_for_attention()

    def _compose(self) -> dict[str, Any]:
        points = self._points.state_dict()
        self._generators = generator_states()
        return {
            "format": 1,
            "step": self.step,
            "epoch": self.epochs_done,
            "batch": self._batch,
            "loss": points["last"].get("train/loss", (0, None))[1],
            **self._parts.capture(),
            "generators": self._generators,
            "determinism": determinism(),
            "environment": self._environment(),
            "points": points,
            "state": self.state,
            "source": self._place,
            "stopping": self.stopping.state_dict(),
            "overfitting": self.overfitting.state_dict(),
            "checkpoints": self._kept(),
            "data": self._data,
            "params": self._attempt.params,
            "settings": asdict(self.settings),
            "about": self._attempt.about,
        }

    def _kept(self) -> list[dict[str, Any]]:
        """Step and value of the checkpoints to keep, before the one that is being taken."""
        kept = [{key: each[key] for key in ("step", "value")} for each in self._pipe.retention.entries]
        best = {"step": self.stopping.best_step, "value": self.stopping.best}
        # The best one may be on its way to the disk still.
        was_taken = self.settings.keep_best > 0 and 0 < self.stopping.best_step < self.step
        return [*kept, best] if was_taken and best not in kept else kept

    def _environment(self) -> dict[str, str]:
        return environment(self._parts.device())

    def _continue(self, state: dict[str, Any]) -> None:
        self.step, self.epochs_done = state["step"], state["epoch"]
        self._taken_at = self.step
        self._epoch_start, self._accumulate = self.step - state["batch"], 1  # until the loop says how many
        self.state = dict(state["state"])
        self.stopping.load_state_dict(state["stopping"])
        self.overfitting.load_state_dict(state.get("overfitting", {}))
        resumed_at = {*state["about"].get("resumed_at", []), self.step}
        self._attempt.about = {**state["about"], "resumed_at": sorted(resumed_at)}
        self._points.load_state_dict(state["points"])
        value = self.stopping.best if self.stopping.best_step == self.step else None
        self._pipe.retention.entries = [*state["checkpoints"], {"step": self.step, "value": value}]

    def _check_data(self, state: dict[str, Any], data: dict[str, int]) -> None:
        """Mid-epoch, the place in the data is a number of batches of a certain size."""
        changed = differences(state["data"], data)
        if state["batch"] and changed:
            raise UsageError(
                f"the checkpoint lies inside an epoch, and the data has changed: {'; '.join(changed)}",
                expected="the same data set, batch size and accumulation until the epoch is over",
                try_next="the recorded values, or a new run with `train`",
            )

    def _compare_environment(self, state: dict[str, Any]) -> None:
        changed = differences(state["environment"], self._environment())
        if changed:
            self.progress.warn(
                f"this machine differs from the one that wrote the checkpoint ({'; '.join(changed)}): "
                "the order of the samples is the same, the bits of the results may not be"
            )
            self.set_tags({EXACT: "false"})

    # -- beside the training

    def _monitored(self, first_sample: int) -> Monitor | None:
        try:
            monitor = Monitor(first_sample)
        except ImportError:
            self.progress.warn(f"no system metrics are logged: psutil is missing\n  try: {INSTALL}")
            return None
        except UsageError:
            self._attempt.lock.release()
            raise
        if monitor.unseen:
            self.progress.warn(f"no metrics of the GPU are logged: {monitor.unseen}")
        return monitor

    def _beside(self, said: Mapping[str, Any]) -> None:
        """Take note of what the sender says and of how the machine does, and show how far it is."""
        if said.get("superseded"):
            self._leave = ("superseded", "another process has taken the run over")
            self._ask_for_attention()
        elif (command := said.get("command")) in ("pause", "stop"):
            self.request_leave("paused" if command == "pause" else "stopped", f"asked to {command}")
        if self._due.is_late() or self._points.not_finite is not None:
            self._ask_for_attention()
        self.progress.update(self)
        if (monitor := self._monitor) is not None:
            self._pipe.add_points(monitor.take())

    def counts(self) -> dict[str, int]:
        """How many points each metric has had, in all attempts."""
        return self._points.counts()

    def latest(self) -> dict[str, float]:
        """The last value of each metric."""
        return self._points.latest()

    def pending(self) -> int:
        """Points that were logged and are not on the server yet."""
        return self._pipe.pending()

    def trouble(self) -> str:
        """Why nothing is being delivered at the moment; empty if it is."""
        return str(self._attempt.said().get("trouble", ""))


def _as_text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def host_and_process() -> str:
    """Who holds a run, for people: host, process, boot."""
    return f"{host_name()} (process {os.getpid()}, boot {boot_id()[:8]})"
