"""One training, fresh or resumed: from a request to a run that is over."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from tracked import experiment as experiments
from tracked import loop, params, provenance
from tracked.attempts import Asking, begin, drain, fetch_best, rehearse, take_over, watch
from tracked.checkpoint import load
from tracked.deferred_compiler import defer_compiler
from tracked.errors import CheckpointError, UsageError
from tracked.experiment import Experiment, Task
from tracked.forking import Origin, find_origin
from tracked.modelling import log_model
from tracked.names import (
    EXACT,
    EXPERIMENT_FILE,
    FILE,
    FORKED_FROM,
    MANIFEST,
    ORIGIN,
    OVERRIDE,
    RUN_KEY,
    SETTINGS,
    STATE,
    SWEEP,
    folder_name,
)
from tracked.pipe import Attempt, Progress, shown_params
from tracked.place import Place
from tracked.resumption import pointer_in
from tracked.schedule import Settings
from tracked.seeding import derive, seed_generators
from tracked.spool import read_json
from tracked.tracking import Paused, Run

if TYPE_CHECKING:
    from tracked.server import RunView

_UNSEEN_BY_VALUES = frozenset(
    {
        *("epochs", "max_steps", "checkpoint_every", "keep_last", "keep_best", "patience", "min_delta"),
        *("device", "log_model", "register", "system_metrics"),
    }
)
_CHECK_STEPS = 3
_LONGEST_TAG = 5000  # MLflow 2 cuts at 5000 characters, MLflow 3 at 8000
BOOKKEEPING = frozenset({"checkpoints", "settings", "about"})
"""Entries of a checkpoint that do not take part in the training."""


class NothingLeft(Exception):
    """A resume that has nothing to do."""

    def __init__(self, view: RunView, reason: str) -> None:
        super().__init__(reason)
        self.view = view


class IsSweep(Exception):
    """A run that was to be resumed is the parent of a sweep, which the caller can go on with."""

    def __init__(self, view: RunView) -> None:
        super().__init__(view.run_id)
        self.view = view


@dataclass
class Request:
    """What a user asked for, apart from the experiment's own params."""

    place: Place
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    experiment_name: str | None = None
    run_name: str | None = None
    run_key: str | None = None
    config: Path | None = None
    file: Path | None = None
    log_diff: bool = False
    progress: Progress = field(default_factory=Progress)
    drain_timeout: float = 60.0
    run: Run | None = field(default=None, init=False)
    """The run, once there is one: also who meets an exception can say how it stands."""


# -- experiment files


def train(path: Path, request: Request) -> Run:
    """Train an experiment file as a new run, to its end; with a run key, go on with that key's run.

    Raises:
        NothingLeft: The run of the key is complete, or was stopped.
        TrackedError: As its text says; what the user's own code raises comes through as it is.
    """
    defer_compiler()
    experiment = experiments.load(path)
    values = experiment.make_params(request.overrides, request.config)
    if request.run_key and (view := _run_of_key(request)):
        state = view.tags.get(STATE)
        if state == "stopped":
            raise NothingLeft(
                view, f"run {view.run_id} of key {request.run_key!r} is {state}: nothing is left to do"
            )
        if pointer_in(view.tags) is not None:
            _check_same_line(request, view, path, values)
            request.file, request.overrides = path, []
            return resume(view.run_id, request)
        # Ended before its first checkpoint was on the server: there is nothing to resume, now or ever.
        _wait_for_its_end(request, view)
    settings = Settings(**request.settings)
    loop.choose_device(settings.device)
    about = experiments.describe(experiment)
    attempt = begin(
        request.place,
        experiment=request.experiment_name or experiment.path.stem,
        name=request.run_name,
        tags={**file_tags(about), **({RUN_KEY: request.run_key} if request.run_key else {})},
        params=params.flatten(values),
    )
    attempt.about = about
    run = request.run = Run(attempt, settings, progress=request.progress, drain_timeout=request.drain_timeout)
    request.progress.say(_named(run))
    with until_over(run):
        run.log_artifact(experiment.path, "source")
        if request.log_diff:
            _log_diff(experiment.path.parent, run)
        carry_out(experiment, values, run)
    return run


def _log_diff(folder: Path, run: Run) -> None:
    if text := provenance.diff(folder):
        run.log_text(text, "source/diff.patch")
    else:
        run.progress.say("no diff to log: no file that git tracks differs from the last commit")


def _named(run: Run) -> str:
    return f"run {run.id} (local handle)" if run.id == run.handle else f"run {run.id}"


def file_tags(about: Mapping[str, Any]) -> dict[str, str]:
    """Where a run of this experiment file comes from."""
    return {
        **provenance.mlflow_tags(provenance.collect()),
        "mlflow.source.name": about["path"],
        EXPERIMENT_FILE: json.dumps(about),
    }


def _wait_for_its_end(request: Request, view: RunView) -> None:
    """Make sure that nobody trains a run that cannot be resumed.

    Raises:
        RunTaken: Somebody does.
    """
    from tracked.server import Server

    server = Server(request.place.tracking_uri, create=False)
    Asking(request.progress.say, math.inf)(lambda: watch(server, view.run_id, request.progress.say))
    request.progress.say(f"run {view.run_id} of the key ended before its first checkpoint; a new one begins")


def _run_of_key(request: Request) -> RunView | None:
    """The newest run of the request's key. Waits for the server: a second run would be worse than a delay."""
    from tracked.server import Server, quoted

    assert request.run_key is not None
    for run in request.place.outbox().runs():
        # A run that has not reached the server yet is known here alone.
        if run.journals() and read_json(run.lock).get("key") == request.run_key:
            drain(request.place, [run], request.progress.say)
    server = Server(request.place.tracking_uri, create=False)
    if (key := quoted(request.run_key)) is None:
        raise UsageError(f"the run key {request.run_key!r} has both kinds of quotes", expected="one, or none")
    ask = Asking(request.progress.say, math.inf)
    found = ask(lambda: server.search(filter=f"tags.`{RUN_KEY}` = {key}", limit=1))
    return found[0] if found else None


def default_run_key(line: Sequence[str]) -> str | None:
    """The key of a Slurm array's task or of an indexed Kubernetes job: the same when it is started again.

    Args:
        line: The command line, because a job may train several times.
    """
    environment = os.environ
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"slurm-{environment['SLURM_ARRAY_JOB_ID']}-{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    elif "JOB_COMPLETION_INDEX" in environment and "JOB_NAME" in environment:
        job = f"job-{environment['JOB_NAME']}-{environment['JOB_COMPLETION_INDEX']}"
    else:
        return None
    return f"{job}-{derive(*line):016x}"


def _check_same_line(request: Request, view: RunView, path: Path, values: Any) -> None:
    """A key stands for one training: another file, or other params, would be another one.

    Raises:
        UsageError: They differ from what the key's run was started with.
    """
    asked = shown_params(params.flatten(values))
    recorded = {name: view.params.get(name, "(none)") for name in asked}
    differing = [
        f"{name}={recorded[name]}, not {asked[name]}" for name in asked if asked[name] != recorded[name]
    ]
    file = json.loads(view.tags.get(EXPERIMENT_FILE, "{}")).get("path", path.name)
    if Path(file).name != path.name:
        differing.insert(0, f"{file}, not {path}")
    if differing:
        raise UsageError(
            f"the key {request.run_key!r} is that of run {view.run_id}, which trains {'; '.join(differing[:5])}",
            expected="the same line for the same key",
            try_next=f"another --run-key, or: python -m tracked.run resume {view.run_id} NAME=VALUE",
        )


def resume(word: str, request: Request) -> Run:
    """Go on with a run from its last checkpoint, to its end.

    Raises:
        NothingLeft: It is complete.
        IsSweep: It is the parent of a sweep.
        TrackedError: As its text says; what the user's own code raises comes through as it is.
    """
    defer_compiler()
    found: list[tuple[Experiment, list[str]]] = []

    def prepare(view: RunView) -> None:
        """What can fail without the run is tried before it is claimed."""
        if SWEEP in view.tags:
            raise IsSweep(view)
        if not request.overrides:
            _check_work_left(view, request.settings)
        found.append(_experiment_of(view, request, "resume", view.run_id))
        _check_work_left(view, request.settings)

    attempt, view = take_over(request.place, word, request.progress.say, before_claim=prepare)
    try:
        experiment, warnings = found[0]
        for warning in warnings:
            request.progress.warn(warning)
        assert attempt.restored is not None
        new, settings, override, standing = _continued(experiment, request, attempt.restored, view)
        _refuse_beyond(attempt, override, standing, _fork_line(attempt, word, *_typed(request)))
        if settings.patience is not None or settings.logs_model:
            fetch_best(request.place, view, attempt, request.progress.say)
    except BaseException:
        attempt.lock.release()
        raise
    attempt.params, attempt.overridden = params.flatten(new), bool(override["params"])
    run = request.run = Run(attempt, settings, progress=request.progress, drain_timeout=request.drain_timeout)
    run.progress.say(f"run {run.id} goes on from step {run.step}, in epoch {run.epoch}  {run.url}".rstrip())
    if changes := _changed(override):
        run.progress.say(f"with {', '.join(f'{name}={_shown(pair)}' for name, pair in changes.items())}")
    if _changed(override) or _changed(standing):
        run.record({OVERRIDE: json.dumps(override)})
    with until_over(run):
        carry_out(experiment, new, run)
    return run


def fork(word: str, request: Request, *, step: int | None = None) -> Run:
    """Train a new run that goes on from a checkpoint of another, with its history up to there, to its end.

    Args:
        word: ID, unique prefix of an ID, local handle, name, or `last`.
        request: What is to be otherwise than in that run.
        step: Of a committed checkpoint; the last one by default.

    Raises:
        TrackedError: As its text says; what the user's own code raises comes through as it is.
    """
    defer_compiler()
    found: list[tuple[Experiment, list[str]]] = []

    def prepare(view: RunView) -> None:
        line = ["fork", view.run_id, *([] if step is None else ["--step", str(step)])]
        found.append(_experiment_of(view, request, *line))
        _check_fork_has_work(view, step, request.settings)

    origin = find_origin(request.place, word, request.progress.say, step=step, before=prepare)
    experiment, warnings = found[0]
    for warning in warnings:
        request.progress.warn(warning)
    new, settings, override, _ = _continued(experiment, request, origin.state, origin.view)
    loop.choose_device(settings.device)
    # Also what the code raises on building is met before there is a run.
    if (task := _build(experiment, new, settings)) is not None:
        loop.check_fits(task, origin.state)
    about = experiments.describe(experiment)
    attempt = _begin_fork(
        origin,
        override,
        request.place,
        experiment=request.experiment_name or origin.experiment,
        name=request.run_name,
        tags=file_tags(about),
        params=params.flatten(new),
        about=about,
    )
    run = request.run = Run(attempt, settings, progress=request.progress, drain_timeout=request.drain_timeout)
    request.progress.say(f"{_named(run)} is forked from run {_origin_text(origin, override)}")
    with until_over(run):
        run.log_artifact(experiment.path, "source")
        _log_best(run, attempt)
        carry_out(experiment, new, run, task)
    return run


def _check_fork_has_work(view: RunView, step: int | None, asked: Mapping[str, Any]) -> None:
    if step not in (None, (pointer_in(view.tags) or {}).get("step")):
        return
    try:
        _check_work_left(view, asked)
    except NothingLeft as nothing:
        raise UsageError(
            str(nothing),
            expected="an earlier checkpoint, with --step N, or a longer training",
            try_next=f"python -m tracked.run show {view.run_id}   (for the checkpoints that there are)",
        ) from None


def _begin_fork(
    origin: Origin,
    override: Mapping[str, Any],
    place: Place,
    *,
    experiment: str,
    name: str | None,
    tags: Mapping[str, str],
    params: dict[str, Any],
    about: Mapping[str, Any],
) -> Attempt:
    """The first attempt at a new run that goes on where another stood, with what `override` changes there."""
    state, view = origin.state, origin.view
    links = {
        ORIGIN: _origin_text(origin, override),
        FORKED_FROM: json.dumps({"run_id": view.run_id, **override}),
        **({EXACT: view.tags[EXACT]} if EXACT in view.tags else {}),
    }
    attempt = begin(place, experiment=experiment, name=name, tags={**tags, **links}, params=params)
    attempt.start["forked_from"] = {"run_id": view.run_id, "step": state["step"]}
    attempt.restored = {**state, "about": {**about, "resumed_at": state["about"].get("resumed_at", [])}}
    attempt.history = origin.history
    origin.bring_best(attempt.folder)
    attempt.overridden = bool(override["params"])
    return attempt


def _log_best(run: Run, attempt: Attempt) -> None:
    """Have the best checkpoint of before the fork uploaded as one of the new run's own."""
    for folder in sorted(attempt.folder.checkpoints.glob("step-*")):
        for name in (FILE, MANIFEST):
            run.log_artifact(folder / name, f"checkpoints/{folder.name}")


def _origin_text(origin: Origin, override: Mapping[str, Any]) -> str:
    changes = ", ".join(f"{name}={_shown(pair)}" for name, pair in _changed(override).items())
    text = f"{origin.view.run_id} at step {origin.state['step']}" + (f", with {changes}" if changes else "")
    return text[:_LONGEST_TAG]


def _experiment_of(view: RunView, request: Request, *line: str) -> tuple[Experiment, list[str]]:
    """The run's experiment file, found in the working tree and loaded, and warnings to show.

    Args:
        line: The command that is carried out, for the text of an error.

    Raises:
        UsageError: It is not found, cannot be loaded, or does not have the overridden params.
    """
    recorded = json.loads(view.tags.get(EXPERIMENT_FILE, "{}"))
    if not recorded and request.file is None:
        script = Path(view.tags.get("mlflow.source.name") or "SCRIPT.py").name
        raise UsageError(
            f"run {view.run_id} was made by a script, not by an experiment file",
            expected="the script behind `--`",
            try_next=f"python -m tracked.run {shlex.join(line)} -- python {script}",
        )
    path, warnings = experiments.locate(
        recorded, file=request.file, cwd=Path.cwd(), run_id=view.run_id, line=line
    )
    experiment = experiments.load(path)
    params.parse(experiment.params_class, request.overrides)
    return experiment, warnings


def _continued(
    experiment: Experiment, request: Request, state: Mapping[str, Any], view: RunView
) -> tuple[Any, Settings, dict[str, Any], dict[str, Any]]:
    """What a training goes on with from the checkpoint `state`, and what that changes.

    Returns:
        The params, the settings, the override that they are, and the one that stands already.
    """
    standing = _standing_override(view, state["step"])
    known = _new_values(standing)
    asked = params.parse(experiment.params_class, request.overrides)
    old = params.build(experiment.params_class, state["params"])
    new = params.replace(old, {**known["params"], **asked})
    settings, changed = _changed_settings(state, view, {**known["settings"], **request.settings})
    differing = params.differences(params.flatten(old), params.flatten(new))
    return new, settings, _override(state["step"], differing, changed), standing


def _continued_script(
    given: Any, settings: Mapping[str, Any], state: Mapping[str, Any], view: RunView
) -> tuple[dict[str, Any], Settings, dict[str, Any], dict[str, Any]]:
    """As `_continued`, for a script: `given` are all of its params, or None for the recorded ones."""
    standing = _standing_override(view, state["step"])
    known = _new_values(standing)
    asked = {name: value for name, value in settings.items() if name != "seed"}
    chosen, changed = _changed_settings(state, view, {**known["settings"], **asked})
    present = {**state["params"], **known["params"]} if given is None else _flat(given)
    override = _override(state["step"], _differences(state["params"], present), changed)
    return present, chosen, override, standing


def _override(
    step: int, changed_params: Mapping[str, Any], changed_settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the run's tag says of an override: its step, and name -> [recorded, new], without secrets."""
    texts = {name: json.dumps(pair, default=str) for name, pair in changed_params.items()}
    shown = provenance.redact_values(texts)
    override = {
        "step": step,
        "params": {
            name: json.loads(text) if shown[name] == text else shown[name] for name, text in texts.items()
        },
        "settings": json.loads(json.dumps(changed_settings)),  # as a resume will read it back from the tag
    }
    while len(json.dumps(override)) > _LONGEST_TAG:
        longest = max(texts, key=lambda name: len(texts[name]))
        del texts[longest]
        override["params"][longest] = "(too long)"
    return override


def _changed(override: Mapping[str, Any]) -> dict[str, Any]:
    return {**override["params"], **override["settings"]}


def _standing_override(view: RunView, step: int) -> dict[str, Any]:
    """The override with which the run goes on from the checkpoint of `step`, as the tag has it.

    An attempt that was killed before its first own checkpoint has logged points with it.
    """
    tag = from_tag(view, OVERRIDE)
    if tag.get("step") != step:
        tag = {}
    return {
        kind: value if isinstance(value := tag.get(kind), dict) else {} for kind in ("params", "settings")
    }


def from_tag(view: RunView, name: str) -> dict[str, Any]:
    """The object that stands in a tag; empty if there is none, or if somebody has changed it."""
    try:
        value = json.loads(view.tags.get(name, "{}"))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _new_values(override: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The second of each pair; a secret, or what is too long for a tag, is not told."""
    return {
        kind: {name: pair[1] for name, pair in override[kind].items() if isinstance(pair, list)}
        for kind in ("params", "settings")
    }


def _shown(pair: Any) -> str:
    return f"{pair[1]} (was {pair[0]})" if isinstance(pair, list) else str(pair)


def _build(experiment: Experiment, values: Any, settings: Settings) -> Task | None:
    """What the thin loop is to train; None where the experiment has a loop of its own."""
    if settings.deterministic:
        # cuBLAS reads it when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    seed_generators(derive(settings.seed, "build"))
    return None if experiment.main is not None else experiment.task(values)


def carry_out(experiment: Experiment, values: Any, run: Run, task: Task | None = None) -> None:
    """Train what the file says with these params, in a run that is open; `task` if it is built already."""
    task = task or _build(experiment, values, run.settings)
    if task is not None:
        loop.fit(task, run)
        if run.settings.logs_model and not run.stopping.is_pruned:
            log_model(task, experiment, run)
    elif experiment.main is not None:
        experiment.main(run, values)


def _check_work_left(view: RunView, asked: Mapping[str, Any]) -> None:
    state = view.tags.get(STATE)
    if state not in ("finished", "stopped_early"):
        return
    recorded = from_tag(view, SETTINGS)
    longer = any(asked.get(name, 0) > (recorded.get(name) or 0) for name in ("epochs", "max_steps"))
    if state == "stopped_early":
        longer = asked.get("patience", 0) > (recorded.get("patience") or 0)
    if not longer:
        pointer = pointer_in(view.tags)
        step = f" at step {pointer['step']}" if pointer else ""
        more = (
            "--patience with a larger number" if state == "stopped_early" else "--epochs with a larger number"
        )
        raise NothingLeft(
            view, f"run {view.run_id} is {state}{step}: nothing is left to do (to go on: {more})"
        )


def _changed_settings(
    state: Mapping[str, Any], view: RunView, asked: Mapping[str, Any]
) -> tuple[Settings, dict[str, Any]]:
    """The recorded settings with what was asked for, and those changes that have a say in values."""
    # How far to go is said by the newest attempt, which may have been killed before its first checkpoint.
    said = {name: value for name, value in from_tag(view, SETTINGS).items() if name in _UNSEEN_BY_VALUES}
    recorded = Settings.from_json({**state["settings"], **said})
    if "seed" in asked and asked["seed"] != recorded.seed:
        raise UsageError(
            f"--seed {asked['seed']} was asked for, and the run was trained with seed {recorded.seed}",
            expected="no --seed: the order of the samples depends on it",
        )
    settings = replace(recorded, **asked)
    changed = {
        name: [getattr(recorded, name), getattr(settings, name)]
        for name in asked
        if name not in _UNSEEN_BY_VALUES and getattr(recorded, name) != getattr(settings, name)
    }
    return settings, changed


def _differing(override: Mapping[str, Any], standing: Mapping[str, Any]) -> set[str]:
    """What would not be as it was when the points beyond the checkpoint were logged."""
    asked, known = _new_values(override), _new_values(standing)
    differing = {
        name
        for kind in asked
        for name in asked[kind].keys() | known[kind].keys()
        # A value may be None, which is not the same as none.
        if name not in asked[kind] or name not in known[kind] or asked[kind][name] != known[kind][name]
    }
    # Of a value that is not told nobody can say whether it is the same; the recomputed points will.
    untold = {name for name, pair in override["params"].items() if not isinstance(pair, list)}
    unasked = {name for name, pair in standing["params"].items() if not isinstance(pair, list)} - untold
    return differing | untold.difference(standing["params"]) | unasked


def _refuse_beyond(
    attempt: Attempt, override: Mapping[str, Any], standing: Mapping[str, Any], line: str
) -> None:
    """Refuse what would make another curve of points that stand; `line` makes a run of its own of it."""
    changes = _differing(override, standing)
    if attempt.replay and changes:
        furthest = max(step for points in attempt.replay.values() for step in points)
        assert attempt.restored is not None
        step = attempt.restored["step"]
        raise UsageError(
            f"{', '.join(sorted(changes))} cannot be changed here: points up to step {furthest} stand beyond "
            f"the checkpoint of step {step}, and would no longer be what the run computes",
            expected="a checkpoint at the end of the curve (a run that was paused, stopped or finished)",
            try_next=line,
        )


def _fork_line(attempt: Attempt, word: str, *typed: str) -> str:
    """The command for a new run that goes on where `attempt` would, with what was typed."""
    assert attempt.restored is not None
    words = ["fork", word, "--step", str(attempt.restored["step"]), *typed]
    return provenance.redact_text(f"python -m tracked.run {shlex.join(words)}")


def _typed(request: Request) -> list[str]:
    """The overrides and settings of a request, as they are typed."""
    words = [*request.overrides]
    for name, value in request.settings.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, bool):
                words.append(option if each else f"--no-{option[2:]}")
            else:
                words += [option, str(each)]
    return words if request.file is None else [*words, "--file", str(request.file)]


@contextlib.contextmanager
def until_over(run: Run) -> Iterator[None]:
    """Run the body with signals listened to, and end the run as the body ended."""
    try:
        with leaving_on_signals(run), run:
            yield
    except Paused:
        pass  # finished as paused or stopped; the caller reads the run's state


@contextlib.contextmanager
def leaving_on_signals(run: Run) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 checkpoint at the next step and leave; a second SIGINT leaves at once.

    Once the training is over, any of them ends the wait for the delivery.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        if run.is_over:
            run.leave_at_once()
            return
        if number == signal.SIGINT and run.should_stop:
            run.leave_at_once()
            signal.default_int_handler(number, frame)
        name = signal.Signals(number).name
        run.request_leave("paused", name)
        # A handler must not use the bar's lock, which the interrupted code may hold.
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended what reads our words
            os.write(2, f"\n{name}: a checkpoint is taken after this step, then the run is paused\n".encode())

    before = {each: signal.signal(each, leave) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- scripts and notebooks

_open_run: Run | None = None


def start(
    experiment_name: str,
    params: Any = None,
    *,
    run_name: str | None = None,
    tracking_uri: str | None = None,
    spool_dir: str | Path | None = None,
    drain_timeout: float = 60.0,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """A run for a script or notebook: `with tracked.start("digits", params) as run:`.

    Under `TRACKED_RESUME` (set by `python -m tracked.run resume RUN -- COMMAND`) it is that run,
    resumed; under `TRACKED_FORK` (set by `fork RUN -- COMMAND`) a new run that goes on from that one's
    checkpoint. Nothing global is changed; `run.batches` and `run.steps` seed.

    Args:
        experiment_name: MLflow's experiment, made if missing.
        params: Hyperparameters, as a dataclass or a mapping.
        run_name: The run's name in MLflow.
        tracking_uri: Else `MLFLOW_TRACKING_URI`, else `sqlite:///mlruns/mlflow.db`.
        spool_dir: Else `TRACKED_SPOOL`, else `mlruns/spool`.
        drain_timeout: Seconds that `finish` waits for the delivery of the last points.
        progress: Whether to show a bar where there is a terminal.
        settings: The loop's, as in `train`'s options: `seed`, `checkpoint_every`, `patience`, …

    Raises:
        TrackedError: A setting that cannot work, a spool that cannot be written.
    """
    if word := os.environ.get("TRACKED_RESUME"):
        return resume_run(
            word,
            params,
            tracking_uri=tracking_uri,
            spool_dir=spool_dir,
            drain_timeout=drain_timeout,
            progress=progress,
            **settings,
        )
    if origin := os.environ.get("TRACKED_FORK"):
        return _fork_run(
            *_run_and_step(origin),
            Place.choose(tracking_uri, spool_dir),
            experiment_name,
            params,
            settings,
            run_name=run_name,
            drain_timeout=drain_timeout,
            progress=progress,
        )
    chosen = _settings(settings)
    attempt = begin(
        Place.choose(tracking_uri, spool_dir),
        experiment=experiment_name,
        name=run_name,
        tags=provenance.mlflow_tags(provenance.collect()),
        params=_flat(params),
    )
    return _opened(attempt, chosen, drain_timeout=drain_timeout, progress=progress)


def resume_run(
    run_id: str,
    params: Any = None,
    *,
    tracking_uri: str | None = None,
    spool_dir: str | Path | None = None,
    drain_timeout: float = 60.0,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Go on with a run in a script or notebook: `with tracked.resume(run_id) as run:`.

    Args:
        run_id: ID, unique prefix, local handle, or `last`.
        params: What the script trains with now; what differs from the recorded is told, tagged, and applied
            to the optimizers and schedulers that it attaches.
        tracking_uri: As in `start`, like the arguments after it.
        spool_dir: As in `start`.
        drain_timeout: As in `start`.
        progress: As in `start`.
        settings: What is to be changed; the others are as recorded.

    Raises:
        TrackedError: See `attempts.take_over`.
    """
    shown = _progress(progress)
    place = Place.choose(tracking_uri, spool_dir)
    attempt, view = take_over(place, run_id, shown.say)
    try:
        assert attempt.restored is not None
        present, chosen, override, standing = _continued_script(params, settings, attempt.restored, view)
        script = Path(view.tags.get("mlflow.source.name") or "SCRIPT.py").name
        _refuse_beyond(attempt, override, standing, _fork_line(attempt, run_id, "--", "python", script))
        if chosen.patience is not None:
            fetch_best(place, view, attempt, shown.say)
        attempt.params, attempt.overridden = present, bool(override["params"])
    except BaseException:
        attempt.lock.release()
        raise
    run = _opened(attempt, chosen, drain_timeout=drain_timeout, progress=progress)
    if changes := _changed(override):
        run.progress.warn(f"recorded and present values differ, the present ones hold: {', '.join(changes)}")
    if changes or _changed(standing):
        run.record({OVERRIDE: json.dumps(override)})
    return run


def _run_and_step(text: str) -> tuple[str, int | None]:
    """What `TRACKED_FORK` names: RUN@STEP, or RUN@ for the last checkpoint; a run's name may hold an @ itself."""
    word, _, step = text.rpartition("@")
    if not word or not (step.isdecimal() or not step):
        raise UsageError(
            f"TRACKED_FORK is {text!r}",
            expected="RUN@STEP, or RUN@ for its last checkpoint",
            try_next=f"python -m tracked.run fork {text} -- COMMAND",
        )
    return word, int(step) if step else None


def _fork_run(
    word: str,
    step: int | None,
    place: Place,
    experiment_name: str,
    params: Any,
    settings: Mapping[str, Any],
    *,
    run_name: str | None,
    drain_timeout: float,
    progress: bool,
) -> Run:
    """As `resume_run`, in a new run."""
    shown = _progress(progress)
    origin = find_origin(place, word, shown.say, step=step)
    present, chosen, override, _ = _continued_script(params, settings, origin.state, origin.view)
    attempt = _begin_fork(
        origin,
        override,
        place,
        experiment=experiment_name,
        name=run_name,
        tags=provenance.mlflow_tags(provenance.collect()),
        params=present,
        about={},
    )
    run = _opened(attempt, chosen, drain_timeout=drain_timeout, progress=progress)
    _log_best(run, attempt)
    run.progress.say(f"{_named(run)} is forked from run {_origin_text(origin, override)}")
    return run


def fit(task: Task, experiment_name: str = "default", params: Any = None, **options: Any) -> Run:
    """Train a task in a run of its own, to its end; options as in `start`."""
    with start(experiment_name, params, **options) as run:
        loop.fit(task, run)
    return run


def _opened(attempt: Attempt, settings: Settings, *, drain_timeout: float, progress: bool) -> Run:
    global _open_run  # noqa: PLW0603 - a notebook's cell that is run again closes the run it left open
    if _open_run is not None:
        _open_run.finish("stopped", "another run was started in this process")
    run = Run(attempt, settings, progress=_progress(progress), drain_timeout=drain_timeout)
    _open_run = run
    return run


def _progress(show: bool) -> Progress:
    if not show:
        return Progress()
    from tracked.progress import Bar

    return Bar()


def _settings(given: Mapping[str, Any]) -> Settings:
    try:
        return Settings(**given)
    except TypeError as error:
        raise UsageError(
            f"unknown setting: {error}", expected=f"one of {', '.join(asdict(Settings()))}"
        ) from None


def _flat(values: Any) -> dict[str, Any]:
    return {} if values is None else params.flatten(values)


def _differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return params.differences(dict(recorded), dict(present))


# -- train --check


def check(path: Path, request: Request) -> tuple[int, int]:
    """Train a few steps, save, reload, train the same steps again, and compare every bit.

    Nothing is sent anywhere.

    Returns:
        Tensors and points that were compared.

    Raises:
        CheckpointError: Something differs; the first differing things are named.
    """
    experiment = experiments.load(path)
    values = experiment.make_params(request.overrides, request.config)
    steps = f"{_CHECK_STEPS} steps"
    settings = replace(
        Settings(**request.settings),
        epochs=None,
        max_steps=2 * _CHECK_STEPS,
        eval_every=steps,
        checkpoint_every=(steps,),
        keep_last=3,
        log_model=False,
        register=None,
    )
    with tempfile.TemporaryDirectory(prefix="tracked-check-") as temp:
        first = _check_run(Path(temp) / "first", experiment, values, settings, None)
        halfway = load(first / folder_name(_CHECK_STEPS) / FILE)
        second = _check_run(Path(temp) / "second", experiment, values, settings, halfway)
        straight = load(first / folder_name(2 * _CHECK_STEPS) / FILE)
        resumed = load(second / folder_name(2 * _CHECK_STEPS) / FILE)
    for each in (straight, resumed):
        for name in BOOKKEEPING:
            each.pop(name)
    compared, wrong = compare_states(straight, resumed)
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} things differ after a resume: {', '.join(wrong[:8])}",
            expected="the same bits: everything random drawn from Python's, NumPy's or torch's global generators, "
            "everything that changes attached",
            try_next="run.attach(name=part) for what is missing; --deterministic on a GPU",
        )
    return compared, sum(straight["points"]["counts"].values())


def _check_run(
    root: Path, experiment: Experiment, values: Any, settings: Settings, state: dict[str, Any] | None
) -> Path:
    attempt = rehearse(root, params.flatten(values), state)
    with Run(attempt, settings) as run:
        carry_out(experiment, values, run)
    return attempt.folder.checkpoints


def compare_states(a: Any, b: Any, where: str = "") -> tuple[int, list[str]]:
    """How many leaves two states have in common, and where they differ (bitwise, NaN equal to NaN)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.stride() == b.stride()
            and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
        )
        return 1, [] if same else [where]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        wrong = [f"{where}.{key}" for key in a.keys() ^ b.keys()]
        parts = [compare_states(a[key], b[key], f"{where}.{key}".lstrip(".")) for key in a if key in b]
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        wrong = []
        parts = [compare_states(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        # `!=` of a NaN with itself is true, and their texts are equal.
        return 1, [] if a == b or repr(a) == repr(b) else [where]
    return sum(count for count, _ in parts), wrong + [each for _, part in parts for each in part]
