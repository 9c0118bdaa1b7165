"""Packs the module of the best step for the sender, which logs it to MLflow, when a training has finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracked.archive import digest
from tracked.errors import TrackedError
from tracked.experiment import Experiment, Task
from tracked.flavour import ABOUT, CODE
from tracked.names import MODULE
from tracked.packaging import example, imports, save, unwrapped
from tracked.seeding import preserved_generators
from tracked.spool import write_json
from tracked.state import load_module
from tracked.tracking import Run


def log_model(task: Task, experiment: Experiment, run: Run) -> None:
    """Have the best weights of a training that is over logged as a model, beside the delivery of its last points.

    The task's model has them afterwards. What cannot be packed is told, and no reason for the run to fail.
    """
    try:
        _log_model(task, experiment, run)
    except TrackedError as error:
        run.progress.warn(f"no model is logged: {error}")
    except Exception as error:  # noqa: BLE001 - of the user's classes and files, after all that was to be trained
        run.progress.warn(f"no model is logged: {type(error).__name__}: {error}")


def _log_model(task: Task, experiment: Experiment, run: Run) -> None:
    model = unwrapped(task.model)
    step, register = run.step, run.settings.register
    if run.stopping.best is not None and run.stopping.best_step != step:
        best = run.best_state()
        if best is None:
            run.progress.warn(
                "the last weights are logged in their place" + ", and not registered" * bool(register)
            )
            register = None
        else:
            load_module(model, best["model_state_dict"])
            step = best["step"]
    run.add_model(lambda folder: _pack(model, task, experiment, folder, run), step=step, register=register)


def _pack(model: nn.Module, task: Task, experiment: Experiment, folder: Path, run: Run) -> None:
    code = folder / CODE
    code.mkdir(parents=True)
    names, needed = save(model, code / MODULE, experiment.path.parent)
    if needed:
        run.progress.warn(
            f"the model refers to {', '.join(needed)}, which must be importable where it is loaded"
        )
    tensors = _tensors(task, model)
    if tensors is None:
        run.progress.say("the model gets no signature: MLflow serves what takes one tensor and gives one")
    about = {
        # By what is in it: a run that is resumed to the same weights has its model already.
        "mark": digest(code / MODULE),
        "code": names,
        "imports": imports(code / MODULE, names),
        "tensors": tensors,
        "torch": torch.__version__,
    }
    write_json(folder / ABOUT, about)


def _tensors(task: Task, model: nn.Module) -> dict[str, dict[str, Any]] | None:
    """Shape and dtype of what the model takes and gives for one sample, as NumPy has them.

    None where that is not one tensor each.
    """
    task.model.eval()
    try:
        with preserved_generators(), torch.no_grad():
            (inputs,), others = example(task, model)
            inputs = torch.zeros_like(inputs[:1])
            outputs = model(inputs)
            if others or not all(isinstance(each, torch.Tensor) and each.dim() for each in (inputs, outputs)):
                return None
            return {
                name: {"shape": [*each.shape], "dtype": str(each.cpu().numpy().dtype)}
                for name, each in (("input", inputs), ("output", outputs))
            }
    except Exception:  # noqa: BLE001 - the user's data and step, which may want the device that the training had
        return None
