"""Support sets held in a file of this machine, so that a restart, or a stand-by that takes over, reads only the rest of the changelog."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Container
from pathlib import Path
from typing import NamedTuple

from streaming.errors import StoreFull
from streaming.store.file import Place, StoreFile
from streaming.store.held import Head, Held, head

MOST_WAITING = 100_000
"""Users whose changes wait in memory, at most, while the disk is full."""

_AGAIN_SECONDS = 5.0
_AT_ONCE = 256
_UPSERT = """INSERT INTO users VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (ordinal) DO UPDATE SET changed = excluded.changed, crc = excluded.crc, value = excluded.value
    ON CONFLICT (user) DO UPDATE SET ordinal = excluded.ordinal, changed = excluded.changed, crc = excluded.crc, value = excluded.value"""


class _Waiting(NamedTuple):
    """A user's last change: the ordinal there is now, the offset of a marker, the support set."""

    ordinal: int | None
    since: int
    value: bytes | None


class Stored(Held):
    """Values in a `StoreFile`, and over it, in memory, those that changed since the last `settle`.

    ``settle`` writes these in one transaction, together with how far of the changelog they go. So the file is always the state after a
    whole number of records, whenever the process is killed. While there is no room for a transaction, changes stay in memory and
    ``full`` says why, up to `MOST_WAITING` users: then it raises `StoreFull`, and nothing is lost, since the changelog has them all.

    ``ordered`` keeps an index by last change, which `oldest` needs. Any use raises `StoreDamaged` where the file turns out to be
    damaged, which is then set aside. Raises as `StoreFile` does.
    """

    def __init__(self, path: Path, place: Place, *, ordered: bool = False, beat: Callable[[], None] = lambda: None) -> None:
        self._file = StoreFile(path, place, beat)
        self._ordered = ordered
        self.full = ""
        self._load()

    def _load(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._users: dict[int, str] = {}
        self._begun = self._again = 0.0
        self._passed = -1
        self._count = 0
        self.covered = self._written = self._file.covered()
        index = "CREATE INDEX IF NOT EXISTS by_change ON users (changed)" if self._ordered else "DROP INDEX IF EXISTS by_change"
        with self._file.meaning():
            self._file.db.execute(index)
            self._marked: bool = self._file.db.execute("SELECT 1 FROM markers").fetchone() is not None
            self._changes: int = self._file.db.execute("SELECT changes FROM meta").fetchone()[0]
        self.grew(None)

    @property
    def set_aside(self) -> str:
        """Why an earlier file was set aside and this one begun empty; empty where none was."""
        return self._file.set_aside

    def begin_anew(self, reason: str) -> str:
        """As `Held.begin_anew`."""
        self._file.begin_anew(reason)
        self._load()
        return self.set_aside

    def __len__(self) -> int:
        return self._count

    def value(self, user: str) -> bytes | None:
        """As `Held.value`."""
        if (waiting := self._waiting.get(user)) is not None:
            return waiting.value
        with self._file.meaning():
            row = self._file.db.execute("SELECT value, crc FROM users WHERE user = ?", (user,)).fetchone()
        if row is None:
            return None
        value: bytes = row[0]
        if zlib.crc32(value) != row[1]:
            raise self._file.put_aside("a support set in it does not have the checksum that it was written with")
        return value

    def since(self, user: str) -> int:
        """As `Held.since`."""
        if (waiting := self._waiting.get(user)) is not None:
            return waiting.since
        with self._file.meaning():
            row = self._file.db.execute('SELECT "since" FROM markers WHERE user = ?', (user,)).fetchone()
        return 0 if row is None else int(row[0])

    def put(self, user: str, value: bytes | None, known: Head | None = None) -> None:
        """As `Held.put`."""
        found = None if value is None else known or head(value, user)
        # Taken out, so that the order of waiting is the order of last changes.
        before = self._waiting.pop(user, None)
        if before is not None and before.ordinal is not None:
            self._users.pop(before.ordinal, None)
        if found is None or found.ordinal is None:
            self._waiting[user] = _Waiting(None, (found.forgotten or 0) if found else 0, None)
        else:
            self._waiting[user] = _Waiting(found.ordinal, 0, value)
            self._users[found.ordinal] = user

    def grew(self, users: int | None) -> None:
        """As `Held.grew`."""
        if users is not None:
            self._count += users
            return
        with self._file.meaning():
            (self._count,) = self._file.db.execute("SELECT count(*) FROM users").fetchone()
            for user, waiting in self._waiting.items():
                row = self._file.db.execute("SELECT 1 FROM users WHERE user = ?", (user,)).fetchone()
                self._count += (waiting.ordinal is not None) - (row is not None)

    def user_of(self, ordinal: int) -> str | None:
        """As `Held.user_of`."""
        if (waiting := self._users.get(ordinal)) is not None:
            return waiting
        with self._file.meaning():
            row = self._file.db.execute("SELECT user FROM users WHERE ordinal = ?", (ordinal,)).fetchone()
        return None if row is None or row[0] in self._waiting else str(row[0])

    def oldest(self, but: Container[str]) -> str | None:
        """As `Held.oldest`."""
        after = self._passed
        passing = True
        while True:
            with self._file.meaning():
                rows = self._file.db.execute(
                    "SELECT changed, user FROM users WHERE changed > ? ORDER BY changed LIMIT ?", (after, _AT_ONCE)
                ).fetchall()
            for changed, user in rows:
                passing = passing and user in self._waiting
                if passing:
                    # Waiting ones stay so until all are written: they need not be looked at again.
                    self._passed = changed
                elif user not in self._waiting and user not in but:
                    return str(user)
            if len(rows) < _AT_ONCE:
                break
            after = rows[-1][0]
        return next((user for user, waiting in self._waiting.items() if waiting.ordinal is not None and user not in but), None)

    @property
    def behind(self) -> int:
        """As `Held.behind`."""
        return len(self._waiting)

    def settle(self, users: int = 1, seconds: float = 0.0) -> None:
        """As `Held.settle`. Raises `StoreFull` once `MOST_WAITING` users wait and there is still no room."""
        if self.covered == self._written:
            return
        now = time.monotonic()
        self._begun = self._begun or now
        if len(self._waiting) < users and now - self._begun < seconds:
            return
        if now < self._again and len(self._waiting) < MOST_WAITING:
            return
        try:
            self._write()
        except StoreFull as error:
            self.full = str(error)
            self._again = now + _AGAIN_SECONDS
            if len(self._waiting) >= MOST_WAITING:
                raise StoreFull(f"{error}; the changes of {len(self._waiting)} users wait in memory, which is the most") from error
        else:
            self.full = ""

    def _write(self) -> None:
        file, db = self._file, self._file.db
        gone = [(user,) for user, waiting in self._waiting.items() if waiting.ordinal is None]
        marks = [(user, waiting.since) for user, waiting in self._waiting.items() if waiting.since]
        sets = [
            (waiting.ordinal, user, change, zlib.crc32(waiting.value), waiting.value)
            for change, (user, waiting) in enumerate(self._waiting.items(), self._changes)
            if waiting.value is not None
        ]
        # In the order in which they lie in the file: each page is then changed once.
        sets.sort()
        changes = self._changes + len(self._waiting)
        with file.meaning():
            db.execute("BEGIN IMMEDIATE")
            try:
                db.executemany("DELETE FROM users WHERE user = ?", gone)
                if self._marked:
                    db.executemany("DELETE FROM markers WHERE user = ?", [(user,) for user in self._waiting])
                db.executemany(_UPSERT, sets)
                db.executemany("INSERT OR REPLACE INTO markers VALUES (?, ?)", marks)
                db.execute("UPDATE meta SET covered = ?, timestamp = ?, changelog = ?, position = ?, changes = ?", (*self.covered, changes))
                db.execute("COMMIT")
            finally:
                file.roll_back()
            if marks:
                # The log of writes still has what they were forgotten with.
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._marked = self._marked or bool(marks)
        self._changes = changes
        self._written = self.covered
        self._waiting, self._users = {}, {}
        self._begun, self._passed = 0.0, -1

    def close(self) -> None:
        """As `Held.close`. What there is no room for is left to the changelog."""
        if self._file.closed:
            return
        self._again = 0.0
        try:
            self.settle()
        except StoreFull as error:
            self.full = str(error)
        finally:
            self._file.close()
