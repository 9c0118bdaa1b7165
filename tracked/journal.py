"""The durable log between a training and its sender: append, read from a cursor, acknowledge.

A journal is a folder of append-only segments, written by one process and read by one. A record is
a frame: four bytes of magic, the length and the CRC-32 of the payload (little-endian), and the
payload `[kind, body]` as JSON. A kill can tear only the last frame, and a reader leaves a torn
tail alone; where a frame in the middle is damaged, reading goes on at the next whole one and the
gap is reported as a record of kind `damaged`. Order is the order of appending. Appended means
handed to the operating system after `flush`, and on the disk after `flush(sync=True)`.

The reader keeps its cursors in `cursor.json` and deletes segments that all of them have passed.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tracked.spool import Lock, fsync_directory, is_held, read_json, unusable, write_json

_MAGIC = b"\xf5TJ1"
_HEADER = struct.Struct("<4sII")
SEGMENT_BYTES = 8 << 20


class Place(NamedTuple):
    """A position in a journal: segment number and byte offset."""

    segment: int
    offset: int


START = Place(1, 0)


@dataclass(frozen=True)
class Record:
    """One appended record, and the place just behind it."""

    kind: str
    body: Any
    end: Place


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:010d}.log"


class Journal:
    """The writing end. All methods are to be called from one thread at a time.

    Raises:
        SpoolError: The folder cannot be made or written to.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self._buffer = bytearray()
        self._place = START
        newborn = folder.with_name(f".{folder.name}")
        try:
            newborn.mkdir(parents=True, mode=0o700)
            self._lock = Lock(newborn / "lock")
            self._lock.acquire(dict(about or {}))
            self._fd = self._open(newborn, START.segment)
            # A sender that sees the folder finds it locked; unlocked, it would take it for left behind.
            newborn.rename(folder)
            self._lock.moved(folder / "lock")
            fsync_directory(folder.parent)
        except OSError as error:
            raise unusable(folder, error) from error
        # A forked DataLoader worker must not hold the file, nor write what it inherited.
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._forget)

    def append(self, kind: str, body: Any) -> None:
        """Add a record to the buffer; `flush` writes it."""
        payload = json.dumps([kind, body], separators=(",", ":")).encode()
        self._buffer += _HEADER.pack(_MAGIC, len(payload), zlib.crc32(payload))
        self._buffer += payload

    def flush(self, *, sync: bool = False) -> None:
        """Write what was appended. What a full disk refuses stays buffered, for the next call.

        Raises:
            SpoolError: The system refused the bytes.
        """
        if os.getpid() != self._pid:
            return
        try:
            if self._buffer:
                self._write()
            if sync:
                os.fsync(self._fd)
            if self._place.offset >= SEGMENT_BYTES:
                self._rotate()
        except OSError as error:
            raise unusable(self.folder, error) from error

    def _rotate(self) -> None:
        os.fsync(self._fd)  # a later `flush(sync=True)` reaches the new segment only
        full, self._fd = self._fd, self._open(self.folder, self._place.segment + 1)
        os.close(full)
        fsync_directory(self.folder)
        self._place = Place(self._place.segment + 1, 0)

    def _write(self) -> None:
        written = 0
        try:
            while written < len(self._buffer):
                written += os.write(self._fd, memoryview(self._buffer)[written:])
        except OSError:
            # Half a frame would hide every later one from the reader.
            os.ftruncate(self._fd, self._place.offset)
            raise
        self._place = Place(self._place.segment, self._place.offset + written)
        self._buffer.clear()

    def close(self) -> None:
        """Flush, and let the reader know that nobody writes any more."""
        if os.getpid() == self._pid and self._fd >= 0:
            self.flush(sync=True)
            os.close(self._fd)
            self._fd = -1
            self._lock.release()

    @staticmethod
    def _open(folder: Path, number: int) -> int:
        return os.open(_segment(folder, number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _forget(self) -> None:
        self._buffer = bytearray()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Reader:
    """The reading end, with a named cursor for each lane that works through the journal."""

    def __init__(self, folder: Path, lanes: tuple[str, ...]) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        stored = read_json(folder / "cursor.json")
        self._cursors = {lane: Place(*stored.get(lane, START)) for lane in lanes}
        self.acknowledged = int(stored.get("count", 0))

    def cursor(self, lane: str) -> Place:
        return self._cursors[lane]

    def end(self) -> Place:
        """The place behind all that has been flushed, whole or torn."""
        numbers = sorted(int(path.stem) for path in self.folder.glob("*.log"))
        for number in reversed(numbers):
            # Behind a full segment stands an empty one, and nothing moves a cursor into that.
            if size := _segment(self.folder, number).stat().st_size:
                return Place(number, size)
        return START

    def is_written(self) -> bool:
        """Whether a living process has the journal open for writing."""
        return is_held(self.folder / "lock")

    def acknowledge(self, lane: str, end: Place, count: int = 0) -> None:
        """Move a lane's cursor to `end`; `count` points have been delivered on the way."""
        with self._lock:
            self._cursors[lane] = end
            self.acknowledged += count
            write_json(self.folder / "cursor.json", {**self._cursors, "count": self.acknowledged})
            done = min(self._cursors.values()).segment
        for path in self.folder.glob("*.log"):
            if int(path.stem) < done:
                path.unlink(missing_ok=True)

    def records(self, lane: str, start: Place | None = None) -> Iterator[Record]:
        """What has been appended behind a lane's cursor (or behind `start`), as far as it is whole."""
        place = start or self._cursors[lane]
        while True:
            path = _segment(self.folder, place.segment)
            following = _segment(self.folder, place.segment + 1).exists()
            try:
                with path.open("rb") as file:
                    file.seek(place.offset)
                    data = file.read()
            except FileNotFoundError:
                return
            for record in _frames(data, place, tail_may_grow=not following):
                place = record.end
                yield record
            if not following:
                return
            place = Place(place.segment + 1, 0)


def _frames(data: bytes, place: Place, *, tail_may_grow: bool) -> Iterator[Record]:
    at = 0
    while at < len(data):
        found = _frame(data, at)
        if found is None:
            # A frame that is not whole is either the tail that is being written, or damage:
            # then a whole one stands somewhere behind it.
            following = _next_frame(data, at + 1)
            if following is None:
                if not tail_may_grow:
                    gap = {"segment": place.segment, "offset": place.offset + at, "bytes": len(data) - at}
                    yield Record("damaged", gap, Place(place.segment, place.offset + len(data)))
                return
            gap = {"segment": place.segment, "offset": place.offset + at, "bytes": following - at}
            at = following
            yield Record("damaged", gap, Place(place.segment, place.offset + at))
            continue
        (kind, body), at = found
        yield Record(kind, body, Place(place.segment, place.offset + at))


def _frame(data: bytes, at: int) -> tuple[Any, int] | None:
    if len(data) - at < _HEADER.size:
        return None
    magic, length, crc = _HEADER.unpack_from(data, at)
    end = at + _HEADER.size + length
    if magic != _MAGIC or end > len(data):
        return None
    payload = data[at + _HEADER.size : end]
    return (json.loads(payload), end) if zlib.crc32(payload) == crc else None


def _next_frame(data: bytes, at: int) -> int | None:
    while (at := data.find(_MAGIC, at)) >= 0:
        if _frame(data, at) is not None:
            return at
        at += 1
    return None
