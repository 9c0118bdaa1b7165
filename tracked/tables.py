"""Rows and numbers as text, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]], *, all_columns: bool = False) -> str:
    """Rows under their titles as text, without the columns that are empty unless `all_columns` are wanted."""
    filled = [column for column in zip(*rows, strict=True) if all_columns or any(column[1:])]
    widths = [max(map(len, column)) for column in filled]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in zip(*filled, strict=True)
    )
    return "\n".join(line.rstrip() for line in lines)


def distinct_length(ids: Sequence[str]) -> int:
    """To how many characters IDs can be cut: 8, or as many more as make them differ."""
    whole = set(ids)
    length = 8
    while length < 32 and len({each[:length] for each in whole}) < len(whole):
        length += 1
    return length


def one_line(value: Any, width: int) -> str:
    """A value as text that fits into a row: on one line, in characters that can be shown, cut to `width`."""
    words = " ".join(str(value).encode(errors="replace").decode().split())
    text = "".join(filter(str.isprintable, words))  # no terminal takes orders from a run's name
    return text if len(text) <= width else f"{text[: width - 1]}…"


def told_apart(values: Sequence[str], width: int) -> list[str]:
    """The values as `one_line` has them, but as much wider as those that differ need to look different."""
    longest = max(map(len, values), default=0)
    while True:
        cut = [one_line(value, width) for value in values]
        if width >= longest or len({*cut}) == len({*values}):
            return cut
        width *= 2


def readable(size: int) -> str:
    """Bytes for people."""
    number = float(size)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def ago(seconds: float) -> str:
    """Seconds for people."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
