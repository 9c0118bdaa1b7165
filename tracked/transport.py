"""Requests to an MLflow server: one attempt each with a timeout of its own, and credentials kept out of every text.

Who calls decides whether to try again. MLflow reads its settings for that from the environment, which is the
user's; so they go along with each request instead.
"""

from __future__ import annotations

import io
import json
import math
import re
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from google.protobuf.json_format import ParseError  # type: ignore[import-untyped]
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from mlflow.protos.service_pb2 import LogBatch
from mlflow.store.model_registry.rest_store import RestStore as RegistryStore
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.proto_json_utils import parse_dict
from mlflow.utils.rest_utils import MlflowHostCreds, http_request

from tracked.address import redact
from tracked.errors import ServerRefused, ServerUnavailable


class _Body(io.BytesIO):
    """A request's body that leaves this machine only while it may: each part of it is asked for when it is due."""

    def __init__(self, body: bytes, place: str, may_leave: Callable[[], bool]) -> None:
        super().__init__(body)
        self._place = place
        self._may_leave = may_leave

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        if part and not self._may_leave():
            raise too_late(self._place)
        return part


class Http:
    """Requests to one server: a single attempt each, its credentials kept out of every text."""

    def __init__(self, uri: str, timeout: float) -> None:
        parts = urlsplit(uri)
        self._user, self._password = unquote(parts.username or ""), unquote(parts.password or "")
        self.host = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        self._timeout = timeout
        self.answered = -math.inf
        """When the server was there last, by `time.monotonic`."""
        self._here = threading.local()

    @contextmanager
    def sending_while(self, may_leave: Callable[[], bool]) -> Iterator[None]:
        """What this thread sends as JSON leaves only while `may_leave` says so, asked once all else is done.

        A machine may sleep between any two lines: what is asked before a request is made holds no more when its
        bytes go. Of a body that stays incomplete the server stores nothing.
        """
        self._here.may_leave = may_leave
        try:
            yield
        finally:
            del self._here.may_leave

    def credentials(self, host: str | None = None) -> MlflowHostCreds:
        creds: MlflowHostCreds = get_default_host_creds(host or self.host)
        # Not to another host: an artifact's address comes from the server.
        if self._user and urlsplit(creds.host).netloc == urlsplit(self.host).netloc:
            creds.username, creds.password = self._user, self._password
        return creds

    def scrub(self, text: str) -> str:
        """`text` without what this process authenticates with: a proxy may echo a request's headers."""
        creds = self.credentials()
        secrets = [self._password, creds.password, creds.token]
        if creds.username and creds.password:
            secrets.append(b64encode(f"{creds.username}:{creds.password}".encode()).decode())
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return redact(text)

    def json(self, method: str, url: str, **request: Any) -> dict[str, Any]:
        """The JSON object that the server answers with.

        Raises:
            RestException: MLflow's own answer that a record is invalid, or a thing missing or there already.
            ServerUnavailable, ServerRefused: any other answer, or none.
        """
        with closing(self.request(method, url, **request)) as response:
            try:
                answer = response.json()
            except requests.JSONDecodeError:
                # MLflow answers an upload with nothing.
                answer = {} if method == "PUT" and not response.content else None
            if not isinstance(answer, dict):
                raise self._refused(response)
            return answer

    def message(self, method: str, path: str, body: str | None, answer: Any) -> Any:
        """`answer`, a message of MLflow's protocol, filled with what the server answers to `body`, JSON.

        Raises:
            RestException, ServerUnavailable, ServerRefused: As `json` does.
        """
        content = {"params" if method == "GET" else "json": json.loads(body) if body else None}
        found = self.json(method, f"{self.host}{path}", **content)
        try:
            parse_dict(found, answer)
        except ParseError:
            raise ServerRefused(
                f"{self.host} answered {first_words(self.scrub(str(found)))}",
                expected="the answers of an MLflow server",
            ) from None
        return answer

    def request(
        self,
        method: str,
        url: str,
        *,
        connect: float | None = None,
        read: float | None = None,
        **request: Any,
    ) -> requests.Response:
        """An answer with status 200. `connect` and `read` are timeouts in s."""
        address = urlsplit(url)
        host = address._replace(path="", query="", fragment="").geturl()
        credentials = self.credentials(host)
        if (may_leave := getattr(self._here, "may_leave", None)) and request.get("json") is not None:
            body = json.dumps(request.pop("json"), allow_nan=False).encode()
            # Who signs a body reads the whole of it, long before it leaves.
            is_signed = bool(credentials.aws_sigv4 or credentials.auth)
            if is_signed and not may_leave():
                raise too_late(self.host)
            request["data"] = body if is_signed else _Body(body, self.host, may_leave)
            request["extra_headers"] = {"Content-Type": "application/json"}
        try:
            response: requests.Response = http_request(
                credentials,
                url.removeprefix(host),
                method,
                max_retries=0,
                retry_codes=frozenset(),
                raise_on_status=False,
                timeout=(connect or self._timeout, read or self._timeout),
                **request,
            )
        except InvalidUrlException:
            raise ServerRefused(
                f"{self.host} is no address",
                expected="the address of an MLflow server",
                try_next="--tracking-uri",
            ) from None
        except (TypeError, ValueError) as error:
            # A way to authenticate that fails: of the record it says nothing.
            raise ServerRefused(
                f"no request to {self.host} can be made: {self.scrub(first_words(str(error)))}",
                expected="MLFLOW_TRACKING_… settings that MLflow accepts",
            ) from None
        except MlflowException as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ServerUnavailable):
                raise cause from None
            if isinstance(cause, requests.RequestException):
                raise no_answer(self.host, self.scrub(brief(cause))) from None
            # Not the network: a way to authenticate that is not installed, a setting that cannot be read.
            raise ServerRefused(
                f"no request to {self.host} can be made: {self.scrub(first_words(error.message))}",
                expected="MLFLOW_TRACKING_… settings that MLflow accepts",
            ) from None
        if response.status_code == 200:
            self.answered = time.monotonic()
            return response
        with closing(response):
            raise self._complaint(response)

    def _complaint(self, response: requests.Response) -> Exception:
        status = response.status_code
        try:
            answer = response.json()
        except requests.JSONDecodeError:
            answer = None
        code = answer.get("error_code") if isinstance(answer, dict) else None
        # Only by MLflow's own word: a proxy's 400 says nothing of the record, its 404 nothing of the run.
        if status in (400, 404) and code in (
            "INVALID_PARAMETER_VALUE",
            "RESOURCE_DOES_NOT_EXIST",
            "RESOURCE_ALREADY_EXISTS",
        ):
            return RestException(answer)
        if code == "BAD_REQUEST" and is_refused_for_good(str(answer.get("message"))):
            return RestException({**answer, "error_code": "INVALID_PARAMETER_VALUE"})
        # BAD_REQUEST is MLflow's word for a database that refused: asked again, two that wrote one param at the
        # same time learn who was first.
        if status in (408, 413, 429) or status >= 500 or code == "BAD_REQUEST":
            said = answer.get("message") if isinstance(answer, dict) else response.text
            return no_answer(self.host, self.scrub(f"{status} {first_words(str(said or response.reason))}"))
        return self._refused(response)

    def _refused(self, response: requests.Response) -> ServerRefused:
        status = response.status_code
        words = first_words(response.text).removeprefix(str(status)).strip()
        said = self.scrub(f"{status} {words}".strip())
        if status in (401, 403):
            return ServerRefused(
                f"{self.host} refused access: {said}",
                expected="credentials that this server accepts",
                try_next="export MLFLOW_TRACKING_USERNAME=… MLFLOW_TRACKING_PASSWORD=…",
            )
        return ServerRefused(
            f"{self.host} does not answer as an MLflow server does: {said}",
            expected="the address under which MLflow's UI opens",
            try_next=f"curl {self.host}/version",
        )


class OneRequestStore(RestStore):
    """MLflow's own REST calls, sent by `Http`."""

    def __init__(self, http: Http) -> None:
        super().__init__(http.credentials)  # type: ignore[no-untyped-call]
        self._http = http

    def _call_endpoint(
        self,
        api: Any,
        json_body: str | None = None,
        endpoint: str | None = None,
        retry_timeout_seconds: float | None = None,  # noqa: ARG002 - there are no retries
        response_proto: Any = None,
    ) -> Any:
        path, method = self._METHOD_TO_INFO[api]
        return self._http.message(method, endpoint or path, json_body, response_proto or api.Response())

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric], params: Sequence[Param], tags: Sequence[RunTag]
    ) -> None:
        """The same request as MLflow's, in an eighth of the time where it is of points alone, as most are."""
        if (
            params
            or tags
            or any(metric.model_id or metric.dataset_name or metric.run_id for metric in metrics)
        ):
            super().log_batch(run_id, metrics, params, tags)  # type: ignore[no-untyped-call]
            return
        points = [
            {
                "key": metric.key,
                "value": "NaN" if math.isnan(metric.value) else metric.value,
                "timestamp": metric.timestamp,
                "step": metric.step,
            }
            for metric in metrics
        ]
        path, method = self._METHOD_TO_INFO[LogBatch]
        self._http.json(method, f"{self._http.host}{path}", json={"run_id": run_id, "metrics": points})


class OneRequestRegistry(RegistryStore):
    """The same for MLflow's registered models."""

    def __init__(self, http: Http) -> None:
        super().__init__(http.credentials)  # type: ignore[no-untyped-call]
        self._http = http

    def _call_endpoint(
        self,
        api: Any,
        json_body: str | None,
        call_all_endpoints: bool = False,  # noqa: ARG002 - only what is not asked here has several
        extra_headers: Any = None,  # noqa: ARG002
    ) -> Any:
        path, method = self._get_endpoint_from_method(api)  # type: ignore[no-untyped-call]
        answer = self._get_response_from_method(api)  # type: ignore[no-untyped-call]
        return self._http.message(method, path, json_body, answer)


def is_refused_for_good(message: str) -> bool:
    """Whether a database says that it can never store a record.

    That is a point of a model that is gone, or a model's second value of the same step and millisecond.
    """
    # Behind it stands the statement, which names tables whatever went wrong.
    said = message.partition("[SQL")[0].lower()
    is_twice = "logged_model_metrics" in said and ("constraint" in said or "duplicate" in said)
    return is_twice or "foreign key" in said


def no_answer(place: str, reason: str) -> ServerUnavailable:
    return ServerUnavailable(
        f"{place} gave no usable answer: {reason}",
        expected="an MLflow server that answers",
        try_next=f"curl {place}/health" if place.startswith("http") else "the same again",
    )


def too_late(place: str) -> ServerUnavailable:
    return ServerUnavailable(
        f"{place} was sent nothing: since it was asked whose run this is, too much time has passed",
        expected="a machine that does not sleep in the middle of a request",
        try_next="the same again",
    )


def brief(error: requests.RequestException) -> str:
    """The innermost cause in a few words; requests wraps it in three layers of object addresses."""
    outer = error.args[0] if error.args else error
    text = str(getattr(outer, "reason", outer))
    if found := re.search(r"\[Errno -?\d+\] ([\w ,]+)", text):
        return found[1]
    if "timed out" in text:
        return "nothing in time"
    return f"{type(error).__name__}: {first_words(text)}"


def first_words(text: str) -> str:
    # Of a page in HTML its title says enough.
    title = re.search(r"<title[^>]*>(.*?)</title>", text, re.DOTALL | re.IGNORECASE)
    plain = " ".join(re.sub(r"<[^>]*>", " ", title[1] if title else text).split())
    return plain if len(plain) <= 160 else f"{plain[:160]}…"
