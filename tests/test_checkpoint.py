"""Checkpoint files: ordinary torch files, whole or refused, written beside the training."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.experiments import tiny
from tests.processes import wait_until
from tests.trainings import fitting, train
from tracked import archive, checkpoint, names
from tracked.checkpoint import Writer, check_loadable, load
from tracked.errors import CheckpointError
from tracked.names import FILE
from tracked.schedule import Settings
from tracked.training import compare_states


class Watched:
    """A writer, with what it reports."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.writer = Writer(self.written.append, self.failed.append)

    @property
    def steps(self) -> list[int]:
        return [manifest["step"] for manifest in self.written]

    @property
    def pid(self) -> int:
        assert self.writer.scribe.process is not None
        return self.writer.scribe.process.pid

    def take(
        self, root: Path, step: int, *, pinned: bool = False, wait: bool = False, size: int = 100
    ) -> bool:
        state = {"step": step, "tensor": torch.full((size,), float(step))}
        folder = root / names.folder_name(step)
        return self.writer.take(state, folder, {"step": step}, pinned=pinned, wait=wait)

    def stop(self) -> None:
        """Stop the writing process, and see that it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(") ")[2][0] == "T", "the writing process to stop")

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def watched() -> Iterator[Watched]:
    found = Watched()
    yield found
    if found.writer.scribe.process is not None:
        found.go_on()
    found.writer.close()


def written(state: Any, folder: Path) -> Path:
    """The file that a writer makes of `state`."""
    found = Watched()
    found.writer.take(state, folder, {"step": 1})
    found.writer.close()
    assert found.failed == []
    return folder / FILE


# -- the file itself


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a real training with a scheduler, after 7 steps."""
    settings = Settings(epochs=1, device="cpu")
    root = tmp_path_factory.mktemp("trained")
    found = train(
        root, fitting(lambda: tiny.build(tiny.Params(scheduler="step", optimizer="adamw"))), settings
    )
    return found.checkpoints / names.folder_name(7) / FILE


_READ = """
import sys, torch
path, mapped = sys.argv[1], sys.argv[2] == "mapped"
state = torch.load(path, weights_only=True, mmap=mapped)
assert not any(name.split(".")[0] == "tracked" for name in sys.modules)
assert (state["epoch"], state["step"]) == (1, 7)
assert isinstance(state["loss"], float)
model = torch.nn.Sequential(
    torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
model.load_state_dict(state["model_state_dict"])
optimizer = torch.optim.AdamW(model.parameters())
optimizer.load_state_dict(state["optimizer_state_dict"])
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
scheduler.load_state_dict(state["scheduler_state_dict"])
assert scheduler.last_epoch == 1
print(model(torch.ones(2, 6)).isfinite().all().item(), optimizer.state[model[0].weight]["step"].item())
"""


@pytest.mark.parametrize("how", ["read", "mapped"])
def test_a_checkpoint_is_an_ordinary_torch_file(how: str, trained: Path, tmp_path: Path) -> None:
    # In another folder, so that this package cannot be imported by accident.
    answer = subprocess.run(
        [sys.executable, "-c", _READ, str(trained), how],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stderr == ""
    assert answer.stdout.split() == ["True", "7.0"]


def test_the_manifest_names_the_hash_and_size_of_the_file(trained: Path) -> None:
    manifest = json.loads((trained.parent / "manifest.json").read_text())
    assert manifest["sha256"] == archive.digest(trained)
    assert manifest["bytes"] == trained.stat().st_size
    assert (manifest["step"], manifest["epoch"]) == (7, 1)
    assert checkpoint.is_whole(trained.parent)
    assert sorted(path.name for path in trained.parent.iterdir()) == [FILE, "manifest.json"]


def test_what_is_written_is_what_torch_save_writes(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    state = {
        "step": 1,
        "pictures": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": base[:, 1:, ::2],
        "base": base,
        "expanded": torch.ones(1).expand(1000),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "dtypes": [
            torch.ones(3).to(dtype)
            for dtype in (
                torch.bfloat16,
                torch.float16,
                torch.int8,
                torch.bool,
                torch.uint16,
                torch.float8_e4m3fn,
            )
        ],
        "complex": torch.ones(3, dtype=torch.complex64),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": OrderedDict(a=1),
        "counter": Counter([3, 3]),
        "plain": [1, 2**80, -0.0, float("nan"), float("inf"), "ä", b"b", True, None, (1, 2), {3}],
        "torch": [torch.float32, torch.device("cpu"), torch.Size([1, 2])],
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    expected, found = torch.load(file, weights_only=True), load(written(state, tmp_path))
    assert compare_states(expected, found)[1] == []
    assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()
    assert found["expanded"].untyped_storage().nbytes() == 4


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    weight = torch.zeros(50_000)
    path = written({"step": 1, "a": weight, "b": weight, "c": weight.view(100, 500)}, tmp_path)
    assert path.stat().st_size < 1.1 * 200_000


def test_every_storage_starts_where_it_can_be_mapped(trained: Path) -> None:
    with zipfile.ZipFile(trained) as file, trained.open("rb") as raw:
        assert file.testzip() is None
        for info in file.infolist():
            raw.seek(info.header_offset + 26)
            name, extra = int.from_bytes(raw.read(2), "little"), int.from_bytes(raw.read(2), "little")
            assert (info.header_offset + 30 + name + extra) % 64 == 0


_LARGE = """
import json, sys, zipfile
from pathlib import Path
zipfile.ZIP64_LIMIT = 1000
from tracked import archive
folder, pickled = Path(sys.argv[1]), sys.stdin.buffer.read()
storages = json.loads(sys.argv[2])
data = memoryview((folder / "raw").read_bytes())
with (folder / "large.pt").open("w+b") as file:
    archive.write_torch_file(file, pickled, storages, data)
"""


def test_a_file_beyond_the_limits_of_plain_zip_is_read_and_mapped(tmp_path: Path) -> None:
    # The limit is lowered from 4 GB to 1,000 bytes in a process of its own; the format is that of large files.
    state = {"step": 1, "small": torch.arange(10.0), "large": torch.randn(5_000), "next": torch.randn(3_000)}
    buffer = io.BytesIO()
    pickler = checkpoint._StatePickler(buffer)
    pickler.dump(state)
    slot = checkpoint._Slot()
    layout = checkpoint._copy(list(pickler.storages.values()), slot)
    (tmp_path / "raw").write_bytes(bytes(slot.tensor.numpy()))
    subprocess.run(
        [sys.executable, "-c", _LARGE, str(tmp_path), json.dumps(layout)], input=buffer.getvalue(), check=True
    )
    with zipfile.ZipFile(tmp_path / "large.pt") as file:
        # A header of 20 bytes more, which zip64 puts before ours.
        assert any(info.extract_version >= zipfile.ZIP64_VERSION for info in file.infolist())
    for mapped in (False, True):
        found = torch.load(tmp_path / "large.pt", weights_only=True, mmap=mapped)
        assert compare_states(state, found)[1] == []
        assert all(found[name].data_ptr() % 64 == 0 for name in ("large", "next") if mapped)


# -- what is not whole is refused


@pytest.fixture
def sound(trained: Path, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint of one's own, and its hash."""
    path = Path(shutil.copytree(trained.parent, tmp_path / "own")) / FILE
    return path, archive.digest(path)


@pytest.mark.parametrize("left", [0.0, 1e-4, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(left: float, sound: tuple[Path, str]) -> None:
    path, sha256 = sound
    os.truncate(path, int(path.stat().st_size * left))
    for known in (sha256, None):
        with pytest.raises(CheckpointError):
            load(path, known)
    assert not checkpoint.is_whole(path.parent)


@pytest.mark.parametrize("seed", range(20))
def test_a_checkpoint_with_one_wrong_bit_is_refused(seed: int, sound: tuple[Path, str]) -> None:
    path, sha256 = sound
    chosen = random.Random(seed)
    data = bytearray(path.read_bytes())
    data[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        load(path, sha256)
    assert not checkpoint.is_whole(path.parent)


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_pickle_without_a_known_hash_raises_nothing_but_our_error(
    seed: int, sound: tuple[Path, str]
) -> None:
    path, _ = sound
    chosen = random.Random(seed)
    data = bytearray(path.read_bytes())
    start = data.index(b"data.pkl")
    for _ in range(8):
        data[start + chosen.randrange(2500)] ^= 1 << chosen.randrange(8)
    path.write_bytes(data)
    try:
        load(path)
    except CheckpointError as error:
        assert error.found  # noqa: PT017 - what hits a plain number may pass


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load(tmp_path / FILE, "0" * 64)
    assert not checkpoint.is_whole(tmp_path)


def test_a_file_without_training_state_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / FILE)
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        load(tmp_path / FILE)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrapped", ["torch file", "bare pickle"])
def test_code_in_a_checkpoint_is_never_run(wrapped: str, tmp_path: Path) -> None:
    evil, path = {"step": 1, "model_state_dict": Malicious(tmp_path / "ran")}, tmp_path / FILE
    if wrapped == "torch file":
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    # Also with the right hash: whoever writes the file can write the manifest.
    with pytest.raises(CheckpointError, match="plain data"):
        load(path, archive.digest(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.0),
        np.arange(3),
        Path("x"),
        torch.nn.Linear,
        int,
        print,
        frozenset([1]),
        object(),
        range(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_is_refused_before_it_is_saved(value: Any, tmp_path: Path) -> None:
    state = {"step": 1, "nested": [{"value": value}]}
    with pytest.raises(CheckpointError):
        check_loadable(state)
    found = Watched()
    try:
        with pytest.raises(CheckpointError):
            found.writer.take(state, tmp_path, {"step": 1})
    finally:
        found.writer.close()


# -- the writer


def test_nothing_queues_and_the_newest_is_written(watched: Watched, tmp_path: Path) -> None:
    assert watched.take(tmp_path, 0)
    watched.writer.drain()
    watched.stop()
    size = 100_000
    assert all(watched.take(tmp_path, step, size=size) for step in range(1, 51))
    assert sum(slot.size for slot in watched.writer.scribe.slots) <= 2 * (4 * size + 4096)
    assert watched.steps == [0]
    watched.go_on()
    watched.writer.drain()
    # The one that was being written, if one had been begun, and the newest.
    assert watched.steps[-1] == 50
    assert len(watched.steps) <= 3
    for step in watched.steps[1:]:
        found = load(tmp_path / names.folder_name(step) / FILE)
        assert found["tensor"].equal(torch.full((size,), float(step)))
    assert watched.failed == []


def test_a_waiting_best_is_not_replaced_by_a_worse_one(watched: Watched, tmp_path: Path) -> None:
    watched.take(tmp_path, 0)
    watched.writer.drain()
    watched.stop()
    assert watched.take(tmp_path, 1)
    wait_until(lambda: watched.writer._writing is not None, "the first to be written")
    assert watched.take(tmp_path, 2, pinned=True)
    assert not watched.take(tmp_path, 3)
    assert watched.take(tmp_path, 4, pinned=True)  # better still
    assert not watched.take(tmp_path, 5)
    watched.go_on()
    assert watched.take(tmp_path, 6, wait=True)
    watched.writer.drain()
    assert watched.steps == [0, 1, 4, 6]
    assert load(tmp_path / names.folder_name(4) / FILE)["tensor"][0] == 4


def test_a_state_that_cannot_be_saved_leaves_the_one_that_waits(watched: Watched, tmp_path: Path) -> None:
    watched.take(tmp_path, 0)
    watched.writer.drain()
    watched.stop()
    watched.take(tmp_path, 1)
    wait_until(lambda: watched.writer._writing is not None, "the first to be written")
    assert watched.take(tmp_path, 2)
    with pytest.raises(CheckpointError):
        watched.writer.take({"step": 3, "object": object()}, tmp_path / "3", {"step": 3})
    watched.go_on()
    watched.writer.drain()
    assert watched.steps == [0, 1, 2]


def test_a_writing_process_that_was_killed_is_replaced(watched: Watched, tmp_path: Path) -> None:
    watched.take(tmp_path, 0)
    watched.writer.drain()
    first = watched.pid
    watched.stop()
    watched.take(tmp_path, 1)
    wait_until(lambda: watched.writer._writing is not None, "the checkpoint to be written")
    os.kill(first, signal.SIGKILL)
    watched.writer.drain()
    assert watched.steps == [0, 1]
    assert watched.failed == []
    assert watched.pid != first
    assert load(tmp_path / names.folder_name(1) / FILE, watched.written[1]["sha256"])["step"] == 1


def test_a_writing_process_that_is_killed_again_and_again_is_told_and_tried_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACKED_FAILPOINT", "archive.before-rename.checkpoint.pt")
    found = Watched()
    found.take(tmp_path, 1)
    found.writer.drain()
    assert found.steps == []
    assert ["killed" in reason for reason in found.failed] == [True]
    assert not (tmp_path / names.folder_name(1) / FILE).exists()
    monkeypatch.delenv("TRACKED_FAILPOINT")
    found.take(tmp_path, 2)
    found.writer.close()
    assert found.steps == [2]


def test_a_full_disk_is_told_and_leaves_nothing_half(watched: Watched, tmp_path: Path) -> None:
    watched.take(tmp_path, 0)
    watched.writer.drain()
    # The system refuses this process every byte beyond, as a full disk does.
    resource.prlimit(watched.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    watched.take(tmp_path, 1, size=100_000)
    watched.writer.drain()
    assert watched.steps == [0]
    assert len(watched.failed) == 1
    assert "too large" in watched.failed[0]
    assert list((tmp_path / names.folder_name(1)).iterdir()) == []
    watched.take(tmp_path, 2)
    watched.writer.drain()
    assert watched.steps == [0, 2]


def test_a_folder_that_cannot_be_made_is_told(watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    watched.take(tmp_path / "file", 1)
    watched.writer.drain()
    assert watched.steps == []
    assert "Not a directory" in watched.failed[0]


def test_what_is_saved_is_the_state_at_the_moment_of_asking(watched: Watched, tmp_path: Path) -> None:
    tensor, plain = torch.ones(1000), {"list": [1]}
    watched.writer.take({"step": 1, "tensor": tensor, "plain": plain}, tmp_path, {"step": 1})
    tensor.fill_(2.0)
    plain["list"].append(2)
    watched.writer.drain()
    found = load(tmp_path / FILE)
    assert found["tensor"].eq(1.0).all()
    assert found["plain"] == {"list": [1]}


def test_the_writing_process_ends_with_the_one_it_writes_for(tmp_path: Path) -> None:
    script = (
        "import os, signal, torch\nfrom pathlib import Path\nfrom tracked.checkpoint import Writer\n"
        "writer = Writer(print, print)\n"
        "writer.take({'step': 1, 't': torch.ones(3)}, Path('one'), {'step': 1}, wait=True)\n"
        "writer.drain()\nprint(writer.scribe.process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == -signal.SIGKILL, answer.stderr
    pid = int(answer.stdout.splitlines()[-1])

    def gone() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
        except OSError:
            return True

    wait_until(gone, "the writing process's end")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000938", 938),
        ("step-123456789", 123456789),
        ("step-938", None),
        ("step-..", None),
        ("x", None),
    ],
)
def test_a_step_is_read_from_a_folder_name(name: str, step: int | None) -> None:
    assert names.step_of(name) == step
    if step is not None:
        assert names.folder_name(step) == name
