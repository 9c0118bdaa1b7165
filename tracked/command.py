"""Asks a running training, on whatever machine, to checkpoint and leave.

What is asked for is a tag of the run, which the sender beside the training looks at with every
heartbeat; a person may as well set it in MLflow's interface.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from tracked.errors import RunTaken, ServerUnavailable, TrackedError, UsageError
from tracked.inspection import find, folders, is_trained, refuse_foreign, true_state
from tracked.names import COMMAND, HANDLE, HOLDER
from tracked.place import Place
from tracked.spool import RunFolder, read_json

if TYPE_CHECKING:
    from tracked.server import RunView

Say = Callable[[str], None]

_POLL_SECONDS = 0.25
_ENDED = ("paused", "stopped", "finished", "stopped_early")


def ask(
    place: Place,
    word: str,
    command: Literal["pause", "stop"],
    say: Say,
    *,
    wait: bool = True,
    timeout: float = 600.0,
) -> tuple[str, str]:
    """Set the run's command, and wait until its training has left.

    Args:
        place: Where the run stands.
        word: ID, unique prefix of an ID, local handle, name, or `last`.
        command: "pause" (comes back with `resume`) or "stop".
        say: Told what is waited for.
        wait: False returns as soon as the server has taken the command.
        timeout: Seconds to wait; the command stands when they are over.

    Returns:
        The run's ID, and its state: "paused" or "stopped", or as it ended by itself meanwhile.

    Raises:
        RunNotFound: There is no such run, or several.
        RunNotResumable: It was not made by this package.
        UsageError: It is over, or nobody trains it.
        RunTaken: It is still being trained when the time is over.
        ServerError: The server does not answer, or does not have the run yet.
        TrackedError: Its training failed instead.
    """
    from tracked.server import Server

    server = Server(place.tracking_uri, create=False)
    view, local = find(server, place, word, say)
    if not view.status:
        raise _out_of_reach(view, local)
    refuse_foreign(view)
    if (state := true_state(view, local)) != "running":
        raise _nobody(view.run_id, state)
    server.set_tags(view.run_id, {COMMAND: command})
    if not wait:
        return view.run_id, state
    say(
        f"asked run {view.run_id} to {command}; waiting until {view.tags.get(HOLDER, 'its process')} has ended "
        "its step, checkpointed and left (Ctrl-C ends this wait alone)"
    )
    deadline = time.monotonic() + timeout
    while True:
        try:
            state = true_state(server.get_run(view.run_id), folders(place).get(view.tags[HANDLE], []))
        except ServerUnavailable as error:
            state = f"not to be seen: {error.found}"
        else:
            if state not in ("running", "draining"):
                break
        if time.monotonic() > deadline:
            raise RunTaken(
                f"run {view.run_id} is {state} after {timeout:g} s; it stays asked to {command}",
                expected="a training that ends its step, and delivers its checkpoint, in this time",
                try_next=f"python -m tracked.run show {view.run_id}, or a larger --timeout",
            )
        time.sleep(_POLL_SECONDS)
    if state not in _ENDED:
        raise TrackedError(
            f"run {view.run_id} was asked to {command}, and is {state} now",
            expected="a training that checkpoints and leaves",
            try_next=f"python -m tracked.run resume {view.run_id}, from its last checkpoint",
        )
    return view.run_id, state


def _out_of_reach(view: RunView, local: Sequence[RunFolder]) -> TrackedError:
    """The error for a run that the server does not show: what is asked for goes by way of the server."""
    name = view.run_id or view.tags[HANDLE]
    trained = next((run for run in local if is_trained(run)), None)
    if trained is None:
        return _nobody(name, "waiting in the spool for its server")
    # An interrupt, because it also pauses a script, which SIGTERM or SIGUSR1 would kill.
    return ServerUnavailable(
        f"run {name} is not to be seen on its server, by way of which its training would be asked",
        expected="a server that answers, and has the run",
        try_next=f"kill -INT {read_json(trained.lock).get('pid', 'PID')}   (its training is on this machine)",
    )


def _nobody(run_id: str, state: str) -> UsageError:
    over = state in ("finished", "stopped_early", "stopped", "pruned", "draining")
    return UsageError(
        f"run {run_id} is {state}: nobody is training it",
        expected="a run that is being trained",
        try_next=f"python -m tracked.run {'show' if over else 'resume'} {run_id}",
    )
