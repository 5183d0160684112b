"""Checkpoints of the embedded log: what is in the -wal file moves into the main one, and the -wal file begins anew."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from pathlib import Path

# Measured: with a checkpoint for each 4 MB, SQLite's default, a commit took 2.4 ms on average, with one for each 64 MB 0.9 ms.
BYTES = 64 << 20
_AGAIN_BYTES = 16 << 20
_MOST = 2
"""The file is at most so many times as large: then commits wait until all is copied."""
_PATIENCE_MS = 200


class Checkpoints:
    """Begins the -wal file anew when it has become large.

    SQLite's own checkpoint begins it anew only if nobody commits meanwhile: with two busy processes the file grew past half a gigabyte. The
    one that makes all others wait is short if most is copied by then; so a thread with a connection of its own copies first, beside the
    commits, and this process waits for it only where they leave it far behind. What goes wrong in either leaves every commit as it is,
    and is tried again some megabytes later.
    """

    def __init__(self, db: sqlite3.Connection, path: Path) -> None:
        self._db = db
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._at = BYTES
        self._copying: threading.Thread | None = None

    def after_commit(self) -> None:
        """Look whether one is due. Call it under the lock of ``db``, outside any transaction."""
        with contextlib.suppress(OSError, sqlite3.Error):
            size = self._wal.stat().st_size
            if size < self._at:
                return
            if self._copying is None:
                # Not a daemon: as the process ends, an interpreter that is gone must not be returned to.
                copying = threading.Thread(target=self._copy, name="checkpoint")
                with contextlib.suppress(RuntimeError):  # No room for a thread: then all is copied while others wait.
                    copying.start()
                    self._copying = copying
            if self._copying is not None and self._copying.is_alive() and size < _MOST * BYTES:
                return
            self.close()
            self._at = size + _AGAIN_BYTES
            self._db.execute(f"PRAGMA busy_timeout = {_PATIENCE_MS}")
            try:
                (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
            finally:
                self._db.execute("PRAGMA busy_timeout = 0")
            if not busy:
                self._at = BYTES

    def _copy(self) -> None:
        place = f"{self._path.absolute().as_uri()}?mode=rw"  # A file that was taken away meanwhile is not to be made.
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(place, uri=True, isolation_level=None)) as db:
            # What was committed during the first pass is left to the second; what comes during that is little.
            for _ in range(2):
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Wait until nothing is being copied."""
        if self._copying is not None:
            self._copying.join()
            self._copying = None
