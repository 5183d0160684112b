"""Records of the embedded log: how they are appended, and how a compacted topic keeps only the last of each key."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from streaming.embedded.file import OFFSET_BITS, LogFile
from streaming.embedded.partitions import Partitions
from streaming.embedded.retention import Retention
from streaming.errors import LogError, RecordTooLarge
from streaming.log import Message, Topic, TopicPartition
from streaming.partitioner import partition_of

_Row = tuple[int, int, bytes | None, bytes | None]


class Prepared(NamedTuple):
    """A message that was found fit, with the id of its partition."""

    partition: int
    topic: Topic
    key: bytes | None
    value: bytes | None


class Records:
    """Appends records. What cannot be written is refused by `prepare`, before the file is touched."""

    def __init__(self, file: LogFile, partitions: Partitions) -> None:
        self._file = file
        self._partitions = partitions
        self._retention = Retention(file, partitions)

    def prepare(self, messages: Sequence[Message]) -> list[Prepared]:
        """Check and place messages. Raises `RecordTooLarge`, `UnknownTopic`, or `LogError` for one that its topic cannot keep."""
        prepared = []
        for message in messages:
            topic, base = self._partitions.placed(message.topic)
            key, value = message.key, message.value
            size = len(key or b"") + len(value or b"")
            if size > topic.max_record_bytes:
                raise RecordTooLarge(f"a record of {size} bytes for topic {topic.name}, whose max_record_bytes is {topic.max_record_bytes}")
            if key is None and topic.cleanup == "compact":
                raise LogError(f"a message without a key for topic {topic.name}, which is compacted by key")
            if message.partition is None:
                identity = base + partition_of(key, topic.partitions)
            else:
                identity = self._partitions.identity(TopicPartition(message.topic, message.partition))
            prepared.append(Prepared(identity, topic, key, value))
        return prepared

    def append(self, db: sqlite3.Connection, prepared: Sequence[Prepared]) -> list[int]:
        """Write the messages and return their offsets. Call it inside a write transaction."""
        now = self._file.clock()
        ends: dict[int, int] = {}
        grown: dict[int, int] = {}
        rows: list[_Row] = []
        latest: dict[tuple[int, bytes], _Row] = {}
        offsets = []
        for partition, topic, key, value in prepared:
            offset = ends.get(partition)
            if offset is None:
                (offset,) = db.execute('SELECT "end" FROM partitions WHERE id = ?', (partition,)).fetchone()
            ends[partition] = offset + 1
            offsets.append(offset)
            row = (partition << OFFSET_BITS | offset, now, key, value)
            if topic.cleanup == "compact" and key is not None:
                latest[partition, key] = row  # Of one key in one commit, only the last record is ever seen.
            else:
                rows.append(row)
                grown[partition] = grown.get(partition, 0) + len(key or b"") + len(value or b"")
        if latest:
            _supersede(db, latest)
            rows.extend(latest.values())
        db.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
        db.executemany(
            'UPDATE partitions SET "end" = ?, bytes = bytes + ? WHERE id = ?',
            [(end, grown.get(partition, 0), partition) for partition, end in ends.items()],
        )
        self._retention.apply(db, now, prepared)
        return offsets


def _supersede(db: sqlite3.Connection, latest: dict[tuple[int, bytes], _Row]) -> None:
    """Remove the records that ``latest`` takes the place of, so that no cleaner is ever needed."""
    db.executemany("DELETE FROM records WHERE id = (SELECT record FROM keys WHERE partition = ? AND key = ?)", latest)
    db.executemany(
        """INSERT INTO keys (partition, key, record, removed) VALUES (?, ?, ?, ?)
           ON CONFLICT (partition, key) DO UPDATE SET record = excluded.record, removed = excluded.removed""",
        [(partition, key, row[0], row[1] if row[3] is None else None) for (partition, key), row in latest.items()],
    )
