"""Where a study is kept: a journal file, SQLite, or PostgreSQL.

    mlruns/studies.journal              unless another is named; any number of processes of one machine
    sqlite:///FILE                      one process alone, because SQLite hands a waiting trial to two
    postgresql+psycopg://USER@HOST/DB   any number of processes on any number of machines

All three are Optuna's own formats, which `optuna-dashboard` opens as they are.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from tracked.address import redact
from tracked.errors import SpoolError, StorageError, StudyTaken, UsageError
from tracked.spool import Lock, read_json

_SQLITE = "sqlite:///"
_ACCEPTED = "sqlite:///FILE.db, or postgresql+psycopg://USER:PASSWORD@HOST:PORT/DATABASE"
_POSTGRESQL_LINE = "--storage postgresql+psycopg://USER@HOST/NAME"
_DRIVERS = ("psycopg", "psycopg2")
# A server that restarts is back within this time; longer, and whoever waits should be told.
_RESTART_SECONDS = 60.0
# Newcomers take turns in making the tables. Any number does that nobody else locks.
_TABLES_LOCK = 7_233_942_001


@dataclass
class StudyStorage:
    """An open storage; use it in a `with` block, or call `close`.

    Attributes:
        backend: For `optuna.create_study(storage=…)` and `optuna.load_study(storage=…)`.
        shown: Where it is, without user or password: fit for tags, logs and `optuna-dashboard`.
        is_private: Whether this process has it alone, so that workers must go through this one.
    """

    backend: BaseStorage
    shown: str
    is_private: bool
    _closing: tuple[Callable[[], object], ...] = ()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what the storage may raise at any moment into an error of ours.

        Raises:
            StorageError: It cannot be used any more.
        """
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError) as error:
            raise _unusable(self.shown, error) from None

    def close(self) -> None:
        """Let go of connections and of the file; closing twice is fine."""
        for each in self._closing:
            each()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_storage(url: str | None, *, default: Path) -> StudyStorage:
    """Open the storage at `url`, made if it is not there; a PostgreSQL database must exist.

    Args:
        url: ``sqlite:///FILE`` or ``postgresql+psycopg://…``; None stands for the journal file.
        default: The journal file.

    Raises:
        UsageError: The address cannot work, or its driver is not installed.
        StudyTaken: Another process has the SQLite file.
        StorageError: The storage cannot be reached, or what is there is no study's storage.
    """
    if url is None:
        return _open_journal(default)
    scheme = url.strip().partition("://")[0].lower()
    if scheme == "sqlite":
        return _open_sqlite(url.strip())
    if scheme in ("postgresql", *(f"postgresql+{driver}" for driver in _DRIVERS)):
        return _open_postgresql(url.strip())
    raise UsageError(
        f"a study cannot be kept in {redact(url)!r}",
        expected=_ACCEPTED,
        try_next="leave --storage out: the study is then kept in a file that all processes of this machine share",
    )


# --- The journal file -------------------------------------------------------------------------

_appending = threading.Lock()
# A process that is forked while another thread appends must not inherit a lock that nobody frees.
os.register_at_fork(before=_appending.acquire, after_in_parent=_appending.release)
os.register_at_fork(after_in_child=_appending.release)


class _JournalFile(JournalFileBackend):
    """Optuna's journal file, with a lock and an end that survive SIGKILL.

    Optuna's own locks are files, which outlive their maker: after a SIGKILL everybody waits 30 s. The kernel
    frees this one at once. And Optuna forgives a torn last line only until the next one is appended to it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        # Not ….lock: that is Optuna's own, which the dashboard makes and breaks.
        self._lock_path = path.with_name(f"{path.name}.appending")
        self.append_logs([])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        # Threads take turns first: closing the lock's file drops every POSIX lock this process has on it.
        with _appending, self._lock_path.open("a") as lock, self._path.open("ab+") as file:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines.encode())
            file.flush()
            # A machine without power may forget the last reports of a trial, but no trial and no end of one.
            if any("state" in log or "datetime_start" in log for log in logs):
                os.fsync(file.fileno())


def _open_journal(path: Path) -> StudyStorage:
    path = path.expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                _refuse(path, "is no journal of studies")  # before anything is cut off
        storage = JournalStorage(_JournalFile(path))
        # Optuna overlooks a damaged last line, and then fails for good at the one that is written after it.
        complete = path.read_bytes().rpartition(b"\n")[0]
        json.loads(complete.rpartition(b"\n")[2] or b"{}")
    except OSError as error:
        raise StorageError(
            f"the studies at {path} cannot be kept: {error.strerror or error}",
            expected="a file on a disk with free space that you may write to",
            try_next=f"ls -ld {path.parent}, or {_POSTGRESQL_LINE}",
        ) from error
    except (ValueError, KeyError, TypeError, AssertionError):
        _refuse(path, "has lines that are no journal's")
    return StudyStorage(storage, str(path), is_private=False)


def _refuse(path: Path, what: str) -> NoReturn:
    raise StorageError(
        f"{path} {what}",
        expected="a file that only tracked, Optuna and optuna-dashboard have written to",
        try_next=f"mv {path} {path}.damaged, and resume the sweep: its study is made again from its runs",
    ) from None


# --- SQLite -----------------------------------------------------------------------------------


def _open_sqlite(url: str) -> StudyStorage:
    name = url[len(_SQLITE) :]
    if not url.lower().startswith(_SQLITE) or name in ("", ":memory:") or "?" in name:
        raise UsageError(
            f"the storage {url!r} names no file",
            expected="sqlite:///FILE.db, without options: a study in memory could not be resumed",
            try_next="--storage sqlite:///mlruns/study.db",
        )
    path = Path(name).expanduser().resolve()  # one lock, whatever name the file goes by
    if path.is_dir() or not path.parent.is_dir():
        missing = "is a folder" if path.is_dir() else "cannot be made: its folder does not exist"
        raise UsageError(
            f"{path} {missing}",
            expected="the path of a file in a folder that is there",
            try_next=f"--storage {_SQLITE}{path}/study.db" if path.is_dir() else f"mkdir -p {path.parent}",
        )
    shown = f"{_SQLITE}{path}"
    lock = Lock(path.with_name(f"{path.name}.lock"))
    try:
        taken = not lock.acquire({"storage": shown})
    except SpoolError as error:
        raise _unusable(shown, error) from None
    if taken:
        raise StudyTaken(
            f"process {read_json(lock.path).get('pid', 'unknown')} has the study in {path}",
            expected="one process: two that share an SQLite file are handed the same trial",
            try_next=f"wait for its end, or share a PostgreSQL database: {_POSTGRESQL_LINE}",
        )
    try:
        with _ours(shown), _probe(make_url(shown), {}) as probe:
            _refuse_foreign(probe, shown)
        with _ours(shown):
            storage = RDBStorage(
                _untemplated(shown), engine_kwargs={"pool_events": [(_without_fsync, "connect")]}
            )
    except BaseException:
        lock.release()
        raise
    closing = (storage.remove_session, storage.engine.dispose, lock.release)
    return StudyStorage(get_storage(storage), shown, is_private=True, _closing=closing)


def _without_fsync(connection: Any, _: object) -> None:
    """A killed process loses nothing; a machine without power may lose its last transactions, never the file."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


# --- PostgreSQL -------------------------------------------------------------------------------


def _open_postgresql(text: str) -> StudyStorage:
    url = _parsed(text)
    shown = _shown(url)
    connect_args = {
        "connect_timeout": 10,
        "application_name": "tracked",
        # A machine that vanishes without a word is noticed within a minute, not after two hours.
        "keepalives_idle": 20,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    with _ours(shown), _probe(url, connect_args) as probe:
        # Held until the probe's connection closes: two newcomers would make the tables at once.
        probe.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_TABLES_LOCK})"))
        _refuse_foreign(probe, shown)
        storage = RDBStorage(
            _untemplated(url.render_as_string(hide_password=False)),
            engine_kwargs={
                "connect_args": connect_args,
                "pool_pre_ping": True,  # a connection that a restart has cut is replaced before its use
                "pool_size": 2,  # each costs the server a process
            },
        )
    sqlalchemy.event.listen(storage.engine, "do_connect", _connect_patiently)
    closing = (storage.remove_session, storage.engine.dispose)
    return StudyStorage(get_storage(storage), shown, is_private=False, _closing=closing)


def _parsed(text: str) -> URL:
    """A PostgreSQL address with a driver that is installed."""
    scheme, _, rest = text.partition("://")
    user = rest.rpartition("@")[0]
    if any(mark in user for mark in "@/?#"):
        raise UsageError(
            f"the storage {redact(text)!r} cannot be told from its password",
            expected="a user and a password in which @ is written %40, / %2F, ? %3F and # %23",
            try_next="python -c 'import getpass, urllib.parse as u; print(u.quote(getpass.getpass(), safe=\"\"))'",
        )
    driver = scheme.lower().partition("+")[2]
    if not driver:
        driver = next(filter(importlib.util.find_spec, _DRIVERS), _DRIVERS[0])
    if importlib.util.find_spec(driver) is None:
        raise _no_driver(driver)
    try:
        return make_url(f"postgresql+{driver}://{rest}")
    except (SQLAlchemyError, ValueError):
        # Nothing of it is shown: where the host was forgotten, the password stands in its place.
        raise UsageError(
            f"the storage {scheme}://… cannot be read",
            expected=_ACCEPTED,
            try_next=_POSTGRESQL_LINE,
        ) from None


def _shown(url: URL) -> str:
    # The query may hold a password too; of all it can hold, these say where.
    where = {key: value for key, value in url.query.items() if key in ("host", "port")}
    return URL.create(
        url.drivername, host=url.host, port=url.port, database=url.database, query=where
    ).render_as_string()


def _no_driver(driver: str) -> UsageError:
    package = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"}[driver]
    return UsageError(
        f"PostgreSQL needs {driver}, which is not installed",
        expected="a driver for PostgreSQL beside Optuna",
        try_next=f"pip install '{package}'",
    )


def _connect_patiently(dialect: Any, _: object, args: Any, kwargs: Any) -> Any:
    """Connect once the server is back, if it restarts; nothing was sent yet, so trying again is safe."""
    deadline = time.monotonic() + _RESTART_SECONDS
    while True:
        try:
            return dialect.connect(*args, **kwargs)
        except dialect.loaded_dbapi.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


# --- Both databases ---------------------------------------------------------------------------


@contextmanager
def _probe(url: URL, connect_args: dict[str, Any]) -> Iterator[sqlalchemy.Connection]:
    """A connection of its own, closed for good afterwards."""
    try:
        engine = sqlalchemy.create_engine(url, poolclass=NullPool, connect_args=connect_args)
    except ImportError:  # psycopg without libpq
        raise _no_driver(url.drivername.partition("+")[2]) from None
    with engine.connect() as connection:
        yield connection


def _refuse_foreign(probe: sqlalchemy.Connection, shown: str) -> None:
    """Optuna would add its tables to MLflow's, and then stumble over the version that both keep."""
    tables = sqlalchemy.inspect(probe).get_table_names()
    if "alembic_version" in tables and "studies" not in tables:
        raise StorageError(
            f"{shown} holds tables of another program: {', '.join(sorted(tables)[:3])} …",
            expected="a database of its own for studies, empty at first",
            try_next=f"createdb NAME, and {_POSTGRESQL_LINE}; or --storage sqlite:///mlruns/study.db",
        )


@contextmanager
def _ours(shown: str) -> Iterator[None]:
    """Turn what the database says into an error of ours; what it was chained to would show more than is fit."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, optuna.exceptions.StorageInternalError, RuntimeError) as error:
        raise _unusable(shown, error) from None


def _unusable(shown: str, error: BaseException) -> StorageError:
    while cause := getattr(error, "orig", None) or error.__cause__:
        error = cause
    said = redact(" ".join(str(error).split()))
    if "optuna storage upgrade" in said:
        return StorageError(
            f"{shown} was written by another version of Optuna",
            expected=f"the tables of Optuna {optuna.__version__}",
            try_next=f"optuna storage upgrade --storage {shown}",
        )
    if shown.startswith(_SQLITE):
        return StorageError(
            f"{shown} cannot be used: {said}",
            expected="a file of Optuna's, or none yet, on a disk with free space that you may write to",
            try_next="another file, as in --storage sqlite:///mlruns/study.db",
        )
    return StorageError(
        f"{shown} cannot be used: {said}",
        expected="a PostgreSQL server that answers there, and a user who may make tables in that database",
        try_next=f"psql {shown.replace('+psycopg2', '').replace('+psycopg', '')}, which says the same or more",
    )


def _untemplated(url: str) -> str:
    """Optuna formats its address, so that braces in the name of a folder would be taken for fields."""
    return url.replace("{", "{{").replace("}", "}}")
