"""What MLflow finds by this package's entry points; it imports this module with itself half imported.

    mlflow.tracking_store         tracked+http, tracked+https, tracked+sqlite
    mlflow.model_registry_store   the same: MLflow's own store of what stands behind `tracked+`
    mlflow.artifact_repository    mlflow-artifacts, which MLflow resolves for http and https alone
    mlflow.run_context_provider   the tags that every run gets

So nothing of MLflow is imported here before it is asked for.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tracked import calls
from tracked.names import ATTEMPT
from tracked.provenance import collect, mlflow_tags

# MLflow ends a run that is still open when the process ends; what is registered before that comes after it.
atexit.register(calls.finish)

_TOLD = ("host", "command", "git_commit", "git_dirty", "torch")
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:  # noqa: ARG001 - MLflow's signature
    """The store that writes through the journal.

    Raises:
        UsageError: What stands behind `tracked+` is no address of a server, nor of an SQLite file.
        SpoolError: The spool cannot be made or written to.
    """
    from tracked import store

    return store.tracking_store(store_uri)


def registry_store(store_uri: str) -> Any:
    """MLflow's own store of registered models."""
    from tracked import store

    return store.registry_store(store_uri)


def artifact_repository(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> Any:
    """MLflow's own way to artifacts that go through its server, whatever stands before the server's address."""
    from tracked import store

    return store.artifact_repository(artifact_uri, tracking_uri, registry_uri)


class RunContext:
    """Where a run comes from, as tags that MLflow's interface hides; found out once for each process.

    Host, command without secrets, git commit and dirtiness, versions of torch and CUDA, and the attempt: the
    restarts that a scheduler or `torchrun` counts, and one.
    """

    def in_context(self) -> bool:
        return True

    def tags(self) -> dict[str, str]:
        return self._tags

    @cached_property
    def _tags(self) -> dict[str, str]:
        known = collect(_folder_of_the_script())
        told = {name: known[name] for name in _TOLD if name in known}
        if cuda := _cuda():
            told["cuda"] = cuda
        restarts = next((int(text) for name in _RESTARTS if (text := os.environ.get(name, "")).isdigit()), 0)
        tags = mlflow_tags(told)
        del tags["mlflow.source.type"]  # MLflow knows better: a notebook, a job
        return {**tags, ATTEMPT: str(1 + restarts)}


def _folder_of_the_script() -> Path | None:
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    return script.resolve().parent if script.is_file() else None


def _cuda() -> str:
    """The CUDA version that torch was built for; empty for none. torch itself is not imported for it."""
    try:
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return ""
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except (OSError, ValueError, ImportError):
        return ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""
