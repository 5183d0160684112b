"""Groups of the embedded log: who owns which partitions, and who may commit offsets."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable

from streaming.embedded.file import LogFile
from streaming.embedded.partitions import Partitions
from streaming.errors import Fenced, LogError
from streaming.log import Assignment, Member, TopicPartition


class EmbeddedMember(Member):
    """A `Member` of a group of the embedded log. It is silent when `assignment` is not called for ``timeout_ms``.

    Partitions are shared out by range over the members in the order they joined, so that who joins takes nothing from the first of them;
    the first few get one more where they do not divide. A member that has gone silent loses its partitions as soon as another one, or a
    commit by the group's plain name, notices it.
    """

    def __init__(self, file: LogFile, partitions: Partitions, group: str, topic: str, timeout_ms: int) -> None:
        self._file = file
        self._count = partitions.placed(topic).topic.partitions
        self._group = group
        self._topic = topic
        self._timeout = timeout_ms
        self._id = ""
        self._joined = self._closed = False
        self._heartbeat = 0
        self._beat()

    def assignment(self) -> Assignment:
        """As `Member.assignment`."""
        if self._closed:
            raise LogError(f"this member has left the group {self._group}")
        if not self._joined or not 0 <= self._file.clock() - self._heartbeat < self._timeout // 8:
            return self._beat()
        with self._file.read() as (db, _):
            return self._look(db)

    def close(self) -> None:
        """As `Member.close`."""
        if self._closed:
            return
        self._closed = True
        with self._file.write() as db:
            if db.execute('DELETE FROM members WHERE "group" = ? AND id = ?', (self._group, self._id)).rowcount:
                _next_generation(db, self._group)

    def _beat(self) -> Assignment:
        with self._file.write() as db:
            now = self._file.clock()
            expire(db, self._group, now, but=self._id)
            if self._joined:
                db.execute('UPDATE members SET heartbeat = ? WHERE "group" = ? AND id = ?', (now, self._group, self._id))
            else:
                self._join(db, now)
            assignment = self._look(db)
        self._heartbeat = now
        self._joined = assignment.generation >= 0
        return assignment

    def _join(self, db: sqlite3.Connection, now: int) -> None:
        row = db.execute("SELECT topic FROM groups WHERE name = ?", (self._group,)).fetchone()
        if row and row[0] != self._topic and db.execute('SELECT 1 FROM members WHERE "group" = ?', (self._group,)).fetchone():
            raise LogError(f"group {self._group} shares out the partitions of {row[0]} at this time, not those of {self._topic}")
        db.execute(
            "INSERT INTO groups VALUES (?, ?, 0) ON CONFLICT (name) DO UPDATE SET topic = excluded.topic",
            (self._group, self._topic),
        )
        # Ids sort by the time of joining. One that was evicted comes back as the last.
        self._id = f"{now:015x}-{uuid.uuid4().hex}"
        db.execute("INSERT INTO members VALUES (?, ?, ?, ?)", (self._group, self._id, now, self._timeout))
        _next_generation(db, self._group)

    def _look(self, db: sqlite3.Connection) -> Assignment:
        ids = [row[0] for row in db.execute('SELECT id FROM members WHERE "group" = ? ORDER BY id', (self._group,))]
        if self._id not in ids:
            self._joined = False
            return Assignment(self._group, self._topic, self._id, -1, frozenset())
        (generation,) = db.execute("SELECT generation FROM groups WHERE name = ?", (self._group,)).fetchone()
        share, more = divmod(self._count, len(ids))
        place = ids.index(self._id)
        first = place * share + min(place, more)
        owned = range(first, first + share + (place < more))
        return Assignment(self._group, self._topic, self._id, generation, frozenset(owned))


def expire(db: sqlite3.Connection, group: str, now: int, but: str = "") -> None:
    """Remove the members that have gone silent; one removed begins a new generation. Call it inside a write transaction."""
    # A heartbeat far ahead of now was given before the clock was set back: it proves nothing.
    gone = db.execute(
        'DELETE FROM members WHERE "group" = ? AND id <> ? AND abs(? - heartbeat) > timeout',
        (group, but, now),
    ).rowcount
    if gone:
        _next_generation(db, group)


def check_owner(db: sqlite3.Connection, owner: Assignment | str, tps: Iterable[TopicPartition], now: int) -> None:
    """Raise `Fenced` unless ``owner`` may commit offsets of these partitions. Call it inside a write transaction."""
    if isinstance(owner, str):
        expire(db, owner, now)
        if db.execute('SELECT 1 FROM members WHERE "group" = ?', (owner,)).fetchone():
            raise Fenced(f"group {owner} has members: its offsets are committed by them, under their assignment")
        return
    row = db.execute(
        'SELECT generation FROM groups JOIN members ON members."group" = groups.name WHERE groups.name = ? AND members.id = ?',
        (owner.group, owner.member_id),
    ).fetchone()
    if row is None or row[0] != owner.generation:
        now_is = "the member was evicted" if row is None else f"the generation is {row[0]} now"
        raise Fenced(f"the assignment of generation {owner.generation} of group {owner.group} is no longer in force: {now_is}")
    for tp in tps:
        if tp.partition not in owner.partitions:
            raise Fenced(f"{tp.topic}/{tp.partition} is not in the assignment of generation {owner.generation} of group {owner.group}")


def _next_generation(db: sqlite3.Connection, group: str) -> None:
    db.execute("UPDATE groups SET generation = generation + 1 WHERE name = ?", (group,))
