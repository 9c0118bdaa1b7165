"""The spool: locks between processes, files replaced in one step, outboxes that belong to one address."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.processes import ROOT
from tracked import spool
from tracked.errors import SpoolError
from tracked.spool import Lock, is_held, open_outbox, outboxes, read_json, write_json

HOLD = """
import sys
from pathlib import Path
from tracked.spool import Lock
print(Lock(Path(sys.argv[1])).acquire({"holder": "child"}), flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that takes the lock, tells whether it got it, and keeps it until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_lock_is_had_by_one_process_and_free_once_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with holder(path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "True\n"
        lock = Lock(path)
        assert is_held(path)
        assert not lock.acquire()
        assert read_json(path) == {"pid": child.pid, "holder": "child"}
        child.kill()
        child.wait()
        assert not is_held(path)
        assert lock.acquire({"holder": "parent"})
    with holder(path) as late:
        assert late.communicate("")[0] == "False\n"
    lock.release()
    assert not is_held(path)


def test_asking_for_a_lock_of_our_own_does_not_lose_it(tmp_path: Path) -> None:
    # A process loses its POSIX locks on a file when it closes any descriptor of it.
    lock = Lock(tmp_path / "run.lock")
    assert lock.acquire()
    assert is_held(lock.path)
    assert not Lock(lock.path).acquire()
    with holder(lock.path) as child:
        assert child.communicate("")[0] == "False\n"
    lock.release()


def test_who_only_asks_keeps_nobody_from_taking_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.touch()
    asking = (
        "import sys\nfrom pathlib import Path\nfrom tracked.spool import is_held\nprint(flush=True)\n"
        "while True: is_held(Path(sys.argv[1]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", asking, path],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        for _ in range(50):
            lock = Lock(path)
            assert lock.acquire()
            lock.release()
        child.kill()


def test_two_who_ask_at_the_same_moment_do_not_take_each_other_for_a_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    ask = "import sys\nfrom pathlib import Path\nfrom tracked.spool import is_held\n"
    ask += "print(sum(is_held(Path(sys.argv[1])) for _ in range(20_000)))"
    both = [
        subprocess.Popen([sys.executable, "-c", ask, path], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [each.communicate()[0] for each in both] == ["0\n", "0\n"]


def test_a_holder_notices_that_its_spool_was_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    folder.mkdir()
    lock = Lock(folder / "sender.lock")
    lock.acquire()
    assert lock.is_in_place()
    shutil.rmtree(folder)
    assert not lock.is_in_place()
    folder.mkdir()
    (folder / "sender.lock").touch()
    assert not lock.is_in_place(), "another file of the same name is not the locked one"
    lock.release()


def test_a_reader_sees_the_old_object_or_the_new_one_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"value": 0})
    done = threading.Event()

    def write() -> None:
        for number in range(300):
            write_json(path, {"value": number, "filling": "x" * 5000})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert "value" in read_json(path)
    writer.join()
    assert [each.name for each in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"\xff"])
def test_a_torn_or_foreign_file_reads_as_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert read_json(tmp_path / "run.json") == {}


def test_each_address_has_an_outbox_of_its_own_and_passwords_stay_out_of_it(tmp_path: Path) -> None:
    one = open_outbox(tmp_path, "http://anna:geheim@host:5000")
    other = open_outbox(tmp_path, "http://host:5001")
    assert one.path != other.path
    assert {each.path for each in outboxes(tmp_path)} == {one.path, other.path}
    assert not any(b"geheim" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert one.path.stat().st_mode & 0o077 == 0


def test_an_outbox_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    mine = open_outbox(tmp_path, "http://host:5000")
    theirs = tmp_path / "elsewhere-12345678" / mine.path.name
    shutil.copytree(mine.path, theirs)
    assert [each.path for each in outboxes(tmp_path)] == [mine.path]


def test_a_spool_that_cannot_be_made_is_told_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="--spool-dir"):
        open_outbox(tmp_path / "file", "http://host:5000")


def test_the_spool_is_the_option_else_the_environment_else_under_mlruns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACKED_SPOOL", raising=False)
    assert spool.root() == tmp_path / "mlruns/spool"
    monkeypatch.setenv("TRACKED_SPOOL", "elsewhere")
    assert spool.root() == tmp_path / "elsewhere"
    assert spool.root(tmp_path / "given") == tmp_path / "given"
