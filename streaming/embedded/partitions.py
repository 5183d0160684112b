"""Topics of the embedded log and the ids of their partitions."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from typing import NamedTuple

from streaming.embedded.file import LogFile
from streaming.errors import UnknownTopic
from streaming.log import Bounds, Topic, TopicPartition
from streaming.risks import require_alike

_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
_MOST_PARTITIONS = 1 << 22


class Placed(NamedTuple):
    """A topic and the id of its first partition; the others follow it."""

    topic: Topic
    base: int


class Partitions:
    """Which topics there are, remembered: a topic is never changed or removed once it is made, so only new names are looked up."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._placed: dict[str, Placed] = {}

    def create(self, topics: Iterable[Topic]) -> None:
        """As `Log.create`, all of them or none. Raises ValueError for settings that no topic can have."""
        wanted = list(topics)
        for topic in wanted:
            _check(topic)
        with self._file.write() as db:
            for topic in wanted:
                row = db.execute("SELECT partitions, cleanup FROM topics WHERE name = ?", (topic.name,)).fetchone()
                if row is None:
                    _insert(db, topic)
                else:
                    require_alike(topic, *row)

    def all(self) -> dict[str, Placed]:
        """Every topic by name."""
        self._refresh()
        return dict(self._placed)

    def known(self) -> list[Placed]:
        """The topics seen so far, without a look at the file."""
        return list(self._placed.values())

    def placed(self, name: str) -> Placed:
        """The topic of this name. Raises `UnknownTopic`. Not to be called inside a transaction."""
        if name not in self._placed:
            self._refresh()
        if (found := self._placed.get(name)) is None:
            raise UnknownTopic(f"topic {name} does not exist; `coldstream topics create` makes the topics")
        return found

    def identity(self, tp: TopicPartition) -> int:
        """The id of a partition. Raises `UnknownTopic`. Not to be called inside a transaction."""
        topic, base = self.placed(tp.topic)
        if not 0 <= tp.partition < topic.partitions:
            raise UnknownTopic(f"topic {tp.topic} has partitions 0 to {topic.partitions - 1}, there is no {tp.partition}")
        return base + tp.partition

    def _refresh(self) -> None:
        columns = "name, partitions, cleanup, retention_ms, retention_bytes, max_record_bytes, base"
        with self._file.read() as (db, _):
            rows = db.execute(f"SELECT {columns} FROM topics").fetchall()
        self._placed = {row[0]: Placed(Topic(*row[:-1]), row[-1]) for row in rows}


def bounds(db: sqlite3.Connection, identities: Iterable[int]) -> list[Bounds]:
    """The bounds of partitions, in order. Call it inside a transaction."""
    query = 'SELECT "start", "end" FROM partitions WHERE id = ?'
    return [Bounds(*db.execute(query, (identity,)).fetchone()) for identity in identities]


def _insert(db: sqlite3.Connection, topic: Topic) -> None:
    (base,) = db.execute("SELECT coalesce(max(base + partitions), 1) FROM topics").fetchone()
    if base + topic.partitions > _MOST_PARTITIONS:
        raise ValueError(f"topic {topic.name}: partitions = {topic.partitions} is more than this log can still hold")
    db.execute(
        """INSERT INTO topics (name, base, partitions, cleanup, retention_ms, retention_bytes, max_record_bytes)
           VALUES (?, ?, ?, ?, ?, ?, ?)""",
        (topic.name, base, *topic[1:]),
    )
    db.executemany("INSERT INTO partitions VALUES (?, 0, 0, 0)", ((base + number,) for number in range(topic.partitions)))


def _check(topic: Topic) -> None:
    if not _NAME.fullmatch(topic.name):
        raise ValueError(f"topic {topic.name!r}: a name has 1 to 249 letters, digits, dots, dashes and underscores")
    if topic.cleanup not in {"delete", "compact"}:
        raise ValueError(f"topic {topic.name}: cleanup is {topic.cleanup!r}, it must be delete or compact")
    for setting, value, least in (
        ("partitions", topic.partitions, 1),
        ("retention_ms", topic.retention_ms, 0),
        ("retention_bytes", topic.retention_bytes, 0),
        ("max_record_bytes", topic.max_record_bytes, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"topic {topic.name}: {setting} is {value}, it must be at least {least}")
