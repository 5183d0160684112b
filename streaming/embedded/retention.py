"""Retention of the embedded log: old records go in small slices, each inside an append that is being made anyway."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from streaming.embedded.file import OFFSET_BITS, LogFile
from streaming.embedded.partitions import Partitions
from streaming.log import Topic

if TYPE_CHECKING:
    from streaming.embedded.records import Prepared

_ROUND_MS = 1000
_LEAST_ROWS = 16
_MOST_LOOKS = 64
_VACUUM_PAGES = 128
_SPARE_PAGES = 1024


class Retention:
    """Removes what the settings of topics no longer keep.

    An append may remove twice as many records of a partition as it writes to it, and 16 more: so retention keeps up with any stream,
    whatever another partition has waiting, and no append stalls. Partitions written to are looked at each time, all others by turns,
    once a second, 16 records altogether. A process that only reads removes nothing.
    """

    def __init__(self, file: LogFile, partitions: Partitions) -> None:
        self._file = file
        self._partitions = partitions
        # When the first record of a partition comes of age. Another process may remove it before: then we look too early, no more.
        self._due: dict[int, int] = {}
        self._next_round = 0
        self._waiting: list[tuple[int, Topic]] = []
        self._undone = file.undone

    def apply(self, db: sqlite3.Connection, now: int, written: Sequence[Prepared]) -> None:
        """Remove one slice. Call it inside the write transaction of an append."""
        if self._undone != self._file.undone:
            self._undone = self._file.undone
            self._due.clear()  # What we learned in a transaction that was undone is not so.
        counts = Counter(message.partition for message in written)
        for partition, topic in {message.partition: message.topic for message in written}.items():
            if topic.cleanup == "delete":
                self._trim(db, partition, topic, now, _LEAST_ROWS + 2 * counts[partition])
        rows = _LEAST_ROWS
        if not self._waiting and (now >= self._next_round or now < self._next_round - _ROUND_MS):
            self._next_round = now + _ROUND_MS
            self._waiting = [(base + number, topic) for topic, base in self._partitions.known() for number in range(topic.partitions)]
            _shrink(db)
        for _ in range(min(_MOST_LOOKS, len(self._waiting))):
            if rows <= 0:
                break
            partition, topic = self._waiting.pop()
            remove = self._trim if topic.cleanup == "delete" else _forget_removals
            rows -= remove(db, partition, topic, now, rows)

    def _trim(self, db: sqlite3.Connection, partition: int, topic: Topic, now: int, rows: int) -> int:
        """Remove the first records of a partition while they are too old or too many; at most ``rows``. Returns how many it removed."""
        by_age, by_size = topic.retention_ms, topic.retention_bytes
        due = by_age is not None and now >= self._due.get(partition, 0)
        if rows <= 0 or not (due or by_size is not None):
            return 0
        row: tuple[int, int, int] = db.execute('SELECT "start", "end", bytes FROM partitions WHERE id = ?', (partition,)).fetchone()
        start, end, size = row
        if not due and (by_size is None or size <= by_size):
            return 0
        base = partition << OFFSET_BITS
        first_kept = start
        oldest = now
        for offset, timestamp, length in db.execute(
            """SELECT id - ?1, timestamp, coalesce(length(key), 0) + coalesce(length(value), 0) FROM records
               WHERE id >= ?1 + ?2 AND id < ?1 + ?3 ORDER BY id LIMIT ?4""",
            (base, start, end, rows),
        ):
            too_old = by_age is not None and timestamp < now - by_age
            # The last record stays, however large: a topic that drops what was just written would be of no use.
            too_many = by_size is not None and size > by_size and offset < end - 1
            if not too_old and not too_many:
                oldest = timestamp
                break
            first_kept = offset + 1
            size -= length
        else:
            oldest = now if first_kept == end else 0
        if by_age is not None:
            self._due[partition] = oldest + by_age + 1 if oldest else 0
        if first_kept > start:
            db.execute("DELETE FROM records WHERE id >= ? AND id < ?", (base + start, base + first_kept))
            db.execute('UPDATE partitions SET "start" = ?, bytes = ? WHERE id = ?', (first_kept, size, partition))
        return first_kept - start


def _forget_removals(db: sqlite3.Connection, partition: int, topic: Topic, now: int, rows: int) -> int:
    """Remove the null records of a compacted partition that are older than its retention; at most ``rows``. Returns how many."""
    if topic.retention_ms is None:
        return 0
    gone = db.execute(
        "SELECT record, key FROM keys WHERE partition = ? AND removed < ? ORDER BY removed LIMIT ?",
        (partition, now - topic.retention_ms, rows),
    ).fetchall()
    db.executemany("DELETE FROM records WHERE id = ?", [(record,) for record, _ in gone])
    db.executemany("DELETE FROM keys WHERE partition = ? AND key = ?", [(partition, key) for _, key in gone])
    return len(gone)


def _shrink(db: sqlite3.Connection) -> None:
    """Give pages back to the disk where a quarter of the file is unused; below that the next records take them."""
    (unused,) = db.execute("PRAGMA freelist_count").fetchone()
    if unused > _SPARE_PAGES and unused * 4 > db.execute("PRAGMA page_count").fetchone()[0]:
        for _ in range(_VACUUM_PAGES):
            db.execute("PRAGMA incremental_vacuum(1)")  # One by one: Python takes a single step of a statement without columns.
