"""Loads a user's experiment file, and `Task`: what its `build` returns.

A run records where its file lies. What it recorded comes back from a server, which may say anything; `locate`
lets it choose among the files of the working tree, and nothing else.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from tracked import params as flat_params
from tracked.errors import ExperimentError, UsageError
from tracked.provenance import git_root

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset


# -- what build returns ----------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True, eq=False)
class Task:
    """All that the training loop needs to know; made by the user's `build(params)`.

    A batch is what the `DataLoader` collates from the data set; without `forward` and `step` it is a pair
    `(inputs, targets)` of tensors whose first dimension is the batch: at most `batch_size` samples, since the
    last batch of an epoch may be smaller.

    Attributes:
        model: The module to train. Parameters of any floating dtype; `precision` does not change them.
        loss: `loss(outputs, targets)` → scalar tensor (shape `[]`, floating dtype), the mean over the batch.
            `outputs` is what `model(inputs)` returns. A module with parameters of its own is trained and saved
            with the model, if the optimizer holds them. None only where `step` is given.
        optimizer: Over parameters of `model`.
        train_data: A data set: `len()` and indices, or an `IterableDataset`. Not a `DataLoader`.
        val_data: A data set, or a mapping of names to data sets; None: no evaluation.
        batch_size: Samples a batch, over all ranks together.
        metrics: Name → `f(outputs, targets)` → number or scalar tensor, averaged over the evaluation with
            samples as weights; or an object with `reset()`, `update(outputs, targets)` and `compute()`, asked
            once per evaluation. Logged as `val/<name>`; of a dict that is computed, as `val/<name>/<key>` what is
            a single number.
        scheduler: A learning rate scheduler of `optimizer`, or None.
        scheduler_interval: Whether `scheduler.step()` belongs to each epoch or to each step.
        monitor: The metric that best-so-far, patience, pruners and `ReduceLROnPlateau` look at.
        mode: Whether a smaller ("min") or a larger ("max") monitored value is better.
        accumulate: Batches of one step; their mean losses are weighted by samples, as in one large batch.
        clip_norm: Largest total 2-norm of the gradients of a step, or None.
        precision: "fp32"; "bf16" (autocast to bfloat16); "fp16" (autocast to float16, gradient scaler).
        loader: Further arguments of `DataLoader`, such as `num_workers` or `collate_fn`.
        forward: `forward(model, batch)` → `(outputs, targets)`, for batches that are no such pair.
        step: `step(model, batch)` → loss, or `(loss, weight)` with the number of samples (or tokens) that the
            mean loss is over; scalar tensor of shape `[]`, floating dtype. Instead of `forward` and `loss`.
        evaluate: `evaluate(model, loader)` → dict of metric names to numbers, instead of the loop's own; a tensor
            of several numbers in it is passed over.
        unfreeze: Epoch (counted from 1) → names or patterns of what is unfrozen when it begins, as
            `finetune.unfreeze` takes them. The optimizer holds it from the start:
            `finetune.trainable(model, also=…)`.

    Raises:
        UsageError: A field whose value cannot work.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    train_data: Dataset[Any]
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    val_data: Dataset[Any] | Mapping[str, Dataset[Any]] | None = None
    batch_size: int = 32
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: Any = None
    scheduler_interval: Literal["epoch", "step"] = "epoch"
    monitor: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    loader: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    forward: Callable[[torch.nn.Module, Any], tuple[Any, Any]] | None = None
    step: Callable[[torch.nn.Module, Any], Any] | None = None
    evaluate: Callable[[torch.nn.Module, Any], Mapping[str, Any]] | None = None
    unfreeze: Mapping[int, str | Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        model, optimizer, scheduler = self.model, self.optimizer, self.scheduler
        sound = callable(model) and hasattr(model, "state_dict") and not isinstance(model, type)
        _need(sound, "model", model, "an instance of torch.nn.Module")
        sound = hasattr(optimizer, "param_groups") and not isinstance(optimizer, type)
        _need(sound, "optimizer", optimizer, "an optimizer, such as torch.optim.AdamW(model.parameters())")
        sound = scheduler is None or (hasattr(scheduler, "state_dict") and not isinstance(scheduler, type))
        _need(sound, "scheduler", scheduler, "an object with step() and state_dict(), or None")
        driven = getattr(scheduler, "optimizer", optimizer)
        _need(driven is optimizer, "scheduler", scheduler, "a scheduler of this very optimizer")
        if self.step is not None and self.metrics and self.evaluate is None:
            raise UsageError(
                "Task: metrics are given beside step, which returns no outputs to measure",
                expected="evaluate(model, loader) -> dict, or loss and forward instead of step",
            )
        if self.loss is None and self.step is None:
            raise UsageError(
                "Task: neither loss nor step is given",
                expected="loss(outputs, targets), or step(model, batch)",
            )
        for name in ("loss", "forward", "step", "evaluate"):
            function = getattr(self, name)
            _need(function is None or callable(function), name, function, "a function")
        for name in ("batch_size", "accumulate"):
            count = getattr(self, name)
            _need(type(count) is int and count >= 1, name, count, "a whole number from 1")
        norm = self.clip_norm
        sound = norm is None or (type(norm) in (int, float) and 0 < norm < math.inf)
        _need(sound, "clip_norm", norm, "a number above 0, or None")
        for name, choices in (
            ("scheduler_interval", ("epoch", "step")),
            ("mode", ("min", "max")),
            ("precision", ("fp32", "bf16", "fp16")),
        ):
            found = getattr(self, name)
            _need(found in choices, name, found, f"one of {', '.join(choices)}")
        _need_name("monitor", self.monitor)
        self._check_data()
        self._check_metrics()
        self._check_unfreeze()

    def _check_data(self) -> None:
        data: dict[str, object] = {"train_data": self.train_data}
        if isinstance(self.val_data, Mapping):
            _need(len(self.val_data) > 0, "val_data", self.val_data, "names of data sets, or None")
            for key, value in self.val_data.items():
                _need_name("a name in val_data", key)
                data[f"val_data[{key!r}]"] = value
        elif self.val_data is not None:
            data["val_data"] = self.val_data
        for name, one in data.items():
            # a loader draws an order of its own, which no resume could take up again
            loader = any(cls.__name__ == "DataLoader" for cls in type(one).__mro__)
            expected = "the data set itself; batch_size and loader={…} say how it is loaded"
            _need(one is not None and not loader, name, one, expected)
        train = data.pop("train_data")
        is_stream = any(cls.__name__ == "IterableDataset" for cls in type(train).__mro__)
        if is_stream and hasattr(train, "load_state_dict"):
            shared = next((name for name, one in data.items() if one is train), "")
            # An evaluation begins it anew, where the training would go on.
            _need(
                not shared,
                shared,
                train,
                "a stream of its own: train_data is this very one, and has a place in it",
            )
        _need(isinstance(self.loader, Mapping), "loader", self.loader, "a dict of DataLoader's arguments")
        for name in ("batch_size", "dataset"):
            if name in self.loader:
                raise UsageError(f"Task: loader holds {name!r}", expected="batch_size and data as fields")

    def _check_metrics(self) -> None:
        _need(isinstance(self.metrics, Mapping), "metrics", self.metrics, "a dict of name: function")
        for name, metric in self.metrics.items():
            _need_name("a name in metrics", name)
            _need(name != "loss", "a name in metrics", name, "another one: val/loss is the loss itself")
            asked = all(hasattr(metric, method) for method in ("reset", "update", "compute"))
            sound = (asked or callable(metric)) and not isinstance(metric, type)
            expected = "f(outputs, targets), or an object with reset, update and compute"
            _need(sound, f"metrics[{name!r}]", metric, expected)

    def _check_unfreeze(self) -> None:
        _need(isinstance(self.unfreeze, Mapping), "unfreeze", self.unfreeze, "a dict of epoch: names")
        for epoch, names in self.unfreeze.items():
            expected = "a whole number from 2: what trains from epoch 1 on is not frozen at all"
            _need(type(epoch) is int and epoch >= 2, "an epoch in unfreeze", epoch, expected)
            listed: object = [names] if isinstance(names, str) else names
            sound = isinstance(listed, Sequence) and listed and all(isinstance(each, str) for each in listed)
            _need(sound, f"unfreeze[{epoch}]", names, "a name or pattern, or a list of them")

    def judged_by(
        self, monitor: str | None, mode: Literal["min", "max"] | None
    ) -> tuple[str, Literal["min", "max"]]:
        """The monitored metric and its mode, where a user has named one or both.

        `mode` of this task is that of its own metric: of another one, smaller values are better unless it is said.
        """
        own = self.mode if monitor in (None, self.monitor) else "min"
        return monitor or self.monitor, mode or own


def _need(sound: object, name: str, found: object, expected: str) -> None:
    if not sound:
        raise UsageError(f"Task: {name} is {_shown(found)}", expected=expected)


def _need_name(what: str, found: object) -> None:
    _need(isinstance(found, str) and found != "", what, found, "a name as text")


# -- the user's file -------------------------------------------------------------------------------


class UserCodeError(ExperimentError):
    """The experiment file itself raised while it was imported.

    Attributes:
        user_traceback: The user's own traceback as text, without a frame of this package. Meant for the
            user's terminal: redact it before it goes anywhere else.
    """

    def __init__(self, found: str, *, user_traceback: str, expected: str = "", try_next: str = "") -> None:
        super().__init__(found, expected=expected, try_next=try_next)
        self.user_traceback = user_traceback


@dataclasses.dataclass(frozen=True)
class NoParams:
    """Stands for Params where an experiment file has none."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A loaded experiment file. Exactly one of `build` and `main` is not None.

    Attributes:
        path: The file, absolute, links resolved.
        source: Its bytes as they were executed.
        sha256: Of `source`, 64 hex digits.
        params_class: The frozen dataclass `Params`, or an empty one.
    """

    path: Path
    source: bytes
    sha256: str
    params_class: type[Any]
    build: Callable[[Any], Task] | None = None
    main: Callable[[Any, Any], object] | None = None
    suggest: Callable[[Any], Mapping[str, object]] | None = None

    def make_params(self, overrides: list[str], config: Path | None = None) -> Any:
        """An instance of `params_class`: defaults, then the YAML file, then `name=value` words.

        Raises:
            ParamError: As `params.parse`, `params.read_yaml` and `params.build`.
        """
        flat = flat_params.read_yaml(self.params_class, config) if config else {}
        flat.update(flat_params.parse(self.params_class, overrides))
        values = flat_params.build(self.params_class, flat)
        # As a resume will build them: a default need not have the type that its field names.
        return flat_params.build(self.params_class, flat_params.flatten(values))

    def task(self, params: object) -> Task:
        """What `build(params)` returns; what it raises comes through unchanged.

        Raises:
            ExperimentError: The file has no `build`, or it returned something else than a Task.
        """
        if self.build is None:
            raise ExperimentError(
                f"{self.path.name} has no build", expected="def build(params) -> tracked.Task"
            )
        task = self.build(params)
        if not isinstance(task, Task):
            raise ExperimentError(
                f"build of {self.path.name} returned {_shown(task)}",
                expected="a tracked.Task",
                try_next="end build with: return tracked.Task(…)",
            )
        return task


def load(path: str | Path) -> Experiment:
    """Imports an experiment file as if it had been started as a script, except for its `__main__` block.

    Its folder comes first on `sys.path`. The module goes by the file's own name where nothing else is called
    that, so that spawned workers can import what they unpickle; otherwise by a name that holds for this
    process and its forks.

    Raises:
        ExperimentError: No such file, not readable as Python, nothing to train in it, or a wrong signature.
        UserCodeError: The file raised; with the user's own traceback.
        ParamError: `Params` cannot be restored exactly.
    """
    import hashlib

    file = _existing(Path(path))
    if file.suffix != ".py":
        raise ExperimentError(
            f"{str(path)!r} is no Python file", expected="an experiment file, EXPERIMENT.py"
        )
    source = file.read_bytes()
    try:
        # inheriting would switch on this module's own __future__ imports in the user's file
        code = compile(source, str(file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ExperimentError(
            f"{path}{f':{line}' if line else ''}: {getattr(error, 'msg', error)}",
            expected="Python source",
            try_next=f"python -m py_compile {path}",
        ) from error
    module = _execute(code, file, str(path))
    build, main, suggest = (getattr(module, name, None) for name in ("build", "main", "suggest"))
    if build is not None and main is not None:
        raise ExperimentError(
            f"{file.name} has both build (line {_line(build)}) and main (line {_line(main)})",
            expected="build(params) for the loop of this package, or main(run, params) for your own",
            try_next="rename the one that is not meant",
        )
    if build is None and main is None:
        raise _nothing_to_train(module, file)
    for name, function, arguments in (
        ("build", build, "params"),
        ("main", main, "run, params"),
        ("suggest", suggest, "trial"),
    ):
        if function is not None:
            _check_signature(file, name, function, arguments)
    params_class = getattr(module, "Params", NoParams)
    flat_params.check(params_class)
    return Experiment(file, source, hashlib.sha256(source).hexdigest(), params_class, build, main, suggest)


def _existing(path: Path) -> Path:
    """The file, absolute and resolved; or an error that knows what else is there."""
    try:
        if path.is_file():
            return path.resolve()
        folder = path if path.is_dir() else path.parent
        there = sorted(entry.name for entry in folder.glob("*.py"))
    except (OSError, ValueError, RuntimeError):
        folder, there = path.parent, []
    if path == folder:
        raise ExperimentError(
            f"{str(path)!r} is a folder",
            expected="an experiment file",
            try_next=" or ".join(_joined(folder, there)),
        )
    import difflib

    near = difflib.get_close_matches(path.name, there, cutoff=0.4) or there[:3]
    raise ExperimentError(
        f"there is no file {str(path)!r}",
        expected="an experiment file",
        try_next=" or ".join(_joined(folder, near)),
    )


def _joined(folder: Path, names: list[str]) -> list[str]:
    return [str(folder / name) for name in names[:5]]


def _execute(code: types.CodeType, file: Path, shown: str) -> types.ModuleType:
    """Runs the compiled file as a module; leaves `sys` as it was if that raises."""
    import importlib.util

    folder = str(file.parent)
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before, path_before = sys.modules.get(name), sys.path[:]
    sys.modules[name] = module  # dataclasses, pickle and get_type_hints look a class's module up there
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    try:
        exec(code, module.__dict__)  # noqa: S102 - the user's own file; these very bytes are what is hashed
    except (Exception, SystemExit) as error:  # whatever the user's file raises is told as theirs
        sys.path[:] = path_before
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        import traceback

        # the first frame is this function's
        own = error.__traceback__.tb_next if error.__traceback__ else None
        frames = traceback.extract_tb(own)
        at = next((frame.lineno for frame in reversed(frames) if frame.filename == str(file)), None)
        raise UserCodeError(
            f"{shown}{f':{at}' if at else ''} raised {type(error).__name__}: {error}",
            expected="a file that can be imported",
            try_next="put what only a script does under: if __name__ == '__main__'"
            if isinstance(error, SystemExit)
            else f"python {shown}",
            user_traceback="".join(traceback.format_exception(type(error), error, own)),
        ) from error
    return module


def _module_name(file: Path) -> str:
    """The file's own name if importing it anywhere gives this very file, else one that nothing else has."""
    import hashlib
    from importlib.machinery import PathFinder

    loaded = sys.modules.get(file.stem)
    if "." not in file.stem and file.stem not in sys.stdlib_module_names and file.stem != "__main__":
        if loaded is not None:
            if getattr(loaded, "__file__", None) == str(file):
                return file.stem
        else:
            elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != file.parent]
            if PathFinder.find_spec(file.stem, elsewhere) is None:
                return file.stem
    digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:12]
    return f"tracked_experiment_{digest}"


def _nothing_to_train(module: types.ModuleType, file: Path) -> ExperimentError:
    import difflib

    functions = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    near = [
        name for name in functions if difflib.get_close_matches(name.lower(), ["build", "main"], cutoff=0.5)
    ]
    return ExperimentError(
        f"{file.name} has neither build nor main; its functions: {', '.join(functions) or 'none'}",
        expected="def build(params) -> tracked.Task, or def main(run, params)",
        try_next=f"rename {near[0]}" if near else "",
    )


def _check_signature(file: Path, name: str, function: object, arguments: str) -> None:
    expected = f"def {name}({arguments})"
    if not callable(function):
        raise ExperimentError(f"{name} of {file.name} is {_shown(function)}", expected=expected)
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ExperimentError(f"{name} of {file.name} is async or a generator", expected=expected)
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a function written in C does not tell
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        raise ExperimentError(
            f"line {_line(function)} of {file.name}: {name} takes {signature}",
            expected=expected,
            try_next=f"{expected}: …",
        ) from None


def _line(function: object) -> int:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return code.co_firstlineno if code else 1


# -- finding it again ------------------------------------------------------------------------------

# Folders where MLflow, or a server started in the working tree, keeps what it was sent.
_COPIES = ("mlruns", "mlartifacts", "artifacts")


def describe(experiment: Experiment) -> dict[str, str]:
    """What a run records of its file, and `locate` takes.

    Keys: `path` (POSIX, relative to its git root, else to the working directory, else the bare name),
    `absolute`, `sha256`.
    """
    path = experiment.path
    root = git_root(path)
    if root is None and path.is_relative_to(Path.cwd()):
        root = Path.cwd()
    relative = path.relative_to(root).as_posix() if root else path.name
    return {"path": relative, "absolute": str(path), "sha256": experiment.sha256}


def locate(
    recorded: Mapping[str, object],
    *,
    file: Path | None,
    cwd: Path,
    run_id: str = "RUN",
    line: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Finds the experiment file of a run on this machine; executes and downloads nothing.

    An explicit `file` counts as it is. Otherwise what the run recorded may choose only a `.py` file that,
    links resolved, lies inside `cwd` or its git root, and in no folder where copies from a server may lie
    (`mlruns`, `mlartifacts`, `artifacts`, names with a leading dot). One with the recorded hash goes first.

    Args:
        recorded: What `describe` gave, as a server returned it: trusted in nothing.
        file: The user's `--file`.
        cwd: The working directory.
        run_id: For the text of the error.
        line: The words of the command that `--file` would be added to; `resume` and the run if empty.

    Returns:
        The file (absolute, resolved), and warnings to print, such as that it changed since.

    Raises:
        ExperimentError: No such file in the working tree, or no file at `file`; says how to fetch the copy.
    """
    if file is not None:
        found = _existing(file)
        return found, _changed(found, recorded)
    candidates = _candidates(recorded, cwd.resolve())
    for candidate in candidates:
        if not _changed(candidate, recorded):
            return candidate, []
    if candidates:
        return candidates[0], _changed(candidates[0], recorded)
    raise _not_here(recorded, run_id, line or ("resume", run_id))


def _candidates(recorded: Mapping[str, object], cwd: Path) -> list[Path]:
    """The files of the working tree that the record may mean, most likely first."""
    root = git_root(cwd)
    # a working tree that is the whole file system would let the server choose anything
    trees = [tree for tree in dict.fromkeys((root or cwd, cwd)) if tree != Path(tree.anchor)]
    relative, absolute = recorded.get("path"), recorded.get("absolute")
    wanted: list[Path] = []
    if isinstance(relative, str) and not PurePosixPath(relative).is_absolute():
        wanted += [tree / relative for tree in trees]
    if isinstance(absolute, str):
        wanted.append(Path(absolute))
    found: list[Path] = []
    for path in wanted:
        real = _inside(path, trees)
        if real is not None and real not in found:
            found.append(real)
    return found


def _inside(path: Path, trees: list[Path]) -> Path | None:
    """The resolved file if it is one that a server may name, else None."""
    # by its letters first, so that a network path is not even looked at
    if ".." in (*path.parts, *PureWindowsPath(path).parts) or not any(map(path.is_relative_to, trees)):
        return None
    try:
        real = path.resolve(strict=True)
        if not real.is_file() or real.suffix != ".py":
            return None
    except (OSError, ValueError, RuntimeError):  # not there, not readable, a NUL, too long, a loop of links
        return None
    for tree in trees:
        if real.is_relative_to(tree):
            parts = real.relative_to(tree).parts
            if any(part in _COPIES or part.startswith(".") for part in parts):
                return None
    return real if any(map(real.is_relative_to, trees)) else None


def _changed(file: Path, recorded: Mapping[str, object]) -> list[str]:
    import hashlib

    expected = recorded.get("sha256")
    actual = hashlib.sha256(file.read_bytes()).hexdigest()
    if actual == expected:
        return []
    if not isinstance(expected, str) or not re.fullmatch(r"[0-9a-f]{64}", expected):
        return [f"{file} cannot be compared with what the run started with: it recorded no hash"]
    return [f"{file} has changed since the run started (sha256 {expected[:12]}… then, {actual[:12]}… now)"]


def _not_here(recorded: Mapping[str, object], run_id: str, line: Sequence[str]) -> ExperimentError:
    import shlex

    named = recorded.get("path") or recorded.get("absolute")
    # the name ends up in a line that a user pastes into a shell
    name = PurePosixPath(named).name if isinstance(named, str) else ""
    name = name if re.fullmatch(r"\w[\w.-]{0,100}\.py", name, re.ASCII) else ""
    fetch = shlex.join(
        [
            "mlflow",
            "artifacts",
            "download",
            "--run-id",
            run_id,
            "--artifact-path",
            f"source/{name}".rstrip("/"),
        ]
    )
    again = shlex.join(["tracked", *line, "--file"])
    return ExperimentError(
        f"the run's experiment file, recorded as {ascii(named)[:200]}, is not in this working tree",
        expected="that file in the working directory or its git repository; what a server sends is never run",
        try_next=f"{again} {name or 'FILE.py'}\n       the run's own copy, to be read first: {fetch}",
    )


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__qualname__} itself"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:59] + '…'} ({type(value).__name__})"
