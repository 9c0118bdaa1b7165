"""A real PostgreSQL server for tests, from Debian's package, on a loopback port and in a folder of its own."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import psycopg

from tests.processes import wait_until
from tests.servers import free_port

USER, PASSWORD = "tracked", "p@ss/wörd %1"
QUOTED = "p%40ss%2Fw%C3%B6rd%20%251"
_ORDINARY = "nobody"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # its usual folder belongs to the machine's own server
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "50",
}


@dataclass
class Postgres:
    """A PostgreSQL server; whoever knows these values can end it, from whatever process.

    Attributes:
        folder: All it keeps; it belongs to the user that the server runs as.
        port: Of the loopback interface.
        pid: The postmaster's.
    """

    folder: Path
    port: int
    pid: int = 0

    @classmethod
    def make(cls) -> Self:
        """A new server that does not run yet."""
        # Not in pytest's own folder, which nobody but its owner may enter.
        folder = Path(tempfile.mkdtemp(prefix="tracked-postgres-"))
        password = folder / "password"
        password.write_text(f"{PASSWORD}\n")
        if os.getuid() == 0:
            for path in (folder, password):
                shutil.chown(path, _ORDINARY)
        _run("initdb", "-D", folder / "data", "-U", USER, f"--pwfile={password}", "--auth=scram-sha-256",
             "--encoding=UTF8", "--locale=C", "--no-sync")  # fmt: skip
        return cls(folder, free_port())

    def launch(self) -> None:
        """Start it without waiting, in a session of its own: a Ctrl-C does not end it."""
        options = [word for item in _SETTINGS.items() for word in ("-c", "=".join(item))]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [binary("postgres"), "-D", self.folder / "data", "-p", str(self.port), *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                **_as_ordinary_user(),
            )
        self.pid = process.pid

    def wait_until_ready(self) -> None:
        """Return once it answers; raises with its log if it ended."""
        wait_until(lambda: self._answers() or _is_gone(self.pid), "PostgreSQL")
        assert not _is_gone(self.pid), (self.folder / "log").read_text()

    def end(self) -> None:
        """End it at once, in the middle of whatever it does, and wait until it is gone."""
        with suppress(ProcessLookupError):
            # Unlike SIGKILL, this takes its children and its shared memory along.
            os.kill(self.pid, signal.SIGQUIT)
        wait_until(lambda: _is_gone(self.pid), "PostgreSQL's end")

    def remove(self) -> None:
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{USER}:{QUOTED}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """The address of a new, empty database."""
        name = f"study_{uuid4().hex[:12]}"
        with closing(self._connect()) as connection:
            connection.autocommit = True
            connection.execute(f"CREATE DATABASE {name}")  # type: ignore[call-overload, unused-ignore]
        return self.url(name)

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname="postgres"
        )

    def _answers(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        known = json.loads(text)
        return cls(Path(known["folder"]), known["port"], known["pid"])


def binary(name: str) -> str:
    """The path of one of PostgreSQL's programs: Debian keeps those of a server off the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    found = str(debian[-1]) if debian else shutil.which(name)
    assert found, f"{name} is not installed; try: apt-get install postgresql"
    return found


def _run(name: str, *args: str | Path) -> None:
    done = subprocess.run(
        [binary(name), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        **_as_ordinary_user(),
    )
    assert done.returncode == 0, done.stderr


def _as_ordinary_user() -> dict[str, Any]:
    """PostgreSQL refuses to run as root, which tests in a container do."""
    if os.getuid():
        return {}
    return {"user": _ORDINARY, "group": pwd.getpwnam(_ORDINARY).pw_gid, "extra_groups": []}


def _is_gone(pid: int) -> bool:
    """Whether no such process runs; one that ended and that its parent has not asked about is gone too."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
