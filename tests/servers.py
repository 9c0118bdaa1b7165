"""Real MLflow servers for tests, and a front that stands before one and misbehaves as proxies do."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class MlflowServer:
    """`mlflow server` on a port and folder of its own, which it keeps over stop, kill and start.

    Args:
        folder: Holds the database, the artifacts and the log.
        port: A free port; found if None.
        workers: Server processes.
    """

    def __init__(self, folder: Path, *, port: int | None = None, workers: int = 1) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.workers = workers
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, and return once it answers."""
        self.launch()
        self.wait_until_healthy()
        return self

    def launch(self) -> None:
        """Start it without waiting. Its process group is its own, so that all of it can be ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port)]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--workers",
            str(self.workers),
        ]
        command += ["--serve-artifacts", "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_healthy(self, seconds: float = 120) -> None:
        """Return once /health answers; raises with the log's end if the server ends or the time is up."""
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while not self.healthy():
            ended = self._process is not None and self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                log = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"mlflow server on {self.uri} does not answer:\n{log}")
            pause.wait(0.1)

    def healthy(self) -> bool:
        """Whether /health answers now."""
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError, http.client.HTTPException):
            return False

    @property
    def group(self) -> int:
        """The process group, for who ends the server from another process."""
        assert self._process
        return self._process.pid

    def stop(self) -> None:
        """End it by SIGTERM, by SIGKILL after 20 s, and wait until all its processes are gone."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End all its processes by SIGKILL, in the middle of whatever they do."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        end_group(process.pid, how)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            end_group(process.pid, signal.SIGKILL)
            process.wait()
        end_group(process.pid, signal.SIGKILL)  # a worker may outlive the one that was waited for


def end_group(group: int, how: signal.Signals) -> None:
    """Send a signal to a process group; one that is gone is fine."""
    with suppress(ProcessLookupError):
        os.killpg(group, how)


@dataclass(frozen=True)
class Request:
    """A request as it arrived."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What the front says itself instead of asking the server."""

    status: int
    body: bytes = b""
    content_type: str = "text/html"
    claimed: int | None = None
    """The Content-Length to announce, where it is not the true one."""


Act = Callable[["FakeFront", BaseHTTPRequestHandler, Request], None]


@dataclass
class _Rule:
    matches: Callable[[Request], bool]
    act: Act
    left: int | None


@dataclass
class FakeFront:
    """An HTTP server that passes requests on to a real one, except those that a rule takes.

    A rule applies to requests whose path holds its text: `skip` of them are left alone, then it takes `times`
    of them (None: all). Requests are kept in `requests`, in the order of arrival.
    """

    target: str | None = None
    requests: list[Request] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                front._serve(self, Request(self.command, self.path, body, dict(self.headers)))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815 - http.server's names

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, answer: Answer, *, times: int | None = None, skip: int = 0) -> None:
        """Answer requests whose path holds `path` with `answer`; the server never sees them."""
        self._add(path, times, skip, lambda front, handler, _: front._write(handler, answer))

    def drop_answer(self, path: str, *, times: int | None = 1, skip: int = 0) -> None:
        """Pass the request on, let the server carry it out, and close the connection without an answer."""

        def act(front: FakeFront, handler: BaseHTTPRequestHandler, request: Request) -> None:
            front._forward(request)
            handler.close_connection = True

        self._add(path, times, skip, act)

    def hang(self, path: str, *, times: int | None = None, skip: int = 0) -> None:
        """Say nothing until the front is closed."""

        def act(front: FakeFront, handler: BaseHTTPRequestHandler, _: Request) -> None:
            front._released.wait(120)
            handler.close_connection = True

        self._add(path, times, skip, act)

    def truncate(self, path: str, keep: int, *, times: int | None = None, skip: int = 0) -> None:
        """Pass on the server's answer with the true length announced, but only its first `keep` bytes."""

        def act(front: FakeFront, handler: BaseHTTPRequestHandler, request: Request) -> None:
            whole = front._forward(request)
            cut = Answer(whole.status, whole.body[:keep], whole.content_type, len(whole.body))
            front._write(handler, cut)
            handler.close_connection = True

        self._add(path, times, skip, act)

    def count(self, path: str) -> int:
        """How many requests held `path`."""
        with self._lock:
            return sum(path in request.path for request in self.requests)

    def _add(
        self,
        path: str,
        times: int | None,
        skip: int,
        act: Act,
    ) -> None:
        with self._lock:
            if skip:
                passing = _Rule(lambda request: path in request.path, FakeFront._pass_on, skip)
                self._rules.append(passing)
            self._rules.append(_Rule(lambda request: path in request.path, act, times))

    def _serve(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            act: Act = FakeFront._pass_on
            for rule in self._rules:
                if rule.left != 0 and rule.matches(request):
                    act = rule.act
                    if rule.left is not None:
                        rule.left -= 1
                    break
        act(self, handler, request)

    def _pass_on(self, handler: BaseHTTPRequestHandler, request: Request) -> None:
        self._write(handler, self._forward(request))

    def _forward(self, request: Request) -> Answer:
        if self.target is None:
            return Answer(404, b"<html>nothing here</html>")
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=60)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "connection")}
        headers["Accept-Encoding"] = "identity"
        connection.request(request.method, request.path, request.body, headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return Answer(response.status, body, response.headers.get("Content-Type", "text/html"))

    def _write(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        try:
            handler.send_response(answer.status)
            handler.send_header("Content-Type", answer.content_type)
            length = len(answer.body) if answer.claimed is None else answer.claimed
            handler.send_header("Content-Length", str(length))
            handler.end_headers()
            handler.wfile.write(answer.body)
            handler.close_connection = handler.close_connection or answer.claimed is not None
        except (BrokenPipeError, ConnectionResetError):
            pass  # who asked has given up already
