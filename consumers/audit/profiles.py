"""Profiles as of any position of their topic."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, NamedTuple

from streaming.errors import Malformed
from streaming.log import TopicPartition, present
from streaming.validation import decode_profile

if TYPE_CHECKING:
    from model.profiles import Profiles
    from streaming.events import Feature
    from streaming.log import Log
    from streaming.validation import Limits


class Entry(NamedTuple):
    """A profile as it came; None drops it."""

    offset: int
    key: str
    features: dict[str, Feature] | None


class ProfileHistory:
    """One partition of a table of profiles, in the model as of any position. ``refused`` are the offsets of what is no profile."""

    def __init__(self, log: Log, tp: TopicPartition, side: Profiles, limits: Limits, partitions: int) -> None:
        self.tp = tp
        self._side = side
        self._entries: list[Entry] = []
        self._places: dict[str, list[int]] = {}
        self.refused: list[int] = []
        self._gap: int | None = None
        """The first offset at which compaction has left nothing."""
        expected = 0
        for record in present(log, [tp]):
            if self._gap is None and record.offset != expected:
                self._gap = expected
            expected = record.offset + 1
            try:
                profile = decode_profile(record, limits, partitions=partitions)
            except Malformed:
                self.refused.append(record.offset)
                continue
            key = (record.key or b"").decode()
            self._places.setdefault(key, []).append(len(self._entries))
            self._entries.append(Entry(record.offset, key, None if profile is None else profile.features))
        self.end = expected
        self._position = 0

    def nulls(self) -> list[tuple[int, str]]:
        """Offset and key of each null."""
        return [(entry.offset, entry.key) for entry in self._entries if entry.features is None]

    def to(self, position: int) -> None:
        """Set the profiles in the model to what had been read at ``position``."""
        low, high = sorted((self._place(self._position), self._place(position)))
        for key in dict.fromkeys(entry.key for entry in self._entries[low:high]):
            self._side.set(key, self._as_of(key, position))
        self._position = position

    def _place(self, position: int) -> int:
        return bisect.bisect_left(self._entries, position, key=lambda entry: entry.offset)

    def _as_of(self, key: str, position: int) -> dict[str, Feature] | None:
        before = [place for place in self._places[key] if self._entries[place].offset < position]
        return self._entries[before[-1]].features if before else None

    def superseded(self, key: str, position: int) -> bool:
        """Whether a profile that ``key`` had at ``position`` may have been removed since, by compaction."""
        places = self._places.get(key)
        later = places is None or self._entries[places[0]].offset >= position
        return later and self._gap is not None and self._gap < position
