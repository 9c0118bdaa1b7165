"""What is said to a real MLflow server and to an SQLite file, and what their errors become."""

from __future__ import annotations

import base64
import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import Answer, FakeFront, MlflowServer, free_port
from tracked.address import database, normalise_uri, redact
from tracked.errors import (
    CheckpointError,
    MetricError,
    NoSuchRun,
    RecordRejected,
    ServerRefused,
    ServerUnavailable,
    UsageError,
)
from tracked.names import HANDLE, stored, validate_key
from tracked.server import Latest, RunView, Server
from tracked.transport import is_refused_for_good

MLFLOW_INVALID = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "no such thing"}).encode()
MLFLOW_MISSING = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}).encode()


def new_run(server: Server, experiment: str | None = None, **tags: str) -> RunView:
    return server.create_run(
        experiment=experiment or f"e-{uuid.uuid4().hex[:8]}",
        handle=str(uuid.uuid4()),
        name=None,
        start_time=1_700_000_000_000,
        tags=tags,
        retry=False,
    )


@pytest.fixture(scope="module")
def database_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('embedded')}/mlflow.db"


@pytest.fixture(params=["server_uri", "database_uri"], ids=["http", "sqlite"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    uri = request.getfixturevalue(request.param)
    opened = Server(uri, timeout=30)
    yield opened
    opened.close()


@pytest.fixture
def front(server_uri: str) -> Iterator[FakeFront]:
    with FakeFront(server_uri) as opened:
        yield opened


# Addresses and names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tracked+http://host:5000/", "http://host:5000"),
        ("tracked+sqlite:///mlflow.db", "sqlite:////base/mlflow.db"),
        ("http://host:5000/", "http://host:5000"),
        ("HTTP://host/mlflow//", "http://host/mlflow"),
        ("http://host:5000/#/experiments/1/runs/abc", "http://host:5000"),
        ("https://user:word@host/", "https://user:word@host"),
        ("sqlite:///mlruns/mlflow.db", "sqlite:////base/mlruns/mlflow.db"),
        ("sqlite:///./a/../mlflow.db", "sqlite:////base/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
    ],
)
def test_one_place_has_one_spelling(written: str, meant: str) -> None:
    assert normalise_uri(written, Path("/base")) == meant
    assert normalise_uri(meant, Path("/other")) == meant


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "mlruns",
        "./mlruns",
        "file:///tmp/mlruns",
        "ftp://host",
        "tracked+ftp://host",
        "http://",
        "http://h:x",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "databricks",
        "http://user:pa/word@host",
    ],
)
def test_an_address_that_cannot_work_is_refused_with_those_that_can(uri: str) -> None:
    with pytest.raises(UsageError) as refused:
        normalise_uri(uri)
    assert "sqlite:///" in str(refused.value)
    assert "word@" not in str(refused.value)


@pytest.mark.parametrize("password", ["word", "w:rd", "w@rd", "w/rd", "w%40rd"])
def test_a_password_in_an_address_is_not_shown(password: str) -> None:
    assert redact(f"at https://user:{password}@host:1/x failed") == "at https://host:1/x failed"
    assert redact("https://host:1/x") == "https://host:1/x"


def test_addresses_and_names_need_no_mlflow() -> None:
    program = "import sys, tracked.address, tracked.names; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


NAMES = [
    "",
    ".",
    "..",
    "a",
    "/a",
    "a/",
    "a//b",
    "a/../b",
    "./a",
    "..a",
    "a..",
    "a b",
    "a:b",
    "a\n",
    "a\tb",
    "é",
    "a#",
]
NAMES += [
    "x" * 250,
    "x" * 251,
    "train/loss",
    "val.acc-1_2",
    "a,b",
    "a\\b",
    "a%20",
    "\x00",
    "日本",
    " ",
    "...",
    "a/.b",
]


def mlflow_takes(key: str) -> bool:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric

    try:
        _validate_metric(key, 1.0, 0, 0)
    except MlflowException:
        return False
    return True


def we_take(key: str) -> bool:
    try:
        validate_key(key)
    except MetricError:
        return False
    return True


@pytest.mark.parametrize("key", NAMES)
def test_a_name_is_refused_when_mlflow_refuses_it(key: str) -> None:
    assert we_take(key) == (mlflow_takes(key) and not key.endswith("\n"))


@given(st.one_of(st.text(max_size=20), st.text("ab/.:- _\n#é", max_size=12)))
def test_any_name_is_refused_when_mlflow_refuses_it(key: str) -> None:
    assert we_take(key) == (mlflow_takes(key) and not key.endswith("\n"))


# Runs and values


def test_a_run_shows_what_was_written(server: Server) -> None:
    run = new_run(server, colour="blue")
    server.log_params(run.run_id, {"lr": "0.1"})
    server.log_points(run.run_id, [("loss", 1, 1000, 0.5), ("loss", 3, 1001, 0.25), ("loss", 2, 1002, 0.75)])
    server.set_tags(run.run_id, {"colour": "red"})
    seen = server.get_run(run.run_id)
    assert seen.params == {"lr": "0.1"}
    assert seen.tags["colour"] == "red"
    assert seen.latest == {"loss": Latest(3, 1001, 0.25)}
    assert (seen.status, seen.start_time, seen.end_time) == ("RUNNING", 1_700_000_000_000, None)


def test_values_come_back_bit_for_bit(server: Server) -> None:
    values = [
        0.1,
        1 / 3,
        -0.0,
        5e-324,
        1.7976931348623157e308,
        math.nan,
        math.inf,
        -math.inf,
        1e22 + 1,
        math.pi,
    ]
    run = new_run(server)
    server.log_points(run.run_id, [("v", step, 1000 + step, value) for step, value in enumerate(values)])
    back = [value for _, _, value in server.history(run.run_id, "v")]
    assert [v.hex() for v in back] == [stored(v).hex() for v in values]


def test_a_point_written_again_stands_once(server: Server) -> None:
    run = new_run(server)
    points = [("loss", step, 1000, step / 7) for step in range(1500)]
    for _ in range(2):
        server.log_points(run.run_id, points)
    assert server.history(run.run_id, "loss") == [(step, 1000, step / 7) for step in range(1500)]


def test_a_history_of_several_pages_is_whole_and_in_order(
    server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracked.server._HISTORY_PAGE", 7)
    server = Server(server_uri, timeout=30)
    run = new_run(server)
    server.log_points(run.run_id, [("loss", step, 5000 - step, 1.0) for step in range(50)])
    assert server.history(run.run_id, "loss") == [(step, 5000 - step, 1.0) for step in range(50)]


def test_more_params_and_tags_than_fit_into_a_request_are_all_written(server: Server) -> None:
    run = new_run(server)
    params = {f"p{i}": "é" * 6000 if i < 60 else str(i) for i in range(250)}
    tags = {f"t{i}": "x" * 8000 for i in range(150)}
    server.log_params(run.run_id, params)
    server.set_tags(run.run_id, tags)
    seen = server.get_run(run.run_id)
    assert seen.params == params
    assert {key: seen.tags[key] for key in tags} == tags


def test_of_data_sets_that_share_a_context_none_stands_for_it(server: Server) -> None:
    run = new_run(server)
    contexts = {"a": "training, validation", "b": "test", "c": "validation"}
    inputs = [
        {"name": name, "digest": f"d{name}", "schema": "{}", "profile": "{}", "context": context}
        for name, context in contexts.items()
    ]
    server.log_inputs(run.run_id, inputs, {})
    assert server.datasets(run.run_id) == {"training": ("a", "da"), "test": ("b", "db")}


def test_a_status_is_set_and_a_run_reopened(server: Server) -> None:
    run = new_run(server)
    server.set_status(run.run_id, "KILLED", 1_700_000_009_000)
    ended = server.get_run(run.run_id)
    assert (ended.status, ended.end_time) == ("KILLED", 1_700_000_009_000)
    server.set_status(run.run_id, "RUNNING")
    assert (server.get_run(run.run_id).status, server.get_run(run.run_id).end_time) == ("RUNNING", None)


def test_a_run_is_found_by_id_prefix_handle_and_name(server: Server) -> None:
    handle = str(uuid.uuid4())
    name = f"it's a name-{handle[:6]}"
    run = server.create_run(experiment="find", handle=handle, name=name, start_time=5, tags={})
    new_run(server, "find")
    for wanted in (run.run_id, run.run_id[:12], handle, handle[:10], name):
        assert [found.run_id for found in server.find(wanted)] == [run.run_id], wanted
    for wanted in ("zzzz", "0" * 32, run.run_id[:2], "%", ""):
        assert server.find(wanted) == []


def test_runs_are_listed_newest_first_with_their_experiments(server: Server) -> None:
    experiment, mark = f"e-{uuid.uuid4().hex}", uuid.uuid4().hex
    for i, where in enumerate([experiment, "another", experiment]):
        server.create_run(
            experiment=where, handle=str(uuid.uuid4()), name=f"r{i}", start_time=i + 1, tags={"mark": mark}
        )
    everywhere = server.search(filter=f"tags.mark = '{mark}'")
    assert [(run.name, run.experiment_name) for run in everywhere] == [
        ("r2", experiment),
        ("r1", "another"),
        ("r0", experiment),
    ]
    assert [run.name for run in server.search(experiment=experiment)] == ["r2", "r0"]
    assert [run.name for run in server.search(experiment=experiment, limit=1)] == ["r2"]
    assert server.search(experiment="nobody made this") == []


def test_a_handle_makes_one_run_however_often_it_is_asked_for(server: Server) -> None:
    handle = str(uuid.uuid4())
    runs = [
        server.create_run(experiment="handles", handle=handle, name="n", start_time=1, tags={})
        for _ in range(3)
    ]
    assert len({run.run_id for run in runs}) == 1
    assert runs[0].tags[HANDLE] == handle
    assert server.find_by_handle(handle) == server.search(filter=f"tags.`{HANDLE}` = '{handle}'")[0]
    assert server.find_by_handle(str(uuid.uuid4())) is None


def test_a_lost_answer_to_create_run_makes_one_run(server_uri: str, front: FakeFront) -> None:
    server, handle = Server(front.uri, timeout=30), str(uuid.uuid4())
    front.drop_answer("/runs/create")
    with pytest.raises(ServerUnavailable):
        server.create_run(experiment="lost", handle=handle, name="n", start_time=1, tags={}, retry=False)
    run = server.create_run(experiment="lost", handle=handle, name="n", start_time=1, tags={})
    there = Server(server_uri, timeout=30).search(filter=f"tags.`{HANDLE}` = '{handle}'")
    assert [run.run_id for run in there] == [run.run_id]
    assert front.count("/runs/create") == 1


def test_a_twin_that_a_late_request_left_behind_is_deleted(server_uri: str, front: FakeFront) -> None:
    handle = str(uuid.uuid4())
    late = Server(server_uri, timeout=30).create_run(
        experiment="late", handle=handle, name="a", start_time=1, tags={}
    )
    # The look comes before the late request took effect …
    front.answer("/runs/search", Answer(200, b"{}", "application/json"), times=1)
    run = Server(front.uri, timeout=30).create_run(
        experiment="late", handle=handle, name="b", start_time=2, tags={}
    )
    # … and what stands afterwards is one run, the same for everybody.
    assert front.count("/runs/create") == 1
    assert (
        [r.run_id for r in Server(server_uri, timeout=30).search(experiment="late")]
        == [run.run_id]
        == [late.run_id]
    )


def test_the_first_run_of_a_known_experiment_costs_one_request(front: FakeFront) -> None:
    server = Server(front.uri, timeout=30)
    new_run(server, "cheap")
    before = len(front.requests)
    new_run(server, "cheap")
    assert len(front.requests) == before + 1


def test_many_threads_create_one_experiment(server: Server) -> None:
    name = f"e-{uuid.uuid4().hex}"
    start = threading.Barrier(6)
    runs: list[RunView] = []

    def create() -> None:
        own = Server(server.uri, timeout=30)
        start.wait()
        runs.append(new_run(own, name))

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 6
    assert len({run.experiment_id for run in runs}) == 1


def test_a_deleted_experiment_is_told_with_the_way_to_restore_it(server: Server) -> None:
    from mlflow import MlflowClient

    name = f"e-{uuid.uuid4().hex}"
    known = Server(server.uri, timeout=30)
    run = new_run(known, name)
    MlflowClient(server.uri).delete_experiment(run.experiment_id)
    for asked in (server, known):
        with pytest.raises(UsageError, match=f"experiments restore --experiment-id {run.experiment_id}"):
            new_run(asked, name)


def test_points_for_a_deleted_run_are_held_and_not_rejected(server: Server) -> None:
    from mlflow import MlflowClient

    run = new_run(server)
    MlflowClient(server.uri).delete_run(run.run_id)
    assert server.get_run(run.run_id).deleted
    with pytest.raises(ServerRefused, match=f"runs restore --run-id {run.run_id}"):
        server.log_points(run.run_id, [("loss", 1, 1, 1.0)])


# Errors


@pytest.mark.parametrize("run_id", ["0" * 32, "no run at all", "../x"])
def test_a_run_that_is_not_there_is_no_such_run(server: Server, run_id: str) -> None:
    with pytest.raises(NoSuchRun):
        server.get_run(run_id)


def test_writing_to_a_run_that_is_not_there_is_no_such_run(server: Server) -> None:
    with pytest.raises(NoSuchRun):
        server.log_points("0" * 32, [("loss", 1, 1, 1.0)])


def test_an_invalid_record_is_rejected_and_nothing_of_its_batch_is_stored(server: Server) -> None:
    run = new_run(server)
    with pytest.raises(RecordRejected):
        server.log_points(run.run_id, [("good", 1, 1, 1.0), ("bad#name", 1, 1, 1.0)])
    assert server.history(run.run_id, "good") == []


@pytest.mark.parametrize("count", [10, 1500])
def test_what_may_no_longer_be_sent_is_not_stored(server: Server, count: int) -> None:
    run = new_run(server)
    points = [("loss", step, 1000, step / 7) for step in range(count)]

    with pytest.raises(ServerUnavailable, match="sent nothing"):
        server.log(run.run_id, points, {"lr": "0.1"}, {}, may_send=lambda: False)
    assert (server.history(run.run_id, "loss"), server.get_run(run.run_id).params) == ([], {})

    server.log(run.run_id, points, {"lr": "0.1"}, {}, may_send=lambda: True)
    assert server.history(run.run_id, "loss") == [(step, 1000, step / 7) for step in range(count)]
    assert server.get_run(run.run_id).params == {"lr": "0.1"}


def test_a_param_cannot_be_changed_but_may_be_repeated(server: Server) -> None:
    run = new_run(server)
    server.log_params(run.run_id, {"claim": "mine"})
    server.log_params(run.run_id, {"claim": "mine"})
    with pytest.raises(RecordRejected):
        server.log_params(run.run_id, {"claim": "theirs"})


HTML = b"<html><head><title>Sign in</title></head><body>who are you?</body></html>"
JSON = "application/json"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        *[(Answer(status, HTML), ServerUnavailable) for status in (408, 413, 429, 500, 502, 503, 504)],
        *[(Answer(status, HTML), ServerRefused) for status in (400, 401, 403, 404, 405, 200, 204)],
        (Answer(400, MLFLOW_INVALID, JSON), RecordRejected),
        (Answer(404, MLFLOW_MISSING, JSON), NoSuchRun),
        # A proxy's own JSON, and MLflow's words under another status, say nothing about the record.
        (Answer(400, b'{"error": "bad request"}', JSON), ServerRefused),
        (Answer(400, b'{"error_code": 400, "message": "no"}', JSON), ServerRefused),
        (Answer(400, b'["INVALID_PARAMETER_VALUE"]', JSON), ServerRefused),
        (Answer(404, b'{"error_code": "ENDPOINT_NOT_FOUND"}', JSON), ServerRefused),
        (Answer(403, b'{"error_code": "PERMISSION_DENIED", "message": "not yours"}', JSON), ServerRefused),
        (Answer(401, MLFLOW_INVALID, JSON), ServerRefused),
        (Answer(429, MLFLOW_INVALID, JSON), ServerUnavailable),
        (Answer(500, b'{"error_code": "INTERNAL_ERROR", "message": "oops"}', JSON), ServerUnavailable),
        (Answer(503, MLFLOW_MISSING, JSON), ServerUnavailable),
        (Answer(200, b"", JSON), ServerRefused),
        (Answer(200, b"[]", JSON), ServerRefused),
        (Answer(200, b'{"cut', JSON), ServerRefused),
        (Answer(200, b'{"cut', JSON, claimed=500), ServerUnavailable),
    ],
)
def test_each_answer_becomes_its_own_error(front: FakeFront, answer: Answer, error: type[Exception]) -> None:
    # The run itself is fine: only the write is answered for it.
    server = Server(front.uri, timeout=30)
    run = new_run(server)
    front.answer("/runs/log-batch", answer)
    with pytest.raises(error) as raised:
        server.log_points(run.run_id, [("loss", 1, 1, 1.0)])
    assert type(raised.value) is error
    if answer.status >= 400 and error in (ServerRefused, ServerUnavailable):
        assert str(answer.status) in str(raised.value)
    assert front.count("/runs/log-batch") == 1  # no attempt but ours


@pytest.mark.parametrize(
    ("said", "for_good"),
    [
        ("(sqlite3.IntegrityError) FOREIGN KEY constraint failed\n", True),
        ("(sqlite3.IntegrityError) UNIQUE constraint failed: logged_model_metrics.model_id\n", True),
        ('duplicate key value violates unique constraint "logged_model_metrics_pk"\n', True),
        ("(1062, \"Duplicate entry 'm-1' for key 'logged_model_metrics.PRIMARY'\")\n", True),
        ("(sqlite3.OperationalError) database is locked\n", False),
        ("(sqlite3.OperationalError) database table is locked: logged_model_metrics\n", False),
        ("(psycopg2.InterfaceError) connection already closed\n", False),
    ],
)
def test_what_a_database_refuses_for_good_is_told_from_what_it_may_take_later(
    said: str, for_good: bool
) -> None:
    message = f"{said}[SQL: INSERT INTO logged_model_metrics (model_id, key) VALUES (?, ?)]"
    assert is_refused_for_good(message) is for_good


def test_an_answer_of_another_shape_is_refused(front: FakeFront) -> None:
    for body in (b"{}", b'{"run": 3}', b'{"run": {"info": {"start_time": "soon"}}}'):
        with FakeFront() as strange:
            strange.answer("/", Answer(200, body, JSON))
            with pytest.raises(ServerRefused):
                Server(strange.uri, timeout=30).get_run("0" * 32)


def test_a_refused_connection_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a user may have set for MLflow changes nothing here, and is not changed.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    before = dict(os.environ)
    started = time.monotonic()
    with pytest.raises(ServerUnavailable, match="Connection refused"):
        Server(f"http://127.0.0.1:{free_port()}").get_run("0" * 32)
    assert time.monotonic() - started < 3
    assert dict(os.environ) == before


def test_a_server_that_says_nothing_is_given_up_after_the_timeout() -> None:
    with FakeFront() as front:
        front.hang("/")
        started = time.monotonic()
        with pytest.raises(ServerUnavailable, match="nothing in time"):
            Server(front.uri, timeout=0.5).get_run("0" * 32)
        assert 0.4 < time.monotonic() - started < 4


def test_a_server_that_takes_no_connection_is_given_up_after_the_timeout() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        # A queue that is full swallows further connections without a word, as a dead host does.
        waiting = [socket.socket() for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        try:
            with pytest.raises(ServerUnavailable, match="nothing in time"):
                Server(f"http://127.0.0.1:{address[1]}", timeout=0.5).get_run("0" * 32)
        finally:
            for client in waiting:
                client.close()


def test_no_secret_appears_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeFront() as front:
        port = front.uri.rpartition(":")[2]
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token-of-mine")
        inside = f"http://alice:p%40ss-of-mine@127.0.0.1:{port}"
        basic = base64.b64encode(b"alice:p@ss-of-mine").decode()
        for status in (401, 500):
            echo = f"you said {basic} p@ss-of-mine token-of-mine {inside}".encode()
            front.answer("/", Answer(status, echo), times=1)
            with pytest.raises((ServerRefused, ServerUnavailable)) as raised:
                Server(inside).get_run("0" * 32)
            shown = str(raised.value) + repr(raised.value)
            assert not [s for s in ("ss-of-mine", "token-of-mine", basic, "alice:") if s in shown]
        # It was used all the same, and with its escapes undone.
        assert front.requests[0].headers["Authorization"] == f"Basic {basic}"


def test_a_locked_database_is_unavailable(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = Server(uri, timeout=30)
    run = new_run(first)
    first.close()
    with sqlite3.connect(tmp_path / "mlflow.db") as holder:
        holder.execute("BEGIN EXCLUSIVE")
        # MLflow waits 20 s on a connection in use; a fresh one, which asks for the schema first, waits 5 s.
        with pytest.raises(ServerUnavailable, match="database is locked"):
            Server(uri, timeout=30).get_run(run.run_id)
    holder.close()
    assert Server(uri, timeout=30).get_run(run.run_id).run_id == run.run_id


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(ServerRefused, match="not a database"):
        Server(f"sqlite:///{tmp_path}/mlflow.db").get_run("0" * 32)


def test_a_database_of_another_version_is_refused_with_the_command(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    new_run(Server(uri, timeout=30))
    with sqlite3.connect(tmp_path / "mlflow.db") as holder:
        holder.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    holder.close()
    with pytest.raises(ServerRefused, match="mlflow db upgrade sqlite:///"):
        Server(uri, timeout=30).get_run("0" * 32)


# The embedded database

CREATE = """
import sys
from tracked.server import Server
sys.stdin.readline()
server = Server(sys.argv[1])
run = server.create_run(experiment="at once", handle=sys.argv[2], name=None, start_time=1, tags={})
server.log_points(run.run_id, [("loss", 1, 1, 1.0)])
"""


def test_processes_that_make_a_database_at_once_all_succeed_in_silence(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new folder/mlflow.db"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE, uri, str(uuid.uuid4())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in processes]
    assert said == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    runs = Server(uri, timeout=30).search()
    assert len(runs) == 2
    assert {run.experiment_name for run in runs} == {"at once"}
    assert {Path(run.artifact_uri).parents[2] for run in runs} == {tmp_path / "new folder" / "artifacts"}


def test_a_reader_makes_no_database_and_finds_one_made_later(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/none/mlflow.db"
    reader = Server(uri, create=False)
    assert reader.search() == []
    assert reader.find("abcd") == []
    assert reader.find_by_handle(str(uuid.uuid4())) is None
    with pytest.raises(NoSuchRun):
        reader.get_run("0" * 32)
    assert not (tmp_path / "none").exists()
    run = new_run(Server(uri, timeout=30))
    assert reader.search()[0].run_id == run.run_id


def test_threads_share_one_embedded_database(tmp_path: Path) -> None:
    server = Server(f"sqlite:///{tmp_path}/mlflow.db")
    runs = [new_run(server) for _ in range(4)]

    def write(run: RunView) -> None:
        for batch in range(5):
            server.log_points(run.run_id, [("loss", batch * 50 + i, 1, 0.5) for i in range(50)])
            server.set_tags(run.run_id, {"beat": str(batch)})

    threads = [threading.Thread(target=write, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(server.history(run.run_id, "loss")) for run in runs] == [250] * 4


# Files


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 9000], ids=["empty", "small", "two MB"])
def test_a_file_goes_up_is_measured_and_comes_back(server: Server, tmp_path: Path, content: bytes) -> None:
    run = new_run(server)
    local = tmp_path / "check point 90%.pt"
    local.write_bytes(content)
    server.upload(run.run_id, local, "checkpoints/step-1")
    server.upload(run.run_id, local, "checkpoints/step-2")
    assert server.sizes(run.run_id, "checkpoints/step-1") == {local.name: len(content)}
    assert server.directories(run.run_id, "checkpoints") == ["step-1", "step-2"]
    assert server.directories(run.run_id, "") == ["checkpoints"]
    assert server.sizes(run.run_id, "checkpoints") == {}
    to = tmp_path / "new" / "folder" / "back.pt"
    assert server.download(run.run_id, f"checkpoints/step-1/{local.name}", to) == to
    assert to.read_bytes() == content
    assert list(to.parent.iterdir()) == [to]


def test_what_is_missing_is_empty_and_may_be_deleted(server: Server, tmp_path: Path) -> None:
    run = new_run(server)
    assert server.sizes(run.run_id, "nothing/here") == {}
    assert server.directories(run.run_id, "nothing") == []
    server.delete(run.run_id, "nothing/here")
    with pytest.raises(CheckpointError, match="has no artifact"):
        server.download(run.run_id, "nothing/here.pt", tmp_path / "x")
    with pytest.raises(CheckpointError, match="no file"):
        server.upload(run.run_id, tmp_path / "absent.pt", "checkpoints")


def test_files_and_directories_are_deleted(server: Server, tmp_path: Path) -> None:
    run = new_run(server)
    local = tmp_path / "a.pt"
    local.write_bytes(b"abc")
    for directory in ("c/one", "c/two", "c/three"):
        server.upload(run.run_id, local, directory)
    server.delete(run.run_id, "c/one/a.pt")
    server.delete(run.run_id, "c/two")
    assert server.sizes(run.run_id, "c/one") == {}
    assert "two" not in server.directories(run.run_id, "c")
    assert server.sizes(run.run_id, "c/three") == {"a.pt": 3}


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/./b",
        "a\\..\\b",
        "C:/x",
        "c:x",
        "file:///etc/x",
        "a\x00b",
        "a\nb",
        "%2e%2e/x",
        "a/%252e%252e/x",
        "%2Fetc/passwd",
        "http://host/x",
        "a/",
        "a#b",
    ],
)
def test_a_path_that_leads_elsewhere_is_never_used(tmp_path: Path, path: str) -> None:
    # No such server: the name is refused before anything is asked.
    server = Server(f"http://127.0.0.1:{free_port()}")
    local = tmp_path / "local"
    local.write_bytes(b"x")
    with pytest.raises(CheckpointError, match="not used"):
        server.download("0" * 32, path, tmp_path / "to" / "x")
    with pytest.raises(CheckpointError, match="not used"):
        server.delete("0" * 32, path)
    if path:  # an empty one is the root, which is no file, but holds some
        with pytest.raises(CheckpointError, match="not used"):
            server.upload("0" * 32, local, path)
    assert sorted(tmp_path.iterdir()) == [local]


def test_a_download_that_breaks_off_leaves_what_was_there(front: FakeFront, tmp_path: Path) -> None:
    server = Server(front.uri, timeout=30)
    run = new_run(server)
    local = tmp_path / "a.pt"
    local.write_bytes(b"new" * 10_000)
    server.upload(run.run_id, local, "c")
    to = tmp_path / "to" / "a.pt"
    to.parent.mkdir()
    to.write_bytes(b"old")
    front.truncate("/artifacts/c/a.pt", 1000)
    with pytest.raises(ServerUnavailable):
        server.download(run.run_id, "c/a.pt", to)
    assert to.read_bytes() == b"old"
    assert list(to.parent.iterdir()) == [to]


def test_an_upload_that_a_proxy_answers_is_not_taken_for_done(front: FakeFront, tmp_path: Path) -> None:
    server = Server(front.uri, timeout=30)
    run = new_run(server)
    local = tmp_path / "a.pt"
    local.write_bytes(b"abc")
    for answer, error in [(Answer(200, HTML), ServerRefused), (Answer(413, HTML), ServerUnavailable)]:
        front.answer("/artifacts/c/a.pt", answer, times=1)
        with pytest.raises(error):
            server.upload(run.run_id, local, "c")
    assert server.sizes(run.run_id, "c") == {}


def test_a_dead_server_is_noticed_before_a_file_is_sent(tmp_path: Path) -> None:
    local = tmp_path / "a.pt"
    local.write_bytes(b"abc")
    with FakeFront() as front:
        front.hang("/")
        started = time.monotonic()
        with pytest.raises(ServerUnavailable):
            Server(front.uri, timeout=0.5).upload("0" * 32, local, "c")
        assert time.monotonic() - started < 4


def test_a_run_has_an_address_only_on_a_server(server_uri: str, tmp_path: Path) -> None:
    port = server_uri.rpartition(":")[2]
    server = Server(f"http://alice:secret@127.0.0.1:{port}/")
    run = new_run(server)
    assert server.url(run) == f"{server_uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    embedded = Server(f"sqlite:///{tmp_path}/mlflow.db")
    assert embedded.url(run) == ""
    assert database(embedded.uri) == tmp_path / "mlflow.db"


def test_a_server_killed_and_started_again_still_has_the_run(own_server: MlflowServer) -> None:
    own_server.start()
    server = Server(own_server.uri, timeout=30)
    run = new_run(server)
    server.log_points(run.run_id, [("loss", 1, 1, 1.0)])
    own_server.kill()
    with pytest.raises(ServerUnavailable):
        server.log_points(run.run_id, [("loss", 2, 2, 1.0)])
    own_server.start()
    server.log_points(run.run_id, [("loss", 2, 2, 1.0)])
    assert server.history(run.run_id, "loss") == [(1, 1, 1.0), (2, 2, 1.0)]
