"""Keeps torch's compiler out of trainings that do not compile, which start seconds sooner for it.

Every optimizer of torch touches `torch._dynamo`, to tell the compiler to leave it alone. That touch
imports the compiler and sympy, which takes as long as torch itself. Here a stand-in answers the two
calls in question, as the compiler would when nothing is being compiled; anything else that is asked of it
imports the real one, which then takes its place for good.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
import types
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

_NAME = "torch._dynamo"
_F = TypeVar("_F", bound=Callable[..., Any])


class _StandIn(types.ModuleType):
    """`torch._dynamo`, until something of it is really used."""

    # Without a path, `import torch._dynamo.config` would not get as far as the finder below.
    __path__: MutableSequence[str] = []  # noqa: RUF012 - as the base class has it

    def __init__(self) -> None:
        super().__init__(_NAME)
        self._loading = threading.RLock()

    def disable(self, fn: _F, recursive: bool = True, *, wrapping: bool = True) -> _F:  # noqa: ARG002
        """Nothing is compiled, so there is nothing to keep the compiler from."""
        return fn

    def graph_break(self, msg: str = "") -> None:
        """Nothing is compiled, so no graph is to be broken."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.replace(), name)

    def replace(self) -> types.ModuleType:
        """Import the real module, and have it asked from now on."""
        with self._loading:
            if sys.modules.get(_NAME) is self:
                sys.meta_path.remove(_finder)
                del sys.modules[_NAME]
                try:
                    importlib.import_module(_NAME)
                finally:
                    _forget_answers()
            return sys.modules[_NAME]


class _Finder(importlib.abc.MetaPathFinder):
    """Has the real package imported before any of its submodules is."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - the protocol's signature
        target: types.ModuleType | None = None,  # noqa: ARG002 - likewise
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{_NAME}."):
            return None
        stand_in = sys.modules.get(_NAME)
        if isinstance(stand_in, _StandIn):
            stand_in.replace()
        loaded = importlib.import_module(fullname)
        return importlib.machinery.ModuleSpec(fullname, _Loaded(loaded))


class _Loaded(importlib.abc.Loader):
    """Gives out a module that is imported already."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:  # noqa: ARG002
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec


_finder = _Finder()


def _forget_answers() -> None:
    """Let the optimizers ask the real compiler again: they remember what `disable` gave them."""
    for value in vars(Optimizer).values():
        inner = getattr(value, "__wrapped__", None)
        if inner is not None and hasattr(inner, "__dynamo_disable"):
            delattr(inner, "__dynamo_disable")


def defer_compiler() -> None:
    """Put the stand-in in place, unless the compiler is imported already or is another one than we know."""
    known = hasattr(torch, "_disable_dynamo") and hasattr(Optimizer.zero_grad, "__wrapped__")
    if known and _NAME not in sys.modules:
        sys.modules[_NAME] = _StandIn()
        sys.meta_path.insert(0, _finder)
