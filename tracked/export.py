"""Saves a checkpoint for use without this package: its weights, its whole module, or all of its state."""

from __future__ import annotations

import ast
import pickle
import pickletools
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import decode_source
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tracked import experiment as experiments
from tracked import params
from tracked.errors import TrackedError, UsageError
from tracked.experiment import Experiment, Task
from tracked.inspection import object_in
from tracked.names import EXPERIMENT_FILE, FILE, MANIFEST
from tracked.place import Place
from tracked.retrieval import Retrieved, retrieve
from tracked.seeding import derive, preserved_generators, seed_generators
from tracked.state import Parts
from tracked.streams import batches_of
from tracked.tensors import modules

Say = Callable[[str], None]
Form = Literal["weights", "model", "training"]

_MODULE, _PROGRAM = "module.pt", "model.pt2"
# What is known before the checkpoint is; told before it is downloaded.
_FILES = {"weights": ("model.pt", "model.safetensors"), "model": (_MODULE,), "training": (FILE, MANIFEST)}


@dataclass(frozen=True)
class Written:
    """A file, its size in bytes, and the line of Python that loads it (empty for one that goes along)."""

    path: Path
    bytes: int
    load: str


@dataclass
class _Draft:
    """Files that are made in a folder of their own, until all of them are whole."""

    folder: Path
    loads: dict[str, str] = field(default_factory=dict)

    def path(self, name: str, load: str = "") -> Path:
        """Where to write the file `name`; `load` has `{path}` and `{folder}` for where it will lie."""
        self.loads[name] = load
        return self.folder / name


def export(
    place: Place,
    word: str,
    form: Form,
    to: Path,
    say: Say,
    *,
    step: int | None = None,
    best: bool = False,
    file: Path | None = None,
    force: bool = False,
) -> tuple[str, int, list[Written]]:
    """Write a run's checkpoint to a folder, in a form that loads where this package is not installed.

    Args:
        place: Where the run stands.
        word: ID, unique prefix of an ID, local handle, name, or `last`.
        form: "weights" (`model.pt`, a state dict; `model.safetensors`), "model" (`module.pt`, the whole module
            with the files of its classes beside it; `model.pt2`, the program of `torch.export`, where it
            works), or "training" (`checkpoint.pt` as it is, and `manifest.json`).
        to: The folder, made if it is missing. All files appear when all are whole.
        say: Told what could not be written, and why.
        step: Of a committed checkpoint; else the last one.
        best: The best one that is kept.
        file: The experiment file, for "model", if it is not where the run recorded it.
        force: Replace files in `to`.

    Returns:
        The run's ID, the step, and what was written.

    Raises:
        UsageError: `to` cannot be written, holds a file already, or the run has no module to build.
        ExperimentError: The experiment file is not found, or cannot be used.
        StateMismatch: The module that it builds is another one than the checkpoint's.
        TrackedError: As `retrieve`; or the module cannot be pickled.
    """
    _refuse_existing(to, _FILES[form], force=force)
    made = not to.exists()
    try:
        to.mkdir(parents=True, exist_ok=True)
        # In the folder itself, which may be a disk of its own.
        workshop = tempfile.TemporaryDirectory(prefix=".export-", dir=to)
    except OSError as error:
        raise UsageError(
            f"{to} cannot be written: {error.strerror}", expected="a folder that you may write to"
        ) from error
    try:
        with workshop as temp:
            found = retrieve(place, word, Path(temp) / "download", say, step=step, best=best)
            draft = _Draft(Path(temp) / "draft")
            draft.folder.mkdir()
            if form == "weights":
                _write_weights(found, draft, say)
            elif form == "training":
                _write_training(found, draft)
            else:
                _write_model(found, draft, to, file, say)
            _refuse_existing(to, draft.loads, force=force)
            for name in draft.loads:
                (draft.folder / name).replace(to / name)
    finally:
        if made:
            with suppress(OSError):  # it is not empty, if all went well
                to.rmdir()
    written = [
        Written(to / name, (to / name).stat().st_size, load.format(path=str(to / name), folder=str(to)))
        for name, load in draft.loads.items()
    ]
    return found.view.run_id, int(found.state["step"]), written


def _refuse_existing(to: Path, names: Sequence[str] | Mapping[str, str], *, force: bool) -> None:
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is a file", expected="a folder", try_next=f"--to {to}-export")
    there = [name for name in names if (to / name).exists()]
    if there and not force:
        raise UsageError(
            f"{to} holds {', '.join(there)} already",
            expected="a folder without them",
            try_next="another folder, or --force to replace them",
        )


# -- weights and training state


def _write_weights(found: Retrieved, draft: _Draft, say: Say) -> None:
    from safetensors.torch import save_file

    parts = modules(found.state)
    if not parts:
        raise UsageError(
            f"run {found.view.run_id} has no weights: nothing that was attached is a module",
            expected="run.attach(model=…)",
            try_next=f"python -m tracked.run export {found.view.run_id} --form training --to DIR",
        )
    about = {"format": "pt", "run_id": found.view.run_id, "step": str(found.state["step"])}
    for name, tensors in parts.items():
        path = draft.path(f"{name}.pt", "torch.load({path!r}, weights_only=True)")
        torch.save(found.state[f"{name}_state_dict"], path)
        path = draft.path(f"{name}.safetensors", "safetensors.torch.load_file({path!r})")
        try:
            save_file(_separate(tensors), path, about)
        except (KeyError, ValueError) as error:  # sparse tensors, and dtypes that the format does not have
            del draft.loads[path.name]
            say(f"no {path.name}, which cannot hold everything: {' '.join(str(error).split())[:200]}")


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with a storage for each name: the format knows no shared ones, such as tied weights."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        separate[name] = tensor.contiguous().clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return separate


def _write_training(found: Retrieved, draft: _Draft) -> None:
    shutil.move(found.file, draft.path(FILE, "torch.load({path!r}, weights_only=True)"))
    shutil.move(found.manifest, draft.path(MANIFEST, "json.load(open({path!r}))"))


# -- the whole module


def _write_model(found: Retrieved, draft: _Draft, to: Path, file: Path | None, say: Say) -> None:
    experiment, task = _built(found, to, file, say)
    if to.resolve() == experiment.path.parent:
        raise UsageError(
            f"{to} is the folder of {experiment.path.name}, whose copy is to lie beside the module",
            expected="another folder",
            try_next=f"--to {to / 'export'}",
        )
    model = getattr(task.model, "_orig_mod", task.model)  # of torch.compile, which cannot be saved
    parts = Parts()
    parts.attach("model", model)
    parts.restore(found.state, ("model",))
    model.to("cpu").eval().zero_grad()
    line = "sys.path.insert(0, {folder!r}); torch.load({path!r}, weights_only=False)"
    path = draft.path(_MODULE, line)
    try:
        torch.save(model, path)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TrackedError(
            f"the module cannot be pickled: {error}",
            expected="a module of classes and functions that stand at the top of a file",
            try_next=f"python -m tracked.run export {found.view.run_id} --form weights --to {to}",
        ) from error
    copies = _copied(experiment)
    named = _modules_named_in(path)
    if not named & copies.keys():
        copies = {}
        draft.loads[_MODULE] = line.partition("; ")[2]
    for name, source in copies.items():
        draft.path(f"{name}.py").write_text(source)
    if needed := [name for name in sorted(named - copies.keys()) if _is_local(name)]:
        say(f"{_MODULE} refers to {', '.join(needed)}, which must be importable where it is loaded")
    program = draft.path(_PROGRAM, "torch.export.load({path!r}).module()")
    try:
        fixed = _write_program(task, model, program)
    except Exception as error:  # noqa: BLE001 - the user's data and model, or a limit of torch.export, may raise anything
        program.unlink(missing_ok=True)
        del draft.loads[_PROGRAM]
        reason = next(iter(str(error).strip().splitlines()), "")
        say(f"no {_PROGRAM}: torch.export does not work here ({type(error).__name__}: {reason[:300]})")
    else:
        if fixed:
            say(f"{_PROGRAM} takes inputs of these shapes only: {fixed}")


def _built(found: Retrieved, to: Path, file: Path | None, say: Say) -> tuple[Experiment, Task]:
    """The experiment's task, built with the checkpoint's params as its training was."""
    run_id, state = found.view.run_id, found.state
    weights = f"python -m tracked.run export {run_id} --form weights --to {to}"
    recorded = object_in(found.view.tags.get(EXPERIMENT_FILE))
    if not recorded and file is None:
        raise UsageError(
            f"run {run_id} was made by a script: no experiment file of it is known, which would build the module",
            expected="--file EXPERIMENT.py with build(params), or another form",
            try_next=weights,
        )
    path, warnings = experiments.locate(
        recorded,
        file=file,
        cwd=Path.cwd(),
        run_id=run_id,
        line=("export", run_id, "--form", "model", "--to", str(to)),
    )
    for warning in warnings:
        say(warning)
    experiment = experiments.load(path)
    if experiment.build is None:
        raise UsageError(
            f"{experiment.path.name} has main and no build: nobody but its loop knows how to make the module",
            expected="def build(params) -> tracked.Task, or another form",
            try_next=weights,
        )
    seed_generators(derive(state["settings"]["seed"], "build"))
    return experiment, experiment.task(params.build(experiment.params_class, state["params"]))


def _copied(experiment: Experiment) -> dict[str, str]:
    """The experiment file and those beside it that it has imported, by the names that a pickle refers to them by."""
    folder = experiment.path.parent
    found = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if "." not in name and file.suffix == ".py" and file.parent == folder:
            source = decode_source(file.read_bytes())
            copy = _without_package(source)
            note = f"# A copy of {file.name}, with stand-ins for what it imports of `tracked`.\n"
            found[name] = source if copy == source else note + copy
    return found


def _is_local(name: str) -> bool:
    """Whether a module is this package's, or one that nobody installed."""
    file = getattr(sys.modules.get(name), "__file__", None) or sys.prefix
    installed = any(Path(file).is_relative_to(prefix) for prefix in (sys.prefix, sys.base_prefix))
    return name.partition(".")[0] == "tracked" or not installed


def _without_package(source: str) -> str:
    """The source with stand-ins for what it imports of this package, which a module can do without."""
    lines = source.encode().splitlines(keepends=True)  # as bytes, which is what positions count
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if alias.name.partition(".")[0] == "tracked"]
            names = [alias.asname or "tracked" for alias in ours]
            stand_in = 'type("tracked", (), {"__getattr__": lambda *_: object})()'
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tracked":
            ours = node.names
            names = [alias.asname or alias.name for alias in ours]
            stand_in = "object"
        else:
            continue
        if ours:
            others = [alias for alias in node.names if alias not in ours]
            new = [" = ".join([*names, stand_in]), *([ast.unparse(ast.Import(others))] if others else [])]
            end = node.end_lineno or node.lineno
            before, after = lines[node.lineno - 1][: node.col_offset], lines[end - 1][node.end_col_offset :]
            lines[node.lineno - 1 : end] = [before + "; ".join(new).encode() + after]
    return b"".join(lines).decode()


def _modules_named_in(path: Path) -> set[str]:
    """The modules that loading a file of `torch.save` will import, read from its pickle without running it."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        # torch.save writes protocol 2, in which each class is named by one instruction.
        operations = pickletools.genops(archive.read(pickled))
        return {str(text).partition(" ")[0] for code, text, _ in operations if code.name == "GLOBAL"}


def _write_program(task: Task, model: nn.Module, path: Path) -> str:
    """Save the module as a program that needs no class of it, if it computes the same.

    Returns:
        The shapes of its inputs, if another batch size than the example's would be refused; else empty.
    """
    from torch.export import Dim, ShapesCollection, save
    from torch.export import export as traced

    with preserved_generators(), torch.no_grad():
        args, kwargs = _example(task, model)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        batch = {each.shape[0] for each in tensors if each.dim()}
        shapes = ShapesCollection()
        for each in tensors:
            if each.dim():
                shapes[each] = {0: Dim.AUTO}
        program = traced(
            model, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs), strict=False
        )
        outputs = []
        for compute in (model, program.module()):
            seed_generators(0)
            outputs.append(compute(*args, **kwargs))
        torch.testing.assert_close(outputs[1], outputs[0])
    program.example_inputs = None  # else the file would hold samples of the training data
    save(program, path)
    if program.range_constraints or not batch:
        return ""
    return ", ".join("×".join(map(str, each.shape)) for each in tensors)


def _example(task: Task, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the module is called with for the first batch of the training data, of at least two samples."""
    collate = {key: value for key, value in task.loader.items() if key == "collate_fn"}
    batches = batches_of(
        task.train_data,
        batch_size=max(2, task.batch_size),
        seed=0,
        shuffle=False,
        loader=collate,
    )
    batch = next(batches.epoch(0))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    hook = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        if task.step is not None:
            task.step(model, batch)
        elif task.forward is not None:
            task.forward(model, batch)
        else:
            model(batch[0])
    finally:
        hook.remove()
    if not seen:
        raise TypeError("a step calls parts of the model, and never the model itself")
    return seen[0]
