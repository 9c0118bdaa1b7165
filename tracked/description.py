"""The text that MLflow shows above a run: what it is, how to go on with it, and what came of it, in Markdown.

It is made of what stands on the server, so whoever sends for the run can renew it. A person may write there too:
a text that is not the one written last is left alone.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING

from tracked.names import (
    BEST,
    DESCRIBED,
    DESCRIPTION,
    EXPERIMENT_FILE,
    ORIGIN,
    STATE,
    STOP_REASON,
    SWEEP,
    TRIAL,
    TRIALS,
    newest_attempt,
)

if TYPE_CHECKING:
    from tracked.server import RunView

_LONGEST_COMMAND = 1000  # characters; the whole of it stands in a tag of its own
# What stands where Python has a program's file, when somebody types: in a shell of Python's own, or in a notebook.
_NO_FILE = re.compile(r"|(?:.*/)?(?:-c|ipython3?|\w*kernel_launcher\.py|ipykernel/__main__\.py)")


def has(view: RunView) -> bool:
    """Whether the run has one of ours: trials have none, for whom two requests more are a tenth of all."""
    return TRIAL not in view.tags


def renewed(view: RunView, experiment: str, tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that give a run its description, as it is with `tags`; none where a person has written or deleted one.

    Args:
        view: The run as it stands.
        experiment: The name of its experiment.
        tags: Tags that are set together with the description.
    """
    standing = view.tags.get(DESCRIPTION)
    if not has(view) or (
        (DESCRIBED in view.tags or standing) and view.tags.get(DESCRIBED) != _digest(standing or "")
    ):
        return {}
    text = _text(view, experiment, {**view.tags, **tags})
    return {DESCRIPTION: text, DESCRIBED: _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(view: RunView, experiment: str, tags: Mapping[str, str]) -> str:
    state = tags.get(STATE, "running")
    what = "A sweep" if SWEEP in tags else "A training"
    commit = tags.get("mlflow.source.git.commit", "")
    is_dirty = tags.get("mlflow.tracked.git_dirty") == "true"
    begun = [f"{what} of **{experiment}**"]
    if source := tags.get("mlflow.source.name"):
        begun.append(f"`{source}`")
    if commit:
        begun.append(f"commit `{commit[:10]}`{' with changes that are not committed' if is_dirty else ''}")
    paragraphs = [", ".join(begun) + "."]
    if origin := tags.get(ORIGIN):
        paragraphs.append(f"Forked from {origin}.")
    if command := tags.get("mlflow.tracked.command"):
        short = command if len(command) <= _LONGEST_COMMAND else f"{command[:_LONGEST_COMMAND]}…"
        paragraphs.append(f"Begun with\n\n{_code(short)}")
    if best := tags.get(BEST):
        paragraphs.append(f"Best result: {best}.")
    if trials := tags.get(TRIALS):
        paragraphs.append(f"Trials: {trials}.")
    attempts = newest_attempt(view.params)[0]
    ended = "" if state == "running" else f", the last one {state.replace('_', ' ')}"
    reason = f" ({tags[STOP_REASON]})" if ended and tags.get(STOP_REASON) else ""
    paragraphs.append(f"Attempts: {attempts}{ended}{reason}.")
    paragraphs.append(f"To go on with it\n\n{_code(_line(view.run_id, state, tags))}")
    return "\n\n".join(paragraphs)


def _line(run_id: str, state: str, tags: Mapping[str, str]) -> str:
    """What one types to go on with the run from where it stands: into a terminal, or into Python if it came there."""
    words = ["python", "-m", "tracked.run", "resume", run_id]
    if SWEEP in tags:
        words += ["--trials", "N"] if state == "finished" else []
    elif EXPERIMENT_FILE not in tags:
        program = program_of(tags)
        if not program:
            return typed(run_id)
        words += ["--", *program]
    else:
        words += {"finished": ["--epochs", "N"], "stopped_early": ["--patience", "K"]}.get(state, [])
    return shlex.join(words)


def typed(run_id: str) -> str:
    """What goes on with a run that somebody began in a shell of Python's own, or in a notebook."""
    return f'with tracked.resume("{run_id}") as run:'


def program_of(tags: Mapping[str, str]) -> list[str]:
    """The program that began a run, as Python was told of it; nothing where somebody typed into Python.

    By its file, or as a module, whose neighbours it may import.
    """
    source = tags.get("mlflow.source.name", "")
    if _NO_FILE.fullmatch(source):
        return []
    module = re.search(r" -\w*m (\S+)", tags.get("mlflow.tracked.command", ""))
    path = PurePath(source)  # without a name where Python was given the folder it stood in
    dotted = ".".join(path.with_suffix("").parts if path.name else ()).removesuffix(".__main__")
    # The option may be the program's own.
    if module and f".{dotted}".endswith(f".{module[1]}"):
        return ["python", "-m", module[1]]
    return ["python", source]


def _code(line: str) -> str:
    """A block of code: by indentation, because a command may hold backticks."""
    return "\n".join(f"    {each}" for each in line.splitlines())
