"""The journal: order, torn tails, damage, cursors, segments, forks, full disks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from tracked import journal
from tracked.errors import SpoolError
from tracked.journal import Journal, Place, Reader
from tracked.spool import is_held

BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KINDS = st.sampled_from(["points", "tags", "checkpoint", "end"])


def opened(root: Path) -> Journal:
    return Journal(root / "run/attempt-0001-abcd")


def read(folder: Path, lane: str = "points") -> list[tuple[str, Any]]:
    return [(record.kind, record.body) for record in Reader(folder, (lane,)).records(lane)]


def segments(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.log"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(KINDS, BODIES), max_size=20), st.integers(1, 200))
def test_what_is_appended_is_read_back_in_order_over_any_number_of_segments(
    records: list[tuple[str, Any]], segment_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "SEGMENT_BYTES", segment_bytes)
        written = opened(Path(root))
        for kind, body in records:
            written.append(kind, body)
            written.flush()
        written.close()
        # NaN is not equal to itself; its text is.
        assert repr(read(written.folder)) == repr(records)


def test_a_last_frame_torn_at_any_byte_hides_nothing_before_it(tmp_path: Path) -> None:
    written = opened(tmp_path)
    for number in range(3):
        written.append("points", [["loss", number, 0, 0.5]])
    written.close()
    path = written.folder / "0000000001.log"
    whole = path.read_bytes()
    first, second = read(written.folder)[:2]
    last = whole.rindex(b"\xf5TJ1")
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        assert read(written.folder) == [first, second], f"torn after {length - last} bytes"


def test_a_frame_that_grows_under_its_reader_is_read_once_it_is_whole(tmp_path: Path) -> None:
    written = opened(tmp_path)
    written.append("points", [1])
    written.append("points", [2])
    written.close()
    path = written.folder / "0000000001.log"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    reader = Reader(written.folder, ("points",))
    (only,) = reader.records("points")
    reader.acknowledge("points", only.end)
    path.write_bytes(whole)
    assert [record.body for record in reader.records("points")] == [[2]]


@pytest.mark.parametrize("victim", ["magic", "length", "checksum", "payload"])
def test_behind_a_damaged_frame_reading_goes_on_at_the_next_whole_one(tmp_path: Path, victim: str) -> None:
    written = opened(tmp_path)
    for number in range(4):
        written.append("points", number)
    written.close()
    path = written.folder / "0000000001.log"
    data = bytearray(path.read_bytes())
    size = len(data) // 4
    at = size + {"magic": 0, "length": 4, "checksum": 8, "payload": 14}[victim]
    data[at] ^= 0xFF
    path.write_bytes(data)
    gap = {"segment": 1, "offset": size, "bytes": size}
    assert read(written.folder) == [("points", 0), ("damaged", gap), ("points", 2), ("points", 3)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_byte_anywhere_costs_one_record_and_is_never_read_as_another(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        written = opened(Path(root))
        records = [("points", [["train/loss", number, 17, number / 7]]) for number in range(5)]
        for kind, body in records:
            written.append(kind, body)
        written.close()
        path = written.folder / "0000000001.log"
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        found = read(written.folder)
        kept = [record for record in found if record[0] != "damaged"]
        lost = [record for record in records if record not in kept]
        assert len(lost) == 1
        assert kept == [record for record in records if record not in lost]
        # Damage at the very end cannot be told from a frame that was being written.
        assert ("damaged" in [kind for kind, _ in found]) == (lost != [records[-1]])


def test_damage_at_the_end_of_a_segment_is_told_once_the_next_one_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1)
    written = opened(tmp_path)
    for number in range(2):
        written.append("points", number)
        written.flush()
    written.close()
    path = written.folder / "0000000001.log"
    path.write_bytes(path.read_bytes()[:-1])
    assert [kind for kind, _ in read(written.folder)] == ["damaged", "points"]


def test_cursors_survive_the_reader_and_lanes_do_not_share_theirs(tmp_path: Path) -> None:
    written = opened(tmp_path)
    for number in range(3):
        written.append("points", number)
    written.close()
    reader = Reader(written.folder, ("points", "files"))
    first = next(reader.records("points"))
    reader.acknowledge("points", first.end, 7)
    again = Reader(written.folder, ("points", "files"))
    assert [record.body for record in again.records("points")] == [1, 2]
    assert [record.body for record in again.records("files")] == [0, 1, 2]
    assert again.acknowledged == 7


def test_a_segment_is_deleted_only_when_every_lane_has_passed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1)
    written = opened(tmp_path)
    for number in range(3):
        written.append("points", number)
        written.flush()
    reader = Reader(written.folder, ("points", "files"))
    last = list(reader.records("points"))[-1].end
    reader.acknowledge("points", last)
    assert segments(written.folder) == [1, 2, 3, 4]
    reader.acknowledge("files", Place(2, 0))
    assert segments(written.folder) == [2, 3, 4]
    written.append("points", 3)
    written.close()
    assert [record.body for record in reader.records("points")] == [3]


def test_a_reader_sees_that_the_writer_is_gone(tmp_path: Path) -> None:
    written = opened(tmp_path)
    reader = Reader(written.folder, ("points",))
    assert reader.is_written()
    written.close()
    assert not reader.is_written()


def test_a_forked_child_writes_nothing_and_holds_no_lock(tmp_path: Path) -> None:
    written = opened(tmp_path)
    written.append("points", "parent")
    child_may_end, end = os.pipe()
    ready, is_ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        written.append("points", "child")
        written.flush(sync=True)
        written.close()
        os.write(is_ready, b".")
        os.close(end)
        os.read(child_may_end, 1)
        os._exit(0)
    os.read(ready, 1)
    assert Reader(written.folder, ("points",)).is_written(), "the child's close freed the parent's lock"
    written.close()
    held_by_child = is_held(written.folder / "lock")
    os.close(end)
    os.waitpid(pid, 0)
    for fd in (child_may_end, ready, is_ready):
        os.close(fd)
    assert not held_by_child
    assert read(written.folder) == [("points", "parent")]


class Writing(Dataset[int]):
    """A data set whose samples, fetched in a worker, try to write to the journal."""

    def __init__(self, written: Journal) -> None:
        self.written = written

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        self.written.append("points", f"worker {index}")
        self.written.flush(sync=True)
        return os.getpid()


def test_a_data_loaders_worker_writes_nothing_and_holds_no_lock(tmp_path: Path) -> None:
    written = opened(tmp_path)
    written.append("points", "before")
    loader = DataLoader(Writing(written), num_workers=1, multiprocessing_context="fork")
    workers = iter(loader)
    pid = int(torch.as_tensor(next(workers)))
    assert pid != os.getpid()
    written.append("points", "after")
    written.close()
    assert not is_held(written.folder / "lock"), "the living worker holds the journal"
    del workers
    assert read(written.folder) == [("points", "before"), ("points", "after")]


FULL = """
import resource, sys
from pathlib import Path
from tracked.errors import SpoolError
from tracked.journal import Journal, Reader

written = Journal(Path(sys.argv[1]))
written.append("points", "early")
written.flush()
path = written.folder / "0000000001.log"
before = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (before + 100, resource.RLIM_INFINITY))
written.append("points", "small")
written.append("points", "x" * 200)
try:
    written.flush(sync=True)
except SpoolError as error:
    print("refused", "file too large" in str(error).lower(), "--spool-dir" in str(error))
print("half", path.stat().st_size - before)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
written.append("points", "late")
written.close()
print([record.body[:5] for record in Reader(written.folder, ("points",)).records("points")])
"""


def test_a_full_disk_leaves_no_half_frame_and_what_was_refused_is_written_later(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path / "attempt-0001-abcd"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(journal.__file__).parent.parent)},
    )
    assert result.stdout.splitlines() == [
        "refused True True",
        "half 0",
        "['early', 'small', 'xxxxx', 'late']",
    ]


def test_a_segment_that_cannot_be_followed_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = opened(tmp_path)
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 1)
    written.append("points", 1)
    (written.folder / "0000000002.log").mkdir()  # as a disk without inodes would, it refuses the new file
    with pytest.raises(SpoolError):
        written.flush()
    (written.folder / "0000000002.log").rmdir()
    written.append("points", 2)
    written.flush()
    written.append("points", 3)
    written.close()
    assert [body for _, body in read(written.folder)] == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file stands in the way")
    with pytest.raises(SpoolError, match="run/attempt-0001-abcd"):
        opened(tmp_path)
