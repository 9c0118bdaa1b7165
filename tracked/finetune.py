"""Transfer learning: pretrained models, weights from a file or from another run, a new head, and what is frozen.

model = finetune.pretrained("resnet18", weights="DEFAULT", head=10)
finetune.freeze(model, "*")
finetune.unfreeze(model, "fc")
optimizer = torch.optim.AdamW(finetune.trainable(model, also={3: "layer4"}), lr=1e-3)
return tracked.Task(model=model, optimizer=optimizer, unfreeze={3: "layer4"}, …)
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracked.attempts import Asking, find_run, restore
from tracked.errors import CheckpointError, StateMismatch, UsageError
from tracked.freezing import freeze, table, train_mode, trainable, unfreeze, unfreeze_until
from tracked.place import Place
from tracked.spool import RunFolder
from tracked.state import load_module, module_state

__all__ = [
    "LoadReport",
    "freeze",
    "load_weights",
    "pretrained",
    "replace_head",
    "table",
    "train_mode",
    "trainable",
    "unfreeze",
    "unfreeze_until",
]

log = logging.getLogger("tracked")

_RUN = "run:"
_HEADS = ("fc", "classifier", "head", "heads")
"""What torchvision calls the last part of its classifiers."""
_USUAL_ENTRIES = ("model_state_dict", "state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and trainers put before the names of a model."""
_WEIGHTS = ("weights", "weights_backbone")
_SHOWN = 6
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a weights file and of the model.

    Attributes:
        source: Where the weights are from.
        loaded: Names that are in both, with the same shape.
        missing: Of the model, and not in the file: they keep their values.
        unexpected: Of the file, and not in the model.
        reshaped: In both, with different shapes: name -> (shape in the file, shape in the model). Not loaded.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        of_model = len(self.loaded) + len(self.missing) + len(self.reshaped)
        shapes = [f"{name} {theirs} → {ours}" for name, (theirs, ours) in self.reshaped.items()]
        lines = [f"{len(self.loaded)} of the model's {of_model} tensors loaded from {self.source}"]
        lines += [
            f"  {kind} ({len(names)}): {_some(names)}"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("reshaped", shapes),
            )
            if names
        ]
        return "\n".join(lines)


def pretrained(name: str, weights: str | Path | None = None, head: int | None = None) -> nn.Module:
    """A torchvision model by name, with weights and, if asked for, a new head.

    The report of what was loaded goes to the logger `tracked`, at level INFO.

    Args:
        name: As in `torchvision.models.list_models()`.
        weights: One of torchvision's own for this model, such as "DEFAULT" or "IMAGENET1K_V1" (fetched once);
            or a file, or `run:RUN_ID`: see `load_weights`. All but the head has to fit. None: as initialised.
        head: Outputs of the new head. A head in a file or run is taken if it has as many.

    Raises:
        UsageError: No such model, weights or file, or a model that has no linear head.
        StateMismatch: The weights are not those of this model.
        CheckpointError: The weights cannot be read.
    """
    from torchvision import models

    if name not in (known := models.list_models()):
        raise UsageError(
            f"torchvision has no model {name!r}",
            expected="one of torchvision.models.list_models()",
            try_next=" or ".join(map(repr, difflib.get_close_matches(name, known, n=3))) or "'resnet18'",
        )
    theirs = list(models.get_model_weights(name).__members__)
    if weights in theirs:
        return _torchvisions_own(name, str(weights), head)
    if weights is not None and not _is_file_or_run(weights):
        raise UsageError(
            f"the weights {str(weights)!r} are neither a file nor torchvision's for {name}",
            expected=f"one of {', '.join(theirs) or '(torchvision has none)'}, a file, or run:RUN_ID",
            try_next=" or ".join(map(repr, difflib.get_close_matches(str(weights).upper(), theirs, n=2))),
        )
    # Else a detector would fetch weights for its backbone.
    takes = inspect.signature(models.get_model_builder(name)).parameters
    model: nn.Module = models.get_model(name, **{each: None for each in _WEIGHTS if each in takes})
    replaced = "" if head is None else replace_head(model, head)
    if weights is not None:
        log.info("%s", load_weights(model, weights, partial=[replaced] if replaced else False))
    return model


def replace_head(model: nn.Module, outputs: int) -> str:
    """Put a fresh linear layer with `outputs` outputs in the place of a torchvision classifier's last one.

    Its inputs, dtype and device stay. What it starts from is drawn from torch's global generator.

    Returns:
        Its dotted name, such as `fc` or `classifier.6`, for `unfreeze`.

    Raises:
        UsageError: The model has no last linear layer by one of torchvision's names, or `outputs` is below 1.
    """
    if outputs < 1:
        raise UsageError(f"a head with {outputs} outputs", expected="1 or more")
    found: list[tuple[str, nn.Linear]] = [
        (name, module)
        for name, module in model.named_modules()
        if name.split(".")[0] in _HEADS and isinstance(module, nn.Linear)
    ]
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no linear layer in {', '.join(_HEADS)}",
            expected="a classifier as torchvision builds them",
            try_next=f"model.NAME = torch.nn.Linear(…, {outputs}), with the name of its last layer",
        )
    name, old = found[-1]
    weight = old.weight
    new = nn.Linear(old.in_features, outputs, old.bias is not None, device=weight.device, dtype=weight.dtype)
    model.set_submodule(name, new)
    return name


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    partial: bool | str | Sequence[str] = False,
    tracking_uri: str | None = None,
) -> LoadReport:
    """Load a model's weights; nothing in them is executed, and the model is untouched where this raises.

    A training checkpoint of any trainer will do: of the dicts in it the one that fits best is taken, without
    the prefixes (`module.`, `_orig_mod.`, `model.`) that wrappers put before the names.

    Args:
        model: Takes the tensors that have its names and shapes; dtypes are converted.
        source: A file of torch (`.pt`, `.pth`, …) or `.safetensors`, or `run:RUN_ID`: the last committed
            checkpoint of another run.
        partial: Which tensors may be missing, unexpected or of another shape: none (False), any (True), or
            those that these patterns mean, as in `freeze`.
        tracking_uri: Where the other run stands; else `MLFLOW_TRACKING_URI`, else `sqlite:///mlruns/mlflow.db`.

    Raises:
        UsageError: There is no such file.
        CheckpointError: It cannot be read as plain data.
        StateMismatch: Nothing in it fits the model, or not all that has to.
        RunNotFound: There is no such run.
        RunNotResumable: The run has no checkpoint.
    """
    content = _of_run(str(source), tracking_uri) if _is_run(source) else _of_file(Path(source))
    present = {name: each for name, each in module_state(model).items() if isinstance(each, Tensor)}
    found = max(_candidates(content), key=lambda candidate: len(_fitting(candidate, present)), default={})
    loaded = _fitting(found, present)
    if not loaded:
        raise StateMismatch(
            f"nothing in {source} fits the model: its tensors are {_some(list(found)) or 'none'}",
            expected=f"tensors by the names and with the shapes of the model's: {_some(list(present))}",
            try_next="the part of the model that the weights are of, such as load_weights(model.backbone, …)",
        )
    # A file need not hold both names of a tied tensor.
    places = {present[name].data_ptr() for name in loaded}
    report = LoadReport(
        source=str(source),
        loaded=tuple(loaded),
        missing=tuple(
            name for name, each in present.items() if name not in found and each.data_ptr() not in places
        ),
        unexpected=tuple(name for name in found if name not in present),
        reshaped={
            name: (tuple(found[name].shape), tuple(each.shape))
            for name, each in present.items()
            if name in found and name not in loaded
        },
    )
    if partial is not True and (wrong := _not_excused(report, partial or ())):
        raise StateMismatch(
            f"{len(wrong)} tensors do not fit: {_some(wrong)}\n{report}",
            expected="the same names and shapes in file and model",
            try_next="partial=True for whatever fits, or the names that need not: partial=['fc']",
        )
    load_module(model, loaded, strict=False)
    return report


def _not_excused(report: LoadReport, partial: str | Sequence[str]) -> list[str]:
    patterns = [partial] if isinstance(partial, str) else list(partial)
    patterns += [f"{pattern}.*" for pattern in patterns]
    wrong = [*report.missing, *report.unexpected, *report.reshaped]
    return [name for name in wrong if not any(fnmatchcase(name, pattern) for pattern in patterns)]


def _fitting(found: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: found[name]
        for name, each in present.items()
        if name in found and found[name].shape == each.shape
    }


def _candidates(content: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """What may be the state of a model: the content itself and the dicts in it, the usual names first."""
    inner = [name for name, value in content.items() if isinstance(value, Mapping)]
    inner.sort(key=lambda name: name not in _USUAL_ENTRIES)
    for each in [content, *(content[name] for name in inner)]:
        state = {name: value for name, value in each.items() if isinstance(value, Tensor)}
        if state:
            yield state
        while prefixes := [prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in state)]:
            state = {name.removeprefix(prefixes[0]): value for name, value in state.items()}
            yield state


def _of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = [each.name for each in path.parent.glob("*.*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        raise UsageError(
            f"there is no weights file {path}",
            expected="a torch or safetensors file, or run:RUN_ID",
            try_next=str(path.with_name(near[0])) if near else "",
        )
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    # A file of another kind makes torch raise what it likes: EOFError, RuntimeError, KeyError, UnicodeError …
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise CheckpointError(
            f"the weights in {path} cannot be loaded as plain data: {reason}",
            expected="a file of tensors and plain values; code in it is never run",
            try_next="where the model can be trusted and built: torch.save(model.state_dict(), 'weights.pt')",
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"the file {path} holds a {type(content).__name__}", expected="a dict of tensors by their names"
        )
    return content


def _of_run(source: str, tracking_uri: str | None) -> dict[str, Any]:
    from tracked.server import Server

    word = source.removeprefix(_RUN)
    if word in ("", "last"):
        raise UsageError(
            f"the weights {source!r} would be those of another run each time",
            expected="the ID of a run, or its first characters",
            try_next="python -m tracked.run list",
        )
    server = Server(Place.choose(tracking_uri).tracking_uri, create=False)
    ask = Asking(log.warning, _PATIENCE)
    view = ask(lambda: find_run(server, word))
    with tempfile.TemporaryDirectory(prefix="tracked-weights-") as folder:
        fetched = RunFolder(Path(folder))
        fetched.make()
        return ask(lambda: restore(server, view, fetched, log.warning))


def _is_run(source: str | Path) -> bool:
    return str(source).startswith(_RUN)


def _is_file_or_run(weights: str | Path) -> bool:
    path = Path(weights)
    # What looks like a file is looked for as one, so that the error says which is missing.
    return _is_run(weights) or bool(path.suffix) or len(path.parts) > 1 or path.is_file()


def _torchvisions_own(name: str, weights: str, head: int | None) -> nn.Module:
    from torchvision import models

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"  # torchvision offers no way to ask for it
    try:
        model: nn.Module = models.get_model(name, weights=weights)
    except OSError as error:
        raise UsageError(
            f"the weights {weights} of {name} cannot be fetched: {error}",
            expected=f"the network once, or the file in {torch.hub.get_dir()}/checkpoints",
            try_next="weights=FILE, with a file of yours",
        ) from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise CheckpointError(
            f"the weights {weights} of {name} cannot be loaded: {reason}",
            expected="torchvision's own file; code in it is never run",
            try_next=f"delete its file in {torch.hub.get_dir()}/checkpoints, and it is fetched again",
        ) from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    if head is not None:
        replace_head(model, head)
    return model


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
