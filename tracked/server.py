"""All that is said to an MLflow server, or to an SQLite file in its place, and its errors made ours."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import requests
from mlflow.entities import (
    Dataset,
    DatasetInput,
    ExperimentTag,
    InputTag,
    LifecycleStage,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelParameter,
    LoggedModelStatus,
    LoggedModelTag,
    Metric,
    Param,
    Run,
    RunStatus,
    RunTag,
    ViewType,
)
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.store.model_registry.abstract_store import AbstractStore as RegistryStore
from mlflow.store.tracking.abstract_store import AbstractStore
from mlflow.utils.logging_utils import suppress_logs_in_thread
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_MODEL_VERSIONS

from tracked.address import database, normalise_uri, redact
from tracked.artifacts import Artifacts, Direct, Entry, Proxied, beside, inside
from tracked.errors import (
    CheckpointError,
    NoSuchRun,
    RecordRejected,
    RunDeleted,
    ServerError,
    ServerRefused,
    ServerUnavailable,
    UsageError,
)
from tracked.names import HANDLE, stored
from tracked.packing import LinkedPoint, Point
from tracked.transport import (
    Http,
    OneRequestRegistry,
    OneRequestStore,
    brief,
    first_words,
    is_refused_for_good,
    no_answer,
    too_late,
)

if TYPE_CHECKING:
    from tracked.embedded import Database

__all__ = ["Latest", "RunView", "Server", "stored"]


# Without it MLflow's interface opens an experiment in its view for language model applications.
_KIND = ExperimentTag("mlflow.experimentKind", "custom_model_development")
_POINTS_A_REQUEST = 1000
_ENTRIES_A_REQUEST = 100
_BYTES_A_REQUEST = 900_000  # MLflow's limit is 1 MB for the whole body
_HISTORY_PAGE = 20_000
_RUNS_A_PAGE = 1000
# MLflow's own limits for the histories of several runs.
_RUNS_OF_A_KEY = 100
_POINTS_OF_A_CURVE = 2500
_POINTS_IN_BULK = 25_000
_AT_A_TIME = 4
_LONG_READ_SECONDS = 120.0
_LOOK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Latest:
    """The point of a key that has the largest step."""

    step: int
    timestamp: int
    value: float


@dataclass(frozen=True)
class RunView:
    """A run as the server showed it at one moment. Times in ms since the epoch."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    start_time: int
    end_time: int | None
    artifact_uri: str
    experiment_name: str | None = None
    deleted: bool = False
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    latest: dict[str, Latest] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelView:
    """A logged model as the server showed it at one moment; `values` are those of its metrics."""

    model_id: str
    run_id: str
    status: str
    artifact_uri: str
    tags: dict[str, str]
    values: dict[str, float]


class Server:
    """One tracking URI. Safe to use from several threads; opens nothing before the first call.

    Args:
        tracking_uri: ``http(s)://…`` or ``sqlite:///…``; see `tracked.address.normalise_uri`.
        timeout: Seconds a request may take to connect, and to answer. Files get longer, by their size.
        create: Whether an SQLite file that does not exist is made. A reader says False, and finds no runs.

    Every method may raise `ServerUnavailable` (the same call may work later) or `ServerRefused` (address,
    credentials, or a run that was deleted). No text of an error holds a password or token.
    """

    def __init__(self, tracking_uri: str, *, timeout: float = 5.0, create: bool = True) -> None:
        self.uri = normalise_uri(tracking_uri)
        path = database(self.uri)
        self._http = Http(self.uri, timeout) if path is None else None
        self._requests = OneRequestStore(self._http) if self._http else None
        self._database: Database | None = None
        if path is not None:
            from tracked.embedded import Database  # takes a second to import, for an SQLite file alone

            self._database = Database(self.uri, path, create=create)
        self._experiments: dict[str, str] = {}
        self._artifact_uris: dict[str, str] = {}

    # Runs

    def create_run(
        self,
        *,
        experiment: str,
        handle: str,
        name: str | None,
        start_time: int,
        tags: Mapping[str, str],
        retry: bool = True,
    ) -> RunView:
        """The one run of this handle, created if there is none.

        Args:
            experiment: The experiment's name; it is created if missing.
            handle: A UUID.
            name: The run's name; the server invents one for None.
            start_time: In ms.
            tags: Tags that the run has from the start.
            retry: False only for the very first attempt with this handle: it saves looking for the handle.

        Raises:
            UsageError: the experiment was deleted.
        """
        if retry and (known := self.find_by_handle(handle)):
            return known
        cached = experiment in self._experiments
        labels = [RunTag(key, value) for key, value in {**tags, HANDLE: handle}.items()]
        try:
            experiment_id = self._experiment_id(experiment)
            with self._translated():
                run = self._store.create_run(
                    experiment_id, tags.get("mlflow.user", ""), start_time, labels, name
                )
        except (RecordRejected, NoSuchRun):
            if not cached:
                raise
            # The experiment was deleted since its ID was learnt: ask again, and tell that instead.
            del self._experiments[experiment]
            return self.create_run(
                experiment=experiment, handle=handle, name=name, start_time=start_time, tags=tags, retry=retry
            )
        created = self._view(run, experiment)
        return self._without_twins(handle, created) if retry else created

    def experiment_name(self, experiment_id: str) -> str:
        """The name of the experiment with this ID, also of a deleted one."""
        with self._translated():
            return str(self._store.get_experiment(experiment_id).name)

    def find_by_handle(self, handle: str) -> RunView | None:
        """The run whose handle is `handle`, or None."""
        twins = self._twins(handle)
        return twins[0] if twins else None

    def get_run(self, run_id: str) -> RunView:
        """The run, also a deleted one.

        Raises:
            NoSuchRun: the server does not have it.
        """
        try:
            with self._translated():
                run = self._store.get_run(run_id)
        except RecordRejected:
            raise _no_run(run_id, self.place) from None  # not even the form of an ID
        return self._view(run)

    def search(
        self,
        *,
        experiment: str | None = None,
        filter: str = "",  # noqa: A002 - MLflow's own word for it
        limit: int = _RUNS_A_PAGE,
        order_by: str = "attributes.start_time DESC",
    ) -> list[RunView]:
        """Runs that are not deleted, by default newest first.

        Args:
            experiment: Only runs of the experiment of this name; of all experiments by default.
            filter: MLflow's search syntax.
            limit: How many at most.
            order_by: MLflow's order syntax. By a metric it is by its last value; NaN, and runs without it, last.

        Raises:
            RecordRejected: the filter or the order cannot be parsed.
        """
        if self._database and self._database.is_absent():
            return []
        names = self._experiment_names(experiment)
        if not names:
            return []
        views: list[RunView] = []
        token: str | None = None
        with self._translated():
            while len(views) < limit:
                page = self._store.search_runs(
                    list(names),
                    filter,
                    ViewType.ACTIVE_ONLY,
                    min(limit - len(views), _RUNS_A_PAGE),
                    [order_by],
                    token,
                )
                views += [self._view(run, names.get(run.info.experiment_id)) for run in page]
                token = page.token
                if not token:
                    break
        return views

    def experiments(self) -> list[str]:
        """The names of the experiments that are not deleted."""
        if self._database and self._database.is_absent():
            return []
        return sorted(self._experiment_names(None).values())

    def find(self, prefix: str) -> list[RunView]:
        """All runs that `prefix` may mean, newest first; the caller says whether one is enough.

        Args:
            prefix: An ID, at least the first 4 characters of an ID or handle, or a run's name.
        """
        if re.fullmatch(r"[0-9a-f]{32}", prefix):
            try:
                return [self.get_run(prefix)]
            except NoSuchRun:
                pass  # a handle may be written without dashes, and a name may be anything
        filters = []
        if re.fullmatch(r"[0-9a-f-]{4,36}", prefix):
            filters += [f"attributes.run_id LIKE '{prefix}%'", f"tags.`{HANDLE}` LIKE '{prefix}%'"]
        if name := quoted(prefix):
            filters.append(f"attributes.run_name = {name}")
        found = {run.run_id: run for text in filters for run in self.search(filter=text)}
        return sorted(found.values(), key=lambda run: (-run.start_time, run.run_id))

    def set_status(self, run_id: str, status: str, end_time: int | None = None) -> None:
        """Set a run's status: RUNNING (which reopens it), FINISHED, FAILED or KILLED. `end_time` in ms."""
        with self._writing(run_id):
            self._store.update_run_info(run_id, RunStatus.from_string(status), end_time, None)

    # Values

    def log(
        self,
        run_id: str,
        points: Sequence[Point | LinkedPoint],
        params: Mapping[str, str],
        tags: Mapping[str, str],
        *,
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        """Write all of it, in one transaction and one request where that holds so much.

        Args:
            run_id: The run.
            points: Up to 1000 of them go in one transaction. A point written again adds nothing.
            params: Values that the run has not, or has as they are.
            tags: Values that take the place of older ones.
            may_send: Asked at the last moment before anything leaves; where it says False, nothing does.

        Raises:
            ServerUnavailable: also where `may_send` said False.
            RecordRejected: at least one of them can never be stored, or a param has another value already.
            NoSuchRun: the server does not have the run.
        """
        chunks = [*_chunks(params.items())], [*_chunks(tags.items())]
        if max(map(len, chunks)) > 1 or len(points) + len(params) + len(tags) > _POINTS_A_REQUEST:
            with self._sending_while(may_send):
                self.log_points(run_id, points)
                self.log_params(run_id, params)
                self.set_tags(run_id, tags)
            return
        with self._sending_while(may_send), self._writing(run_id):
            self._store.log_batch(
                run_id,
                [_metric(point) for point in points],
                [Param(key, value) for key, value in params.items()],
                [RunTag(key, value) for key, value in tags.items()],
            )

    @contextmanager
    def _sending_while(self, may_send: Callable[[], bool]) -> Iterator[None]:
        if self._http:
            with self._http.sending_while(may_send):
                yield
        elif may_send():
            yield
        else:
            raise too_late(self.place)

    def log_points(self, run_id: str, points: Sequence[Point | LinkedPoint]) -> None:
        """Write points, up to 1000 of them in one transaction. A point written again adds nothing.

        Raises:
            RecordRejected: at least one of them can never be stored. Nothing of its transaction was.
            NoSuchRun: the server does not have the run.
        """
        for start in range(0, len(points), _POINTS_A_REQUEST):
            metrics = [_metric(point) for point in points[start : start + _POINTS_A_REQUEST]]
            with self._writing(run_id):
                self._store.log_batch(run_id, metrics, [], [])

    def log_inputs(self, run_id: str, inputs: Sequence[Mapping[str, str]], source: Mapping[str, str]) -> None:
        """Name data sets that a run reads. One that it names already adds nothing.

        Args:
            run_id: The run.
            inputs: Of each `name`, `digest`, `schema` and `profile` as `mlflow.entities.Dataset` has them, and its
                `context`.
            source: The tags that name the code which made them.

        Raises:
            RecordRejected: one of them can never be stored.
            NoSuchRun: the server does not have the run.
        """
        code = json.dumps({"tags": dict(source)})
        datasets = [
            DatasetInput(
                Dataset(each["name"], each["digest"], "code", code, each["schema"], each["profile"]),
                [InputTag(MLFLOW_DATASET_CONTEXT, each["context"])],
            )
            for each in inputs
        ]
        with self._writing(run_id):
            self._store.log_inputs(run_id, datasets)

    def datasets(self, run_id: str) -> dict[str, tuple[str, str]]:
        """Name and digest of the data sets that a run reads, by their contexts; none of those that several share."""
        with self._translated():
            inputs = self._store.get_run(run_id).inputs
        found: dict[str, list[tuple[str, str]]] = {}
        for each in inputs.dataset_inputs if inputs else []:
            for tag in each.tags:
                if tag.key == MLFLOW_DATASET_CONTEXT:
                    for context in tag.value.split(", "):
                        found.setdefault(context, []).append((each.dataset.name, each.dataset.digest))
        return {context: data[0] for context, data in found.items() if len(data) == 1}

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Write params, which can be written once only.

        Raises:
            RecordRejected: one of them has another value already, or can never be stored.
        """
        for chunk in _chunks(params.items()):
            with self._writing(run_id):
                self._store.log_batch(run_id, [], [Param(key, value) for key, value in chunk], [])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Write tags over what they were."""
        for chunk in _chunks(tags.items()):
            with self._writing(run_id):
                self._store.log_batch(run_id, [], [], [RunTag(key, value) for key, value in chunk])

    def drop_tag(self, run_id: str, name: str) -> None:
        """Delete a tag; one that is missing is fine."""
        try:
            with self._translated():
                self._store.delete_tag(run_id, name)  # type: ignore[attr-defined] # both stores have it
        except NoSuchRun:
            self.get_run(run_id)  # the same answer stands for a missing run, which is not fine

    def history(self, run_id: str, key: str) -> list[tuple[int, int, float]]:
        """Every point of a key as (step, timestamp in ms, value), by step, then timestamp."""
        points: list[tuple[int, int, float]] = []
        token: str | None = None
        with self._translated():
            while True:
                page = self._store.get_metric_history(
                    run_id, key, max_results=_HISTORY_PAGE, page_token=token
                )
                points += [(metric.step, metric.timestamp, metric.value) for metric in page]
                token = page.token
                if not token:
                    break
        return sorted(points, key=lambda point: point[:2])

    def histories(
        self, run_ids: Sequence[str], key: str, *, about: int | None = None
    ) -> dict[str, list[tuple[int, int, float]]]:
        """The points of a key in many runs, as `history` gives them for one.

        Args:
            run_ids: The runs; one without a point of the key has an empty history.
            key: The metric.
            about: So many points of each are enough, evenly spread, the first and the last among them. A server
                then sends at most 2500; an SQLite file is read whole, which is faster. None: every point.
        """
        if self._database:
            with self._translated():
                return self._database.histories(run_ids, key)
        assert self._http
        found: dict[str, list[tuple[int, int, float]]] = {run_id: [] for run_id in run_ids}
        if about is not None:
            return found | self._sampled(run_ids, key, min(about, _POINTS_OF_A_CURVE))
        if not run_ids:
            return found
        found |= self._whole(run_ids[:1], key)
        # Runs that are compared resemble each other: of so many, twice as long, an answer holds all points.
        at_once = _POINTS_IN_BULK // (2 * len(found[run_ids[0]]) + 1)
        at_once = min(max(at_once, 1), _RUNS_OF_A_KEY)
        groups = [run_ids[start : start + at_once] for start in range(1, len(run_ids), at_once)]
        # A server may have several processes, and while one of them reads, what another sent is parsed here.
        answered = {run_ids[0]}
        with ThreadPoolExecutor(_AT_A_TIME) as threads:
            for some in threads.map(partial(self._whole, key=key), groups):
                found |= some
                answered |= some.keys()
            longer = [[run_id] for run_id in run_ids if run_id not in answered]
            for some in threads.map(partial(self._whole, key=key), longer):
                found |= some
        return found

    def _sampled(
        self, run_ids: Sequence[str], key: str, most: int
    ) -> dict[str, list[tuple[int, int, float]]]:
        """At most so many points of each run, evenly spread; all of a run that has fewer."""
        assert self._http
        found: dict[str, list[tuple[int, int, float]]] = {run_id: [] for run_id in run_ids}
        # With a range of steps a database finds the points of a run by its index, and without it SQLite reads
        # the key's points in all runs there are. What has steps of more than 32 bits is asked for again.
        for limits in ({"start_step": -(2**31), "end_step": 2**31 - 1}, {}):
            missing = [run_id for run_id in run_ids if not found[run_id]]
            for start in range(0, len(missing), _RUNS_OF_A_KEY):
                asked = {
                    "run_ids": missing[start : start + _RUNS_OF_A_KEY],
                    "metric_key": key,
                    "max_results": most,
                    **limits,
                }
                address = f"{self._http.host}/api/2.0/mlflow/metrics/get-history-bulk-interval"
                with self._translated():
                    answer = self._http.json("GET", address, params=asked, read=_LONG_READ_SECONDS)
                for point in answer.get("metrics", []):
                    found[point["run_id"]].append(_point(point))
        return found

    def _whole(self, run_ids: Sequence[str], key: str) -> dict[str, list[tuple[int, int, float]]]:
        """As `histories`, by the way of MLflow's interface, which does without protobuf and so takes half the time.

        Nothing where an answer cannot hold the points of several runs.
        """
        assert self._http
        asked = {"run_id": run_ids, "metric_key": key, "max_results": _POINTS_IN_BULK}
        address = f"{self._http.host}/ajax-api/2.0/mlflow/metrics/get-history-bulk"
        with self._translated():
            answer = self._http.json("GET", address, params=asked, read=_LONG_READ_SECONDS)
        found: dict[str, list[tuple[int, int, float]]] = {run_id: [] for run_id in run_ids}
        points = answer.get("metrics", [])
        if len(points) >= _POINTS_IN_BULK:  # there may be more
            return {run_ids[0]: self.history(run_ids[0], key)} if len(run_ids) == 1 else {}
        for point in points:
            found[point["run_id"]].append(_point(point))
        return {run_id: sorted(points, key=lambda point: point[:2]) for run_id, points in found.items()}

    def points_at(self, run: RunView, step: int) -> list[Point]:
        """What the run has logged at `step`, of every key that `run` shows."""
        if self._database:
            with self._translated():
                return self._database.points_at(run.run_id, step)
        assert self._http
        points = []
        for key in run.latest:
            asked = {"run_ids": run.run_id, "metric_key": key, "start_step": step, "end_step": step}
            address = f"{self._http.host}/api/2.0/mlflow/metrics/get-history-bulk-interval"
            with self._translated():
                answer = self._http.json("GET", address, params=asked, read=_LONG_READ_SECONDS)
            points += [(key, *_point(point)) for point in answer.get("metrics", [])]
        return points

    # Files

    def upload(self, run_id: str, local: Path, directory: str) -> None:
        """Store the file `local` as artifact ``directory/local.name``, over what stood there.

        An empty `directory` is the root of the run's artifacts.

        Raises:
            CheckpointError: `local` cannot be read, or the names cannot be used.
        """
        inside(beside(directory, local.name))
        if not local.is_file():
            raise CheckpointError(f"there is no file {local} to upload", expected="a file that can be read")
        try:
            with self._translated():
                self._artifacts(run_id).upload(local, directory)
        except OSError as error:
            raise CheckpointError(
                f"{local} cannot be read: {error.strerror}", expected="a file that can be read"
            ) from error

    def sizes(self, run_id: str, directory: str) -> dict[str, int]:
        """Names and bytes of the files in an artifact directory; empty if there is none."""
        return {
            entry.name: entry.size for entry in self._entries(run_id, directory) if not entry.is_directory
        }

    def directories(self, run_id: str, directory: str) -> list[str]:
        """Names of the directories in an artifact directory, sorted."""
        return sorted(entry.name for entry in self._entries(run_id, directory) if entry.is_directory)

    def download(self, run_id: str, path: str, to: Path) -> Path:
        """Fetch one artifact. `to` is either whole or untouched.

        Args:
            path: The artifact, as a tag of the run names it: anybody may have written that.
            to: The file to write; its folder is created.

        Returns:
            `to`.

        Raises:
            CheckpointError: `path` would lead elsewhere, the run has no such file, or `to` cannot be written.
        """
        source = inside(path)
        size = self.sizes(run_id, str(source.parent)).get(source.name)
        if size is None:
            raise CheckpointError(
                f"run {run_id} has no artifact {path!r}",
                expected="a file among the run's artifacts",
                try_next=f"tracked verify {run_id}",
            )
        part = to.with_name(f".{to.name}.{uuid.uuid4().hex}.part")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with self._translated():
                self._artifacts(run_id).download(path, size, part)
            arrived = part.stat().st_size
            if arrived != size:
                raise ServerUnavailable(
                    f"{arrived} of {size} bytes of {path!r} arrived", expected="all of them"
                )
            part.replace(to)
        except OSError as error:
            raise CheckpointError(
                f"{to} cannot be written: {error.strerror}", expected=f"a folder with room for {size} bytes"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return to

    def delete(self, run_id: str, path: str) -> None:
        """Delete an artifact, file or directory. One that is missing is fine."""
        inside(path)
        with self._translated():
            self._artifacts(run_id).delete(path)

    # Models

    def models(self, run: RunView) -> list[ModelView]:
        """The models that a run has logged."""
        with self._translated():
            found = self._store.search_logged_models([run.experiment_id], f"source_run_id = '{run.run_id}'")
        return [_model(each) for each in found]

    def get_model(self, model_id: str) -> ModelView:
        """The model.

        Raises:
            NoSuchRun: The server does not have it, or it is in the bin.
        """
        with self._translated():
            return _model(self._store.get_logged_model(model_id))

    def create_model(self, run: RunView, name: str, *, tags: Mapping[str, str]) -> ModelView:
        """A model that `run` has made: with the run's params, and pending until `finish_model`.

        Raises:
            RecordRejected: The server cannot store it.
        """
        with self._writing(run.run_id):
            made = self._store.create_logged_model(
                run.experiment_id,
                name,
                run.run_id,
                [LoggedModelTag(key, value) for key, value in tags.items()],
                [LoggedModelParameter(key, value) for key, value in run.params.items()],
            )
        return _model(made)

    def link_model(self, run: RunView, model: ModelView, step: int) -> None:
        """Have the run show the model as its output of `step`; once is enough."""
        with self._writing(run.run_id):
            outputs = self._store.get_run(run.run_id).outputs
            known = {each.model_id for each in outputs.model_outputs} if outputs else set()
            if model.model_id not in known:
                self._store.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])

    def upload_model(self, model: ModelView, folder: Path) -> None:
        """Store every file of `folder` as the model's."""
        with self._translated():
            artifacts = self._artifacts_at(model.artifact_uri)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                directory = file.parent.relative_to(folder).as_posix()
                artifacts.upload(file, "" if directory == "." else directory)

    def finish_model(self, model_id: str) -> None:
        """Have the server show the model as ready."""
        with self._translated():
            self._store.finalize_logged_model(model_id, LoggedModelStatus.READY)

    def delete_model(self, model_id: str) -> None:
        """Put a model into the bin."""
        with self._translated():
            self._store.delete_logged_model(model_id)

    def register_model(self, model: ModelView, run: RunView, name: str) -> str:
        """Make the model a version of the registered model `name`, if it is none; the number of the version.

        Raises:
            RecordRejected: The name cannot be used.
        """
        source = f"models:/{model.model_id}"
        with self._translated():
            registry = self._registry()
            try:
                registry.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            known = registry.search_model_versions(f"source_path = '{source}'")
            version = next((each for each in known if each.name == name), None)
            if version is None:
                version = registry.create_model_version(name, source, run.run_id, model_id=model.model_id)
            # By which the interface leads from the model to its versions.
            versions = json.loads(model.tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
            if (this := {"name": name, "version": version.version}) not in versions:
                said = json.dumps([*versions, this])
                self._store.set_logged_model_tags(
                    model.model_id, [LoggedModelTag(MLFLOW_MODEL_VERSIONS, said)]
                )
        return str(version.version)

    def aliased(self, name: str, alias: str) -> str | None:
        """The ID of the logged model that `alias` of a registered model points at; None if it points at none."""
        with self._translated():
            try:
                version = self._registry().get_model_version_by_alias(name, alias)
            except MlflowException as error:
                if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                    return None
                raise
        logged = re.fullmatch("models:/([^/@]+)", version.source or "")
        return logged[1] if logged else None

    def set_alias(self, name: str, alias: str, version: str) -> None:
        """Point `alias` at a version of a registered model, wherever it pointed before."""
        with self._translated():
            self._registry().set_registered_model_alias(name, alias, version)

    # The place

    def url(self, run: RunView) -> str:
        """Where a browser shows the run; empty for an SQLite file, which has no address."""
        return f"{self._http.host}/#/experiments/{run.experiment_id}/runs/{run.run_id}" if self._http else ""

    def compare_url(self, runs: Sequence[RunView], host: str = "") -> str:
        """Where a browser compares the runs, on `host` if not on this server; empty for neither."""
        host = self._http.host if self._http else host
        run_ids, experiments = [run.run_id for run in runs], sorted({run.experiment_id for run in runs})
        words = (quote(json.dumps(each, separators=(",", ":")), safe=",") for each in (run_ids, experiments))
        return host and "{}/#/compare-runs?runs={}&experiments={}".format(host, *words)

    def close(self) -> None:
        """Close idle connections to an SQLite file. The object can be used again."""
        if self._database:
            self._database.close()

    @property
    def place(self) -> str:
        return redact(self.uri)

    @property
    def _store(self) -> AbstractStore:
        if self._database:
            return self._database.store
        assert self._requests
        return self._requests

    def _registry(self) -> RegistryStore:
        if self._database:
            return self._database.registry()
        assert self._http
        return OneRequestRegistry(self._http)

    def _experiment_id(self, name: str) -> str:
        if name not in self._experiments:
            with self._translated():
                found = self._store.get_experiment_by_name(name)
                if found is None:
                    try:
                        created = self._store.create_experiment(name, None, [_KIND])
                        self._experiments[name] = str(created)
                        return self._experiments[name]
                    except MlflowException as error:
                        if error.error_code != "RESOURCE_ALREADY_EXISTS":
                            raise
                    found = self._store.get_experiment_by_name(name)  # another process was quicker
            if found is None or not found.experiment_id:
                raise ServerRefused(f"{self.place} has experiment {name!r} and does not show it")
            if found.lifecycle_stage == LifecycleStage.DELETED:
                raise UsageError(
                    f"the experiment {name!r} was deleted on {self.place}",
                    expected="an experiment that is not in the bin, or a new name",
                    try_next=f"MLFLOW_TRACKING_URI={self.place} mlflow experiments restore "
                    f"--experiment-id {found.experiment_id}",
                )
            self._experiments[name] = str(found.experiment_id)
        return self._experiments[name]

    def _experiment_names(self, only: str | None) -> dict[str, str]:
        """Experiment IDs to names."""
        names: dict[str, str] = {}
        token: str | None = None
        with self._translated():
            if only is not None:
                found = self._store.get_experiment_by_name(only)
                return {str(found.experiment_id): only} if found and found.experiment_id else {}
            while True:
                page = self._store.search_experiments(ViewType.ACTIVE_ONLY, _RUNS_A_PAGE, None, None, token)
                names.update((str(experiment.experiment_id), experiment.name) for experiment in page)
                token = page.token
                if not token:
                    return names

    def _twins(self, handle: str) -> list[RunView]:
        """Runs of one handle: the one in use first."""
        text = quoted(handle)
        if not text:
            raise UsageError(f"the handle {handle!r} is no UUID", expected="a UUID")
        runs = self.search(filter=f"tags.`{HANDLE}` = {text}")
        # Whatever came of a request that was given up on has nothing in it.
        return sorted(runs, key=lambda run: (not run.latest, not run.params, run.start_time, run.run_id))

    def _without_twins(self, handle: str, created: RunView) -> RunView:
        """`created`, unless an earlier request that was given up on has made the run in the meantime."""
        kept, *others = self._twins(handle) or [created]
        for other in others:
            if not other.latest and not other.params:
                with self._translated():
                    self._store.delete_run(other.run_id)
        return kept

    def _view(self, run: Run, experiment: str | None = None) -> RunView:
        info, data = run.info, run.data
        if not info.run_id:
            raise ServerRefused(
                f"{self.place} answered without naming a run", expected="the answers of an MLflow server"
            )
        self._artifact_uris[info.run_id] = info.artifact_uri
        return RunView(
            run_id=info.run_id,
            experiment_id=str(info.experiment_id),
            name=info.run_name or "",
            status=info.status,
            start_time=info.start_time,
            # A run that is reopened keeps the old end time on the server.
            end_time=None if info.status == "RUNNING" else info.end_time or None,
            artifact_uri=info.artifact_uri,
            experiment_name=experiment,
            deleted=info.lifecycle_stage == LifecycleStage.DELETED,
            params=dict(data.params),
            tags=dict(data.tags),
            latest={
                metric.key: Latest(metric.step, metric.timestamp, metric.value)
                for metric in data.to_proto().metrics
            },
        )

    def _artifacts(self, run_id: str) -> Artifacts:
        uri = self._artifact_uris.get(run_id, "")
        # Asked for again after a while: it also finds out within the short timeout whether the server is there,
        # before a transfer that has to wait longer begins.
        if not uri or (self._http and time.monotonic() - self._http.answered > _LOOK_AGAIN_SECONDS):
            uri = self.get_run(run_id).artifact_uri
        return self._artifacts_at(uri)

    def _artifacts_at(self, uri: str) -> Artifacts:
        if self._http and uri.startswith(("mlflow-artifacts:", "http:", "https:")):
            if uri.startswith("mlflow-artifacts:"):
                uri = MlflowArtifactsRepository.resolve_uri(uri, self._http.host)
            return Proxied(self._http, uri)
        return Direct(
            get_artifact_repository(uri, tracking_uri=self._http.host if self._http else self.uri), uri
        )

    def _entries(self, run_id: str, directory: str) -> list[Entry]:
        if directory not in ("", "."):
            inside(directory)
        with self._translated():
            return self._artifacts(run_id).entries("" if directory == "." else directory)

    @contextmanager
    def _writing(self, run_id: str) -> Iterator[None]:
        """A deleted run answers like an invalid record. Its points must be kept: the run can be restored."""
        try:
            with self._translated():
                yield
        except (TypeError, ValueError) as error:  # no request can carry it
            raise RecordRejected(str(error), expected="a record that MLflow can store") from None
        except RecordRejected:
            if self.get_run(run_id).deleted:
                raise RunDeleted(
                    f"run {run_id} was deleted on {self.place}",
                    expected="a run that is not in the bin",
                    try_next=f"MLFLOW_TRACKING_URI={self.place} mlflow runs restore --run-id {run_id}",
                ) from None
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """MLflow silent, and its errors made ours.

        Theirs are left out of the traceback, where they would say it again at ten times the length.
        """
        with suppress_logs_in_thread(), self._database.translated() if self._database else nullcontext():
            try:
                yield
            except MlflowException as error:
                raise self._ours(error) from None
            except requests.RequestException as error:
                raise no_answer(self.place, brief(error)) from None

    def _ours(self, error: MlflowException) -> ServerError:
        said = first_words(error.message)
        if self._http:
            said = self._http.scrub(said)
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return NoSuchRun(
                f"{self.place}: {said}", expected="something that is on the server", try_next="tracked list"
            )
        if error.error_code == "INVALID_PARAMETER_VALUE" or is_refused_for_good(error.message):
            return RecordRejected(f"{self.place}: {said}", expected="a record that MLflow can store")
        if "database schema" in error.message:
            return ServerRefused(
                f"{self.place}: {said}",
                expected="a database of the MLflow version that is installed",
                try_next=f"mlflow db upgrade {self.place}",
            )
        return no_answer(self.place, said)


def _point(answer: Mapping[str, Any]) -> tuple[int, int, float]:
    """A point as MLflow writes it in JSON, where a number may stand as text."""
    return int(answer.get("step", 0)), int(answer["timestamp"]), float(answer["value"])


def _model(found: LoggedModel) -> ModelView:
    return ModelView(
        found.model_id,
        found.source_run_id or "",
        str(found.status),
        found.artifact_location,
        dict(found.tags),
        {each.key: each.value for each in found.metrics or []},
    )


def _no_run(run_id: str, place: str) -> NoSuchRun:
    return NoSuchRun(f"{place} has no run {run_id!r}", expected="the ID of a run", try_next="tracked list")


def _metric(point: Point | LinkedPoint) -> Metric:
    if isinstance(point, tuple):
        key, step, timestamp, value = point
        return Metric(key, stored(value), timestamp, step)
    return Metric(**{**point, "value": stored(point["value"])})


def _chunks(entries: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Lists that fit into one request each."""
    chunk: list[tuple[str, str]] = []
    room = _BYTES_A_REQUEST
    for key, value in entries:
        size = len(json.dumps([key, value])) + len('{"key": , "value": }, ')
        if chunk and (len(chunk) == _ENTRIES_A_REQUEST or size > room):
            yield chunk
            chunk, room = [], _BYTES_A_REQUEST
        chunk.append((key, value))
        room -= size
    if chunk:
        yield chunk


def quoted(text: str) -> str | None:
    """`text` as a string of MLflow's search syntax, which knows no escapes; None if it cannot be one."""
    if "'" not in text:
        return f"'{text}'"
    return f'"{text}"' if '"' not in text else None
