"""The MLflow store of `tracked+http://`, `tracked+https://` and `tracked+sqlite:///`.

Metrics, params, tags and the end of a run go into the journal and cost no request. All else is MLflow's own
store, asked at once; where its answer depends on what was written before, that is waited for.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

from mlflow.entities import (
    LifecycleStage,
    LoggedModel,
    Metric,
    Param,
    Run,
    RunData,
    RunInfo,
    RunStatus,
    RunTag,
    ViewType,
)
from mlflow.entities.run_info import check_run_is_active
from mlflow.environment_variables import MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.protos.service_pb2 import UpdateRun
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.store.model_registry.rest_store import RestStore as RegistryRestStore
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracking import get_tracking_uri
from mlflow.tracking._model_registry import utils as registry_utils
from mlflow.utils.async_logging.run_operations import RunOperations
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.proto_json_utils import parse_dict
from mlflow.utils.rest_utils import http_request, verify_rest_response
from mlflow.utils.validation import (
    _validate_batch_log_limits,
    _validate_metric,
    _validate_param,
    _validate_param_keys_unique,
    _validate_tag,
)

from tracked import calls
from tracked.address import PLUGIN, database, normalise_uri, redact
from tracked.calls import Calls, Entry, read_timeout
from tracked.errors import NotDelivered
from tracked.names import ATTEMPT, CALL, DIVERGED_AT, OVERRIDE, is_system
from tracked.place import Place
from tracked.resumption import Edge, Resumption, points_again, resumed_run_id

if TYPE_CHECKING:
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryDatabase

log = logging.getLogger("tracked")

_INT64 = 1 << 63
_LONGEST_TAG = 8000  # characters, as MLflow has it
_RETRY_SECONDS = 1.0
_LOOK_SECONDS = 2.0
_MONITOR = "SystemMetricsMonitor"

# What these answer, or change, depends on all runs, or on one that their arguments do not name.
_AFTER_ALL_WRITES = frozenset({
    *("search_runs", "get_logged_model", "search_logged_models"),
    "restore_experiment",
})  # fmt: skip
# The same of the run that is their first argument.
_AFTER_WRITES_TO_THE_RUN = frozenset({"get_metric_history", "delete_tag", "record_logged_model"})


class ReadTimeout(NotDelivered, MlflowException):
    """A read that would have missed what was written before it, as an error that MLflow's callers know."""


@cache
def _look_for_spark_in_memory() -> None:
    """Spare each call of MLflow's fluent API a search of the disk that costs more than all the rest of it.

    Whenever it makes a client, which is once or twice a call, MLflow asks Spark whether there is a session, and
    where pyspark is not installed it looks for it each time anew. Only what has been imported can have one.
    """
    clients: Any = registry_utils
    ask = clients._get_active_spark_session  # noqa: SLF001
    clients._get_active_spark_session = lambda: ask() if "pyspark" in sys.modules else None  # noqa: SLF001


def tracking_store(store_uri: str) -> TrackingStore:
    """The store of a tracking URI that begins with `tracked+`.

    Raises:
        UsageError: The rest of it is no address of a server, nor of an SQLite file.
        SpoolError: The spool cannot be made or written to.
    """
    place = Place.choose(store_uri)
    path = database(place.tracking_uri)
    with suppress(AttributeError):  # another version of MLflow may ask elsewhere
        _look_for_spark_in_memory()
    inner: AbstractStore
    if path is None:
        inner = _OnceStore(place.tracking_uri)
    else:
        from tracked.embedded import open_database  # takes a second to import, for an SQLite file alone

        inner = open_database(place.tracking_uri, path)
    return TrackingStore(inner, calls.to(place))


def registry_store(store_uri: str) -> RegistryRestStore | RegistryDatabase:
    """MLflow's own store of registered models behind such a URI."""
    uri = normalise_uri(store_uri)
    if (path := database(uri)) is None:
        return RegistryRestStore(partial(get_default_host_creds, uri))
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

    from tracked.embedded import open_database

    open_database(uri, path).engine.dispose()  # made here if need be, by one process at a time
    return SqlAlchemyStore(uri)


def artifact_repository(
    artifact_uri: str, tracking_uri: str | None, registry_uri: str | None
) -> MlflowArtifactsRepository:
    """Artifacts behind an MLflow server, whose address may stand behind `tracked+`."""
    uri = tracking_uri or get_tracking_uri()
    return MlflowArtifactsRepository(artifact_uri, uri.removeprefix(PLUGIN), registry_uri)


class _OnceStore(RestStore):
    """MLflow's REST store, except that a run whose creation got no answer is looked for before another is made.

    MLflow's own repeats the request, and where only the answer was lost, that makes a second run.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(partial(get_default_host_creds, uri))  # type: ignore[no-untyped-call]
        self._asking = threading.local()

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, tags: Sequence[RunTag], run_name: str | None
    ) -> Run:
        call = uuid.uuid4().hex
        tags = [*tags, RunTag(CALL, call)]
        deadline = time.monotonic() + read_timeout()
        self._asking.once = True
        try:
            while True:
                try:
                    run = super().create_run(experiment_id, user_id, start_time, tags, run_name)  # type: ignore[no-untyped-call]
                    return cast("Run", run)
                except MlflowException as error:
                    # As MLflow has it: what may work later, and no refusal.
                    again = error.get_http_status_code() in (408, 429) or error.get_http_status_code() >= 500
                    if not again or time.monotonic() > deadline:
                        raise
                time.sleep(_RETRY_SECONDS)
                with suppress(MlflowException):
                    found = self.search_runs([experiment_id], f"tags.`{CALL}` = '{call}'", ViewType.ALL)  # type: ignore[no-untyped-call]
                    if found:
                        return cast("Run", found[0])
        finally:
            self._asking.once = False

    def check_model(self, model_id: str) -> None:
        """Refuse a model that the server does not have, if it says so within seconds."""
        self._asking.once, self._asking.seconds = True, _LOOK_SECONDS
        try:
            self.get_logged_model(model_id)
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
        finally:
            self._asking.once, self._asking.seconds = False, None

    def _call_endpoint(
        self, api: Any, json_body: str | None = None, endpoint: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not getattr(self._asking, "once", False):
            return super()._call_endpoint(api, json_body, endpoint, *args, **kwargs)  # type: ignore[no-untyped-call]
        path, method = self._METHOD_TO_INFO[api]
        path = endpoint or path
        body = json.loads(json_body) if json_body else None
        request = {"params" if method == "GET" else "json": body}
        seconds = getattr(self._asking, "seconds", None)
        response = http_request(
            self.get_host_creds(), path, method, max_retries=0, timeout=seconds, **request
        )
        answer = api.Response()
        parse_dict(verify_rest_response(response, path).json(), answer)
        return answer


@dataclass
class _Known:
    """What this process knows of a run."""

    info: RunInfo
    params: dict[str, str]


class TrackingStore:
    """MLflow's own store, but for the writes to a run, and for the reads that have to wait for them.

    What it does not name here is the other store's, and MLflow asks no store for its class where it matters.
    """

    def __init__(self, inner: AbstractStore, calls: Calls) -> None:
        self._inner = inner
        self._calls = calls
        self._runs: dict[str, _Known] = {}
        self._names: set[str] = set()
        self._models: set[str] = set()
        self._resumed = resumed_run_id()
        self._resumption: Resumption | None = None
        self._begin_anew()
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        """A lock that another thread of this process's parent held would stay held for ever."""
        self._resuming = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name in _AFTER_ALL_WRITES:
            return self._after(found)
        if name in _AFTER_WRITES_TO_THE_RUN:
            return self._after(found, of_one_run=True)
        return found

    def _after(self, call: Callable[..., Any], *, of_one_run: bool = False) -> Callable[..., Any]:
        def waiting(*args: Any, **kwargs: Any) -> Any:
            run_id = (args[0] if args else kwargs["run_id"]) if of_one_run else None
            self._wait(run_id)
            return call(*args, **kwargs)

        return waiting

    def _wait(self, run_id: str | None = None) -> None:
        try:
            self._calls.wait(run_id)
        except NotDelivered as error:
            raise ReadTimeout(error.found, expected=error.expected, try_next=error.try_next) from None

    # -- runs

    def create_run(
        self, experiment_id: str, user_id: str, start_time: int, tags: list[RunTag], run_name: str | None
    ) -> Run:
        self._calls.ensure_sender()
        return self._learn(self._inner.create_run(experiment_id, user_id, start_time, tags, run_name))

    def get_run(self, run_id: str) -> Run:
        known = self._runs.get(run_id)
        if known is not None and threading.current_thread().name == _MONITOR:
            # It asks after each sample whether the run goes on, and one failed answer ends it for good.
            return Run(known.info, RunData())
        self._wait(run_id)
        return self._learn(self._inner.get_run(run_id))

    def delete_experiment(self, experiment_id: str) -> None:
        self._wait()
        self._runs.clear()  # whichever of them are in it are deleted with it
        self._inner.delete_experiment(experiment_id)

    def delete_run(self, run_id: str) -> None:
        self._change(run_id, self._inner.delete_run)

    def restore_run(self, run_id: str) -> None:
        self._runs.pop(run_id, None)
        self._inner.restore_run(run_id)  # without waiting: what waits does so until this is done

    def update_run_info(
        self, run_id: str, run_status: int | None, end_time: int | None, run_name: str | None
    ) -> RunInfo:
        if run_status is None or run_name or not RunStatus.is_terminated(run_status):
            info: RunInfo = self._change(run_id, self._inner.update_run_info, run_status, end_time, run_name)
            return info
        known = self._writable(run_id)
        status = RunStatus.to_string(run_status)
        wire = UpdateRun(end_time=end_time)
        ended = wire.end_time if wire.HasField("end_time") else None
        self._calls.add(run_id, ("status", {"status": status, "end_time": ended}))
        known.info = known.info._copy_with_overrides(status=status, end_time=ended)  # noqa: SLF001
        self._print_address(known.info)
        return known.info

    def _change(self, run_id: str, change: Callable[..., Any], *args: Any) -> Any:
        """Change what the journal does not carry, and forget what was known."""
        self._wait(run_id)
        self._runs.pop(run_id, None)
        return change(run_id, *args)

    def _learn(self, run: Run) -> Run:
        if run.info.lifecycle_stage == LifecycleStage.ACTIVE:
            known = self._runs.get(run.info.run_id)
            # Another thread may have journaled a param since this answer was given.
            params = {**(known.params if known else {}), **run.data.params}
            self._runs[run.info.run_id] = _Known(run.info, params)
        else:
            self._runs.pop(run.info.run_id, None)
        return run

    def _resume(self, run_id: str) -> Resumption:
        """Begin another attempt of the run that this process goes on with, knowing what stands of it already."""
        self._wait(run_id)
        run = self._inner.get_run(run_id)
        edge = Edge.of(run.data.tags)
        replay = {}
        for latest in run.data._metric_objs:  # noqa: SLF001 - `metrics` has no steps
            if edge.is_before(latest.step, latest.timestamp) and not is_system(latest.key):
                history = self._inner.get_metric_history(run_id, latest.key)
                points = [(each.step, each.timestamp, each.value) for each in history]
                replay[latest.key] = points_again(points, edge)
        self._begin_attempt(run)
        return Resumption(run.data.params, replay)

    def _begin_attempt(self, run: Run) -> None:
        """Have the run say that it is trained again."""
        attempt = run.data.tags.get(ATTEMPT, "1")
        number = int(attempt) + 1 if attempt.isdigit() else 2
        self._inner.set_tag(run.info.run_id, RunTag(ATTEMPT, str(number)))
        self._inner.update_run_info(run.info.run_id, RunStatus.RUNNING, None, None)
        log.info("going on with run %s, attempt %d", run.info.run_id, number)

    def _writable(self, run_id: str) -> _Known:
        """What is known of a run that is to be written.

        Raises:
            MlflowException: MLflow's own, for a run that does not exist or was deleted.
        """
        if run_id == self._resumed:
            with self._resuming:
                if self._resumption is None:
                    # Only now: a process that but reads is no attempt.
                    self._resumption = self._resume(run_id)
        if (known := self._runs.get(run_id)) is None:
            run = self._learn(self._inner.get_run(run_id))
            check_run_is_active(run.info)
            known = self._runs.setdefault(run_id, _Known(run.info, dict(run.data.params)))
        return known

    def _print_address(self, info: RunInfo) -> None:
        """The two lines that MLflow prints at a run's end, for stores of its own alone."""
        if not isinstance(self._inner, RestStore) or MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.get():
            return
        address = (
            f"{redact(self._inner.get_host_creds().host.rstrip('/'))}/#/experiments/{info.experiment_id}"
        )
        sys.stdout.write(f"🏃 View run {info.run_name} at: {address}/runs/{info.run_id}\n")
        sys.stdout.write(f"🧪 View experiment at: {address}\n")

    # -- what is logged to them

    def log_metric(self, run_id: str, metric: Metric) -> None:
        if run_id not in self._runs or run_id == self._resumed:
            self._writable(run_id)
        entry = self._checked(run_id, metric)
        if not self._stands(run_id, metric):
            self._calls.add(run_id, entry)

    def _stands(self, run_id: str, metric: Metric) -> bool:
        """Whether it is a point of an earlier attempt, which is not written twice."""
        resumption = self._resumption if run_id == self._resumed else None
        if resumption is None:
            return False
        told = resumption.diverged
        stands = resumption.stands(metric.key, metric.step, float(metric.value))
        if resumption.diverged != told:
            self._calls.add(run_id, ("tags", {DIVERGED_AT: resumption.diverged}))
        return stands

    def log_param(self, run_id: str, param: Param) -> None:
        known = self._writable(run_id)
        checked = _checked_param(param)
        if self._keeps(run_id, checked):
            return
        if known.params.setdefault(param.key, checked.value) != checked.value:
            self._change(run_id, self._inner.log_param, param)
        else:
            self._calls.add(run_id, ("params", {checked.key: checked.value}))

    def set_tag(self, run_id: str, tag: RunTag) -> None:
        self._writable(run_id)
        checked = _checked_tag(tag)
        if tag.key == MLFLOW_RUN_NAME:
            self._change(run_id, self._inner.set_tag, tag)
        else:
            self._calls.add(run_id, ("tags", {checked.key: checked.value}))

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]
    ) -> None:
        known = self._writable(run_id)
        points = [self._checked(run_id, metric, index) for index, metric in enumerate(metrics)]
        checked_params = [_checked_param(param, f"params[{index}]") for index, param in enumerate(params)]
        checked_tags = [_checked_tag(tag, f"tags[{index}]") for index, tag in enumerate(tags)]
        _validate_batch_log_limits(metrics, params, tags)
        _validate_param_keys_unique(params)
        params = checked_params = [param for param in checked_params if not self._keeps(run_id, param)]
        if run_id == self._resumed:
            stands = [self._stands(run_id, metric) for metric in metrics]
            points = [point for point, stood in zip(points, stands, strict=True) if not stood]
            metrics = [metric for metric, stood in zip(metrics, stands, strict=True) if not stood]
        changes = any(known.params.get(p.key, p.value) != p.value for p in checked_params)
        if changes or any(tag.key == MLFLOW_RUN_NAME for tag in tags):
            self._change(run_id, self._inner.log_batch, metrics, params, tags)
            return
        known.params |= {param.key: param.value for param in checked_params}
        self._calls.add(
            run_id,
            *(("params", {param.key: param.value}) for param in checked_params),
            *points,
            *(("tags", {tag.key: tag.value}) for tag in checked_tags),
        )

    def _keeps(self, run_id: str, param: Param) -> bool:
        """Whether a resumed run has another value of it already, which stays; what it was to be stands in a tag."""
        resumption = self._resumption if run_id == self._resumed else None
        if resumption is None or not resumption.keeps(param.key, param.value):
            return False
        if len(note := json.dumps({"params": resumption.overridden})) <= _LONGEST_TAG:
            self._calls.add(run_id, ("tags", {OVERRIDE: note}))
        return True

    def _checked(self, run_id: str, metric: Metric, index: int | None = None) -> Entry:
        """The entry for a metric, which may be one of several.

        Raises:
            MlflowException: MLflow's own, for what it refuses.
        """
        key, value, timestamp, step = metric.key, metric.value, metric.timestamp, metric.step
        if not (
            key in self._names
            and type(value) is float
            and type(timestamp) is int
            and type(step) is int
            and 0 <= timestamp < _INT64
            and -_INT64 <= step < _INT64
        ):
            _validate_metric(key, value, timestamp, step, "" if index is None else f"metrics[{index}]")
            self._names.add(key)
            wire = metric.to_proto()  # as a request would carry it
            value, timestamp, step = wire.value, wire.timestamp, wire.step
        # `mlflow.log_metrics` names the run in each of its points, which links them to nothing.
        if metric.model_id or metric.dataset_name or metric.run_id not in (None, run_id):
            if metric.model_id:
                self._check_model(metric.model_id)
            return "linked", Metric.from_proto(metric.to_proto()).to_dictionary()
        return "points", (key, step, timestamp, value)

    def _check_model(self, model_id: str) -> None:
        """Refuse a model that the server does not have, as it would itself."""
        if model_id in self._models:
            return
        if isinstance(self._inner, _OnceStore):
            self._inner.check_model(model_id)
        else:
            self._inner.get_logged_model(model_id)
        self._models.add(model_id)

    def create_logged_model(self, *args: Any, **kwargs: Any) -> LoggedModel:
        model: LoggedModel = self._inner.create_logged_model(*args, **kwargs)
        self._models.add(model.model_id)
        return model

    # -- without waiting, which all of it is: what MLflow's own does in threads is done here at once

    def log_metric_async(self, run_id: str, metric: Metric) -> RunOperations:
        return self.log_batch_async(run_id, [metric], [], [])

    def log_param_async(self, run_id: str, param: Param) -> RunOperations:
        return self.log_batch_async(run_id, [], [param], [])

    def set_tag_async(self, run_id: str, tag: RunTag) -> RunOperations:
        return self.log_batch_async(run_id, [], [], [tag])

    def log_batch_async(
        self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]
    ) -> RunOperations:
        try:
            self.log_batch(run_id, metrics, params, tags)
        except Exception as error:  # noqa: BLE001 - told to who waits for it, as MLflow does
            failed: Future[None] = Future()
            failed.set_exception(error)
            return RunOperations([failed])
        return RunOperations([_Arrival(partial(self._wait, run_id))])

    def flush_async_logging(self) -> None:
        self._wait()

    def end_async_logging(self) -> None:
        """Nothing to end: calls are journaled to the end of the process."""

    def shut_down_async_logging(self) -> None:
        """Nothing to wait for: the run's end is journaled behind all that was logged."""


# What protobuf cannot carry is refused at once, as where it goes into a request; else it would wait in the journal.


def _checked_param(param: Param, path: str = "") -> Param:
    return Param.from_proto(_validate_param(param.key, param.value, path).to_proto())


def _checked_tag(tag: RunTag, path: str = "") -> RunTag:
    return RunTag.from_proto(_validate_tag(tag.key, tag.value, path).to_proto())


@dataclass(frozen=True)
class _Arrival:
    """What MLflow takes for the future of a request."""

    result: Callable[[], None]
