"""Experiment tracking around MLflow: kill it anywhere, resume it by run ID.

Nothing heavy is imported until it is used: `import tracked` takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracked import finetune
    from tracked.errors import TrackedError
    from tracked.experiment import Task
    from tracked.groups import param_groups
    from tracked.logged_run import LoggedRun, fetch_checkpoint
    from tracked.resumption import resumed_run_id
    from tracked.tracking import Paused, Run
    from tracked.training import fit, start
    from tracked.training import resume_run as resume

__version__ = "0.1.0"
__all__ = [
    "LoggedRun",
    "Paused",
    "Run",
    "Task",
    "TrackedError",
    "fetch_checkpoint",
    "finetune",
    "fit",
    "param_groups",
    "resume",
    "resumed_run_id",
    "start",
]

_HOMES = {
    "LoggedRun": ("tracked.logged_run", "LoggedRun"),
    "Paused": ("tracked.tracking", "Paused"),
    "Run": ("tracked.tracking", "Run"),
    "Task": ("tracked.experiment", "Task"),
    "TrackedError": ("tracked.errors", "TrackedError"),
    "fetch_checkpoint": ("tracked.logged_run", "fetch_checkpoint"),
    "fit": ("tracked.training", "fit"),
    "param_groups": ("tracked.groups", "param_groups"),
    "resume": ("tracked.training", "resume_run"),
    "resumed_run_id": ("tracked.resumption", "resumed_run_id"),
    "start": ("tracked.training", "start"),
}


_MODULES = ("finetune",)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tracked.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tracked' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
