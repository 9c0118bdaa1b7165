"""What is packed for the journal is unpacked to the last bit."""

from __future__ import annotations

import json
import struct

from hypothesis import given
from hypothesis import strategies as st

from tracked.packing import Point, pack, unpack

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
POINTS = st.lists(st.tuples(st.text(min_size=1), INT64, INT64, st.floats()), min_size=1)


def bits(points: list[Point]) -> list[tuple[str, int, int, bytes]]:
    return [(key, step, time, struct.pack("<d", value)) for key, step, time, value in points]


@given(POINTS)
def test_points_come_back_in_order_and_to_the_last_bit(points: list[Point]) -> None:
    body = json.loads(json.dumps(pack(points)))

    assert bits(unpack(body)) == bits(points)
    assert body["count"] == len(points)
