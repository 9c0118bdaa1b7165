"""Points ↔ what a record of the journal holds: columns of little-endian numbers, as text.

As JSON, number by number, they would hold the training's interpreter lock several times as long.
"""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_POINTS_IN_A_RECORD = 500

Point = tuple[str, int, int, float]
"""Key, step (int64), milliseconds since 1970 (int64), value (float64, to the last bit)."""
LinkedPoint = Mapping[str, Any]
"""A point of a model or a data set as well: its fields as `mlflow.entities.Metric` names them."""


def pack(points: Sequence[Point]) -> dict[str, Any]:
    """The body of a record; `points` must not be empty."""
    keys, steps, times, values = zip(*points, strict=True)
    index = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return {
        "count": len(points),
        "names": list(index),
        "keys": _text("I", list(map(index.__getitem__, keys))),
        "steps": _text("q", steps),
        "times": _text("q", times),
        "values": _text("d", values),
    }


def records(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """The bodies of the records that hold `points`, in their order; none if there are none."""
    for start in range(0, len(points), _POINTS_IN_A_RECORD):
        yield pack(points[start : start + _POINTS_IN_A_RECORD])


def linked_records(points: Sequence[LinkedPoint]) -> Iterator[dict[str, Any]]:
    """The same of linked points, which are rare and stay as they are."""
    for start in range(0, len(points), _POINTS_IN_A_RECORD):
        linked = points[start : start + _POINTS_IN_A_RECORD]
        yield {"count": len(linked), "points": linked}


def unpack(body: dict[str, Any]) -> list[Point]:
    """What `pack` was given."""
    keys = [body["names"][number] for number in _numbers("I", body["keys"])]
    columns = (_numbers(code, body[name]) for code, name in (("q", "steps"), ("q", "times"), ("d", "values")))
    return list(zip(keys, *columns, strict=True))


def _text(code: str, numbers: Sequence[float]) -> str:
    return b64encode(struct.pack(f"<{len(numbers)}{code}", *numbers)).decode("ascii")


def _numbers(code: str, text: str) -> tuple[Any, ...]:
    data = b64decode(text)
    return struct.unpack(f"<{len(data) // struct.calcsize('<' + code)}{code}", data)
