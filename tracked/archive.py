"""Writes checkpoint files in a process of its own, without importing torch.

A thread that calls `torch.save` beside a training slows it several times, and a process that
imports torch costs seconds and hundreds of megabytes. A torch file is a plain zip of a pickle and
of raw storages (https://docs.pytorch.org/docs/stable/notes/serialization.html), so the
training hands over the pickle and shared memory, and this process (`python -m tracked.archive FD…`)
writes the file, syncs it, reads it back for its SHA-256, and renames it.

Jobs come on standard input (a length, then JSON; the pickle behind it), answers leave on standard
output, a line of JSON each. A job of no length, or the end of input, ends the process.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tracked.children import give_way
from tracked.failpoints import reach
from tracked.spool import fsync_directory

_ALIGNMENT = 64
_CHUNK = 1 << 20
_LOCAL_HEADER = 30  # bytes before the name of a zip entry
HEADER = struct.Struct("<II")


def write_torch_file(
    file: IO[bytes], pickled: bytes, storages: Sequence[tuple[str, int, int]], buffer: memoryview
) -> None:
    """Write a file that `torch.load` reads.

    Args:
        file: Open for writing and seekable.
        pickled: The pickle, whose persistent IDs name storages by their keys.
        storages: Key, offset in `buffer` and size in bytes of each storage.
        buffer: The raw bytes of all storages.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(_member(file, "data.pkl", len(pickled)), pickled)
        archive.writestr(_member(file, "byteorder", len(sys.byteorder)), sys.byteorder)
        for key, offset, size in storages:
            with archive.open(_member(file, f"data/{key}", size), "w") as member:
                for start in range(offset, offset + size, _CHUNK):
                    # A copy: an error's traceback would keep a slice alive, and with it the memory mapped.
                    member.write(bytes(buffer[start : min(start + _CHUNK, offset + size)]))
        archive.writestr(_member(file, "version", 2), "3\n")


def _member(file: IO[bytes], name: str, size: int) -> zipfile.ZipInfo:
    """A zip entry whose data starts on a multiple of 64 bytes, so that the file can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = size
    # `ZipFile.open` puts a zip64 field of 20 bytes before ours when the size calls for one.
    zip64 = 20 if size * 1.05 > zipfile.ZIP64_LIMIT else 0
    start = file.tell() + _LOCAL_HEADER + len(info.filename) + zip64 + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit(folder: Path, name: str, write: Any) -> Path:
    """Let `write(file)` fill a file, and give it its name once every byte of it is on the disk."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    temp = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with temp.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        reach(f"archive.before-rename.{name}")
        target = temp.replace(folder / name)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fsync_directory(folder)
    return target


def write_checkpoint(job: dict[str, Any], pickled: bytes, buffer: memoryview) -> dict[str, Any]:
    """Write `checkpoint.pt` and then `manifest.json` into the job's folder; the manifest's content."""
    folder = Path(job["folder"])
    reach("archive.before-write")
    path = commit(
        folder, "checkpoint.pt", lambda file: write_torch_file(file, pickled, job["storages"], buffer)
    )
    manifest = {**job["manifest"], "sha256": digest(path), "bytes": path.stat().st_size}
    text = json.dumps(manifest, indent=1).encode()
    commit(folder, "manifest.json", lambda file: file.write(text))
    fsync_directory(folder.parent)
    return manifest


def serve(slots: Sequence[int], jobs: IO[bytes], answers: IO[str]) -> None:
    """Write one checkpoint for each job until the jobs end."""
    while header := jobs.read(HEADER.size):
        length, pickle_length = HEADER.unpack(header)
        if not length:
            return
        job = json.loads(jobs.read(length))
        pickled = jobs.read(pickle_length)
        if len(pickled) < pickle_length:
            return
        fd = slots[job["slot"]]
        size = os.fstat(fd).st_size
        answer: dict[str, Any]
        try:
            with mmap.mmap(fd, size, prot=mmap.PROT_READ) as shared, memoryview(shared) as buffer:
                answer = {"manifest": write_checkpoint(job, pickled, buffer)}
        except OSError as error:
            answer = {"error": f"{error.strerror or error}: {job['folder']}"}
        answers.write(json.dumps({"job": job["job"], **answer}) + "\n")
        answers.flush()


if __name__ == "__main__":
    give_way()
    serve([int(fd) for fd in sys.argv[1:]], sys.stdin.buffer, sys.stdout)
