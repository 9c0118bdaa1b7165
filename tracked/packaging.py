"""A module in a file, with the files of its classes beside it, to be loaded where this package is not installed."""

from __future__ import annotations

import ast
import pickle
import pickletools
import sys
import zipfile
from importlib.util import decode_source
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracked.errors import TrackedError
from tracked.experiment import Task
from tracked.streams import batches_of


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself where it was compiled, which cannot be saved."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def save(model: nn.Module, path: Path, folder: Path, *, try_next: str = "") -> tuple[list[str], list[str]]:
    """Write a module as it is on a CPU for evaluation, which it then is, and beside it what its classes need.

    Args:
        model: The module.
        path: The file for it.
        folder: Where the files lie that are copied beside it, if it refers to one of them.
        try_next: What to type where it cannot be pickled.

    Returns:
        Names of the files that were copied, and of modules that must be importable besides.

    Raises:
        TrackedError: It cannot be pickled.
    """
    model.to("cpu").eval().zero_grad()
    try:
        torch.save(model, path)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:  # the last: parametrized
        raise TrackedError(
            f"the module cannot be pickled: {error}",
            expected="a module of classes and functions that stand at the top of a file",
            try_next=try_next,
        ) from error
    copies = _copied(folder)
    named = _modules_named_in(path)
    copies = _reached(named, copies)
    for name, source in copies.items():
        (path.parent / f"{name}.py").write_text(source, encoding="utf-8")
    needed = [name for name in sorted(named - copies.keys()) if _is_local(name)]
    return [f"{name}.py" for name in copies], needed


def imports(path: Path, files: list[str]) -> list[str]:
    """The top-level names of what is imported to load what `save` has written, but for the standard library.

    Args:
        path: The file with the module, which names what is installed.
        files: Names of those beside it, which import at their top.
    """
    found = {name.partition(".")[0] for name in _modules_named_in(path) if not _is_local(name)}
    for file in files:
        for node in ast.parse((path.parent / file).read_bytes()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return sorted(found - sys.stdlib_module_names)


class _Seen(BaseException):
    """The module was called: all that was to be found out."""


def example(task: Task, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the module is called with for two samples of the training data."""
    collate = {key: value for key, value in task.loader.items() if key == "collate_fn"}
    batches = batches_of(
        task.train_data,
        batch_size=2,
        seed=0,
        shuffle=False,
        loader=collate,
    )
    batch = next(batches.epoch(0))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Seen  # what follows may take long, or want the device that the training had

    hook = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        if task.step is not None:
            task.step(model, batch)
        elif task.forward is not None:
            task.forward(model, batch)
        else:
            model(batch[0])
    except _Seen:
        pass
    finally:
        hook.remove()
    if not seen:
        raise TypeError("a step calls parts of the model, and never the model itself")
    return seen[0]


def _copied(folder: Path) -> dict[str, str]:
    """The files of a folder that are imported, by the names that a pickle refers to them by."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if "." not in name and file.suffix == ".py" and file.parent == folder:
            source = decode_source(file.read_bytes())
            copy = without_package(source)
            note = f"# A copy of {file.name}, with stand-ins for what it imports of `tracked`.\n"
            found[name] = source if copy == source else note + copy
    return found


def _reached(named: set[str], copies: dict[str, str]) -> dict[str, str]:
    """Those of the copies that are named, or that one of these imports: there may be others with secrets in them."""
    found: dict[str, str] = {}
    waiting = named & copies.keys()
    while waiting:
        name = waiting.pop()
        found[name] = copies[name]
        for node in ast.walk(ast.parse(copies[name])):
            if isinstance(node, ast.Import):
                waiting |= {
                    alias.name.partition(".")[0] for alias in node.names
                } & copies.keys() - found.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting |= {node.module.partition(".")[0]} & copies.keys() - found.keys()
    return found


def _is_local(name: str) -> bool:
    """Whether a module is this package's, or one that nobody installed."""
    file = getattr(sys.modules.get(name), "__file__", None) or sys.prefix
    installed = any(Path(file).is_relative_to(prefix) for prefix in (sys.prefix, sys.base_prefix))
    return name.partition(".")[0] == "tracked" or not installed


def without_package(source: str) -> str:
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
