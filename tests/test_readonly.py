"""A log opened for reading only: it reads all, and nothing can change it."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.brokers import open_log
from streaming.embedded import EmbeddedLog
from streaming.errors import LogError, LogUnavailable
from streaming.log import Log, Message, Topic, TopicPartition, present
from streaming.readonly import ReadOnlyLog

HISTORY = TopicPartition("history", 0)


def filled(path: Path) -> Log:
    log = open_log(f"embedded:{path}")
    log.create([Topic("history")])
    with log.writer("filler") as writer:
        writer.commit([Message("history", b"a", b"%d" % n) for n in range(100)], {HISTORY: 7}, "readers")
    return log


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if not path.name.endswith("-shm")}


def test_everything_can_be_read(tmp_path: Path) -> None:
    filled(tmp_path / "log.db").close()
    with ReadOnlyLog(EmbeddedLog(tmp_path / "log.db", read_only=True)) as log:
        assert [record.value for record in present(log, [HISTORY])] == [b"%d" % n for n in range(100)]
        assert list(log.topics()) == ["history"]
        assert log.bounds([HISTORY])[HISTORY] == (0, 100)
        assert log.committed("readers", [HISTORY]) == {HISTORY: 7}


def test_whatever_would_change_it_is_refused_by_name(tmp_path: Path) -> None:
    filled(tmp_path / "log.db").close()
    with ReadOnlyLog(filled(tmp_path / "log.db")) as log:
        for change, message in (
            (lambda: log.create([Topic("new")]), "create new"),
            (lambda: log.append([Message("history", b"a", b"x")]), "append 1 records"),
            (lambda: log.writer("filler"), "open the writer filler"),
            (lambda: log.member("readers", "history"), "join the group readers"),
        ):
            with pytest.raises(LogError, match=f"opened for reading only; it was asked to {message}"):
                change()
        assert log.bounds([HISTORY])[HISTORY].end == 200


def test_the_embedded_file_itself_refuses_and_stays_as_it_was(tmp_path: Path) -> None:
    filled(tmp_path / "log.db").close()
    before = digest(tmp_path)
    with EmbeddedLog(tmp_path / "log.db", read_only=True) as log:
        list(present(log, [HISTORY]))
        for change in (
            lambda: log.create([Topic("new")]),
            lambda: log.append([Message("history", b"a", b"x")]),
            lambda: log.writer("filler"),
            lambda: log.member("readers", "history"),
        ):
            with pytest.raises(LogUnavailable, match="cannot be opened for writing"):
                change()
    after = digest(tmp_path)
    assert after["log.db"] == before["log.db"]


def test_it_follows_a_log_that_grows_and_does_not_end_its_write_ahead_log(tmp_path: Path) -> None:
    with filled(tmp_path / "log.db") as live:
        with EmbeddedLog(tmp_path / "log.db", read_only=True) as log, log.reader() as reader:
            reader.assign({HISTORY: 100})
            assert reader.poll(10) == []
            live.append([Message("history", b"a", b"new")])
            assert [record.value for record in reader.poll(10, timeout=5)] == [b"new"]
            before = digest(tmp_path)
        assert digest(tmp_path) == before
        live.append([Message("history", b"a", b"newer")])
        assert live.bounds([HISTORY])[HISTORY].end == 102


KILLED = """
import os, signal, sys
from tests.test_readonly import filled
from pathlib import Path
filled(Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_read_without_being_tidied_up(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "log.db")], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "log.db-wal").stat().st_size > 0
    before = digest(tmp_path)
    with EmbeddedLog(tmp_path / "log.db", read_only=True) as log:
        assert log.bounds([HISTORY])[HISTORY].end == 100
    assert digest(tmp_path) == before


@pytest.mark.parametrize("content", [None, b"", b"no log at all" * 100])
def test_a_file_that_is_no_log_is_refused_and_left_alone(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LogUnavailable, match=r"log\.db"):
        EmbeddedLog(path, read_only=True)
    assert (path.read_bytes() if path.exists() else None) == content
