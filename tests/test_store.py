"""A local store through everything that can happen to its file: each is noticed, and nothing but the file is lost by it."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.codec import encode
from streaming.errors import LogFull, StoreDamaged, StoreError, StoreFull, StoreLocked
from streaming.events import Forgotten, Support
from streaming.store import file, stored
from streaming.store.file import ASIDE, Place
from streaming.store.held import Covered
from streaming.store.stored import Stored

PLACE = Place("g", "support", 3)


def value(ordinal: int, item: str = "i1", length: int = 5) -> bytes:
    return encode(Support([(item, 3.0, 10**12)] * length, ("interactions", 3, ordinal), length, ordinal))


def filled(path: Path, users: int = 300) -> None:
    """A closed store of so many users."""
    store = Stored(path, PLACE)
    for number in range(users):
        store.put(f"u{number}", value(number))
    store.covered = Covered(users, 1, "x", b"p")
    store.close()


def overwrite(path: Path, at: float, what: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        file.write(what)


def other_layout(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET layout = 'another'")
    db.close()


def something_else(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE meta (layout TEXT)")
    db.close()


FAULTS = {
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "holes": lambda path: overwrite(path, 0.5, bytes(8192)),
    "noise": lambda path: overwrite(path, 0.7, b"\xff\x07" * 4096),
    "another layout": other_layout,
    "something else": something_else,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used_is_set_aside_and_begun_anew(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "state" / "g-3.db"
    filled(path)
    FAULTS[fault](path)
    spoilt = path.read_bytes()
    store = Stored(path, PLACE)
    assert "g-3.db was set aside as g-3.db.set-aside: " in store.set_aside
    assert (len(store), store.covered) == (0, Covered())
    store.put("u1", value(1))
    store.covered = Covered(1, 1, "x", b"p")
    store.close()
    assert path.with_name(path.name + ASIDE).read_bytes() == spoilt, "whoever wants to know finds it as it was"
    assert Stored(path, PLACE).value("u1") == value(1)


def test_a_heartbeat_that_fails_while_a_store_is_looked_through_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_BEAT_STEPS", 10)
    path = tmp_path / "s.db"
    filled(path)

    def beat() -> None:
        raise LogFull("there is no room for it")

    with pytest.raises(LogFull, match="no room for it"):
        Stored(path, PLACE, beat=beat)
    assert [found.name for found in tmp_path.iterdir()] == ["s.db"]
    store = Stored(path, PLACE)
    assert (store.set_aside, len(store)) == ("", 300)
    store.close()


def test_the_store_of_another_partition_or_group_is_set_aside(tmp_path: Path) -> None:
    for number, other in enumerate([PLACE._replace(partition=4), PLACE._replace(group="h"), PLACE._replace(topic="a.support")]):
        path = tmp_path / f"{number}.db"
        filled(path)
        store = Stored(path, other)
        assert f"it is the store of {PLACE}" in store.set_aside
        assert len(store) == 0
        store.close()
        again = Stored(path, other)
        assert again.set_aside == ""
        again.close()


def test_an_empty_file_is_begun(tmp_path: Path) -> None:
    """What a kill between the making of the file and its first page leaves."""
    (tmp_path / "s.db").touch()
    store = Stored(tmp_path / "s.db", PLACE)
    assert (store.set_aside, len(store)) == ("", 0)
    store.close()


def test_a_support_set_that_changed_on_disk_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    """SQLite's own check says nothing of what is inside a value."""
    path = tmp_path / "s.db"
    filled(path, 3)
    found = path.read_bytes().replace(value(1), value(1).replace(b"i1", b"i9", 1))
    path.write_bytes(found)
    store = Stored(path, PLACE)
    assert store.value("u0") == value(0)
    with pytest.raises(StoreDamaged, match=r"s\.db was set aside as s\.db\.set-aside: a support set in it"):
        store.value("u1")
    store.close()
    assert len(Stored(path, PLACE)) == 0


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    filled(path, 3)
    holder = (
        "import sys; from pathlib import Path; from tests.test_store import *\n"
        "store = Stored(Path(sys.argv[1]), PLACE); print(len(store), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", holder, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "3\n"
        with pytest.raises(StoreLocked, match="is held by another process"):
            Stored(path, PLACE)
        process.kill()
    store = Stored(path, PLACE)
    assert (store.set_aside, len(store)) == ("", 3), "a killed holder has let go"
    store.close()


def test_killed_between_two_writes_it_is_as_after_the_first(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    program = (
        "import os, sys; from pathlib import Path; from tests.test_store import *; s = Stored(Path(sys.argv[1]), PLACE)\n"
        "s.put('a', value(0)); s.covered = Covered(1, 1, 'x', b'p'); s.settle()\n"
        "s.put('b', value(1)); s.put('a', None); s.covered = Covered(3, 3, 'x', b'q'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -9
    store = Stored(path, PLACE)
    assert (store.set_aside, len(store), store.value("a"), store.covered) == ("", 1, value(0), Covered(1, 1, "x", b"p"))
    store.close()


def test_while_the_disk_is_full_changes_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(stored, "MOST_WAITING", 2000)
    path = tmp_path / "s.db"
    store = Stored(path, PLACE)
    pages = store._file.db.execute("PRAGMA page_count").fetchone()[0]
    store._file.db.execute(f"PRAGMA max_page_count = {pages + 2}")
    for number in range(1900):
        store.put(f"u{number}", value(number))
        store.covered = Covered(number + 1, 1, "x", b"p")
        if number % 100 == 99:
            store.settle(100, math.inf)
    assert "no room for" in store.full
    store.grew(1900)
    assert (len(store), store.behind) == (1900, 1900)
    assert all(store.value(f"u{number}") == value(number) for number in range(1900))
    store._file.db.execute("PRAGMA max_page_count = 1000000")
    store.settle()
    assert (store.full, store.behind, len(store), store.value("u7")) == ("", 0, 1900, value(7))
    store.close()
    again = Stored(path, PLACE)
    assert (len(again), again.covered.offset) == (1900, 1900)
    again.close()


def test_a_disk_that_stays_full_ends_it_before_memory_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST_WAITING", 500)
    path = tmp_path / "s.db"
    filled(path, 10)
    store = Stored(path, PLACE)
    store._file.db.execute("PRAGMA max_page_count = 1")  # No less than there are.
    for number in range(10, 510):
        store.put(f"u{number}", value(number))
        store.covered = Covered(number + 1, 1, "x", b"p")
        if number < 509:
            store.settle(100, math.inf)
    with pytest.raises(StoreFull, match="the changes of 500 users wait in memory"):
        store.settle(100, math.inf)
    store.close()
    again = Stored(path, PLACE)
    assert (again.set_aside, len(again), again.covered.offset) == ("", 10, 10), "what was written before is whole"
    again.close()


def test_of_a_forgotten_user_the_files_hold_nothing_but_the_marker(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    filled(path)
    store = Stored(path, PLACE)
    store.put("u7", value(7, "very-private"))
    store.covered = Covered(301, 1, "x", b"p")
    store.settle()
    assert any(b"very-private" in file.read_bytes() for file in tmp_path.iterdir()), "else this test cannot fail"
    store.put("u7", encode(Forgotten(9)))
    store.covered = Covered(302, 1, "x", b"p")
    store.settle()
    assert not any(b"very-private" in file.read_bytes() for file in tmp_path.iterdir())
    store.grew(-1)
    assert (store.value("u7"), store.since("u7"), len(store)) == (None, 9, 299)
    store.grew(None)
    assert len(store) == 299
    store.close()


def test_a_place_where_no_store_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(StoreError, match=r"worker\.state_dir: the folder .*file cannot be made"):
        Stored(tmp_path / "file" / "s.db", PLACE)
    with pytest.raises(StoreError, match=r"worker\.state_dir: .*folder\.db is a folder"):
        Stored(tmp_path / "folder.db", PLACE)
