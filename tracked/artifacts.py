"""The files of a run or a model: through the MLflow server, or in a store that this process reaches itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import quote, unquote

from mlflow.exceptions import RestException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

from tracked.address import redact
from tracked.errors import CheckpointError, ServerRefused
from tracked.transport import Http, first_words, no_answer


@dataclass(frozen=True)
class Entry:
    """One line of a listing; the size in bytes."""

    name: str
    is_directory: bool
    size: int


class Artifacts(Protocol):
    """The artifacts of one run. Paths are relative, and checked before."""

    def upload(self, local: Path, directory: str) -> None: ...
    def entries(self, directory: str) -> list[Entry]: ...
    def download(self, path: str, size: int, to: Path) -> None: ...
    def delete(self, path: str) -> None: ...


class Proxied:
    """Artifacts that go through the MLflow server.

    A file's connection may be silent for long: the server writes all of it before it answers, or fetches it
    from a store of its own first.
    """

    _ENDPOINT = "/mlflow-artifacts/artifacts"

    def __init__(self, http: Http, root: str) -> None:
        self._http = http
        self._root = root.rstrip("/")

    def upload(self, local: Path, directory: str) -> None:
        patience = _patience(local.stat().st_size)
        with local.open("rb") as file:
            # requests sends an empty file in chunks, which not every server takes. The connect timeout also
            # holds for each block that is sent, so it has to bear a busy disk on the other side.
            self._http.json(
                "PUT",
                self._address(beside(directory, local.name)),
                data=file if local.stat().st_size else b"",
                extra_headers={"Content-Type": "application/octet-stream"},
                connect=patience,
                read=patience,
            )

    def entries(self, directory: str) -> list[Entry]:
        service, _, root = self._root.partition(self._ENDPOINT)
        path = f"{unquote(root).strip('/')}/{directory}".strip("/")
        try:
            answer = self._http.json("GET", f"{service}{self._ENDPOINT}", params={"path": path}, read=60.0)
        except RestException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        files = answer.get("files", [])
        return [
            Entry(Path(f["path"]).name, f.get("is_dir", False), int(f.get("file_size", 0))) for f in files
        ]

    def download(self, path: str, size: int, to: Path) -> None:
        response = self._http.request("GET", self._address(path), stream=True, read=_patience(size))
        with closing(response), to.open("xb") as file:
            for block in response.iter_content(1 << 20):
                file.write(block)

    def delete(self, path: str) -> None:
        try:
            self._http.json("DELETE", self._address(path), read=60.0)
        except RestException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _address(self, path: str) -> str:
        return f"{self._root}/{quote(path)}"


class Direct:
    """Artifacts that this process reads and writes itself: a local folder, S3 and the like."""

    def __init__(self, repository: ArtifactRepository, uri: str) -> None:
        self._repository = repository
        self._uri = uri
        self._folder = (
            Path(repository.artifact_dir) if isinstance(repository, LocalArtifactRepository) else None
        )

    def upload(self, local: Path, directory: str) -> None:
        target = self._folder / directory / local.name if self._folder else None
        known = next(folder for folder in target.parents if folder.exists()) if target else None
        with self._told():
            self._repository.log_artifact(str(local), directory or None)
            if target and known:
                _make_durable(target, known)

    def entries(self, directory: str) -> list[Entry]:
        with self._told():
            found = self._repository.list_artifacts(directory or None)
        return [Entry(PurePosixPath(f.path).name, f.is_dir, f.file_size or 0) for f in found]

    def download(self, path: str, size: int, to: Path) -> None:  # noqa: ARG002
        with self._told():
            # The one call that names the file to write.
            self._repository._download_file(path, str(to))  # noqa: SLF001

    def delete(self, path: str) -> None:
        with self._told():
            self._repository.delete_artifacts(path)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise ServerRefused(
                f"the artifact store {redact(self._uri)} needs the module {error.name!r}",
                expected="the client of that store",
                try_next=f"pip install {error.name}",
            ) from error
        # Each of MLflow's twenty stores has a client with errors of its own, and what they share is this.
        except Exception as error:  # noqa: BLE001
            raise no_answer(redact(self._uri), redact(first_words(str(error)))) from None


def _patience(size: int) -> float:
    """Seconds to wait for a file of `size` bytes: a minute, and what a slow disk of 10 MB/s needs."""
    return 60 + size / 10e6


def _make_durable(file: Path, known: Path) -> None:
    """A checkpoint's pointer is sent once its file is safe, which for MLflow means: in the page cache."""
    folders = [folder for folder in file.parents if folder == known or known in folder.parents]
    for path in [file, *folders]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def beside(directory: str, name: str) -> str:
    """The artifact `name` in `directory`, which is empty for the run's own root. Nothing is made of bad names."""
    return f"{directory}/{name}" if directory else name


def inside(path: str) -> PurePosixPath:
    """`path` as a name below a run's artifacts.

    Raises:
        CheckpointError: it could lead out of them, here or on the server.
    """
    if (
        not path.isprintable()
        or unquote(path) != path  # MLflow decodes a name as often as it can, and not in every store
        or "\\" in path
        or "#" in path
        or re.match(r"[A-Za-z][\w+.-]*:", path)
        or any(part in ("", ".", "..") for part in path.split("/"))
    ):
        raise CheckpointError(
            f"the artifact path {path!r} is not used",
            expected="a relative path of plain names, which cannot lead out of the run's artifacts",
        )
    return PurePosixPath(path)
