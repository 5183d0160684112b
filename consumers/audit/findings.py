"""What an audit finds: differences, and what was out of its reach."""

from __future__ import annotations

from collections import Counter

import msgspec


class Difference(msgspec.Struct, frozen=True):
    """Something in the log that does not follow from the rest of it. ``kind`` says what differs, ``place`` where it stands."""

    kind: str
    place: str
    detail: str


class Reach(msgspec.Struct):
    """What could not be checked, and why: ``count`` things of a partition between two offsets (of versions: two numbers)."""

    what: str
    partition: int
    first: int
    last: int
    count: int = 0


class Findings:
    """Differences and what was out of reach, bounded in memory: all are counted, the first of each kind are kept."""

    def __init__(self, keep: int = 100) -> None:
        self.keep = keep
        self.differences: list[Difference] = []
        self.counts: Counter[str] = Counter()
        self.reaches: dict[tuple[str, int], Reach] = {}

    def differs(self, kind: str, place: str, detail: str) -> None:
        """Note a difference."""
        self.counts[kind] += 1
        if self.counts[kind] <= self.keep:
            self.differences.append(Difference(kind, place, detail))

    def beyond(self, what: str, partition: int, first: int, last: int | None = None, count: int = 1) -> None:
        """Note what is out of reach."""
        reach = self.reaches.setdefault((what, partition), Reach(what, partition, first, first))
        reach.first, reach.last = min(reach.first, first), max(reach.last, first if last is None else last)
        reach.count += count
