"""Training state <-> one verified file.

A snapshot copies every storage of a state into shared memory, between two steps; `Writer` has a
process beside the training write it (see `archive`). There are two slots of memory: one is being
written, the other waits; a newer snapshot replaces the one that waits, so nothing queues.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tracked import children
from tracked.archive import HEADER, digest
from tracked.errors import CheckpointError
from tracked.names import FILE
from tracked.spool import read_json

_ALIGNMENT = 64
# What `torch.load(weights_only=True)` builds without being told to trust more.
_LOADABLE = (
    torch.Tensor,
    torch.storage.TypedStorage,
    torch.storage.UntypedStorage,
    OrderedDict,
    Counter,
    torch.Size,
    torch.dtype,
    torch.device,
)
# Classes that a pickle of these refers to by name; any other class would be refused when it is loaded.
_LOADABLE_CLASSES = (OrderedDict, Counter, set, bytearray, torch.UntypedStorage)


class _StatePickler(pickle.Pickler):
    """Pickles a state with its storages left out, in torch's own file format."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: dict[int, tuple[str, torch.UntypedStorage]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            untyped = obj._untyped_storage  # noqa: SLF001 - the public way warns of deprecation
            kind, size = getattr(torch, obj._pickle_storage_type()), obj._size()  # noqa: SLF001
        elif isinstance(obj, torch.UntypedStorage):  # of the newer types: float8, unsigned
            untyped, kind, size = obj, torch.UntypedStorage, obj.nbytes()
        else:
            return None
        # Tied weights and views share a storage, which is written once.
        key, _ = self.storages.setdefault(untyped._cdata, (str(len(self.storages)), untyped))  # noqa: SLF001
        # Numbers are stored as the CPU has them, so a state loads on any device.
        return ("storage", kind, key, "cpu", size)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type):
            loadable = obj in _LOADABLE_CLASSES or obj.__module__ == "torch"
        else:
            loadable = isinstance(obj, _LOADABLE) or _is_torch_rebuild(obj)
        if loadable:
            return NotImplemented
        raise CheckpointError(
            f"the state holds a {type(obj).__module__}.{type(obj).__qualname__}: {obj!r:.80}",
            expected="tensors, numbers, strings, None, and dicts, lists and tuples of them: a checkpoint "
            "is loaded with weights_only=True, which never runs code",
            try_next="convert it first (`float(x)`, `torch.as_tensor(x)`)",
        )


def _is_torch_rebuild(obj: Any) -> bool:
    return callable(obj) and getattr(obj, "__module__", "") in ("torch._utils", "torch", "_codecs")


@dataclass
class Snapshot:
    """A state taken apart: its pickle, and its storages in a slot of shared memory."""

    pickled: bytes
    storages: list[tuple[str, int, int]]
    slot: int = -1
    folder: Path = Path()
    manifest: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False


class _Slot:
    """Anonymous shared memory that grows to the size of a state and is then used again."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            # Unlike /dev/shm, which containers often limit to 64 MB, bounded by memory alone.
            self.fd = os.memfd_create("tracked-checkpoint", 0)
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        self.size = 0
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> torch.Tensor:
        """A tensor over the memory: uint8, `(at least size,)`."""
        if size > self.size:
            os.ftruncate(self.fd, size)
            self.tensor = torch.frombuffer(mmap.mmap(self.fd, size), dtype=torch.uint8)
            self.size = size
        return self.tensor

    def empty(self) -> None:
        """Give the memory back."""
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.size = 0
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        self.empty()
        os.close(self.fd)


def _copy(storages: list[tuple[str, torch.UntypedStorage]], slot: _Slot) -> list[tuple[str, int, int]]:
    layout, end = [], 0
    for key, storage in storages:
        layout.append((key, end, storage.nbytes()))
        end += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
    memory = slot.reserve(max(end, _ALIGNMENT))
    for (_, offset, size), (_, storage) in zip(layout, storages, strict=True):
        if size:
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            memory[offset : offset + size].copy_(source, non_blocking=True)
    if any(storage.device.type == "cuda" for _, storage in storages):
        torch.cuda.synchronize()  # CPU-GPU sync: the copies must have landed before the next step
    return layout


class _Scribe:
    """The process that writes checkpoints, and the memory that it shares with this one."""

    def __init__(self) -> None:
        self.slots = (_Slot(), _Slot())
        self.process: subprocess.Popen[bytes] | None = None
        self._jobs = 0
        with contextlib.suppress(OSError):  # told of when a checkpoint is to be written
            self._start()

    def write(self, snapshot: Snapshot) -> dict[str, Any]:
        """Have a snapshot written; its manifest.

        Raises:
            OSError: It cannot be.
        """
        try:
            answer = self._ask(snapshot)
        except BrokenPipeError:
            # The process was killed; what it was to write is still here.
            self.stop()
            answer = self._ask(snapshot)
        if "error" in answer:
            raise OSError(answer["error"])
        manifest: dict[str, Any] = answer["manifest"]
        return manifest

    def _ask(self, snapshot: Snapshot) -> dict[str, Any]:
        process = self.process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        self._jobs += 1
        job = json.dumps(
            {
                "job": self._jobs,
                "slot": snapshot.slot,
                "folder": str(snapshot.folder),
                "storages": snapshot.storages,
                "manifest": snapshot.manifest,
            }
        ).encode()
        process.stdin.write(HEADER.pack(len(job), len(snapshot.pickled)) + job + snapshot.pickled)
        process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            raise BrokenPipeError("the process that writes checkpoints was killed")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        fds = [slot.fd for slot in self.slots]
        self.process = children.start(
            [sys.executable, "-m", "tracked.archive", *map(str, fds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            start_new_session=True,  # a Ctrl-C on the terminal must not take it away from the training
        )
        return self.process

    def stop(self) -> None:
        """End the process; the memory stays."""
        if self.process is not None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            with contextlib.suppress(OSError):
                # Closing alone is no end: workers forked since then hold the pipe open too.
                self.process.stdin.write(HEADER.pack(0, 0))
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.stop()
        for slot in self.slots:
            slot.close()


_spare: list[_Scribe] = []
_keeps = False


def keep_process() -> None:
    """Have the writing process of one training write for the next one too: for a process of many short ones."""
    global _keeps  # noqa: PLW0603 - a decision of the whole process
    _keeps = True


class Writer:
    """Takes snapshots and has them written beside the training.

    Args:
        on_written: Called from a thread of the writer's with the manifest of each whole checkpoint.
        on_failed: Called likewise with the reason when one could not be written.
    """

    def __init__(
        self, on_written: Callable[[dict[str, Any]], None], on_failed: Callable[[str], None]
    ) -> None:
        self._on_written = on_written
        self._on_failed = on_failed
        self._changed = threading.Condition()
        self._writing: Snapshot | None = None
        self._waiting: Snapshot | None = None
        self.scribe = _spare.pop() if _spare else _Scribe()  # so early that its start falls into no step
        self._closed = False
        # So early as well: a thread that has just begun keeps the one that began it waiting.
        self._thread = threading.Thread(target=self._run, name="tracked-checkpoints", daemon=True)
        self._thread.start()

    def take(
        self,
        state: Any,
        folder: Path,
        manifest: Mapping[str, Any],
        *,
        pinned: bool = False,
        wait: bool = False,
    ) -> bool:
        """Copy `state` now, and have it written to `folder`; the only part that the training waits for.

        Args:
            state: Nested dicts, lists and tuples of tensors and plain values.
            folder: Where `checkpoint.pt` and `manifest.json` will stand.
            manifest: What the manifest says beside `sha256` and `bytes`.
            pinned: A later snapshot must not replace this one while it waits (it is the best so far).
            wait: Wait for a free slot rather than decline.

        Returns:
            False if both slots are taken, by one being written and a pinned one: ask again later. True also
            where there is no memory for a copy, which has been told.

        Raises:
            CheckpointError: The state holds something that could not be loaded again.
        """
        # First, because it may raise, and what waits must not be lost then.
        buffer = io.BytesIO()
        pickler = _StatePickler(buffer)
        pickler.dump(state)
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._waiting is None)
            if self._waiting is not None and self._waiting.pinned and not pinned:
                return False
            # Claimed, so that the writing thread cannot start on it while it is overwritten.
            self._waiting = None
            slot = 1 - self._writing.slot if self._writing else 0
        try:
            layout = _copy(list(pickler.storages.values()), self.scribe.slots[slot])
        except OSError as error:  # no memory for it
            self._on_failed(error.strerror or str(error))
            return True
        snapshot = Snapshot(buffer.getvalue(), layout, slot, folder, dict(manifest), pinned)
        with self._changed:
            self._waiting = snapshot
            self._changed.notify_all()
        return True

    def drain(self) -> None:
        """Wait until everything taken is written or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._writing is None)

    def close(self) -> None:
        """Write what was taken, and let the writing process go."""
        self.drain()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if _keeps and not _spare:
            for slot in self.scribe.slots:
                slot.empty()
            _spare.append(self.scribe)
        else:
            self.scribe.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                self._writing, self._waiting = self._waiting, None
            try:
                self._on_written(self.scribe.write(self._writing))
            except OSError as error:
                self.scribe.stop()
                self._on_failed(str(error))
            finally:
                with self._changed:
                    self._writing = None
                    self._changed.notify_all()


def check_loadable(state: Any) -> None:
    """Save and load `state` with its tensors emptied: what cannot be loaded is told before the training.

    Raises:
        CheckpointError: Something in it is not plain data.
    """
    buffer = io.BytesIO()
    _StatePickler(io.BytesIO()).dump(state)
    torch.save(_emptied(state, {}), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"the state could be saved but not loaded: {str(error).splitlines()[0]}",
            expected="tensors, numbers, strings, None, and dicts, lists and tuples of them",
        ) from error


def _emptied(value: Any, empty: dict[torch.dtype, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # One of a kind: every storage is a file in what torch writes, and takes as long as a hundred numbers.
        return empty.setdefault(value.dtype, torch.empty(0, dtype=value.dtype))
    if isinstance(value, Mapping):
        return {key: _emptied(item, empty) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_emptied(item, empty) for item in value)
    return value


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint in `folder` has the hash that its manifest names."""
    manifest = read_json(folder / "manifest.json")
    path = folder / FILE
    return bool(manifest) and path.is_file() and digest(path) == manifest.get("sha256")


def load(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after its hash; nothing in it is executed.

    Raises:
        CheckpointError: It is missing, its hash is another, or it is no plain torch file.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if sha256 is not None and (found := digest(path)) != sha256:
        raise CheckpointError(
            f"the checkpoint at {path} is damaged: its SHA-256 is {found[:16]}…",
            expected=f"{sha256[:16]}…, as recorded when it was written",
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise CheckpointError(
            f"the checkpoint at {path} cannot be loaded as plain data: {reason}",
            expected="a torch file of tensors and plain values; code in it is never run",
        ) from error
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"the file at {path} is no training checkpoint", expected="a dict with `step`")
    return state
