"""Fixtures that several test files share: MLflow servers, PostgreSQL, and folders in which commands run."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.nursery import Nursery
from tests.postgres import Postgres
from tests.processes import Workplace, wait_until
from tests.servers import MlflowServer, end_group

# Two tests run at a time, on machines with two cores: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_SHARED = "shared-server.json"
_SHARED_POSTGRES = "shared-postgres.json"


def _children() -> set[psutil.Process]:
    """The processes of this one that still run, but for what `multiprocessing` keeps for its own use."""
    living = set()
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                living.add(child)
    return living


_shared: set[psutil.Process] = set()
"""What outlives a test, and ends with a module or with the session: servers, their senders, the nursery."""


def note_shared() -> None:
    """What runs now is started for several tests."""
    _shared.update(_children())


@pytest.fixture(scope="session")
def outlives() -> Callable[[int], None]:
    """Tells that a process which a test has started, such as a server of its module, ends after it."""
    return lambda pid: _shared.add(psutil.Process(pid))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """Note what a module starts; pytest asks no conftest below its root about what the session does."""
    made = yield
    if fixturedef.scope == "module":
        note_shared()
    return made


@pytest.fixture(autouse=True)
def leaves_no_process() -> Iterator[None]:
    """No test leaves a process behind."""
    before = _children()
    yield
    if left := _children() - before - _shared:
        gc.collect()  # torch's data loaders end their workers when they are collected
        # What was told to end, or killed, takes its time.
        wait_until(lambda: not _children() - before - _shared, f"the end of {left}", 20)


@contextmanager
def _shared_file(factory: pytest.TempPathFactory, name: str) -> Iterator[IO[str]]:
    """A file that the workers of pytest-xdist share, locked and open at its start."""
    base = factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (folder / name).open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of one MLflow server for the session, which the workers of pytest-xdist share.

    The first to ask starts it; `pytest_unconfigure` ends it, in the process that outlives the workers.
    """
    with _shared_file(tmp_path_factory, _SHARED) as file:
        known = file.read()
        if known:
            uri: str = json.loads(known)["uri"]
            return uri
        server = MlflowServer(Path(file.name).parent / "shared-server")
        server.launch()
        note_shared()
        # Written before it answers, so that a Ctrl-C in between leaves nothing behind.
        json.dump({"uri": server.uri, "group": server.group}, file)
        file.flush()
        server.wait_until_healthy()
    return server.uri


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Postgres:
    """One PostgreSQL server for the session, shared and ended as the MLflow server is."""
    with _shared_file(tmp_path_factory, _SHARED_POSTGRES) as file:
        known = file.read()
        if known:
            return Postgres.from_json(known)
        server = Postgres.make()
        server.launch()
        note_shared()
        file.write(server.to_json())
        file.flush()
        server.wait_until_ready()
    return server


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """The address of an empty PostgreSQL database."""
    return postgres.new_database()


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for one test, which ends and starts it as it likes."""
    server = Postgres.make()
    try:
        server.launch()
        server.wait_until_ready()
        yield server
    finally:
        server.remove()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the shared servers, also after Ctrl-C."""
    factory: pytest.TempPathFactory | None = getattr(config, "_tmp_path_factory", None)
    if hasattr(config, "workerinput") or factory is None:
        return
    shared = factory.getbasetemp() / _SHARED
    if shared.exists() and (known := shared.read_text()):
        end_group(json.loads(known)["group"], signal.SIGKILL)
        shared.unlink()
    shared = factory.getbasetemp() / _SHARED_POSTGRES
    if shared.exists() and (known := shared.read_text()):
        Postgres.from_json(known).remove()
        shared.unlink()


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[MlflowServer]:
    """An MLflow server for one test, which starts, stops and kills it as it likes."""
    server = MlflowServer(tmp_path / "own-server")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """The process that commands are forked from; each worker of pytest-xdist has one."""
    with Nursery() as nursery:
        note_shared()
        yield nursery


@pytest.fixture
def workplace(tmp_path: Path, nursery: Nursery) -> Iterator[Workplace]:
    """A folder in which commands run, against an SQLite file in it."""
    place = Workplace(tmp_path, f"sqlite:///{tmp_path}/mlruns/mlflow.db", nursery=nursery)
    yield place
    place.close()


@pytest.fixture
def remote_workplace(tmp_path: Path, server_uri: str, nursery: Nursery) -> Iterator[Workplace]:
    """A folder in which commands run, against the session's MLflow server."""
    place = Workplace(tmp_path, server_uri, nursery=nursery)
    yield place
    place.close()
