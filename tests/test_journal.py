"""The run journal counts what was done, repeats included, and bears being killed in the middle of a line."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from streaming.errors import LogFull, StreamError
from streaming.journal import Journal, read_journal


def test_counts_runs_repeats_stages_and_notes(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "journal.jsonl"
    with Journal(path) as journal:
        journal.step(0, 0, 16, 16)
        journal.stages({"adapt": 1.0, "commit": 0.5})
        journal.stages({"adapt": 2.0, "commit": 0.75})
        journal.note("attention", {"events": 16, "spread_users": 0.2, "spread_rows": 0.4})
    with Journal(path) as journal:
        journal.step(0, 0, 16, 16)
        journal.step(0, 16, 33, 15)
        journal.stages({"adapt": 1.0})
        journal.note("attention", {"events": 31, "spread_users": 0.3, "spread_rows": 0.5})
    history = read_journal(path)
    assert (history.runs, history.events_processed, history.torn_lines) == (2, 47, 0)
    assert history.stages == {"adapt": 3.0, "commit": 0.75}
    assert [note["events"] for note in history.notes["attention"]] == [16, 31]


def test_a_step_line_says_what_the_issue_asks(tmp_path: Path) -> None:
    before = time.time_ns() // 1_000_000
    with Journal(tmp_path / "j") as journal:
        journal.step(3, 160, 176, 15)
    start, step, end = (json.loads(line) for line in (tmp_path / "j").read_text().splitlines())
    assert (start["kind"], end["kind"]) == ("start", "end")
    assert start["run"] == step["run"] == end["run"] == journal.run
    assert (step["kind"], step["partition"], step["from"], step["to"], step["events"]) == ("step", 3, 160, 176, 15)
    assert before <= start["started_at"] <= step["started_at"] <= time.time_ns() // 1_000_000
    assert 0 <= start["elapsed"] <= step["elapsed"] <= end["elapsed"]


def test_seconds_are_those_of_each_run_up_to_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    lines = [
        {"kind": "start", "run": "a", "elapsed": 0.0},
        {"kind": "step", "run": "a", "elapsed": 2.5, "events": 4},
        {"kind": "start", "run": "b", "elapsed": 0.0},
        {"kind": "step", "run": "b", "elapsed": 1.0, "events": 4},
        {"kind": "end", "run": "b", "elapsed": 4.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_journal(path).seconds == 6.5


@pytest.mark.parametrize("cut", [1, 2, 20, 60])
def test_a_torn_last_line_is_passed_over_and_not_joined_to_the_next(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.step(0, 0, 8, 8)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1] + whole[1][: -cut - 1])
    assert read_journal(path).events_processed == 8
    with Journal(path) as journal:
        journal.step(0, 8, 16, 8)
    history = read_journal(path)
    assert (history.runs, history.events_processed, history.torn_lines) == (2, 16, 1)


@pytest.mark.parametrize("garbage", [b"\x00\xff\n", b"[]\n", b'{"kind":"step"}\n', b"\n", b'{"kind":1,"run":"x","elapsed":0}\n'])
def test_garbage_lines_do_not_stop_the_reader(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "j"
    path.write_bytes(garbage)
    with Journal(path) as journal:
        journal.step(0, 0, 8, 8)
    assert read_journal(path).events_processed == 8


def test_a_killed_process_leaves_every_line_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "j"
    program = (
        "import sys\nfrom streaming.journal import Journal\njournal = Journal(sys.argv[1])\nn = 0\n"
        "while True:\n    journal.step(0, n, n + 1, 1)\n    n += 1\n    print(n, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(50):
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
    history = read_journal(path)
    assert history.events_processed >= said == 50
    assert history.runs == 1


def test_each_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for n in range(3):
        journal.step(0, n, n + 1, 1)
        assert read_journal(tmp_path / "j").events_processed == n + 1
    journal.close()


def test_a_line_costs_little(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        costs = []
        for _ in range(20):
            began = time.perf_counter()
            for n in range(100):
                journal.step(0, n, n + 16, 16)
            costs.append((time.perf_counter() - began) / 100)
    assert min(costs) < 300e-6, "a journal line should take microseconds (measured: about 5)"


def test_a_full_disk_is_a_named_error(tmp_path: Path) -> None:
    class Full:
        def write(self, line: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self) -> None: ...

        def close(self) -> None: ...

    journal = Journal(tmp_path / "j")
    assert journal._file is not None
    journal._file.close()
    journal._file = Full()  # type: ignore[assignment]
    with pytest.raises(LogFull, match=r"run journal .*No space left"):
        journal.step(0, 0, 1, 1)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    with pytest.raises(ValueError, match="journal's own"):
        journal.note("step", {})
    with pytest.raises(ValueError, match="bytes, more than"):
        journal.note("x", {"y": "z" * 2_000_000})
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="is closed"):
        journal.step(0, 0, 1, 1)
    with pytest.raises(StreamError, match=r"run journal .*none.*No such file"):
        read_journal(tmp_path / "none")
