"""Saves a checkpoint for use without this package: its weights, its whole module, or all of its state."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from tracked import experiment as experiments
from tracked import params
from tracked.errors import UsageError
from tracked.experiment import Experiment, Task
from tracked.inspection import object_in
from tracked.names import EXPERIMENT_FILE, FILE, MANIFEST, MODULE
from tracked.packaging import example, save, unwrapped
from tracked.place import Place
from tracked.retrieval import Retrieved, retrieve
from tracked.seeding import derive, preserved_generators, seed_generators
from tracked.state import Parts
from tracked.tensors import modules

Say = Callable[[str], None]
Form = Literal["weights", "model", "training"]

_PROGRAM = "model.pt2"
# What is known before the checkpoint is; told before it is downloaded.
_FILES = {"weights": ("model.pt", "model.safetensors"), "model": (MODULE,), "training": (FILE, MANIFEST)}


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
    parts = Parts()
    model = unwrapped(task.model)
    parts.attach("model", model)
    parts.restore(found.state, ("model",))
    weights = f"python -m tracked.run export {found.view.run_id} --form weights --to {to}"
    line = "sys.path.insert(0, {folder!r}); torch.load({path!r}, weights_only=False)"
    copies, needed = save(model, draft.path(MODULE, line), experiment.path.parent, try_next=weights)
    if not copies:
        draft.loads[MODULE] = line.partition("; ")[2]
    for name in copies:
        draft.path(name)
    if needed:
        say(f"{MODULE} refers to {', '.join(needed)}, which must be importable where it is loaded")
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


def _write_program(task: Task, model: nn.Module, path: Path) -> str:
    """Save the module as a program that needs no class of it, if it computes the same.

    Returns:
        The shapes of its inputs, if another batch size than the example's would be refused; else empty.
    """
    from torch.export import Dim, ShapesCollection
    from torch.export import export as traced
    from torch.export import save as save_program

    with preserved_generators(), torch.no_grad():
        args, kwargs = example(task, model)
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
    save_program(program, path)
    if program.range_constraints or not batch:
        return ""
    return ", ".join("×".join(map(str, each.shape)) for each in tensors)
