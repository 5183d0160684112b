"""Transactional writing to the embedded log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streaming.embedded.file import LogFile
from streaming.embedded.groups import check_owner
from streaming.embedded.partitions import Partitions
from streaming.embedded.records import Records
from streaming.errors import Fenced, LogError
from streaming.log import Assignment, Commit, Committed, Message, TopicPartition, Writer


class EmbeddedWriter(Writer):
    """A `Writer` of the embedded log: a commit is one SQLite transaction, which begins when everything is at hand."""

    def __init__(self, file: LogFile, partitions: Partitions, records: Records, transactional_id: str) -> None:
        self._file = file
        self._partitions = partitions
        self._records = records
        self._id = transactional_id
        self._closed = False
        with file.write() as db:
            (self._epoch,) = db.execute(
                "INSERT INTO writers VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch", (transactional_id,)
            ).fetchone()

    def begin(
        self,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> Commit:
        """As `Writer.begin`: nobody else does the work, so it is done at once."""
        if self._closed:
            raise LogError(f"the writer {self._id} is closed")
        if offsets and owner is None:
            raise ValueError("offsets are committed for a group: give its name, or the assignment, as owner")
        prepared = self._records.prepare(messages)
        consumed = [(self._partitions.identity(TopicPartition(*tp)), offset) for tp, offset in (offsets or {}).items()]
        with self._file.write() as db:
            (epoch,) = db.execute("SELECT epoch FROM writers WHERE id = ?", (self._id,)).fetchone()
            if epoch != self._epoch:
                raise Fenced(f"a newer writer of {self._id} was opened (epoch {epoch}, this one has {self._epoch})")
            if owner is not None:
                check_owner(db, owner, offsets or (), self._file.clock())
                group = owner if isinstance(owner, str) else owner.group
                db.executemany(
                    """INSERT INTO offsets VALUES (?, ?, ?)
                       ON CONFLICT ("group", partition) DO UPDATE SET "offset" = excluded."offset" """,
                    [(group, partition, offset) for partition, offset in consumed],
                )
            return Committed(self._records.append(db, prepared))

    def close(self) -> None:
        """As `Writer.close`."""
        self._closed = True
