"""Reading the embedded log."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping

from streaming.embedded.file import OFFSET_BITS, LogFile, Version
from streaming.embedded.partitions import Partitions, bounds
from streaming.errors import LogError, OffsetOutOfRange
from streaming.log import Bounds, Reader, Record, TopicPartition

_OFFSETS = (1 << OFFSET_BITS) - 1
_MOST_BYTES = 32 << 20
"""A poll ends early beyond this, so that ``max_records`` large ones cannot fill the memory."""


class EmbeddedReader(Reader):
    """A `Reader` of the embedded log. One poll shows one moment: of each commit all that is asked for, or nothing."""

    def __init__(self, file: LogFile, partitions: Partitions) -> None:
        self._file = file
        self._partitions = partitions
        self._ids: dict[TopicPartition, int] = {}
        self._positions: dict[TopicPartition, int] = {}  # Whose turn is next stands first.
        self._bounds: dict[TopicPartition, Bounds] = {}
        self._seen: Version | None = None
        self._closed = False

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """As `Reader.assign`."""
        self._check_open()
        identities = {TopicPartition(*tp): self._partitions.identity(TopicPartition(*tp)) for tp in positions}
        self._ids = identities
        self._positions = {TopicPartition(*tp): position for tp, position in positions.items()}
        self._seen = None

    def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
        """As `Reader.poll`; fewer than ``max_records`` where the records are large (32 MB together)."""
        self._check_open()
        wanted = set(self._positions if only is None else only)
        if strangers := wanted - self._positions.keys():
            raise ValueError(f"only names partitions that are not assigned: {', '.join(f'{t}/{p}' for t, p in sorted(strangers))}")
        deadline = time.monotonic() + timeout
        while True:
            with self._file.read() as (db, version):
                records, moved = self._read(db, version, max_records, wanted)
            for tp, position in moved.items():  # Only now: a read that failed has moved nothing.
                del self._positions[tp]
                self._positions[tp] = position  # Behind all others: they are next.
            left = deadline - time.monotonic()
            if records or left <= 0 or max_records <= 0 or not self._file.wait(version, left):
                return records

    def position(self, tp: TopicPartition) -> int:
        """As `Reader.position`. Raises ValueError for a partition that is not assigned."""
        if tp not in self._positions:
            raise ValueError(f"{tp[0]}/{tp[1]} is not assigned to this reader")
        return self._positions[tp]

    def close(self) -> None:
        """As `Reader.close`."""
        self._closed = True
        self._positions = {}

    def _check_open(self) -> None:
        if self._closed:
            raise LogError("this reader is closed")

    def _read(
        self, db: sqlite3.Connection, version: Version, max_records: int, wanted: set[TopicPartition]
    ) -> tuple[list[Record], dict[TopicPartition, int]]:
        """Records, and the positions after them."""
        if version != self._seen:
            self._bounds = dict(zip(self._ids, bounds(db, self._ids.values()), strict=True))
            self._seen = version
        ready = []
        for tp, position in self._positions.items():
            if tp in wanted:
                start, end = self._bounds[tp]
                if not start <= position <= end:
                    raise OffsetOutOfRange(
                        f"{tp.topic}/{tp.partition}: position {position} is not within the records kept, {start} to {end}"
                    )
                if position < end:
                    ready.append(tp)
        records: list[Record] = []
        moved = {}
        room = _MOST_BYTES
        for tp in ready:
            count = max_records - len(records)
            if count <= 0 or room <= 0:
                break
            position = self._positions[tp]
            end, base = self._bounds[tp].end, self._ids[tp] << OFFSET_BITS
            rows = db.execute(
                "SELECT id, timestamp, key, value FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
                (base + position, base + end, count),
            )
            taken = 0
            for row in rows:
                offset = row[0] & _OFFSETS
                records.append(Record(tp.topic, tp.partition, offset, *row[1:]))
                position = offset + 1
                taken += 1
                room -= len(row[2] or b"") + len(row[3] or b"")
                if room <= 0:
                    break
            if taken < count and room > 0:
                position = end  # All that is left is a gap.
            moved[tp] = position
        return records, moved
