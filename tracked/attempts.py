"""Who may write a run: a fresh one, or one taken over from an attempt that is over or dead.

The order of taking over is the proof that two processes never write one run, and that nothing an
earlier attempt journaled is lost: lock on this machine, drain its spool, watch the heartbeat,
claim the attempt by a param that can be written once, and only then read checkpoint and history.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tracked import delivery, sender, spool
from tracked.address import redact
from tracked.checkpoint import load
from tracked.errors import (
    CheckpointError,
    NoSuchRun,
    RecordRejected,
    RunNotFound,
    RunNotResumable,
    RunTaken,
    ServerError,
    ServerUnavailable,
)
from tracked.names import (
    ATTEMPT,
    CHECKPOINT,
    COMMAND,
    FILE,
    FORKED_FROM,
    HANDLE,
    HEARTBEAT,
    HOLDER,
    OURS,
    RUN_KEY,
    STATE,
    STOP_REASON,
    attempt_param,
    folder_name,
    is_system,
    newest_attempt,
    step_of,
)
from tracked.pipe import Attempt, shown_params
from tracked.place import Place
from tracked.points import Replay
from tracked.resumption import pointer_in
from tracked.spool import Lock, Outbox, RunFolder, read_json, write_json
from tracked.tracking import host_and_process

if TYPE_CHECKING:
    from tracked.server import RunView, Server

T = TypeVar("T")
Say = Callable[[str], None]


def begin(
    place: Place,
    *,
    experiment: str,
    name: str | None,
    tags: Mapping[str, str],
    params: dict[str, Any],
    handle: str | None = None,
    may_exist: bool = False,
) -> Attempt:
    """A new run, known by a local handle until the server has given it an ID.

    Args:
        place: Where it is to stand.
        experiment: Name of the MLflow experiment.
        name: Of the run; the server invents one for None.
        tags: That the run has from the start.
        params: Flat hyperparameters.
        handle: A UUID that nobody has begun a run with; a new one by default.
        may_exist: Whether another machine may have begun it all the same; the server is asked before it makes one.

    Raises:
        ParamError: A name that MLflow refuses.
        RunTaken: A process on this machine has the run of that handle.
    """
    shown_params(params)  # refused here, there is no run that has failed
    outbox = place.start_sender()
    handle, nonce = handle or uuid.uuid4().hex, uuid.uuid4().hex
    folder = outbox.run(handle)
    folder.make()
    lock = Lock(folder.lock)
    if not lock.acquire({**_holder(), "key": tags.get(RUN_KEY, "")}):
        raise _taken(handle, read_json(folder.lock).get("holder", "a process on this machine"))
    start = {
        "run_id": None,
        "experiment": experiment,
        "name": name,
        "start_time": int(time.time() * 1000),
        "tags": {**tags, **_running(1)},
        "attempt": 1,
        "nonce": nonce,
        "may_exist": may_exist,
    }
    return Attempt(outbox, place.tracking_uri, folder, lock, 1, nonce, start, params)


def begin_or_take_over(
    place: Place,
    handle: str,
    say: Say,
    *,
    experiment: str,
    name: str | None,
    tags: Mapping[str, str],
    params: dict[str, Any],
    before_claim: Callable[[RunView], None] = lambda _: None,
) -> tuple[Attempt, RunView]:
    """The next attempt of the run with this handle, whatever became of those before, if there were any.

    It goes on from the last checkpoint; where the run has none, or is not even on the server, it begins. Arguments
    as those of `begin` and `take_over`; the server is waited for without an end.

    Raises:
        RunTaken: Another process holds it, or was quicker.
        CheckpointError: None of its checkpoints is whole.
    """
    from tracked.server import Server

    shown_params(params)
    server = Server(place.tracking_uri)
    ask = Asking(say, math.inf)
    drain(place, local_runs(place, handle), say, patience=math.inf)
    if ask(lambda: server.find_by_handle(handle)) is None:
        created = ask(
            lambda: server.create_run(
                experiment=experiment,
                handle=handle,
                name=name,
                start_time=int(time.time() * 1000),
                tags={**tags, STATE: "crashed"},
            )
        )
        # Nobody's yet: whoever claims it first has it, without watching for a heartbeat that cannot come.
        ask(lambda: server.set_status(created.run_id, "FAILED"))
    return take_over(place, handle, say, before_claim=before_claim, patience=math.inf, anew=params)


def rehearse(root: Path, params: dict[str, Any], restored: dict[str, Any] | None = None) -> Attempt:
    """An attempt in a spool of its own at `root`, fresh or from `restored`, that is never delivered."""
    folder = RunFolder(root / "runs" / uuid.uuid4().hex)
    folder.make()
    lock = Lock(folder.lock)
    lock.acquire()
    number, nonce = 1 if restored is None else 2, uuid.uuid4().hex
    start: dict[str, Any] = {"run_id": None}
    return Attempt(
        Outbox(root), "", folder, lock, number, nonce, start, params, restored=restored, delivers=False
    )


def take_over(
    place: Place,
    word: str,
    say: Say,
    *,
    before_claim: Callable[[RunView], None] = lambda _: None,
    patience: float = 60.0,
    anew: dict[str, Any] | None = None,
) -> tuple[Attempt, RunView]:
    """The next attempt of an existing run, with the state of its last checkpoint.

    Args:
        place: Where the run stands.
        word: ID, unique prefix of an ID, local handle, or `last`.
        say: Told what is waited for.
        before_claim: May still refuse, by raising, with nothing changed.
        patience: Seconds to wait for a server that does not answer.
        anew: Params with which it begins from the start where it has no checkpoint yet; None refuses that.

    Raises:
        RunNotFound: There is no such run, or several.
        RunNotResumable: It has no checkpoint, or was not made by this package.
        RunTaken: Another process holds it, or was quicker.
        CheckpointError: None of its checkpoints is whole.
        ServerError: The server did not answer as it should.
    """
    from tracked.server import Server

    server = Server(place.tracking_uri, create=False)
    ask = Asking(say, patience)
    outbox = place.start_sender()
    drain(place, local_runs(place, word), say)
    view = ask(lambda: find_run(server, word))
    handle = view.tags.get(HANDLE)
    if handle is None or not re.fullmatch(r"[0-9a-f]{32}", handle):
        raise RunNotResumable(
            f"run {view.run_id} was not made by this package: it has no tag {HANDLE}",
            expected="a run of `python -m tracked.run train`, or of tracked.start()",
            try_next=f"python -m tracked.run resume {view.run_id} -- COMMAND, with an address that begins with tracked+"
            if pointer_in(view.tags)
            else "python -m tracked.run list",
        )
    folder = outbox.run(handle)
    folder.make()
    lock = Lock(folder.lock)
    if not lock.acquire(_holder()):
        raise _taken(view.run_id, read_json(folder.lock).get("holder", "a process on this machine"))
    try:
        local = [each for box in spool.outboxes(place.spool) for each in box.runs() if each.handle == handle]
        drain(place, local, say)
        known = str(folder.about.get("claimed", ""))  # by a process here, which is over: its lock is ours
        view = ask(lambda: watch(server, view.run_id, say, known))
        before_claim(view)
        silent = _is_silent(view, known)
        if silent and ask(lambda: server.get_run(view.run_id)).status == "RUNNING":
            raise _taken(view.run_id, "another process, which was quicker")
        if pointer_in(view.tags) is None and anew is None:
            raise _no_checkpoint(view)
        number, nonce = newest_attempt(view.params)[0] + 1, uuid.uuid4().hex
        write_json(folder.path / "run.json", {**folder.about, "claimed": nonce})
        ask(lambda: _claim(server, view.run_id, number, nonce))
        if silent:
            # Its sender, if it lives, looked at the run a moment ago and may send for a while.
            time.sleep(delivery.grace_seconds())
        # From here on nobody else adds points, so what stands there now is all there will be.
        seen, view = view, ask(lambda: server.get_run(view.run_id))
        if COMMAND in view.tags:
            # It was for an attempt that is over; what comes from here on is for this one.
            ask(lambda: server.drop_tag(view.run_id, COMMAND))
        state = None
        if pointer_in(view.tags) is not None:
            state = ask(lambda: restore(server, view, folder, say))
        last = {} if state is None else state["points"]["last"]
        replay = ask(lambda: _beyond(server, view, last))
    except BaseException:
        lock.release()
        raise
    start = {"run_id": view.run_id, "tags": _running(number), "attempt": number, "nonce": nonce}
    samples = [latest.step + 1 for key, latest in view.latest.items() if is_system(key)]
    found = Attempt(
        outbox,
        place.tracking_uri,
        folder,
        lock,
        number,
        nonce,
        start,
        (anew or {}) if state is None else state["params"],
        {} if state is None else state["about"],
        state,
        replay,
        (_state(seen), seen.tags.get(STOP_REASON, "")),
        first_sample=max(samples, default=0),
    )
    return found, view


def _state(view: RunView) -> str:
    """The state of a run that nobody trains."""
    state = view.tags.get(STATE, "running")
    return "crashed" if state == "running" else state


def find_run(server: Server, word: str) -> RunView:
    """The run that `word` means: ID, unique prefix, handle, name, or `last`.

    Raises:
        RunNotFound: None, or more than one.
    """
    if word == "last":
        found = server.search(filter=OURS, limit=1)
    else:
        found = server.find(word)
    if len(found) == 1:
        return found[0]
    if found:
        raise RunNotFound(
            f"{word!r} may mean {len(found)} runs: {', '.join(run.run_id[:8] for run in found[:5])} …",
            expected="an ID, or enough of its first characters",
            try_next="python -m tracked.run list",
        )
    raise RunNotFound(
        f"there is no run {word!r} on {server.place}",
        expected="a run ID, at least 4 characters of one, a local handle, or `last`",
        try_next="python -m tracked.run list",
    )


def local_runs(place: Place, word: str) -> list[RunFolder]:
    """What this machine's spool holds of the run that `word` means; for `last`, all that waits to be delivered."""
    boxes = list(spool.outboxes(place.spool))
    if word == "last":
        # Any of them may be the last run, which the server alone can tell once it has them.
        here = [box for box in boxes if box.tracking_uri == redact(place.tracking_uri)]
        waiting = [run for box in here for run in box.runs() if run.journals()]
        return [run for run in waiting if not any(spool.is_held(path / "lock") for path in run.journals())]
    if len(word) < 4:
        return []
    runs = [run for box in boxes for run in box.runs()]
    return [
        run
        for run in runs
        if run.handle.startswith(word) or str(run.about.get("run_id", "")).startswith(word)
    ]


def drain(place: Place, runs: list[RunFolder], say: Say, *, patience: float = 600.0) -> None:
    """Wait until nothing of these runs is left to deliver, original timestamps and all."""
    for run in runs:
        outbox = Outbox(run.path.parent.parent)
        # The spool does not keep a password that stands in the address.
        same = outbox.tracking_uri == redact(place.tracking_uri)
        uri = place.tracking_uri if same else outbox.tracking_uri
        told, deadline = "", time.monotonic() + patience
        while journals := run.journals():
            held = [path for path in journals if spool.is_held(path / "lock")]
            if held:
                raise _taken(
                    run.about.get("run_id", run.handle), read_json(run.lock).get("holder", "a process here")
                )
            sender.ensure(outbox, uri)
            text = f"delivering what an earlier attempt left in the spool … {run.about.get('trouble', '')}".strip()
            if text != told:
                say(text)
                told = text
            if time.monotonic() > deadline:
                raise ServerUnavailable(
                    f"what an earlier attempt left in the spool could not be delivered: {run.about.get('trouble')}",
                    try_next="python -m tracked.run sync",
                )
            time.sleep(0.05)


def watch(server: Server, run_id: str, say: Say, known: str = "") -> RunView:
    """The run, once nobody trains it: it has ended, or its heartbeat stands still on our own clock.

    Args:
        server: Where it stands.
        run_id: Its ID.
        say: Told what is waited for.
        known: The nonce of an attempt that is over for certain.

    Raises:
        RunTaken: Somebody does.
    """
    view = server.get_run(run_id)
    seen, deadline = view.tags.get(HEARTBEAT), time.monotonic() + delivery.watch_seconds()
    if view.status == "RUNNING" or _is_silent(view, known):
        found = "marked as running" if view.status == "RUNNING" else "claimed by an attempt that is silent"
        say(f"the run is {found}; watching for {delivery.watch_seconds():g} s whether somebody trains it")
    while (view.status == "RUNNING" or _is_silent(view, known)) and time.monotonic() < deadline:
        time.sleep(min(1.0, delivery.watch_seconds() / 4))
        view = server.get_run(run_id)
        if view.tags.get(HEARTBEAT) != seen and view.status == "RUNNING":
            raise _taken(run_id, view.tags.get(HOLDER, "a process elsewhere"))
    return view


def _is_silent(view: RunView, known: str) -> bool:
    """Whether the newest attempt has claimed the run, and said nothing yet: it is loading, or was killed then."""
    number, nonce = newest_attempt(view.params)
    return nonce != known and str(number) != view.tags.get(ATTEMPT, "1")


def _claim(server: Server, run_id: str, number: int, nonce: str) -> None:
    try:
        server.log_params(run_id, {attempt_param(number): nonce})
    except RecordRejected:
        raise _taken(run_id, "another process, which asked at the same time") from None


def _taken(run_id: str, holder: str) -> RunTaken:
    return RunTaken(
        f"run {run_id} is being trained by {holder}",
        expected="a run that nobody is training",
        try_next=f"python -m tracked.run show {run_id}, or, to have it left: python -m tracked.run pause {run_id}",
    )


def restore(
    server: Server, view: RunView, folder: RunFolder, say: Say, *, step: int | None = None
) -> dict[str, Any]:
    """The newest checkpoint that verifies, or the one at `step`, from the run's folder or downloaded into it.

    Raises:
        RunNotResumable: The run names no checkpoint.
        CheckpointError: None is whole, or none is at `step`.
    """
    pointer = pointer_in(view.tags)
    if pointer is None:
        raise _no_checkpoint(view)
    candidates = dict(_candidates(server, view, folder, pointer))
    if step is not None and step not in candidates:
        nearest = min(sorted(candidates), key=lambda at: abs(at - step))
        raise CheckpointError(
            f"run {view.run_id} has no committed checkpoint of step {step}",
            expected=f"one of {', '.join(map(str, sorted(candidates)))}",
            try_next=f"--step {nearest}, which is the nearest",
        )
    reasons = []
    for at in candidates if step is None else [step]:
        local, sha256 = folder.checkpoints / folder_name(at) / FILE, candidates[at]
        try:
            try:
                state = load(local, sha256)
            except CheckpointError:
                # Missing or damaged here: the server has it too.
                server.download(view.run_id, f"checkpoints/{folder_name(at)}/{FILE}", local)
                state = load(local, sha256)
        except CheckpointError as error:
            reasons.append(f"step {at}: {error.found}")
            if step is None:
                say(f"checkpoint of step {at} cannot be used ({error.found}); looking for an earlier one")
            continue
        return state
    raise CheckpointError(
        f"no checkpoint of run {view.run_id} is whole: {'; '.join(reasons)}",
        expected="one file whose SHA-256 is the recorded one",
        try_next=f"python -m tracked.run verify {view.run_id}",
    )


def fetch_best(place: Place, view: RunView, attempt: Attempt, say: Say) -> None:
    """Have the best checkpoint here, whose weights are those of the model, and restored when patience is out."""
    from tracked.server import Server

    assert attempt.restored is not None
    step = attempt.restored["stopping"]["best_step"]
    if step in (0, attempt.restored["step"]):
        return
    server = Server(place.tracking_uri, create=False)
    try:
        Asking(say, 60.0)(lambda: restore(server, view, attempt.folder, say, step=step))
    except (CheckpointError, ServerError) as error:
        say(f"the best checkpoint, of step {step}, cannot be fetched: {error.found}")


def _no_checkpoint(view: RunView) -> RunNotResumable:
    again = "the same `train` line again, for a new run"
    if forked := json.loads(view.tags.get(FORKED_FROM, "{}")):
        again = f"python -m tracked.run fork {forked['run_id']} --step {forked['step']}"
        again += " with the same values, for a new run" if forked["params"] or forked["settings"] else ""
    return RunNotResumable(
        f"run {view.run_id} has no checkpoint (state: {view.tags.get(STATE, view.status)})",
        expected=f"a tag {CHECKPOINT}; it is set when the first checkpoint is on the server",
        try_next=again,
    )


def _candidates(
    server: Server, view: RunView, folder: RunFolder, pointer: dict[str, Any]
) -> list[tuple[int, str]]:
    """Steps and hashes, the committed one first, then what is older, newest first."""
    found = {int(pointer["step"]): str(pointer["sha256"])}
    names = {*server.directories(view.run_id, "checkpoints")}
    names |= {path.name for path in folder.checkpoints.iterdir()}
    for name in names:
        step = step_of(name)
        if step is None or step >= pointer["step"]:
            continue
        local = folder.checkpoints / name / "manifest.json"
        if not local.exists():
            try:
                server.download(view.run_id, f"checkpoints/{name}/manifest.json", local)
            except CheckpointError:
                continue
        sha256 = read_json(local).get("sha256")
        if isinstance(sha256, str):
            found[step] = sha256
    return sorted(found.items(), reverse=True)


def _beyond(server: Server, view: RunView, last: Mapping[str, tuple[int, float]]) -> Replay:
    """Every point that stands on the server beyond the checkpoint's last one of the same key."""
    # Not beyond its step: what is logged one step late has fewer points there.
    known = {key: last[key][0] if key in last else -math.inf for key in view.latest}
    return {
        key: {at: value for at, _, value in server.history(view.run_id, key) if at > known[key]}
        for key, latest in view.latest.items()
        if latest.step > known[key] and not is_system(key)
    }


class Asking:
    """Asks a server that may be away for a moment, for as long as a user would wait."""

    def __init__(self, say: Say, patience: float) -> None:
        self._say = say
        self._patience = patience

    def __call__(self, question: Callable[[], T]) -> T:
        deadline, told = time.monotonic() + self._patience, False
        while True:
            try:
                return question()
            except NoSuchRun as error:
                raise RunNotFound(error.found, expected=error.expected, try_next=error.try_next) from None
            except ServerUnavailable as error:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    self._say(f"waiting for the server: {error.found}")
                    told = True
                time.sleep(0.5)


def _holder() -> dict[str, str]:
    return {"holder": host_and_process()}


def _running(attempt: int) -> dict[str, str]:
    return {STATE: "running", ATTEMPT: str(attempt), HOLDER: host_and_process()}
