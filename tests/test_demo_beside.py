"""The demo in lockstep with a process beside it: the same report as without, and that process ends whenever the demo does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from consumers import cli
from consumers.demo_beside import Beside, BesideEnded
from consumers.exits import Exit
from consumers.stop import Stop
from streaming.report import read_report
from tests.test_demo_live import soon, write_data

ROOT = Path(__file__).parent.parent
SETTINGS = ["--set", "worker.micro_batch=4", "--port", "0"]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("COLDSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def beside(out: Path) -> list[int]:
    """The ids of processes beside a demo in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"consumers.demo_beside" in words and str(out).encode() in words:
                found.append(int(path.parent.name))
    return found


def test_the_report_is_the_one_of_a_demo_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Settings of the environment hold in the process beside, too.
    monkeypatch.setenv("COLDSTREAM_SEED", "3")
    data, reports = write_data(tmp_path / "data", 120), []
    for threads in ("1", "2"):
        out = tmp_path / threads
        assert cli.execute(["demo", "--data", str(data), "--out", str(out), "--set", f"threads={threads}", *SETTINGS]) == 0
        assert beside(out) == []
        assert "120 events, each scored before it was learned from" in capfd.readouterr().out
        assert (out / "report.html").exists()
        report = read_report(out / "report.json")
        assert report.settings["seed"] == 3
        assert report.scores == 120
        assert report.seconds_by_stage["commit"] > 0
        reports.append(msgspec.structs.replace(report, seconds=0.0, events_per_second=0.0, settings={}, seconds_by_stage={}))
    assert reports[0] == reports[1]


def test_only_what_it_says_itself_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, program = tmp_path / "done", tmp_path / "beside"
    program.write_text(
        f"""#!{sys.executable}
import pathlib, sys, time
for line in ("filled", "reported"):
    print("of a library", flush=True)
    time.sleep(0.3)
    pathlib.Path({str(done)!r}).write_text(line)
    print(f"more of it\\n{{line}}", flush=True)
    sys.stdin.readline()
"""
    )
    program.chmod(0o755)
    monkeypatch.setattr("consumers.demo_beside.sys.executable", str(program))
    monkeypatch.setattr("consumers.demo_beside.read_report", lambda _: done.read_text())
    with Beside(tmp_path / "settings.toml", write_data(tmp_path / "data", 10), tmp_path) as process, Stop() as stop:
        process.filled(stop)
        assert done.read_text() == "filled"
        assert str(process.report(stop)) == "reported"
    with Beside(tmp_path / "settings.toml", tmp_path / "data", tmp_path) as process, Stop() as stop:
        process.filled(stop)
        os.kill(beside(tmp_path)[0], signal.SIGKILL)
        soon(lambda: beside(tmp_path) == [])
        with pytest.raises(BesideEnded):
            process.report(stop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_demo_ends_the_process_beside(tmp_path: Path, number: signal.Signals) -> None:
    data, out = write_data(tmp_path / "data", 20_000), tmp_path / "out"
    command = ["demo", "--data", str(data), "--out", str(out), "--set", "threads=2", *SETTINGS]
    program = [sys.executable, "-c", "from consumers.cli import main; main()", *command]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as demo:
        try:
            # It is at work while the demo itself still loads torch.
            soon((out / "log.db").exists)
            assert len(beside(out)) == 1
            demo.send_signal(number)
            _, err = demo.communicate(timeout=100)
            soon(lambda: beside(out) == [])
        finally:
            demo.kill()
            for pid in beside(out):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert demo.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert ("the same command goes on from here" in err) == (number != signal.SIGKILL)
    assert not (out / "report.json").exists()


def test_what_goes_wrong_beside_is_said_and_ends_the_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = write_data(tmp_path / "data", 10), tmp_path / "out"
    (data / "ml-100k.user").write_text("id:token\n1\n")
    assert cli.execute(["demo", "--data", str(data), "--out", str(out), "--set", "threads=2", *SETTINGS]) == Exit.DATA
    err = capfd.readouterr().err
    assert "there is no column 'user_id'" in err
    assert "the process beside ended with exit code 6" in err
    assert beside(out) == []
