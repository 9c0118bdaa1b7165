"""MLflow code that writes through the journal: what arrives, in which order, how often, and what is refused."""

from __future__ import annotations

import errno
import math
import subprocess
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler
from multiprocessing import get_context
from multiprocessing.context import ForkProcess, SpawnProcess
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.rest_store import RestStore
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.credentials import get_default_host_creds

from tests.nursery import Nursery
from tests.processes import Workplace, wait_until
from tests.servers import Answer, FakeFront, MlflowServer, Request, _Rule
from tracked import calls
from tracked.errors import TrackedError
from tracked.logged_run import LoggedRun
from tracked.spool import read_json
from tracked.store import ReadTimeout, TrackingStore, tracking_store

NOW = 1_700_000_000_000


def opened(uri: str, folder: Path, nursery: Nursery, **env: str) -> Iterator[TrackingStore]:
    """A store with a spool and a sender of its own, which end with it; `env` is the sender's."""
    place = Workplace(folder, uri)
    sender = nursery.start_sender(place, {"TRACKED_SENDER_IDLE": "600", **env})  # spares its imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKED_SPOOL", str(place.spool))
        patch.setenv("TRACKED_SENDER_IDLE", "600")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        store = tracking_store(f"tracked+{uri}")
        yield store
    del calls._everywhere[:]
    # Its thread would start another sender in place of the one that is ended here.
    store._calls._finished = True
    if store._calls._thread:
        store._calls._thread.join()
    assert "Traceback" not in sender.errors
    assert_no_sender_has_died(place)
    place.close()


def assert_no_sender_has_died(place: Workplace) -> None:
    """Another takes its place, so nothing else would show it."""
    for log in place.spool.glob("*/*/sender.log"):
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def store(
    server_uri: str, tmp_path_factory: pytest.TempPathFactory, nursery: Nursery
) -> Iterator[TrackingStore]:
    yield from opened(server_uri, tmp_path_factory.mktemp("calls"), nursery)


@pytest.fixture
def front(server_uri: str) -> Iterator[FakeFront]:
    """A way to the server on which requests can be lost."""
    with FakeFront(server_uri) as front:
        yield front


@pytest.fixture
def behind_front(front: FakeFront, tmp_path: Path, nursery: Nursery) -> Iterator[TrackingStore]:
    yield from opened(front.uri, tmp_path, nursery)


@pytest.fixture
def mlflows_own(server_uri: str) -> RestStore:
    return RestStore(partial(get_default_host_creds, server_uri))


def new_run(store: TrackingStore | RestStore, *, tags: Mapping[str, str] | None = None) -> str:
    labels = [RunTag(key, value) for key, value in (tags or {}).items()]
    run_id: str = store.create_run("0", "me", NOW, labels, "a run").info.run_id
    return run_id


def history(uri: str, run_id: str, key: str = "loss") -> list[tuple[int, int, float]]:
    """A key's points as they stand on the server: step, timestamp, value."""
    found = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.timestamp, point.value) for point in found)


# -- what arrives


def test_what_was_written_is_there_when_it_is_read(store: TrackingStore) -> None:
    run_id = new_run(store)
    for step in range(1500):
        store.log_metric(run_id, Metric("loss", step / 2, NOW + step, step))
    store.log_param(run_id, Param("lr", "0.1"))
    store.set_tag(run_id, RunTag("kind", "first"))
    store.log_batch(
        run_id, [Metric("loss", -1.0, NOW + 1500, 1500)], [Param("n", "2")], [RunTag("kind", "second")]
    )

    run = store.get_run(run_id)

    assert run.data.metrics == {"loss": -1.0}
    assert run.data.params == {"lr": "0.1", "n": "2"}
    assert run.data.tags["kind"] == "second"
    found = store.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in found] == [
        *((s, s / 2) for s in range(1500)),
        (1500, -1.0),
    ]


def test_a_search_finds_what_was_written_before_it(store: TrackingStore) -> None:
    run_id, mark = new_run(store), uuid.uuid4().hex
    store.set_tag(run_id, RunTag("mark", mark))

    found = store.search_runs(["0"], f"tags.mark = '{mark}'", 1, 10, None, None)

    assert [run.info.run_id for run in found] == [run_id]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 5e-324, 1 / 3, 7])
def test_a_value_arrives_as_mlflow_itself_would_have_stored_it(
    store: TrackingStore, mlflows_own: RestStore, value: float
) -> None:
    here, there = new_run(store), new_run(mlflows_own)
    for each, run_id in ((store, here), (mlflows_own, there)):
        each.log_metric(run_id, Metric("loss", value, NOW, 3))

    (found,), (expected,) = (
        each.get_metric_history(run_id, "loss") for each, run_id in ((store, here), (mlflows_own, there))
    )

    assert repr(found.value) == repr(expected.value)
    assert (found.step, found.timestamp) == (3, NOW)


def test_a_point_of_a_model_and_a_data_set_arrives_at_both(store: TrackingStore) -> None:
    run_id = new_run(store)
    model = store.create_logged_model("0", "model", run_id)
    store.log_metric(run_id, Metric("accuracy", 0.5, NOW, 1, model.model_id, "digits", "1234"))

    (metric,) = store.get_logged_model(model.model_id).metrics

    assert (metric.key, metric.value, metric.step) == ("accuracy", 0.5, 1)
    assert (metric.dataset_name, metric.dataset_digest, metric.run_id) == ("digits", "1234", run_id)
    assert store.get_run(run_id).data.metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("model", ["", "model_id=model.model_id, "])
def test_many_calls_travel_in_few_requests(server_uri: str, tmp_path: Path, model: str) -> None:
    with FakeFront(server_uri) as front:
        place = Workplace(tmp_path, front.uri)
        process = program(
            place,
            f"""
            import mlflow
            with mlflow.start_run() as run:
                model = mlflow.initialize_logged_model("net")
                print(run.info.run_id, model.model_id)
                for step in range(400):
                    mlflow.log_metrics({{"loss": 1 / (step + 1), "accuracy": 0.5}}, {model}step=step)
            """,
        )
        stdout, stderr = process.communicate(timeout=60)
        run_id, model_id = stdout.split()[:2]

        assert "tracked:" not in stderr
        for key in ("loss", "accuracy"):
            assert [step for step, _, _ in history(server_uri, run_id, key)] == list(range(400))
        assert bool(MlflowClient(server_uri).get_logged_model(model_id).metrics) == bool(model)
        assert front.count("runs/log-batch") < 20
        place.close()


def test_a_call_does_not_search_the_disk_for_spark(remote_workplace: Workplace) -> None:
    process = program(
        remote_workplace,
        """
        import sys, types, mlflow
        class Searched:
            names = []
            def find_spec(self, name, path=None, target=None):
                self.names.append(name)
        class SparkSession:
            getActiveSession = lambda: types.SimpleNamespace(conf={"spark.mlflow.modelRegistryUri": "theirs"})
        with mlflow.start_run():
            mlflow.log_metrics({"loss": 1.0}, step=0)
            sys.meta_path.insert(0, Searched())
            mlflow.log_metrics({"loss": 1.0}, step=1)
            mlflow.log_metric("loss", 1.0, step=2)
            del sys.meta_path[0]
        print("searched", Searched.names)
        for name in ("pyspark", "pyspark.sql", "pyspark.sql.utils"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["pyspark.sql"].SparkSession = SparkSession
        sys.modules["pyspark.sql.utils"].AnalysisException = Exception
        print("registry", mlflow.MlflowClient()._registry_uri)
        """,
    )
    stdout, stderr = process.communicate(timeout=60)

    assert "searched []" in stdout, stderr
    assert "registry theirs" in stdout, stderr


def test_the_end_of_a_run_comes_behind_all_that_was_logged_to_it(
    store: TrackingStore, server_uri: str
) -> None:
    run_id = new_run(store)
    store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))
    info = store.update_run_info(run_id, RunStatus.FINISHED, NOW + 5, None)

    assert (info.status, info.end_time) == ("FINISHED", NOW + 5)
    client = MlflowClient(server_uri)
    wait_until(lambda: client.get_run(run_id).info.status == "FINISHED", "the end")
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}
    assert client.get_run(run_id).info.end_time == NOW + 5


def test_a_run_that_has_ended_goes_on(store: TrackingStore) -> None:
    run_id = new_run(store)
    store.update_run_info(run_id, RunStatus.KILLED, NOW, None)
    store.update_run_info(run_id, RunStatus.RUNNING, None, "another name")
    store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))

    run = store.get_run(run_id)

    assert (run.info.status, run.info.run_name, run.data.metrics) == (
        "RUNNING",
        "another name",
        {"loss": 1.0},
    )


def test_who_logs_without_waiting_may_still_wait(store: TrackingStore, server_uri: str) -> None:
    run_id = new_run(store)

    store.log_metric_async(run_id, Metric("loss", 1.0, NOW, 1)).wait()

    assert history(server_uri, run_id) == [(1, NOW, 1.0)]
    with pytest.raises(MlflowException, match="Invalid value"):
        store.log_metric_async(run_id, Metric("a//b", 1.0, NOW, 1)).wait()


def test_a_run_is_renamed_and_deleted_at_once(store: TrackingStore) -> None:
    run_id = new_run(store)
    store.set_tag(run_id, RunTag("mlflow.runName", "renamed"))
    store.set_tag(run_id, RunTag("gone", "soon"))
    store.delete_tag(run_id, "gone")

    assert store.get_run(run_id).info.run_name == "renamed"
    assert "gone" not in store.get_run(run_id).data.tags
    store.delete_run(run_id)
    assert store.get_run(run_id).info.lifecycle_stage == "deleted"


def test_what_the_store_does_not_carry_is_mlflows_own(store: TrackingStore, server_uri: str) -> None:
    name = f"model-{uuid.uuid4().hex}"
    MlflowClient(server_uri, f"tracked+{server_uri}").create_registered_model(name)

    assert MlflowClient(server_uri).get_registered_model(name).name == name
    assert store.get_experiment("0").name == "Default"


# -- what is refused

BAD: dict[str, Callable[[TrackingStore | RestStore, str], object]] = {
    "metric name": lambda store, run: store.log_metric(run, Metric("a//b", 1.0, NOW, 1)),
    "metric characters": lambda store, run: store.log_metric(run, Metric("a?", 1.0, NOW, 1)),
    "metric name too long": lambda store, run: store.log_batch(run, [Metric("a" * 251, 1.0, NOW, 1)], [], []),
    "negative time": lambda store, run: store.log_metric(run, Metric("a", 1.0, -1, 1)),
    "param name": lambda store, run: store.log_param(run, Param("../a", "1")),
    "param too long": lambda store, run: store.log_param(run, Param("a" * 251, "1")),
    "param twice": lambda store, run: store.log_batch(run, [], [Param("a", "1"), Param("a", "1")], []),
    "param changed": lambda store, run: store.log_param(run, Param("taken", "2")),
    "param changed in a batch": lambda store, run: store.log_batch(run, [], [Param("taken", "2")], []),
    "tag name": lambda store, run: store.set_tag(run, RunTag("a\n?", "1")),
    "tag too long": lambda store, run: store.set_tag(run, RunTag("a" * 251, "1")),
    "batch too large": lambda store, run: store.log_batch(
        run, [Metric("a", 1.0, NOW, step) for step in range(1001)], [], []
    ),
    "no such run": lambda store, _: store.log_metric("f" * 32, Metric("a", 1.0, NOW, 1)),
    "no ID of a run": lambda store, _: store.log_metric("../..", Metric("a", 1.0, NOW, 1)),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD)
def test_what_mlflow_refuses_is_refused_at_once_and_in_the_same_way(
    store: TrackingStore, mlflows_own: RestStore, call: str
) -> None:
    codes = []
    for each in (store, mlflows_own):
        run_id = new_run(each)
        each.log_param(run_id, Param("taken", "1"))
        with pytest.raises(MlflowException) as raised:
            BAD[call](each, run_id)
        codes.append(raised.value.error_code)

    assert codes[0] == codes[1]


UNCARRIED: dict[str, Callable[[TrackingStore, str], object]] = {
    "half of a character, in a tag": lambda store, run: store.set_tag(run, RunTag("a", "caf\udce9")),
    "half of a character, in a param": lambda store, run: store.log_param(run, Param("a", "caf\udce9")),
    "half of a character, in a batch": lambda store, run: store.log_batch(run, [], [], [RunTag("a", "\udce9")]),
    "no value": lambda store, run: store.set_tag(run, RunTag("a", None)),  # type: ignore[arg-type]
    "an end in text": lambda store, run: store.update_run_info(run, RunStatus.FINISHED, "now", None),  # type: ignore[arg-type]
    "an end of 70 bits": lambda store, run: store.update_run_info(run, RunStatus.FINISHED, 1 << 70, None),
}  # fmt: skip


@pytest.mark.parametrize("call", UNCARRIED)
def test_what_no_request_can_carry_is_refused_at_once(store: TrackingStore, call: str) -> None:
    run_id = new_run(store)

    with pytest.raises((TypeError, ValueError)):
        UNCARRIED[call](store, run_id)

    store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))
    assert store.get_run(run_id).data.metrics == {"loss": 1.0}
    assert store.get_run(run_id).info.status == "RUNNING"


def test_bytes_and_numbers_of_other_kinds_are_carried_as_mlflow_carries_them(store: TrackingStore) -> None:
    run_id = new_run(store)
    store.set_tag(run_id, RunTag("a", b"x"))  # type: ignore[arg-type]
    store.update_run_info(run_id, RunStatus.FINISHED, np.int64(NOW), None)  # type: ignore[arg-type]

    run = store.get_run(run_id)

    assert (run.data.tags["a"], run.info.end_time) == ("x", NOW)


def test_a_model_that_does_not_exist_is_refused_at_once(store: TrackingStore) -> None:
    run_id = new_run(store)

    with pytest.raises(MlflowException, match="m-none"):
        store.log_metric(run_id, Metric("a", 1.0, NOW, 1, "m-none"))


def test_a_record_that_cannot_be_sent_is_left_out_and_holds_up_nothing(
    behind_front: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    unsent = {
        "tags": {"a": "\udce9"},
        "status": {"status": "FINISHED", "end_time": "now"},
        "linked": Metric("a", 1.0, NOW, 1, "m-none").to_dictionary(),
    }
    runs = [new_run(behind_front) for _ in unsent]
    for run_id, (kind, body) in zip(runs, unsent.items(), strict=True):
        behind_front._calls.add(run_id, (kind, body))
        behind_front.log_metric(run_id, Metric("loss", 1.0, NOW, 1))

    assert [behind_front.get_run(run_id).data.metrics["loss"] for run_id in runs] == [1.0, 1.0, 1.0]
    behind_front._calls.finish()
    assert caplog.text.count("left out, as it cannot be delivered") == 3


def test_points_of_a_model_that_were_delivered_without_an_answer_hold_up_nothing(
    front: FakeFront, behind_front: TrackingStore, server_uri: str
) -> None:
    run_id = new_run(behind_front)
    model = behind_front.create_logged_model("0", "model", run_id)
    front.drop_answer("runs/log-batch", times=1)
    points = [Metric(f"m{key}", 1.0, NOW, 1, model.model_id, run_id=run_id) for key in range(150)]
    behind_front.log_batch(run_id, points, [], [])
    for value in range(30):  # within one millisecond, at one step: MLflow keeps one of them for the model
        behind_front.log_metric(run_id, Metric("loss", float(value), NOW, 0, model.model_id))
    behind_front.update_run_info(run_id, RunStatus.FINISHED, NOW, None)

    run = behind_front.get_run(run_id)

    assert (run.info.status, len(run.data.metrics)) == ("FINISHED", 151)
    assert sorted(value for _, _, value in history(server_uri, run_id)) == [float(each) for each in range(30)]
    assert len(behind_front.get_logged_model(model.model_id).metrics) == 151


def test_a_model_of_somebody_else_is_logged_to_while_the_server_is_away(
    front: FakeFront, behind_front: TrackingStore, server_uri: str
) -> None:
    run_id = new_run(behind_front)
    model = MlflowClient(server_uri).create_logged_model("0", "model", run_id)
    front.answer("logged-models", Answer(503, b"down"))

    began = time.perf_counter()
    behind_front.log_metric(run_id, Metric("loss", 1.0, NOW, 0, model.model_id))
    assert time.perf_counter() - began < 5

    front._rules.clear()
    assert behind_front.get_run(run_id).data.metrics == {"loss": 1.0}


def test_a_full_disk_is_told_where_something_is_read_and_at_the_end(
    behind_front: TrackingStore,
    front: FakeFront,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, run_id = behind_front, new_run(behind_front)
    file = tmp_path / "state.txt"
    file.write_text("state")

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tracked.journal.Journal._write", full)
        store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))
        with pytest.raises(ReadTimeout, match=r"in memory alone: .*No space left on device"):
            store.get_run(run_id)
        LoggedRun(run_id, front.uri).save_checkpoint(file, 1)
        began = time.monotonic()
        store._calls.finish()
        assert time.monotonic() - began < 5, "for what no sender can see nothing waits"
        told = capsys.readouterr().err
        assert f"what was logged last to run {run_id} is lost" in told
        assert "sync" not in told

    assert store.get_run(run_id).data.metrics == {"loss": 1.0}


def test_a_param_that_another_process_has_logged_is_refused_too(
    store: TrackingStore, mlflows_own: RestStore
) -> None:
    run_id = new_run(mlflows_own)
    mlflows_own.log_param(run_id, Param("lr", "0.1"))

    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        store.log_param(run_id, Param("lr", "0.2"))
    store.log_param(run_id, Param("lr", "0.1"))


def test_a_deleted_run_is_refused(store: TrackingStore) -> None:
    run_id = new_run(store)
    store.delete_run(run_id)
    assert store.get_run(run_id).info.lifecycle_stage == "deleted"

    with pytest.raises(MlflowException, match="active"):
        store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))


def test_a_run_that_is_deleted_with_its_experiment_is_refused(store: TrackingStore) -> None:
    experiment_id = store.create_experiment(uuid.uuid4().hex, None, None)
    run_id = store.create_run(experiment_id, "me", NOW, [], "a run").info.run_id
    store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))
    store.delete_experiment(experiment_id)

    with pytest.raises(MlflowException, match="active"):
        store.log_metric(run_id, Metric("loss", 1.0, NOW, 2))


def test_a_run_that_somebody_has_deleted_holds_up_no_search_and_gets_its_points_when_it_is_restored(
    store: TrackingStore, server_uri: str
) -> None:
    run_id, other = new_run(store), new_run(store)
    theirs = MlflowClient(server_uri)
    theirs.delete_run(run_id)
    store.log_metric(run_id, Metric("loss", 1.0, NOW, 1))
    store.log_metric(other, Metric("loss", 2.0, NOW, 1))

    found = store.search_runs(["0"], f"attributes.run_id = '{other}'", 1, 10, None, None)
    assert [run.data.metrics for run in found] == [{"loss": 2.0}]
    with pytest.raises(ReadTimeout, match="was deleted"):
        store.get_metric_history(run_id, "loss")

    store.restore_run(run_id)
    assert [point.value for point in store.get_metric_history(run_id, "loss")] == [1.0]


# -- when something fails on the way


def test_a_run_whose_creation_got_no_answer_is_made_once(
    front: FakeFront, behind_front: TrackingStore
) -> None:
    mark = uuid.uuid4().hex
    front.drop_answer("runs/create", times=1)

    run_id = new_run(behind_front, tags={"mark": mark})

    found = behind_front.search_runs(["0"], f"tags.mark = '{mark}'", 3, 10, None, None)
    assert [run.info.run_id for run in found] == [run_id]


def test_what_was_delivered_without_an_answer_takes_effect_once(
    front: FakeFront, behind_front: TrackingStore, server_uri: str
) -> None:
    front.drop_answer("runs/log-batch", times=3)
    run_id = new_run(behind_front)
    behind_front.log_param(run_id, Param("lr", "0.1"))
    for step in range(100):
        behind_front.log_metric(run_id, Metric("loss", 1.0, NOW + step, 0))

    assert behind_front.get_run(run_id).data.params == {"lr": "0.1"}

    assert history(server_uri, run_id) == [(0, NOW + step, 1.0) for step in range(100)]
    assert front.count("runs/log-batch") >= 4  # at least one, sent again three times


def test_a_sender_that_is_killed_before_it_takes_note_sends_nothing_twice(
    tmp_path: Path, server_uri: str, nursery: Nursery
) -> None:
    for store in opened(server_uri, tmp_path, nursery, TRACKED_FAILPOINT="sender.before-acknowledge"):
        lock = store._calls.outbox.sender_lock
        first = read_json(lock)["pid"]
        run_id = new_run(store)
        for step in range(50):
            store.log_metric(run_id, Metric("loss", 1.0, NOW + step, 0))

        store.get_run(run_id)

        assert history(server_uri, run_id) == [(0, NOW + step, 1.0) for step in range(50)]
        assert read_json(lock)["pid"] != first


def test_a_read_that_would_miss_what_was_written_waits_and_then_says_so(
    front: FakeFront, behind_front: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = new_run(behind_front)
    front.answer("runs/log-batch", Answer(503, b"down"))
    monkeypatch.setenv("TRACKED_READ_TIMEOUT", "1")
    behind_front.log_metric(run_id, Metric("loss", 1.0, NOW, 1))

    with pytest.raises(ReadTimeout, match="has not reached the server after 1 s") as raised:
        behind_front.get_run(run_id)

    assert isinstance(raised.value, MlflowException)
    assert isinstance(raised.value, TrackedError)
    assert "TRACKED_READ_TIMEOUT" in str(raised.value)
    front._rules.clear()
    monkeypatch.setenv("TRACKED_READ_TIMEOUT", "30")
    assert behind_front.get_run(run_id).data.metrics == {"loss": 1.0}


def test_an_outage_costs_who_logs_nothing(
    front: FakeFront, behind_front: TrackingStore, server_uri: str
) -> None:
    run_id = new_run(behind_front)
    front.answer("", Answer(503, b"down"))
    began = time.perf_counter()
    for step in range(1000):
        behind_front.log_metric(run_id, Metric("loss", 1.0, NOW, step))
    behind_front.update_run_info(run_id, RunStatus.FINISHED, NOW, None)
    assert time.perf_counter() - began < 0.5

    front._rules.clear()

    assert behind_front.get_run(run_id).info.status == "FINISHED"
    assert history(server_uri, run_id) == [(step, NOW, 1.0) for step in range(1000)]


def test_a_second_checkpoint_of_a_step_lies_beside_the_first_which_counts_until_the_runs_tag_changes(
    front: FakeFront, behind_front: TrackingStore, server_uri: str, tmp_path: Path
) -> None:
    run_id = new_run(behind_front)
    run, client, file = LoggedRun(run_id, front.uri), MlflowClient(server_uri), tmp_path / "state.txt"

    def content() -> str | None:
        found = run.fetch_checkpoint()
        return found.read_text() if found else None

    def names() -> set[str]:
        entries = client.list_artifacts(run_id, "checkpoints/step-00000002")
        return {Path(entry.path).name for entry in entries} - {"manifest.json"}

    file.write_text("first")
    run.save_checkpoint(file, 2)
    wait_until(lambda: content() == "first", "the first")
    [first] = names()
    front._rules.append(
        _Rule(
            lambda request: b"tracked.checkpoint" in request.body,
            lambda front, handler, _: front._write(handler, Answer(503)),
            None,
        )
    )
    file.write_text("second")
    run.save_checkpoint(file, 2)
    wait_until(lambda: len(names()) == 2, "the second beside it")
    assert content() == "first"

    front._rules.clear()

    wait_until(lambda: content() == "second", "the second")
    assert first in names()


def test_a_checkpoint_that_a_newer_one_replaces_while_it_is_fetched_is_the_newer_one(
    front: FakeFront, behind_front: TrackingStore, server_uri: str, tmp_path: Path
) -> None:
    run_id = new_run(behind_front)
    run, client, file = LoggedRun(run_id, front.uri), MlflowClient(server_uri), tmp_path / "state.txt"

    def save(step: int) -> None:
        file.write_text(f"after {step}")
        run.save_checkpoint(file, step)
        name = f"checkpoints/step-{step:08}"
        wait_until(
            lambda: (
                f'"step": {step}' in client.get_run(run_id).data.tags.get("tracked.checkpoint", "")
                and [each.path for each in client.list_artifacts(run_id, "checkpoints")] == [name]
            ),
            "the checkpoint, alone",
        )

    def replace(front: FakeFront, handler: BaseHTTPRequestHandler, request: Request) -> None:
        save(2)
        front._write(handler, front._forward(request))

    save(1)
    looks = _Rule(lambda request: request.method == "GET" and "step-00000001" in request.path, replace, 1)
    front._rules.append(looks)

    found = run.fetch_checkpoint()

    assert looks.left == 0
    assert found is not None
    assert found.read_text() == "after 2"


def test_mlflows_system_metrics_go_on_over_an_outage(
    front: FakeFront, behind_front: TrackingStore, server_uri: str
) -> None:
    """Its monitor asks after each sample whether the run goes on, and leaves for good when nobody answers."""
    client = MlflowClient(f"tracked+{front.uri}")
    run_id = client.create_run("0").info.run_id
    monitor = SystemMetricsMonitor(
        run_id, sampling_interval=0.05, samples_before_logging=1, tracking_uri=client.tracking_uri
    )
    front.answer("", Answer(503, b"down"))
    monitor.start()
    wait_until(lambda: monitor._logging_step >= 5, "samples during the outage")
    front._rules.clear()
    monitor.finish()

    client.get_run(run_id)
    steps = [step for step, _, _ in history(server_uri, run_id, "system/cpu_utilization_percentage")]
    assert steps == list(range(monitor._logging_step))


# -- whole programs


def program(place: Workplace, text: str, **env: str) -> subprocess.Popen[str]:
    """Start a Python program in the workplace, with its tracking URI behind `tracked+`."""
    address = {"MLFLOW_TRACKING_URI": f"tracked+{place.tracking_uri}"}
    return place.program("-c", textwrap.dedent(text), env={**address, **env})


def test_a_program_that_is_killed_loses_no_point_older_than_the_flush(remote_workplace: Workplace) -> None:
    place = remote_workplace
    process = program(
        place,
        """
        import time, mlflow
        print(mlflow.start_run().info.run_id, flush=True)
        for step in range(100_000):
            mlflow.log_metric("loss", 1.0, step=step)
            print(step, time.time(), flush=True)
            time.sleep(0.001)
        """,
    )
    assert process.stdout
    run_id = process.stdout.readline().strip()
    for _ in range(700):
        process.stdout.readline()
    killed = time.time()
    process.kill()
    said = [line.split() for line in process.stdout.read().splitlines()]
    due = [
        int(step) for step, when in (line for line in said if len(line) == 2) if float(when) < killed - 0.2
    ]

    place.tracked("sync")

    steps = [step for step, _, _ in history(place.tracking_uri, run_id)]
    assert steps == list(range(len(steps)))
    assert len(steps) > max(due, default=400)
    assert (
        MlflowClient(place.tracking_uri).get_run(run_id).info.status == "RUNNING"
    )  # as MLflow itself leaves it


def test_what_a_program_could_not_deliver_is_told_kept_and_delivered_by_sync(
    server_uri: str, tmp_path: Path
) -> None:
    with FakeFront(server_uri) as front:
        place = Workplace(tmp_path, front.uri)
        front.answer("runs/log-batch", Answer(503, b"down"))
        process = program(
            place,
            """
            import mlflow
            with mlflow.start_run() as run:
                print(run.info.run_id)
                mlflow.log_metric("loss", 1.0, step=1)
            """,
            TRACKED_DRAIN_TIMEOUT="1",
        )
        stdout, stderr = process.communicate(timeout=60)
        run_id = stdout.split()[0]

        assert process.returncode == 0
        assert f"what was logged to run {run_id} is not all delivered" in stderr
        assert "try: python -m tracked.run sync" in stderr
        assert MlflowClient(server_uri).get_run(run_id).info.status == "RUNNING"

        place.end_senders()  # it may be quicker than the command
        front._rules.clear()
        done = place.tracked("sync")

        assert f"run {run_id}: 2 records were delivered" in done.stderr
        run = MlflowClient(server_uri).get_run(run_id)
        assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
        assert not any(outbox.all_called() for outbox in place.outboxes())
        assert_no_sender_has_died(place)
        place.close()


def test_a_process_that_a_program_starts_waits_and_tells_once(server_uri: str, tmp_path: Path) -> None:
    with FakeFront(server_uri) as front:
        place = Workplace(tmp_path, front.uri)
        run_id = MlflowClient(server_uri).create_run("0").info.run_id
        front.answer("runs/log-batch", Answer(503, b"down"))
        process = program(
            place,
            f"""
            import multiprocessing, mlflow
            logs = {{"key": "loss", "value": 1.0, "run_id": {run_id!r}}}
            child = multiprocessing.get_context("spawn").Process(target=mlflow.log_metric, kwargs=logs)
            child.start()
            child.join()
            """,
            TRACKED_DRAIN_TIMEOUT="1",
        )
        _, stderr = process.communicate(timeout=60)

        assert stderr.count("is not all delivered") == 1
        place.close()


def test_a_run_left_open_is_ended_with_its_program_and_all_is_delivered(remote_workplace: Workplace) -> None:
    process = program(
        remote_workplace,
        """
        import mlflow
        print(mlflow.start_run().info.run_id)
        for step in range(10):
            mlflow.log_metric("loss", 1.0, step=step)
        """,
    )
    stdout, stderr = process.communicate(timeout=60)

    run_id = stdout.split()[0]
    assert "tracked:" not in stderr
    assert len(history(remote_workplace.tracking_uri, run_id)) == 10
    assert MlflowClient(remote_workplace.tracking_uri).get_run(run_id).info.status == "FINISHED"


def test_a_server_that_is_killed_in_between_costs_a_program_no_call(
    own_server: MlflowServer, tmp_path: Path
) -> None:
    own_server.start()
    place = Workplace(tmp_path, own_server.uri)
    process = program(
        place,
        """
        import sys, time, mlflow
        with mlflow.start_run() as run:
            print(run.info.run_id, flush=True)
            longest = 0.0
            for step in range(400):
                began = time.perf_counter()
                mlflow.log_metric("loss", 1.0, step=step)
                longest = max(longest, time.perf_counter() - began)
                print(step, flush=True)
                time.sleep(0.005)
        print("longest", longest)
        """,
    )
    assert process.stdout
    run_id = process.stdout.readline().strip()
    while process.stdout.readline().strip() != "100":
        pass
    own_server.kill()
    while process.stdout.readline().strip() != "300":
        pass
    own_server.start()
    stdout, stderr = process.communicate(timeout=90)

    longest = next(float(line.split()[1]) for line in stdout.splitlines() if line.startswith("longest"))
    assert longest < 1.0
    assert "tracked: what was logged" not in stderr
    assert [step for step, _, _ in history(own_server.uri, run_id)] == list(range(400))
    assert MlflowClient(own_server.uri).get_run(run_id).info.status == "FINISHED"
    place.close()


def log_from_a_child(run_id: str, uri: str, steps: range) -> None:
    client = MlflowClient(uri)
    for step in steps:
        client.log_metric(run_id, "loss", 1.0, timestamp=NOW, step=step)


@pytest.mark.parametrize("process", [get_context("fork").Process, get_context("spawn").Process])
def test_processes_that_a_program_starts_write_to_its_run_too(
    server_uri: str,
    tmp_path: Path,
    nursery: Nursery,
    process: Callable[..., ForkProcess | SpawnProcess],
) -> None:
    for store in opened(server_uri, tmp_path, nursery):
        run_id = new_run(store)
        store.log_metric(run_id, Metric("loss", 1.0, NOW, 0))
        child = process(target=log_from_a_child, args=(run_id, f"tracked+{server_uri}", range(1, 20)))
        child.start()
        child.join(60)
        assert child.exitcode == 0

        assert [point.step for point in store.get_metric_history(run_id, "loss")] == list(range(20))


def test_of_two_processes_the_one_that_ended_first_has_its_say_first(server_uri: str, tmp_path: Path) -> None:
    with FakeFront(server_uri) as front:
        place = Workplace(tmp_path, front.uri, {"TRACKED_DRAIN_TIMEOUT": "0.5"})
        run_id = MlflowClient(server_uri).create_run("0").info.run_id
        front.answer("runs/log-batch", Answer(503, b"down"))
        line = "import mlflow, sys; mlflow.MlflowClient().set_tag({!r}, 'who', {!r})"
        for who in ("first", "second"):
            program(place, line.format(run_id, who)).communicate(timeout=60)
        front._rules.clear()

        place.tracked("sync")

        assert MlflowClient(server_uri).get_run(run_id).data.tags["who"] == "second"
        place.close()
