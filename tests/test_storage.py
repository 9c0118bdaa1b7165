"""A study is kept in a journal file, SQLite or PostgreSQL, whatever is killed, torn or wrong."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import pytest
from optuna.trial import TrialState

from tests.postgres import PASSWORD, QUOTED, Postgres
from tests.servers import free_port
from tracked.errors import StorageError, StudyTaken, UsageError
from tracked.storage import open_storage

KINDS = ["journal", "sqlite", "postgresql"]
SHARED = ["journal", "postgresql"]
# Forked, a child has Optuna imported; each opens its own storage, as workers do.
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """Of the kind that the test is run with."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    return None if request.param == "journal" else request.getfixturevalue("postgres_url")


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "mlruns/studies.journal"


def study_of(backend: Any) -> optuna.Study:
    return optuna.create_study(
        storage=backend,
        study_name="a study",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=1),
    )


def run_trials(study: optuna.Study, count: int) -> None:
    for _ in range(count):
        trial = study.ask()
        value = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        for epoch in (1, 2, 3):
            trial.report(value / epoch, epoch)
        study.tell(trial, value)


def fork(target: Callable[..., None], *args: object) -> tuple[BaseProcess, Connection]:
    """A process, and what it sends; receiving fails once it is gone."""
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=target, args=(*args, sending), daemon=True)
    process.start()
    sending.close()
    return process, receiving


def answers_of_three(target: Callable[..., None], *args: object) -> list[Any]:
    """What three processes say that begin at the same moment."""
    barrier = FORK.Barrier(3)
    forked = [fork(target, *args, barrier) for _ in range(3)]
    answers = [receiving.recv() for _, receiving in forked]
    for process, _ in forked:
        process.join(30)
    return answers


# --- What is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("address", KINDS, indirect=True)
def test_a_study_is_there_again_when_its_storage_is_opened_again(address: str | None, journal: Path) -> None:
    with open_storage(address, default=journal) as storage:
        run_trials(study_of(storage.backend), 3)
        before = study_of(storage.backend).trials

    with open_storage(address, default=journal) as storage:
        after = study_of(storage.backend).trials

    assert [trial.intermediate_values for trial in after] == [trial.intermediate_values for trial in before]
    assert [trial.params for trial in after] == [trial.params for trial in before]
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 3


@pytest.mark.parametrize("address", KINDS, indirect=True)
def test_optuna_dashboard_opens_the_storage_as_it_is(address: str | None, journal: Path) -> None:
    with open_storage(address, default=journal) as storage:
        run_trials(study_of(storage.backend), 2)

        app = optuna_dashboard.wsgi(address or str(journal))
        asked = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies/0", "wsgi.input": io.BytesIO()}
        if address:
            asked["PATH_INFO"] = "/api/studies/1"
        answer = json.loads(b"".join(app({**asked, "wsgi.errors": sys.stderr}, lambda *_: None)))

    assert answer["name"] == "a study"
    assert [trial["state"] for trial in answer["trials"]] == ["Complete", "Complete"]


def test_the_journal_and_postgresql_are_shared_and_sqlite_is_private(
    tmp_path: Path, journal: Path, postgres_url: str
) -> None:
    private = {}
    for url in (None, f"sqlite:///{tmp_path}/study.db", postgres_url):
        with open_storage(url, default=journal) as storage:
            private[storage.shown.partition(":")[0]] = storage.is_private

    assert private == {str(journal): False, "sqlite": True, "postgresql+psycopg": False}


def test_a_relative_file_of_sqlite_is_kept_in_the_current_folder_whatever_its_name_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "{braces} and 100%"
    folder.mkdir()
    monkeypatch.chdir(folder)

    with open_storage("sqlite:///study.db", default=tmp_path) as storage:
        run_trials(study_of(storage.backend), 1)

    assert sqlite3.connect(folder / "study.db").execute("SELECT count(*) FROM trials").fetchone() == (1,)


# --- Several processes ------------------------------------------------------------------------


def ask_all(url: str | None, journal: Path, barrier: Any, answers: Connection) -> None:
    with open_storage(url, default=journal) as storage:
        study = study_of(storage.backend)
        barrier.wait(30)
        asked = []
        for _ in range(15):
            asked.append((trial := study.ask()).number)
            study.tell(trial, trial.suggest_float("lr", 0, 1))
        answers.send(asked)


@pytest.mark.parametrize("address", SHARED, indirect=True)
def test_processes_that_open_a_new_storage_at_once_share_one_study_and_its_numbers(
    address: str | None, journal: Path
) -> None:
    numbers = [number for share in answers_of_three(ask_all, address, journal) for number in share]

    assert sorted(numbers) == list(range(45))


# --- The journal file, torn and killed --------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_journal_that_ends_in_the_middle_of_a_line_goes_on(journal: Path, cut: int) -> None:
    with open_storage(None, default=journal) as storage:
        run_trials(study_of(storage.backend), 2)
    os.truncate(journal, journal.stat().st_size - cut)

    with open_storage(None, default=journal) as storage:
        run_trials(study_of(storage.backend), 1)

    with open_storage(None, default=journal) as storage:  # what follows a torn line stays readable too
        states = [trial.state for trial in study_of(storage.backend).trials]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.COMPLETE]


@pytest.mark.parametrize("garbage", [b"{", b'{"op_code":5,"worker', b"\0" * 5000])
def test_garbage_at_the_journals_end_is_cut_off_also_under_an_open_storage(
    journal: Path, garbage: bytes
) -> None:
    with open_storage(None, default=journal) as storage:
        run_trials(study_of(storage.backend), 1)
        with journal.open("ab") as file:
            file.write(garbage)
        run_trials(study_of(storage.backend), 1)

    with open_storage(None, default=journal) as storage:
        assert [trial.state for trial in study_of(storage.backend).trials] == [TrialState.COMPLETE] * 2
    assert all(json.loads(line) for line in journal.read_bytes().splitlines())


def test_threads_of_one_process_append_in_turns(journal: Path) -> None:
    def ask(_: int) -> list[int]:
        with open_storage(None, default=journal) as storage:
            study = study_of(storage.backend)
            return [study.ask().number for _ in range(10)]

    with ThreadPoolExecutor(4) as threads:
        numbers = [number for share in threads.map(ask, range(4)) for number in share]

    assert sorted(numbers) == list(range(40))


def append_for_ever(journal: Path, started: Connection) -> None:
    with open_storage(None, default=journal) as storage:
        study = study_of(storage.backend)
        started.send(os.getpid())
        while True:
            run_trials(study, 1)


@pytest.mark.parametrize("attempt", range(3))
def test_processes_killed_while_they_append_leave_a_journal_that_opens_at_once(
    journal: Path, attempt: int
) -> None:
    pair = [fork(append_for_ever, journal) for _ in range(2)]
    for _, started in pair:
        started.recv()
    with open_storage(None, default=journal) as storage:
        run_trials(study_of(storage.backend), 3 + attempt)  # while both append too
    for process, _ in pair:
        process.kill()
        process.join()

    before = time.monotonic()
    with open_storage(None, default=journal) as storage:
        run_trials(study_of(storage.backend), 1)
        trials = study_of(storage.backend).trials

    assert time.monotonic() - before < 10, "a killed process kept the lock"
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert trials[-1].state == TrialState.COMPLETE
    assert sum(trial.state == TrialState.RUNNING for trial in trials) <= 2


def hold_the_lock(journal: Path, started: Connection) -> None:
    def hang(fd: object) -> None:
        started.send("held")
        signal.pause()

    os.fsync = hang  # the last thing that is done under the lock
    with open_storage(None, default=journal) as storage:
        study_of(storage.backend).ask()


def test_a_lock_is_free_as_soon_as_its_holder_is_killed(journal: Path) -> None:
    holder, held = fork(hold_the_lock, journal)
    held.recv()
    waiting, answer = fork(ask_all, None, journal, FORK.Barrier(1))
    assert not answer.poll(0.5), "it did not wait for the lock"

    holder.kill()
    holder.join()

    assert answer.recv() == list(range(1, 16))
    waiting.join(30)


@pytest.mark.parametrize(
    "text",
    [
        "lr,loss\n0.1,2\n",
        "no line at all",
        '{"not": "a journal"}\n',
        '{"op_code":0,"worker{"op_code":1}\n{"op_code":1}\n',
        '{"op_code":0,"worker{"op_code":1}\n',
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(journal: Path, text: str) -> None:
    journal.parent.mkdir()
    journal.write_text(text)

    with pytest.raises(StorageError, match=f"^{journal} ") as refused:
        open_storage(None, default=journal)

    assert f"mv {journal}" in refused.value.try_next
    assert journal.read_text() == text


def test_a_journal_in_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match="cannot be kept"):
        open_storage(None, default=tmp_path / "file/studies.journal")


# --- SQLite, owned alone ----------------------------------------------------------------------


def test_a_second_process_is_refused_an_sqlite_file_until_the_first_is_killed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    (tmp_path / "link.db").symlink_to(tmp_path / "study.db")

    def own(started: Connection) -> None:
        with open_storage(url, default=tmp_path) as storage:
            run_trials(study_of(storage.backend), 1)
            started.send(os.getpid())
            signal.pause()

    owner, started = fork(own)
    pid = started.recv()
    for name in ("study.db", "link.db"):
        with pytest.raises(StudyTaken, match=f"process {pid} has the study") as refused:
            open_storage(f"sqlite:///{tmp_path}/{name}", default=tmp_path)
        assert "--storage postgresql+psycopg://USER@HOST/NAME" in refused.value.try_next
    owner.kill()
    owner.join()

    with open_storage(url, default=tmp_path) as storage:
        assert len(study_of(storage.backend).trials) == 1


def test_a_process_that_has_an_sqlite_file_open_is_refused_a_second_time(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with open_storage(url, default=tmp_path), pytest.raises(StudyTaken, match=f"process {os.getpid()} "):
        open_storage(url, default=tmp_path)

    open_storage(url, default=tmp_path).close()


def test_a_file_that_is_no_database_is_refused_and_let_go(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    path.write_text("lr,loss\n" * 1000)
    for _ in range(2):  # not "taken" the second time
        with pytest.raises(StorageError, match="file is not a database"):
            open_storage(f"sqlite:///{path}", default=tmp_path)

    assert path.read_text() == "lr,loss\n" * 1000


@pytest.mark.parametrize("address", ["sqlite", "postgresql"], indirect=True)
def test_the_database_of_mlflow_is_refused_and_left_as_it_is(address: str, journal: Path) -> None:
    from sqlalchemy import create_engine, inspect, text

    engine = create_engine(address)
    with engine.begin() as connection:
        for table in ("alembic_version", "runs", "metrics"):
            connection.execute(text(f"CREATE TABLE {table} (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('bd07f7e963c5')"))

    with pytest.raises(StorageError, match="tables of another program: alembic_version, metrics, runs"):
        open_storage(address, default=journal)

    assert sorted(inspect(engine).get_table_names()) == ["alembic_version", "metrics", "runs"]
    engine.dispose()


def test_tables_of_another_version_of_optuna_are_refused_with_the_line_that_upgrades_them(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    open_storage(url, default=tmp_path).close()
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")

    with pytest.raises(StorageError, match="another version of Optuna") as refused:
        open_storage(url, default=tmp_path)

    assert refused.value.try_next == f"optuna storage upgrade --storage {url}"


# --- PostgreSQL, restarted --------------------------------------------------------------------


def test_a_study_goes_on_when_the_server_comes_back(own_postgres: Postgres, journal: Path) -> None:
    with open_storage(own_postgres.new_database(), default=journal) as storage:
        study = study_of(storage.backend)
        run_trials(study, 2)

        own_postgres.end()
        own_postgres.launch()
        run_trials(study, 2)  # waits until it answers

        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4


# --- Wrong addresses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("mysql://me:secret@host/db", "a study cannot be kept in 'mysql://host/db'"),
        ("redis://:secret@host", "a study cannot be kept in 'redis://host'"),
        ("study.db", "a study cannot be kept in 'study.db'"),
        ("", "a study cannot be kept in ''"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///study.db?mode=ro", "names no file"),
        ("sqlite:///nowhere/study.db", "nowhere/study.db cannot be made: its folder does not exist"),
        ("sqlite:////tmp", "/tmp is a folder"),
        ("postgresql+psycopg://me:secret@host:notaport/db", "cannot be read"),
        ("postgresql+psycopg://me:secret", "the storage postgresql+psycopg://… cannot be read"),
        ("postgresql+psycopg://me:sec@ret@host/db", "cannot be told from its password"),
        ("postgresql://me:se/cret@host/db", "'postgresql://host/db' cannot be told from its password"),
        ("postgresql+asyncpg://me:secret@host/db", "a study cannot be kept in"),
    ],
)
def test_an_address_that_cannot_work_is_refused(url: str, found: str, journal: Path) -> None:
    with pytest.raises(UsageError) as refused:
        open_storage(url, default=journal)

    assert found in refused.value.found
    assert refused.value.expected
    assert refused.value.try_next
    told = "".join(traceback.format_exception(refused.value))
    assert not any(part in told for part in ("cret", "sec@", "ret@"))


def test_a_wrong_password_a_missing_database_and_a_silent_port_are_told_without_the_password(
    postgres: Postgres, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    good = postgres.url("postgres")
    cases = {
        good.replace(QUOTED, "wrong-secret"): "password authentication failed",
        postgres.url("no_such_database"): "does not exist",
        good.replace(str(postgres.port), str(free_port())): "refused",
        f"{good}?password=wrong-secret&sslmode=no-such-mode": "sslmode",
    }
    for url, said in cases.items():
        with pytest.raises(StorageError, match=said) as refused:
            open_storage(url, default=journal)

        told = "".join(traceback.format_exception(refused.value)) + caplog.text
        assert refused.value.try_next.startswith("psql postgresql://127.0.0.1:")
        assert not any(secret in told for secret in (PASSWORD, QUOTED, "wrong-secret"))


def test_what_is_shown_of_an_address_holds_neither_user_nor_password(
    postgres: Postgres, journal: Path
) -> None:
    url = postgres.new_database()

    with open_storage(f"{url}?application_name=secret", default=journal) as storage:
        assert storage.shown == f"postgresql+psycopg://{url.rpartition('@')[2]}"
        assert PASSWORD not in repr(storage)
        assert QUOTED not in repr(storage)


def test_postgresql_without_a_driver_takes_the_one_that_is_installed(
    postgres_url: str, journal: Path
) -> None:
    with open_storage(postgres_url.replace("+psycopg", ""), default=journal) as storage:
        assert storage.shown.startswith("postgresql+psycopg://")


def test_a_driver_that_is_not_installed_is_named_with_the_line_that_installs_it(journal: Path) -> None:
    assert importlib.util.find_spec("psycopg2") is None, "this test needs a driver that is not there"

    with pytest.raises(UsageError, match="psycopg2, which is not installed") as refused:
        open_storage("postgresql+psycopg2://me:secret@host/db", default=journal)

    assert refused.value.try_next == "pip install 'psycopg2-binary'"


def test_without_any_driver_psycopg_is_named(journal: Path) -> None:
    script = (
        "import sys; sys.modules['psycopg'] = None; from pathlib import Path\n"
        "from tracked.storage import open_storage\n"
        f"open_storage('postgresql://me@127.0.0.1/db', default=Path({str(journal)!r}))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "try: pip install 'psycopg[binary]'" in done.stderr
