"""The SQLite file in a server's place: made by one process at a time, read in statements that SQLite is quick at.

Whoever has the address of a server need not import this, which takes MLflow and SQLAlchemy a second.
"""

from __future__ import annotations

import fcntl
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import bindparam, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from tracked.address import redact
from tracked.errors import NoSuchRun, ServerRefused
from tracked.packing import Point
from tracked.transport import first_words, no_answer

# POSIX locks belong to a process: two of its threads would both get one.
_opening = threading.Lock()


class Database:
    """An SQLite file with runs in it. Opens nothing before the first call.

    Args:
        uri: Its tracking URI, normalised.
        path: The same as a path.
        create: Whether a file that does not exist is made.
    """

    def __init__(self, uri: str, path: Path, *, create: bool) -> None:
        self._uri, self._path, self._create = uri, path, create
        self._opened: SqlAlchemyStore | None = None

    def is_absent(self) -> bool:
        """Whether nobody has made it yet, and this is but a reader."""
        return not self._create and not (self._path.is_file() and self._path.stat().st_size)

    @property
    def store(self) -> SqlAlchemyStore:
        if self._opened is None:
            if self.is_absent():
                raise NoSuchRun(f"there is no database {self._path}", expected="a database with runs in it")
            self._opened = open_database(self._uri, self._path)
        return self._opened

    def registry(self) -> Registry:
        # Where the database makes a version it asks MLflow for the model, at the address of the whole process.
        mlflow.set_tracking_uri(self._uri)
        return Registry(self._uri)

    def histories(self, run_ids: Sequence[str], key: str) -> dict[str, list[tuple[int, int, float]]]:
        """The points of a key in many runs as (step, timestamp, value), in that order.

        In one statement: for each of MLflow's own, SQLite reads the key's points in all runs there are.
        """
        found: dict[str, list[tuple[int, int, float]]] = {run_id: [] for run_id in run_ids}
        statement = text(
            "SELECT run_uuid, step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics "
            # The plus keeps SQLite from the index that begins with the key.
            "WHERE run_uuid IN :runs AND +key = :key ORDER BY run_uuid, step, timestamp"
        ).bindparams(bindparam("runs", expanding=True))
        asked = {"runs": [*run_ids], "key": key}
        with self.store.engine.connect() as connection:
            for run_id, step, timestamp, value in connection.execute(statement, asked):
                found[run_id].append((step, timestamp, math.nan if value is None else value))
        return found

    def points_at(self, run_id: str, step: int) -> list[Point]:
        """What a run has logged at a step, in the order of the keys."""
        statement = text(
            "SELECT key, step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END FROM metrics "
            "WHERE run_uuid = :run AND step = :step ORDER BY key"
        )
        with self.store.engine.connect() as connection:
            return [
                (key, at, timestamp, math.nan if value is None else value)
                for key, at, timestamp, value in connection.execute(statement, {"run": run_id, "step": step})
            ]

    @contextmanager
    def translated(self) -> Iterator[None]:
        """SQLAlchemy's errors made ours."""
        place = redact(self._uri)
        try:
            yield
        except OperationalError as error:
            raise no_answer(place, str(error.orig)) from None
        except SQLAlchemyError as error:
            raise ServerRefused(
                f"{place} cannot be used: {first_words(str(error))}", expected="a database made by MLflow"
            ) from None

    def close(self) -> None:
        """Close idle connections. The object can be used again."""
        if self._opened:
            self._opened.engine.dispose()


def open_database(uri: str, path: Path) -> SqlAlchemyStore:
    """MLflow's store on a file, made if need be: by one process, for two at once would crash each other."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opening, _locked(path.with_name(f"{path.name}.lock")):
            artifacts = str(path.parent / "artifacts")
            if not path.exists():
                _make_database(path, artifacts)
            return SqlAlchemyStore(uri, artifacts)
    except OSError as error:
        raise ServerRefused(
            f"{path} cannot be opened: {error.strerror}", expected="a folder that can be written"
        ) from error


def _make_database(path: Path, artifacts: str) -> None:
    """A database with all its tables, under its name only once it is whole: MLflow cannot mend half of one."""
    newborn = path.with_name(f".{path.name}.new")
    newborn.unlink(missing_ok=True)
    SqlAlchemyStore(f"sqlite:///{newborn}", artifacts).engine.dispose()
    newborn.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        lock = path.open("a")
    except PermissionError:
        yield  # a reader in a folder that is not its own
        return
    with lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
