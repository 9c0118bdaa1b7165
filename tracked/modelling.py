"""Packs the module of the best step for the process that logs it to MLflow, when a training has finished."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch
from torch import nn

from tracked.archive import digest
from tracked.errors import TrackedError
from tracked.experiment import Experiment, Task
from tracked.flavour import ABOUT, CODE, EXAMPLE
from tracked.packaging import MODULE, example, save, unwrapped
from tracked.seeding import preserved_generators
from tracked.spool import write_json
from tracked.state import load_module
from tracked.tracking import Run


def log_model(task: Task, experiment: Experiment, run: Run) -> None:
    """Have the best weights of a training that is over logged as a model, beside the delivery of its last points.

    The task's model has them afterwards. What cannot be packed is told, and no reason for the run to fail.
    """
    model = unwrapped(task.model)
    step = run.step
    if run.stopping.best is not None and (best := run.best_state()) is not None:
        load_module(model, best["model_state_dict"])
        step = best["step"]
    register = run.settings.register
    try:
        run.add_model(
            lambda folder: _pack(model, task, experiment, folder, run), step=step, register=register
        )
    except TrackedError as error:
        run.progress.warn(f"no model is logged: {error}")


def _pack(model: nn.Module, task: Task, experiment: Experiment, folder: Path, run: Run) -> None:
    code = folder / CODE
    code.mkdir(parents=True)
    names, needed = save(model, code / MODULE, experiment.path.parent)
    if needed:
        run.progress.warn(
            f"the model refers to {', '.join(needed)}, which must be importable where it is loaded"
        )
    inputs = _blank_input(task, model)
    if inputs is None:
        run.progress.warn(
            "the model is logged without signature and example: MLflow knows those of one tensor only"
        )
    else:
        torch.save(inputs, folder / EXAMPLE)
    imports = sorted({name for each in names for name in _imported(code / each)})
    # By what is in it: a run that is resumed to the same weights has its model already.
    write_json(folder / ABOUT, {"mark": digest(code / MODULE), "code": names, "imports": imports})


def _blank_input(task: Task, model: nn.Module) -> torch.Tensor | None:
    """A sample of zeros, shaped as those that the model takes: no sample of the data goes along.

    None where the model takes something else than one tensor.
    """
    task.model.eval()
    try:
        with preserved_generators(), torch.no_grad():
            args, kwargs = example(task, model)
    except Exception:  # noqa: BLE001 - the user's data and step, which may want the device that the training had
        return None
    (first, *others) = args or (None,)
    if others or kwargs or not isinstance(first, torch.Tensor) or not first.dim():
        return None
    return torch.zeros_like(first[:1], device="cpu")


def _imported(file: Path) -> set[str]:
    """The installed packages that a file imports at its top."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names
