"""What keeps a place in order: deliver what the spool holds, free what is superseded, show MLflow's UI."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from tracked import inspection, sender, spool
from tracked.address import database, redact
from tracked.errors import ServerError, ServerUnavailable, TrackedError, UsageError
from tracked.inspection import folders, is_trained, waiting_in
from tracked.journal import START, Reader
from tracked.logged_run import left_behind
from tracked.names import CHECKPOINT, FILE, HANDLE, MANIFEST, OURS, SETTINGS, STATE, folder_name, step_of
from tracked.place import Place
from tracked.provenance import boot_id, host_name
from tracked.spool import Lock, Outbox, RunFolder, is_held, read_json
from tracked.tables import readable

if TYPE_CHECKING:
    from tracked.server import RunView, Server

Say = Callable[[str], None]

_POLL_SECONDS = 0.05
_UI_START_SECONDS = 120.0
# Nothing will be added to these, so all that is worth keeping of them is on the server.
_COMPLETE = ("finished", "stopped_early")


# -- sync


def sync(place: Place, timeout: float, say: Say, *, everywhere: bool = True) -> int:
    """Deliver what this host's spool holds, earlier boots included.

    Args:
        place: Names the spool; its address is used, with its password, for the outbox that it belongs to.
        timeout: Seconds to wait.
        say: Told what was delivered, discarded and rejected, and what is in the way.
        everywhere: For whichever server; False: only for that of `place`.

    Returns:
        Points and other records that are still there; those of a run that is being trained do not count.
    """
    waiting = _waiting(place, say, everywhere=everywhere)
    for outbox in spool.outboxes(place.spool):
        for run in outbox.all_called():
            if (file := run.path / "rejected.jsonl").exists():
                say(f"run {_name(run)}: left out, as the server found it invalid: {file}")
    if not waiting:
        say("nothing waits in the spool")
        return 0
    deadline = time.monotonic() + timeout
    while True:
        for each in waiting[:]:
            each.tell(say)
            if each.is_over():
                waiting.remove(each)
        moving = [each for each in waiting if not each.damaged]
        if not moving or time.monotonic() > deadline:
            break
        for each in moving:
            sender.ensure(each.outbox, each.tracking_uri)
        time.sleep(_POLL_SECONDS)
    left = 0
    for each in waiting:
        # One whose sender stands before its very end still has something to say: that the run is over.
        count = max(1, waiting_in(each.journal))
        say(
            f"run {_name(each.run)}: {count} records are not delivered{_because(each.run)}\n"
            f"  they are kept in {each.run.path}; to give them up, delete that folder"
        )
        left += count
    return left


@dataclass
class _Waiting:
    """A journal that no training writes any more, until it is delivered."""

    outbox: Outbox
    run: RunFolder
    journal: Path
    tracking_uri: str
    count: int
    rejected: int
    damaged: bool
    told: str = ""

    def tell(self, say: Say) -> None:
        """Say what is in the way, once for each change."""
        trouble = str(self.run.about.get("trouble", ""))
        if trouble != self.told and self.journal.exists() and not self.damaged:
            self.told = trouble
            if trouble:
                say(f"run {_name(self.run)}: waiting: {trouble}")
            return
        if not self.is_over():
            return
        about = self.run.about
        if about.get("discarded") == self.journal.name:
            say(
                f"run {_name(self.run)}: {self.count} records of an older attempt were discarded: "
                "a newer attempt has taken the run over"
            )
        else:
            say(f"run {_name(self.run)}: {self.count} records were delivered")
        if (rejected := about.get("rejected", 0)) > self.rejected:
            say(
                f"run {_name(self.run)}: the server found {rejected - self.rejected} records invalid: "
                f"{self.run.path / 'rejected.jsonl'}"
            )

    def is_over(self) -> bool:
        return not self.journal.exists()


def _waiting(place: Place, say: Say, *, everywhere: bool) -> list[_Waiting]:
    found = []
    for outbox in spool.outboxes(place.spool):
        # The spool keeps no password; the address that was typed may have one.
        typed = outbox.tracking_uri == redact(place.tracking_uri)
        if not typed and not everywhere:
            continue
        uri = place.tracking_uri if typed else outbox.tracking_uri
        for run in [*outbox.runs(), *outbox.all_called()]:
            if is_trained(run):
                doing = "written" if run.path.parent.name == "calls" else "trained"
                say(f"run {_name(run)} is still being {doing}; its points are delivered as they come")
                continue
            for journal in run.journals():
                damaged = _is_damaged(journal)
                if damaged:
                    say(
                        f"run {_name(run)}: the first record of {journal} is damaged, so it cannot be sent; it is kept"
                    )
                found.append(
                    _Waiting(
                        outbox,
                        run,
                        journal,
                        uri,
                        count=waiting_in(journal),
                        rejected=int(run.about.get("rejected", 0)),
                        damaged=damaged,
                    )
                )
    return found


def _is_damaged(journal: Path) -> bool:
    """Whether the journal has lost the record that says which run it is of."""
    if journal.name.startswith("calls-") or read_json(journal / "start.json"):
        return False  # the folder of calls is named by the run
    first = next(Reader(journal, ("points", "files")).records("points", START), None)
    return first is not None and first.kind != "start"


def _name(run: RunFolder) -> str:
    return str(run.about.get("run_id") or run.handle)


def _because(run: RunFolder) -> str:
    trouble = run.about.get("trouble")
    return f" ({trouble})" if trouble else ""


# -- gc


def gc(place: Place, *, dry_run: bool, say: Say) -> int:
    """Delete what nobody needs any more, in this machine's spool and among the runs' checkpoints.

    What a run's tag names, what a resume could fall back to, and anything of a run that is being trained or
    not delivered yet stays.

    Args:
        place: The server and the spool.
        dry_run: Only say what would be deleted.
        say: Told each thing that is deleted.

    Returns:
        Bytes freed.
    """
    from tracked.server import Server

    waste = _Waste(dry_run, say)
    local = folders(place)
    server: Server | None = Server(place.tracking_uri, create=False)
    views: dict[str, RunView] = {}
    try:
        assert server is not None
        found = server.search(filter=OURS, limit=sys.maxsize)
        views = {view.tags[HANDLE]: view for view in found}
    except ServerError as error:
        say(f"{error.found}; only what this machine knows to be superseded is deleted")
        server = None
    for handle, runs in local.items():
        if any(is_trained(run) or run.journals() for run in runs):
            continue
        for run in runs:
            _clean_folder(run, server, views.get(handle), waste)
    if server is not None:
        for handle, view in views.items():
            if not any(is_trained(run) or run.journals() for run in local.get(handle, [])):
                _clean_server(server, view, waste)
    for outbox in spool.outboxes(place.spool):
        # Which processes of another machine live nobody knows here.
        here = outbox.path.parent.name.startswith(f"{host_name()}-")
        for path in [path for run in outbox.all_called() if here for path in left_behind(run)]:
            waste.delete(path, "left by a program that was killed while it saved")
        if outbox.path.parent.name != f"{host_name()}-{boot_id()[:8]}":
            _clean_outbox(outbox, waste)
    say(f"{'would free' if dry_run else 'freed'} {readable(waste.freed)}")
    return waste.freed


@dataclass
class _Waste:
    dry_run: bool
    say: Say
    freed: int = 0

    def delete(self, path: Path, why: str) -> None:
        size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        self.count(size, str(path), why)
        if not self.dry_run:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def count(self, size: int, what: str, why: str) -> None:
        self.freed += size
        self.say(f"{'would delete' if self.dry_run else 'deleted'} {what} ({readable(size)}): {why}")


def _clean_folder(run: RunFolder, server: Server | None, view: RunView | None, waste: _Waste) -> None:
    lock = Lock(run.lock)
    # Held, so that a resume cannot begin in between.
    if not lock.acquire({"holder": "gc"}):
        return
    try:
        if server is not None and (reason := _needless(run, server, view)):
            waste.delete(run.path, reason)
            return
        about = run.about
        committed, keep = about.get("committed"), about.get("keep")
        for path in sorted(run.checkpoints.iterdir()) if run.checkpoints.is_dir() else []:
            step = step_of(path.name)
            if step is None or committed is None:
                continue
            if step > committed:
                waste.delete(path, "its training died before it could be recorded")
            elif keep is not None and step != committed and step not in keep:
                waste.delete(path, "superseded")
        # With the lock held and no journal left, nobody is writing here.
        for path in [*run.path.glob(".*"), *run.checkpoints.rglob(".*")]:
            waste.delete(path, "left over from a process that was killed")
    finally:
        lock.release()


def _needless(run: RunFolder, server: Server, view: RunView | None) -> str:
    """Why the whole folder can go; empty if it cannot."""
    run_id = run.about.get("run_id")
    if view is None:
        if not run_id:
            return "its training died before it had a run"
        try:
            # A run that is not found is no reason: the database may be the wrong one, or new and empty.
            return "its run was deleted on the server" if server.get_run(run_id).deleted else ""
        except ServerError:
            return ""
    if view.tags.get(STATE) not in _COMPLETE:
        return ""
    pointer = _pointer(view)
    if pointer is not None:
        try:
            found = server.sizes(view.run_id, f"checkpoints/{folder_name(pointer['step'])}").get(FILE)
        except ServerError:
            return ""
        if found != pointer["bytes"]:
            return ""  # what should be on the server is not: this copy may be the last one
    return f"its run is {view.tags[STATE]}, and its checkpoints are on the server"


def _clean_server(server: Server, view: RunView, waste: _Waste) -> None:
    """Delete the run's checkpoints that are superseded, or that a finished run never committed."""
    if _at_rest(view) is None:
        return
    try:
        view = server.get_run(view.run_id)  # it may have been resumed since the list was made
        if (pointer := _at_rest(view)) is None:
            return
        state = view.tags[STATE]
        steps = {
            step
            for name in server.directories(view.run_id, "checkpoints")
            if (step := step_of(name)) is not None
        }
        keep = _kept(server, view, pointer["step"], sorted(step for step in steps if step <= pointer["step"]))
        for step in sorted(steps - keep):
            uncommitted = step > pointer["step"]
            if uncommitted and (state not in _COMPLETE or _at_rest(server.get_run(view.run_id)) != pointer):
                continue  # another machine's spool may still commit it
            path = f"checkpoints/{folder_name(step)}"
            size = sum(server.sizes(view.run_id, path).values())
            if not waste.dry_run:
                server.delete(view.run_id, path)
            why = "never committed" if uncommitted else "superseded"
            waste.count(size, f"{path} of run {view.run_id}", why)
    except ServerError as error:
        waste.say(f"run {view.run_id}: nothing more is deleted on the server: {error.found}")


def _at_rest(view: RunView) -> dict[str, Any] | None:
    """The pointer of a run that nobody trains; None if it has none, or somebody does."""
    running = view.tags.get(STATE, "running") == "running" or view.status == "RUNNING"
    return None if running else _pointer(view)


def _kept(server: Server, view: RunView, committed: int, steps: Sequence[int]) -> set[int]:
    """The steps that the run's own rule keeps, of those that are there; all of them if its rule is not known."""
    settings = inspection.object_in(view.tags.get(SETTINGS))
    if not {"keep_last", "keep_best"} <= settings.keys():
        return set(steps)
    from tracked.pipe import Retention

    retention = Retention(settings["keep_last"], settings["keep_best"], settings.get("mode") or "min")
    keep = {committed}
    with tempfile.TemporaryDirectory(prefix="tracked-gc-") as folder:
        for step in steps:
            try:
                path = server.download(
                    view.run_id, f"checkpoints/{folder_name(step)}/{MANIFEST}", Path(folder) / MANIFEST
                )
            except ServerUnavailable:
                raise
            except TrackedError:
                return set(steps)  # without its manifest nobody knows whether it is the best one
            keep = retention.add({"step": step, "value": read_json(path).get("value")})
    return keep | {committed}


def _clean_outbox(outbox: Outbox, waste: _Waste) -> None:
    """Delete an outbox of an earlier boot that holds nothing any more."""
    if outbox.runs() or outbox.all_called() or is_held(outbox.sender_lock):
        return
    waste.delete(outbox.path, "empty, and of an earlier boot")
    if not waste.dry_run:
        with suppress(OSError):  # others are left in it
            outbox.path.parent.rmdir()


def _pointer(view: RunView) -> dict[str, Any] | None:
    try:
        pointer = json.loads(view.tags[CHECKPOINT])
        return {"step": int(pointer["step"]), "bytes": int(pointer["bytes"])}
    except (KeyError, ValueError, TypeError):
        return None


# -- ui


def ui(place: Place, port: int, say: Say) -> int:
    """Show where MLflow's UI is; for an SQLite file, serve it on this machine until Ctrl-C.

    Raises:
        UsageError: There is no database yet, or the port is taken.
        TrackedError: MLflow's server did not start.
    """
    path = database(place.tracking_uri)
    if path is None:
        say(f"{redact(place.tracking_uri)}  (a server of its own: open it in a browser)")
        return 0
    if not path.is_file():
        raise UsageError(
            f"there is no database {path} yet",
            expected="a run that was logged, or the address of your MLflow server",
            try_next="python -m tracked.run train EXPERIMENT.py, or --tracking-uri",
        )
    address = f"http://127.0.0.1:{port}"
    _check_free(port)
    with tempfile.TemporaryFile() as log:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, _leave)
        server = _start_server(place.tracking_uri, path.parent / "artifacts", port, log)
        try:
            _wait_until_healthy(server, address, log)
            say(f"{address}  (Ctrl-C ends it)")
            server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _end(server)
        raise _did_not_serve(server, log)


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's arguments
    raise KeyboardInterrupt


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"port {port} cannot be used: {getattr(error, 'strerror', None) or error}",
                expected="a free port",
                try_next="python -m tracked.run ui --port 5001",
            ) from None


def _start_server(uri: str, artifacts: Path, port: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(artifacts), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    # Its jobs would be further processes, and nobody here asks for any.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # a group of its own, so that it can be ended whole
    )


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _UI_START_SECONDS
    while True:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:  # noqa: S310
            if answer.status == 200:
                return
        if server.poll() is not None or time.monotonic() > deadline:
            raise _did_not_serve(server, log)
        time.sleep(0.1)


def _did_not_serve(server: subprocess.Popen[bytes], log: IO[bytes]) -> TrackedError:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
    said = log.read().decode(errors="replace").strip()
    return TrackedError(
        f"MLflow's server ended with status {server.poll()} and said:\n{said}",
        expected="a server that keeps running",
        try_next="python -m tracked.run ui --port 5001",
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started."""
    # A second Ctrl-C must not leave half of it behind.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    for how in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
