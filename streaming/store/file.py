"""The file under a local store: opening it, finding out whether it can be used, setting it aside, and what its errors mean."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from streaming.errors import StoreDamaged, StoreError, StoreFull, StoreLocked
from streaming.events import FORMAT
from streaming.store.held import Covered

APPLICATION_ID = 0x436F6C73  # "Cols"
ASIDE = ".set-aside"
"""Ending of a store that could not be used. There is one for each partition, the last."""

_SCHEMA = (
    # By ordinal, so that a support set that changes stays where it is; users come by growing ordinals.
    """CREATE TABLE users (ordinal INTEGER PRIMARY KEY, user TEXT NOT NULL UNIQUE, changed INTEGER NOT NULL, crc INTEGER NOT NULL,
       value BLOB NOT NULL) STRICT""",
    'CREATE TABLE markers (user TEXT PRIMARY KEY, "since" INTEGER NOT NULL) STRICT, WITHOUT ROWID',
    """CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), layout TEXT NOT NULL, place TEXT NOT NULL, covered INTEGER NOT NULL,
       timestamp INTEGER NOT NULL, changelog TEXT NOT NULL, position BLOB, changes INTEGER NOT NULL) STRICT""",
)
LAYOUT = hashlib.sha256(repr((_SCHEMA, FORMAT)).encode()).hexdigest()
"""Digest of the tables and of the format of the records in them; a store of another layout is set aside."""

_PAGE_BYTES = 4096
_CACHE_KB = 32_000
# Measured as for the embedded log: the fewer checkpoints, the fewer syncs; here a file of 32 MB is a tenth of the gain for half the disk.
_CHECKPOINT_PAGES = 8192
_BEAT_STEPS = 1_000_000
_NO_ROOM = {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_CANNOT = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}


class Place(NamedTuple):
    """Whose state a store holds: the group, and the partition of the changelog."""

    group: str
    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.group}: {self.topic}[{self.partition}]"


class StoreFile:
    """One SQLite file, which no other process can open meanwhile.

    A file that is damaged, of another layout or another partition is set aside and begun anew; ``set_aside`` then says why. Every page
    is looked at when it is opened, a second for a million users, and ``beat`` is called meanwhile.
    Raises `StoreLocked` while another process has it, `StoreFull` where there is no room to begin it, `StoreError` where it
    cannot be opened for another reason.
    """

    def __init__(self, path: Path, place: Place, beat: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.place = place
        self.set_aside = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"worker.state_dir: the folder {path.parent} cannot be made ({error.strerror})") from error
        if path.is_dir():
            raise StoreError(f"worker.state_dir: {path} is a folder, where the store of {place} should be")
        try:
            self._open(beat)
        except StoreDamaged as error:
            self.set_aside = str(error)
            self._open(beat)

    def _open(self, beat: Callable[[], None]) -> None:
        self.db = sqlite3.connect(self.path, timeout=0, isolation_level=None, cached_statements=64)
        self.closed = False
        try:
            with self.meaning():
                self._prepare(beat)
        except BaseException:
            self.close()
            raise

    def _prepare(self, beat: Callable[[], None]) -> None:
        db = self.db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")  # Does nothing to a file that has pages.
        db.execute(f"PRAGMA cache_size = -{_CACHE_KB}")
        db.execute("PRAGMA temp_store = MEMORY")
        # What a forgotten user had is overwritten, not only unlinked.
        db.execute("PRAGMA secure_delete = ON")
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables:
            self._check(beat)
        # Here, not at the first commit, is noticed whether it can be written to, and whether another process has it.
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreError(f"worker.state_dir: {self.path} cannot have a write-ahead log; put it on a local disk")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {_CHECKPOINT_PAGES * _PAGE_BYTES}")
        db.execute("BEGIN IMMEDIATE")
        try:
            if not tables:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute("INSERT INTO meta VALUES (1, ?, ?, 0, 0, '', NULL, 0)", (LAYOUT, str(self.place)))
            db.execute("COMMIT")
        finally:
            self.roll_back()

    def _check(self, beat: Callable[[], None]) -> None:
        """Raise `StoreDamaged`, the file set aside, unless it is whole, of this layout and of this place."""
        db = self.db
        if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise self.put_aside("it is a database of something else")
        row = db.execute("SELECT layout, place FROM meta").fetchone()
        if row is None or row[0] != LAYOUT:
            raise self.put_aside("it was written by another version of Coldstream")
        if row[1] != str(self.place):
            raise self.put_aside(f"it is the store of {row[1]}")
        failed = list[BaseException]()

        def step() -> bool:
            # An error in here would only interrupt SQLite, and be taken for damage.
            try:
                beat()
            except BaseException as error:  # noqa: BLE001  raised below
                failed.append(error)
            return bool(failed)

        db.set_progress_handler(step, _BEAT_STEPS)
        try:
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        except sqlite3.OperationalError:
            if failed:
                raise failed[0] from None
            raise
        finally:
            db.set_progress_handler(None, 0)
        if found != "ok":
            raise self.put_aside(f"it is damaged ({found})")

    @contextlib.contextmanager
    def meaning(self) -> Iterator[None]:
        """Turn errors of SQLite's into `StoreFull`, `StoreLocked`, `StoreError`, or `StoreDamaged`, whereupon the file is set aside."""
        try:
            yield
        except sqlite3.Error as error:
            whole = getattr(error, "sqlite_errorcode", 0)
            code = whole & 0xFF
            if code == sqlite3.SQLITE_FULL or whole in _NO_ROOM:
                raise StoreFull(
                    f"worker.state_dir: no room for {self.path}: the disk, a quota or the size of files has its limit"
                ) from error
            if code in _BUSY:
                raise StoreLocked(f"{self.path} is held by another process") from error
            if code in _CANNOT:
                raise StoreError(f"worker.state_dir: {self.path} cannot be opened for writing ({error})") from error
            raise self.put_aside(f"it is damaged ({error})") from error

    def put_aside(self, reason: str) -> StoreDamaged:
        """Close the file and give it another name; returns the error that says so. An earlier one set aside goes."""
        self.close()
        aside = self.path.with_name(self.path.name + ASIDE)
        for ending in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self.path}{ending}").replace(f"{aside}{ending}")
        try:
            self.path.replace(aside)
        except OSError as error:
            raise StoreError(f"worker.state_dir: {self.path} cannot be used ({reason}), nor renamed ({error.strerror})") from error
        return StoreDamaged(f"{self.path} was set aside as {aside.name}: {reason}")

    def begin_anew(self, reason: str) -> None:
        """Set the file aside and open an empty one; ``set_aside`` says why. Raises as opening does."""
        self.set_aside = str(self.put_aside(reason))
        self._open(lambda: None)

    def covered(self) -> Covered:
        """How far of the changelog the file goes."""
        with self.meaning():
            return Covered(*self.db.execute("SELECT covered, timestamp, changelog, position FROM meta").fetchone())

    def roll_back(self) -> None:
        """End a transaction that could not be committed."""
        with contextlib.suppress(sqlite3.Error):  # SQLite rolls back by itself where it cannot go on.
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        self.closed = True
        self.db.close()
