"""Where journals and checkpoints lie on this machine, and who holds them.

    SPOOL/HOST-BOOT/TARGET/          an outbox: all that goes from this machine to one tracking URI
        target.json  sender.lock  sender.log
        runs/HANDLE/                 a run, whichever attempts it had on this machine
            run.lock                 held by the process that trains
            run.json                 what the sender knows: run ID, points acknowledged, trouble
            checkpoints/step-00000938/{checkpoint.pt, manifest.json}
            attempt-0001-NONCE/      a journal (see `journal`), gone once it is delivered
        calls/RUN-ID/                a run that other MLflow code writes; gone once all is delivered
            run.json  wanted         the latter is touched by who waits for the delivery
            calls-NANOSECONDS-PID/   the journal of one process

Locks are POSIX record locks (`fcntl.lockf`): DataLoader workers, which are forked, do not inherit
them, so they are free as soon as the process that took them is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracked.address import redact
from tracked.errors import SpoolError
from tracked.provenance import boot_id, host_name

_held_here: set[str] = set()
_TRIES = 5
_WANTED_SECONDS = 2.0


class Lock:
    """An exclusive lock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self, about: dict[str, Any] | None = None) -> bool:
        """Take the lock if it is free, and say in the file who holds it.

        Raises:
            SpoolError: The file cannot be opened.
        """
        # Opening and closing a file drops every POSIX lock this process has on it.
        if str(self.path) in _held_here:
            return False
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise unusable(self.path, error) from error
        for remaining in reversed(range(_TRIES)):
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    os.close(fd)
                    raise unusable(self.path, error) from error
            if not remaining:
                os.close(fd)
                return False
            time.sleep(0.01)  # `is_held` has the lock for a moment, when somebody asks
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({"pid": os.getpid(), **(about or {})}).encode())
        self._fd = fd
        _held_here.add(str(self.path))
        return True

    def is_in_place(self) -> bool:
        """Whether the path still names the locked file: a spool may be deleted under its holder."""
        try:
            return self._fd is not None and os.path.samestat(self.path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def moved(self, path: Path) -> None:
        """The locked file has been renamed to `path`; the lock goes with it."""
        _held_here.discard(str(self.path))
        self.path = path
        _held_here.add(str(path))

    def release(self) -> None:
        if self._fd is not None:
            _held_here.discard(str(self.path))
            os.close(self._fd)
            self._fd = None


def is_held(path: Path) -> bool:
    """Whether a living process (this one included) holds the lock at `path`."""
    if str(path) in _held_here:
        return True
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unusable(path, error) from error
    try:
        # Shared, so that of two who ask at the same moment neither takes the other for a holder.
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if the file is missing or torn."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step, so that a reader sees the old object or the new one."""
    fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(value, file)
        Path(temp).replace(path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise


def fsync_directory(path: Path) -> None:
    """Make renames and new names in `path` survive a crash of the machine."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def unusable(path: Path, error: OSError) -> SpoolError:
    """The error for a spool that the system refuses to read or write."""
    return SpoolError(
        f"the spool at {path} cannot be used: {error.strerror or error}",
        expected="a folder on a disk with free space that you may write to",
        try_next="free some space (`python -m tracked.run gc`), or name another folder with --spool-dir",
    )


@dataclass(frozen=True)
class RunFolder:
    """What this machine keeps of one run."""

    path: Path

    @property
    def handle(self) -> str:
        return self.path.name

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def about(self) -> dict[str, Any]:
        """What the sender last wrote down: run_id, url, points, committed, trouble."""
        return read_json(self.path / "run.json")

    def journals(self) -> list[Path]:
        """Journals that are not delivered yet, oldest attempt first."""
        return sorted([*self.path.glob("attempt-*"), *self.path.glob("calls-*")])

    def want(self) -> None:
        """Have the sender send at once what it would gather for a fuller request."""
        with contextlib.suppress(FileNotFoundError):  # all is delivered
            (self.path / "wanted").touch(mode=0o600)

    def is_wanted(self) -> bool:
        """Whether somebody has waited for the delivery within the last seconds."""
        try:
            return time.time() - (self.path / "wanted").stat().st_mtime < _WANTED_SECONDS
        except FileNotFoundError:
            return False

    def make(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise unusable(self.path, error) from error


@dataclass(frozen=True)
class Outbox:
    """All that goes from this machine to one tracking URI."""

    path: Path

    @property
    def sender_lock(self) -> Path:
        return self.path / "sender.lock"

    @property
    def tracking_uri(self) -> str:
        """The address, without any password."""
        return str(read_json(self.path / "target.json").get("tracking_uri", ""))

    def run(self, handle: str) -> RunFolder:
        return RunFolder(self.path / "runs" / handle)

    def runs(self) -> list[RunFolder]:
        return [RunFolder(path) for path in sorted((self.path / "runs").glob("*")) if path.is_dir()]

    def called(self, run_id: str) -> RunFolder:
        """The folder of a run that other MLflow code writes."""
        return RunFolder(self.path / "calls" / run_id)

    def all_called(self) -> list[RunFolder]:
        return [RunFolder(path) for path in sorted((self.path / "calls").glob("*"))]

    def journals(self) -> list[Path]:
        return [journal for run in [*self.runs(), *self.all_called()] for journal in run.journals()]


def root(spool_dir: str | Path | None = None) -> Path:
    """The spool: the given folder, else `TRACKED_SPOOL`, else `mlruns/spool`."""
    return Path(spool_dir or os.environ.get("TRACKED_SPOOL") or "mlruns/spool").absolute()


def open_outbox(spool: Path, tracking_uri: str) -> Outbox:
    """This machine's outbox for `tracking_uri`, made if it is not there.

    Raises:
        SpoolError: The folder cannot be made or written to.
    """
    public = redact(tracking_uri)
    digest = hashlib.sha256(public.encode()).hexdigest()[:12]
    outbox = Outbox(spool / f"{host_name()}-{boot_id()[:8]}" / digest)
    try:
        outbox.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        (outbox.path / "runs").mkdir(exist_ok=True, mode=0o700)
        if outbox.tracking_uri != public:
            write_json(outbox.path / "target.json", {"tracking_uri": public})
        # A file that can be made but not written is how a full disk shows itself.
        with tempfile.TemporaryFile(dir=outbox.path) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise unusable(outbox.path, error) from error
    return outbox


def outboxes(spool: Path) -> Iterator[Outbox]:
    """This host's outboxes, those of earlier boots included: their writers cannot be alive."""
    for machine in sorted(spool.glob(f"{host_name()}-*")):
        for path in sorted(machine.iterdir()):
            if (path / "target.json").is_file():
                yield Outbox(path)
