"""The file under the embedded log: opening it, its two kinds of transaction, and what its errors mean."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from streaming.embedded import checkpoints
from streaming.errors import LogError, LogFull, LogUnavailable

APPLICATION_ID = 0x436F6C64  # "Cold"
FORMAT = 1
"""Version of the tables below, kept in the file's ``user_version``."""

OFFSET_BITS = 40
"""A record's id is its partition's id and, in the low bits, its offset: one integer key, in the order in which it is read."""

_PAGE_BYTES = 8192
_SQLITE = (3, 37)  # STRICT tables.
_LONGEST_PAUSE = 0.01

_SCHEMA = (
    """CREATE TABLE topics (name TEXT PRIMARY KEY, base INTEGER NOT NULL, partitions INTEGER NOT NULL, cleanup TEXT NOT NULL,
       retention_ms INTEGER, retention_bytes INTEGER, max_record_bytes INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
    """CREATE TABLE partitions (id INTEGER PRIMARY KEY, "start" INTEGER NOT NULL, "end" INTEGER NOT NULL, bytes INTEGER NOT NULL)
       STRICT""",
    "CREATE TABLE records (id INTEGER PRIMARY KEY, timestamp INTEGER NOT NULL, key BLOB, value BLOB) STRICT",
    # The last record of each key of a compacted topic; removed is when a null value came.
    """CREATE TABLE keys (partition INTEGER NOT NULL, key BLOB NOT NULL, record INTEGER NOT NULL, removed INTEGER,
       PRIMARY KEY (partition, key)) STRICT, WITHOUT ROWID""",
    "CREATE INDEX removals ON keys (partition, removed) WHERE removed IS NOT NULL",
    """CREATE TABLE offsets ("group" TEXT NOT NULL, partition INTEGER NOT NULL, "offset" INTEGER NOT NULL,
       PRIMARY KEY ("group", partition)) STRICT, WITHOUT ROWID""",
    "CREATE TABLE writers (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE groups (name TEXT PRIMARY KEY, topic TEXT NOT NULL, generation INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    """CREATE TABLE members ("group" TEXT NOT NULL, id TEXT NOT NULL, heartbeat INTEGER NOT NULL, timeout INTEGER NOT NULL,
       PRIMARY KEY ("group", id)) STRICT, WITHOUT ROWID""",
)

T = TypeVar("T")
Version = tuple[int, int]
"""Changes whenever anything was committed to the file: by others, by this process."""


class LogFile:
    """One connection to the file, shared by all threads of a `Log` under one lock.

    One connection, not one for each thread: a commit on one connection empties the page cache of every other, and in lockstep worker and
    trainer would read back from the file all that they just wrote. The lock is held for statements only, never while a caller computes.
    ``timeout_ms`` bounds every wait for other processes, ``clock`` gives milliseconds since the epoch. With ``read_only`` SQLite itself
    refuses every change, and the file must exist.
    """

    def __init__(
        self, path: Path, durability: Literal["process", "power"], timeout_ms: int, clock: Callable[[], int], *, read_only: bool = False
    ) -> None:
        self.path = path
        self.clock = clock
        self.undone = 0  # Write transactions that were rolled back.
        self._timeout = timeout_ms / 1000
        self._commits = 0
        self._changed = threading.Condition(threading.RLock())
        if sqlite3.sqlite_version_info < _SQLITE:
            raise LogUnavailable(
                f"broker: the embedded log needs SQLite {'.'.join(map(str, _SQLITE))}, this Python has {sqlite3.sqlite_version}"
            )
        if not read_only:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LogUnavailable(f"broker: the folder of {path} cannot be made: {error.strerror}") from error
        if path.is_dir():
            raise LogUnavailable(f"broker: {path} is a folder; name a file in it")
        try:
            self._db = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
                uri=True,
                timeout=0,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=256,
            )
        except sqlite3.Error as error:
            raise self._meaning(error) from error
        self._checkpoints = checkpoints.Checkpoints(self._db, path)
        try:
            self._patiently(self._look if read_only else self._open)
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'NORMAL'}")
        except sqlite3.Error as error:
            self._db.close()
            raise self._meaning(error) from error
        except LogError:
            self._db.close()
            raise

    def _look(self) -> None:
        """Open what is there, and be unable to change it."""
        if not self._is_ours():
            raise LogUnavailable(f"broker: {self.path} is not a log of Coldstream; name another file")
        self._db.execute("PRAGMA temp_store = MEMORY")
        self._db.execute("PRAGMA cache_size = -16000")
        self._db.execute("PRAGMA query_only = ON")

    def _open(self) -> None:
        """Look before touching: a file of something else, or of another format, is left as it is."""
        db = self._db
        # In this order: another process may be making it, and does both in one transaction.
        tables = db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if not self._is_ours() and tables:
            raise LogUnavailable(f"broker: {self.path} is a database of something else; name another file, or move it away")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("PRAGMA cache_size = -16000")
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # This and the next do nothing to a file that has pages.
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise LogUnavailable(f"broker: {self.path} lies where processes cannot share memory; put it on a local disk")
        db.execute("PRAGMA wal_autocheckpoint = 0")
        # Some builds of SQLite overwrite what is deleted: of old updates and versions, which retention removes, as much as is written anew.
        db.execute("PRAGMA secure_delete = FAST")
        # Cut to less than this when it begins anew: so its size tells when it is full, and most of it need not be allocated again.
        db.execute(f"PRAGMA journal_size_limit = {checkpoints.BYTES * 15 // 16}")
        db.execute("BEGIN IMMEDIATE")  # A file that may only be read is noticed here, not at the first commit.
        try:
            if not self._is_ours():  # Another process may have made it meanwhile.
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {FORMAT}")
                db.execute("COMMIT")
        finally:
            self._roll_back()

    def _is_ours(self) -> bool:
        if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            return False
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found != FORMAT:
            raise LogUnavailable(
                f"broker: {self.path} has format {found}, this version reads {FORMAT}; use the version that made it, or another file"
            )
        return True

    @contextlib.contextmanager
    def read(self) -> Iterator[tuple[sqlite3.Connection, Version]]:
        """A view of one moment: what is committed later is not in it. Gives the connection and the version of what it shows."""
        with self._changed:
            try:
                version = self._patiently(self._begin_read)
                yield self._db, version
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._meaning(error) from error
            finally:
                self._roll_back()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """All or nothing: what is done inside is visible to everybody when it ends, and not at all if it raises."""
        with self._changed:
            done = False
            try:
                self._patiently(lambda: self._db.execute("BEGIN IMMEDIATE"))
                yield self._db
                self._db.execute("COMMIT")
                done = True
            except sqlite3.Error as error:
                raise self._meaning(error) from error
            finally:
                self._commits += 1  # Also where it raised: an interrupt may come just after the commit.
                if not done:
                    self.undone += 1
                    self._roll_back()
            self._changed.notify_all()
            self._checkpoints.after_commit()

    def wait(self, seen: Version, seconds: float) -> bool:
        """Wait until something is committed that ``seen`` does not show, at most so long. Returns whether there is."""
        deadline = time.monotonic() + seconds
        pause = 0.005
        with self._changed:
            while True:
                try:
                    # SQLite has no call for "wake me": this looks at one number in shared memory.
                    now = (self._db.execute("PRAGMA data_version").fetchone()[0], self._commits)
                except sqlite3.Error as error:
                    raise self._meaning(error) from error
                left = deadline - time.monotonic()
                if now != seen or left <= 0:
                    return now != seen
                self._changed.wait(min(pause, left))  # A commit of this process ends it at once.
                pause = min(pause * 1.5, 0.05)

    def close(self) -> None:
        """Close the file; readers and writers of it then raise `LogUnavailable`."""
        with self._changed:
            self._checkpoints.close()
            self._db.close()

    def _begin_read(self) -> Version:
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        return self._db.execute("PRAGMA data_version").fetchone()[0], self._commits

    def _roll_back(self) -> None:
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error:  # SQLite rolls back by itself where it cannot go on; a closed file has nothing to roll back.
            return

    def _patiently(self, begin: Callable[[], T]) -> T:
        """``begin``, again and again while another process holds the file."""
        deadline = time.monotonic() + self._timeout
        pause = 0.0002
        with self._changed:
            while True:
                try:
                    return begin()
                except sqlite3.OperationalError as error:
                    self._roll_back()
                    if _code(error) not in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED} or time.monotonic() > deadline:
                        raise
                # Releases the lock meanwhile. Uneven, lest two processes wait in step.
                self._changed.wait(pause * random.uniform(0.5, 1.5))
                pause = min(pause * 1.5, _LONGEST_PAUSE)

    def _meaning(self, error: sqlite3.Error) -> LogError:
        code, full = _code(error), getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_FULL or full in {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}:
            return LogFull(f"no room for {self.path}: the disk, a quota or a limit of file size is reached; nothing of the commit was kept")
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return LogUnavailable(f"{self.path} was held by another process for {self._timeout:g} s; is one stopped inside a commit?")
        if code == sqlite3.SQLITE_NOTADB:
            return LogUnavailable(f"broker: {self.path} is not a log of Coldstream; name another file, or move it away")
        if code == sqlite3.SQLITE_CORRUPT:
            return LogUnavailable(f"{self.path} is damaged ({error}); move it away with its -wal and -shm, and restore a copy or replay")
        if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}:
            return LogUnavailable(f"broker: {self.path} cannot be opened for writing ({error}); check the folder and its permissions")
        return LogUnavailable(f"{self.path}: {error}")


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where the error is Python's own, such as that of a closed connection."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
