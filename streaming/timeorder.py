"""The entries of a source in the order of their event times."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from streaming.errors import SourceError
from streaming.textfiles import Line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streaming.sources import Entry, Source

SORT_BYTES = 1 << 30
"""What sorting may hold in memory by default: the text of all lines and `LINE_BYTES` for each."""

LINE_BYTES = 48
"""What a line costs beside its text: time, number, two offsets, its place in the order, and some room."""

_LAST = 2**63 - 1


def by_time(source: Source, skip: int = 0, max_bytes: int = SORT_BYTES) -> Iterator[tuple[Entry, float]]:
    """Yield all entries but the first ``skip`` by event time, each with its share of the whole (0 to 1).

    Entries of one time keep the file's order, those that have none come last. Lines are held as text and read again when their turn
    comes. Raises `SourceError` for a source without times and for one beyond ``max_bytes``.
    """
    if not source.timed:
        raise SourceError(f"{source.file.path}: profiles have no time to sort by")
    text, times, numbers, file_ends, text_ends, overlong = bytearray(), array("q"), array("q"), array("q"), array("q"), dict[int, int]()
    for entry, _ in source.entries():
        line = entry.line
        if line.overlong:
            overlong[line.number] = line.overlong
        text += line.raw
        if len(text) + LINE_BYTES * len(times) > max_bytes:
            raise SourceError(
                f"{source.file.path}: more than {max_bytes} bytes at line {line.number}, too much to sort in memory; "
                "sort the file by its timestamps first and replay it without sorting by time"
            )
        times.append(_LAST if entry.timestamp is None else entry.timestamp)
        numbers.append(line.number)
        file_ends.append(line.end)
        text_ends.append(len(text))
    order = np.argsort(np.frombuffer(times, np.int64), kind="stable") if times else np.empty(0, np.int64)
    for turn in range(skip, len(order)):
        at = int(order[turn])
        raw = bytes(text[text_ends[at - 1] if at else 0 : text_ends[at]])
        line = Line(numbers[at], file_ends[at], raw, overlong.get(numbers[at], 0))
        yield source.entry(line), (turn + 1) / len(order)
