"""What only the embedded log promises: files that are none, retention at append, bounded polls. Processes: test_embedded_processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.brokers import open_log
from streaming.embedded import EmbeddedLog
from streaming.errors import LogError, LogUnavailable
from streaming.log import Bounds, Message, Topic, TopicPartition


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Iterator[EmbeddedLog]:
    with EmbeddedLog(tmp_path / "log.db", clock=clock) as log:
        yield log


def read_all(log: EmbeddedLog, topic: str, partition: int = 0) -> list[bytes | None]:
    reader = log.reader()
    tp = TopicPartition(topic, partition)
    start, end = log.bounds([tp])[tp]
    reader.assign({tp: start})
    values = []
    while reader.position(tp) < end:
        values += [record.value for record in reader.poll(1000)]
    return values


# --- opening


def test_the_folder_is_made_and_the_log_is_still_there_when_opened_again(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'new' / 'folder' / 'log.db'}"
    with open_log(url) as log:
        log.create([Topic("t")])
        log.append([Message("t", None, b"a")])
    with open_log(url) as log:
        assert log.bounds([TopicPartition("t", 0)]) == {TopicPartition("t", 0): Bounds(0, 1)}


@pytest.mark.parametrize(("url", "words"), [("kafka:", "broker"), ("redis:x", "broker"), ("embedded:", "broker"), ("x", "broker")])
def test_a_broker_that_is_not_there_is_named(url: str, words: str) -> None:
    with pytest.raises(LogUnavailable, match=words):
        open_log(url)


@pytest.mark.parametrize("options", [{"durability": "eternal"}, {"session_timeout_ms": 0}, {"lock_timeout_ms": 0}])
def test_a_wrong_option_is_named(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EmbeddedLog(tmp_path / "log.db", **options)


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE diary (entry TEXT)")
    db.close()


def newer(path: Path) -> None:
    EmbeddedLog(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def truncated(path: Path) -> None:
    with EmbeddedLog(path) as log:
        log.create([Topic("t")])
        log.append([Message("t", None, b"x" * 100_000)])
    os.truncate(path, 8192)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text("dear diary, " * 1000), "not a log"),
        (foreign, "something else"),
        (newer, "format 99"),
        (truncated, "damaged"),
        (Path.mkdir, "folder"),
    ],
    ids=["text", "foreign", "newer", "truncated", "folder"],
)
def test_a_file_that_is_no_log_is_named_and_left_as_it_is(tmp_path: Path, spoil: object, words: str) -> None:
    path = tmp_path / "log.db"
    spoil(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(LogUnavailable, match=rf"log\.db.*{words}|{words}.*log\.db"):
        EmbeddedLog(path)
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_page_overwritten_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with EmbeddedLog(path) as log:
        log.create([Topic("t")])
        log.append([Message("t", None, b"x" * 100) for _ in range(1000)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    with EmbeddedLog(path) as log:
        reader = log.reader()
        reader.assign({TopicPartition("t", 0): 0})
        with pytest.raises(LogUnavailable, match=r"log\.db is damaged"):
            reader.poll(10_000)
        assert reader.position(TopicPartition("t", 0)) == 0, "a read that failed moves nothing"


def test_a_folder_that_cannot_be_made_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogUnavailable, match="file/sub"):
        EmbeddedLog(tmp_path / "file" / "sub" / "log.db")
    if sys.platform == "linux":
        with pytest.raises(LogUnavailable, match=r"/proc/log\.db.*permissions"):
            EmbeddedLog("/proc/log.db")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(LogUnavailable, match=r"log\.db.*permissions"):
        EmbeddedLog(tmp_path / "log.db")


def test_a_sqlite_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 36, 9))
    with pytest.raises(LogUnavailable, match=r"needs SQLite 3\.37"):
        EmbeddedLog(tmp_path / "log.db")


def test_a_closed_log_says_so_and_closes_twice(log: EmbeddedLog) -> None:
    log.create([Topic("t")])
    log.close()
    log.close()
    with pytest.raises(LogUnavailable, match="closed"):
        log.append([Message("t", None, b"x")])


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("power", 2)])
def test_durability_is_what_sqlite_is_told(tmp_path: Path, durability: str, synchronous: int) -> None:
    with EmbeddedLog(tmp_path / "log.db", durability=durability) as log:  # type: ignore[arg-type]
        assert log._file._db.execute("PRAGMA synchronous").fetchone() == (synchronous,)
        assert log._file._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- retention and compaction


def test_retention_by_age_goes_in_slices_that_keep_up(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("t", retention_ms=1000)])
    tp = TopicPartition("t", 0)
    log.append([Message("t", None, b"old")] * 500)
    clock.now += 1000
    log.append([Message("t", None, b"x")])
    assert log.bounds([tp])[tp].start == 0, "of just that age is not too old"
    clock.now += 1
    starts = []
    for _ in range(60):
        log.append([Message("t", None, b"new")])
        starts.append(log.bounds([tp])[tp].start)
    assert 0 < starts[0] < 100, "the first slice is a slice"
    assert starts[-1] == 500
    assert read_all(log, "t") == [b"x"] + [b"new"] * 60


def test_retention_keeps_up_where_another_topic_has_much_waiting(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("old", retention_ms=1000), Topic("small", retention_bytes=1000)])
    log.append([Message("old", None, b"x")] * 5000)
    clock.now += 5000
    for _ in range(60):
        log.append([Message("old", None, b"x")] * 16 + [Message("small", None, b"y" * 500)] * 2)
        start, end = log.bounds([TopicPartition("small", 0)])[TopicPartition("small", 0)]
        assert end - start == 2
    assert log.bounds([TopicPartition("old", 0)])[TopicPartition("old", 0)].start >= 60 * 48


def test_retention_holds_for_partitions_that_nobody_writes_to(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("t", 3, retention_ms=1000), Topic("other")])
    log.append([Message("t", None, b"x", 2)] * 10)
    clock.now += 5000
    log.append([Message("other", None, b"x")])
    assert log.bounds([TopicPartition("t", 2)]) == {TopicPartition("t", 2): Bounds(10, 10)}
    assert log.append([Message("t", None, b"y", 2)]) == [10]


def test_what_a_failed_commit_would_have_dropped_is_dropped_by_the_next(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("t", retention_ms=1000)])
    tp = TopicPartition("t", 0)
    log.append([Message("t", None, b"old")])
    clock.now += 5000
    prepared = log._records.prepare([Message("t", None, b"lost")])
    with contextlib.suppress(KeyError), log._file.write() as db:
        log._records.append(db, prepared)
        raise KeyError
    assert log.bounds([tp])[tp] == Bounds(0, 1)
    log.append([Message("t", None, b"new")])
    assert log.bounds([tp])[tp] == Bounds(1, 2)


def test_a_removed_key_is_forgotten_after_the_retention_of_nulls(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("t", cleanup="compact", retention_ms=1000), Topic("other")])
    log.append([Message("t", b"k", b"v"), Message("t", b"j", b"v")])
    log.append([Message("t", b"k", None)])
    clock.now += 1000
    log.append([Message("other", None, b"x")])
    assert read_all(log, "t") == [b"v", None]
    clock.now += 2000
    log.append([Message("other", None, b"x")])
    assert read_all(log, "t") == [b"v"]
    assert log.bounds([TopicPartition("t", 0)])[TopicPartition("t", 0)] == Bounds(0, 3)
    log.append([Message("t", b"k", b"back")])
    assert read_all(log, "t") == [b"v", b"back"]


def test_a_file_does_not_grow_with_what_was_superseded_or_dropped(log: EmbeddedLog, tmp_path: Path) -> None:
    log.create([Topic("table", cleanup="compact"), Topic("updates", retention_bytes=1_000_000)])
    for n in range(300):
        log.append([Message("table", b"%d" % (n % 5), b"x" * 10_000), Message("updates", None, b"x" * 100_000)])
    log._file._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert (tmp_path / "log.db").stat().st_size < 4_000_000


def test_a_file_mostly_unused_shrinks(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("t", retention_ms=1000)])
    log.append([Message("t", None, b"x" * 200_000)] * 100)
    pages = log._file._db.execute("PRAGMA page_count").fetchone()[0]
    for _ in range(30):
        clock.now += 2000
        log.append([Message("t", None, b"x")] * 10)
    assert log._file._db.execute("PRAGMA page_count").fetchone()[0] < pages - 500


# --- reading


def test_a_poll_ends_early_where_records_are_large(log: EmbeddedLog) -> None:
    log.create([Topic("t", max_record_bytes=20_000_000)])
    log.append([Message("t", None, b"x" * 15_000_000)] * 4)
    reader = log.reader()
    reader.assign({TopicPartition("t", 0): 0})
    assert [len(reader.poll(100)), len(reader.poll(100)), len(reader.poll(100))] == [3, 1, 0]


# --- groups


def test_a_silent_member_is_evicted_where_the_clock_was_set_back(log: EmbeddedLog, clock: Clock) -> None:
    log.create([Topic("t", 2)])
    log.member("g", "t")
    clock.now -= 3_600_000
    assert log.member("g", "t").assignment().partitions == frozenset({0, 1})


def test_a_group_serves_one_topic_at_a_time(log: EmbeddedLog) -> None:
    log.create([Topic("t"), Topic("u")])
    member = log.member("g", "t")
    with pytest.raises(LogError, match=r"group g .* t at this time, not those of u"):
        log.member("g", "u")
    member.close()
    assert log.member("g", "u").assignment().topic == "u"
