"""The embedded log as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from streaming.embedded.file import LogFile
from streaming.embedded.groups import EmbeddedMember
from streaming.embedded.partitions import Partitions, bounds
from streaming.embedded.reader import EmbeddedReader
from streaming.embedded.records import Records
from streaming.embedded.writer import EmbeddedWriter
from streaming.log import Bounds, Log, Message, Topic, TopicPartition


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class EmbeddedLog(Log):
    """A `Log` in one SQLite file, which several processes of one machine may use at once. It does not outlive a fork.

    What it promises beyond `Log`: offsets of one partition are contiguous when appended; a poll shows one moment of the whole log;
    compaction and retention happen at append, and `create` makes all its topics or none.

    ``durability`` is what a commit survives: ``process``, the end of any process by any means, while a loss of power may take the last
    commits (never a part of one, and the file stays whole); ``power``, that too, at the price of a sync to disk for each commit.
    ``session_timeout_ms`` is how long a group member may be silent. ``lock_timeout_ms`` is how long to wait while another process commits
    before `LogUnavailable`. ``clock`` gives milliseconds since the epoch; tests bring their own. ``read_only`` opens a file that exists
    so that nothing can be committed to it: whatever would write raises `LogUnavailable`.

    Raises `LogUnavailable` for a file that cannot be opened, is damaged, or is not such a log, and `LogFull`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        durability: Literal["process", "power"] = "process",
        session_timeout_ms: int = 6000,
        lock_timeout_ms: int = 10_000,
        clock: Callable[[], int] = _now_ms,
        read_only: bool = False,
    ) -> None:
        if durability not in {"process", "power"}:
            raise ValueError(f"durability is {durability!r}, it must be process or power")
        for setting, value in (("session_timeout_ms", session_timeout_ms), ("lock_timeout_ms", lock_timeout_ms)):
            if value < 1:
                raise ValueError(f"{setting} is {value}, it must be at least 1")
        self._session_timeout = session_timeout_ms
        self._path = Path(path)
        self._file = LogFile(Path(path), durability, lock_timeout_ms, clock, read_only=read_only)
        self._partitions = Partitions(self._file)
        self._records = Records(self._file, self._partitions)

    def create(self, topics: Iterable[Topic]) -> None:
        """As `Log.create`: all of them or none. Raises ValueError for settings that no topic can have."""
        self._partitions.create(topics)

    def identity(self) -> str:
        """As `Log.identity`: the file, which other paths may lead to as well."""
        found = self._path.stat()
        return f"file {found.st_dev}/{found.st_ino}"

    def topics(self) -> dict[str, Topic]:
        """As `Log.topics`."""
        return {name: placed.topic for name, placed in self._partitions.all().items()}

    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        """As `Log.bounds`, all of one moment."""
        identities = {tp: self._partitions.identity(tp) for tp in tps}
        with self._file.read() as (db, _):
            return dict(zip(identities, bounds(db, identities.values()), strict=True))

    def committed(self, group: str, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """As `Log.committed`, all of one moment. Raises `UnknownTopic`."""
        identities = {tp: self._partitions.identity(tp) for tp in tps}
        with self._file.read() as (db, _):
            found = dict(db.execute('SELECT partition, "offset" FROM offsets WHERE "group" = ?', (group,)))
        return {tp: found[identity] for tp, identity in identities.items() if identity in found}

    def append(self, messages: Sequence[Message]) -> list[int]:
        """As `Log.append`: all of the messages or none; what they survive is ``durability``."""
        prepared = self._records.prepare(messages)
        with self._file.write() as db:
            return self._records.append(db, prepared)

    def reader(self) -> EmbeddedReader:
        """As `Log.reader`."""
        return EmbeddedReader(self._file, self._partitions)

    def member(self, group: str, topic: str) -> EmbeddedMember:
        """As `Log.member`. Raises `UnknownTopic`, and `LogError` while the group has members for another topic."""
        return EmbeddedMember(self._file, self._partitions, group, topic, self._session_timeout)

    def writer(self, transactional_id: str) -> EmbeddedWriter:
        """As `Log.writer`."""
        return EmbeddedWriter(self._file, self._partitions, self._records, transactional_id)

    def close(self) -> None:
        """As `Log.close`."""
        self._file.close()
