"""The embedded log under several processes: shared, killed with kill -9, and on a full disk."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming.embedded import EmbeddedLog
from streaming.errors import LogFull, LogUnavailable
from streaming.log import Message, Topic, TopicPartition
from tests.test_embedded import read_all

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EmbeddedLog]:
    with EmbeddedLog(tmp_path / "log.db") as log:
        yield log


# --- several processes


def test_a_process_that_holds_the_file_too_long_is_an_error_with_a_name(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with EmbeddedLog(path, lock_timeout_ms=100) as log:
        log.create([Topic("t")])
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LogUnavailable, match=r"log\.db was held by another process for 0\.1 s"):
            log.append([Message("t", None, b"x")])
        assert read_all(log, "t") == [], "reading goes on"
        other.execute("ROLLBACK")
        other.close()
        assert log.append([Message("t", None, b"x")]) == [0]


def test_an_append_waits_for_a_commit_of_another_process(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    with EmbeddedLog(path) as log:
        log.create([Topic("t")])
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.1, other.execute, ("COMMIT",))
        timer.start()
        assert log.append([Message("t", None, b"x")]) == [0]
        timer.join()
        other.close()


MAKER = """
import sys
from streaming.embedded import EmbeddedLog
from streaming.log import Message, Topic
log = EmbeddedLog(sys.argv[1])
log.create([Topic("t", 2)])
for n in range(50):
    log.append([Message("t", None, sys.argv[2].encode() + b" %d" % n, n % 2)])
log.close()
"""


def test_processes_that_make_one_log_at_the_same_time_agree(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    running = [subprocess.Popen([sys.executable, "-c", MAKER, path, str(n)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for n in range(3)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    with EmbeddedLog(path) as log:
        found = [value for partition in (0, 1) for value in read_all(log, "t", partition)]
        assert sorted(v for v in found if v) == sorted(b"%d %d" % (number, n) for number in range(3) for n in range(50))


STEPPER = """
import sys
from streaming.embedded import EmbeddedLog
from streaming.log import Message, TopicPartition
log = EmbeddedLog(sys.argv[1])
source = TopicPartition("source", 0)
writer = log.writer("stepper")
at = log.committed("g", [source]).get(source, 0)
reader = log.reader()
reader.assign({source: at})
print("ready", flush=True)
while True:
    batch = reader.poll(7)
    count = batch[-1].offset + 1
    writer.commit(
        [Message("out", None, b"%d" % r.offset, r.offset % 3) for r in batch] + [Message("count", b"k", b"%d" % count)],
        {source: count}, "g",
    )
"""


def test_killed_at_any_moment_records_offsets_and_count_agree(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    source = TopicPartition("source", 0)
    dice = random.Random(7)
    with EmbeddedLog(path) as log:
        log.create([Topic("source"), Topic("out", 3), Topic("count", cleanup="compact")])
        log.append([Message("source", None, b"x")] * 200_000)
    done = 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", STEPPER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(dice.uniform(0.01, 0.15))
        process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
        process.stdout.close()
        with EmbeddedLog(path) as log:
            before, done = done, log.committed("g", [source]).get(source, 0)
            outputs = sorted(int(value or b"") for partition in range(3) for value in read_all(log, "out", partition))
            assert outputs == list(range(done))
            assert read_all(log, "count") == ([b"%d" % done] if done else [])
        assert done >= before
    assert done > 100, "the kills came before any work"
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_the_write_ahead_file_stays_bounded_and_one_who_reads_for_long_does_not_stop_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streaming.embedded.checkpoints.BYTES", 1_000_000)
    monkeypatch.setattr("streaming.embedded.checkpoints._AGAIN_BYTES", 500_000)
    path, wal = tmp_path / "log.db", tmp_path / "log.db-wal"
    with EmbeddedLog(path) as log, EmbeddedLog(path) as second:
        log.create([Topic("t")])
        sizes = []

        def fill() -> None:
            for n in range(30):
                (log, second)[n % 2].append([Message("t", None, b"x" * 100_000)])
                sizes.append(wal.stat().st_size)

        fill()
        # Twice the megabyte, once more the half, if the two came in each other's way, and a commit; all of it is 3,080,000.
        assert max(sizes) < 2_700_000
        monkeypatch.setattr("streaming.embedded.checkpoints._PATIENCE_MS", 1)  # Whoever reads from here on will not give way.
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM records").fetchone()
        fill()
        assert max(sizes) > 2_900_000, "what somebody still reads is not overwritten"
        reader.execute("COMMIT")
        reader.close()
        fill()
        assert sizes[-1] < 2_200_000
        assert len(read_all(log, "t")) == 90


def test_without_room_for_a_thread_what_is_written_ahead_stays_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("streaming.embedded.checkpoints.BYTES", 1_000_000)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with EmbeddedLog(tmp_path / "log.db") as log:
        log.create([Topic("t")])
        for _ in range(40):
            log.append([Message("t", None, b"x" * 100_000)])
            assert (tmp_path / "log.db-wal").stat().st_size < 1_200_000
        assert len(read_all(log, "t")) == 40


# --- a full disk


def test_a_full_file_keeps_nothing_of_the_commit_and_goes_on_when_there_is_room(log: EmbeddedLog) -> None:
    log.create([Topic("t"), Topic("table", cleanup="compact")])
    tp = TopicPartition("t", 0)
    writer = log.writer("w")
    writer.commit([Message("table", b"k", b"before")], {tp: 1}, "g")
    db = log._file._db
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0] + 5}")
    with pytest.raises(LogFull, match=r"log\.db.*nothing of the commit was kept"):
        writer.commit([Message("table", b"k", b"after"), Message("t", None, b"x" * 100_000)], {tp: 2}, "g")
    assert (read_all(log, "t"), read_all(log, "table"), log.committed("g", [tp])) == ([], [b"before"], {tp: 1})
    assert log.append([Message("t", None, b"small")]) == [0], "what fits is still taken"
    db.execute("PRAGMA max_page_count = 1000000")
    writer.commit([Message("table", b"k", b"after"), Message("t", None, b"x" * 100_000)], {tp: 2}, "g")
    assert (len(read_all(log, "t")), read_all(log, "table"), log.committed("g", [tp])) == (2, [b"after"], {tp: 2})


FILLER = """
import resource, sys
from streaming.embedded import EmbeddedLog
from streaming.errors import LogFull
from streaming.log import Message, Topic
log = EmbeddedLog(sys.argv[1])
log.create([Topic("t")])
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, most))
written = 0
try:
    while written < 1000:
        log.append([Message("t", None, b"%d" % (written + n) + b" " * 50_000) for n in range(3)])
        written += 3
except LogFull:
    reader = log.reader()
    reader.assign({("t", 0): 0})
    assert len(reader.poll(10_000)) == written
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    print(written, *log.append([Message("t", None, b"after")]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of resources there")
def test_an_operating_system_that_takes_no_more_bytes_is_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    done = subprocess.run([sys.executable, "-c", FILLER, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    written, offset = map(int, done.stdout.split())
    assert 3 <= written == offset < 200
    with EmbeddedLog(path) as log:
        assert [int((value or b"").split()[0]) for value in read_all(log, "t")[:-1]] == list(range(written))
        assert read_all(log, "t")[-1] == b"after"
