"""The demo in processes of their own: on a real Apache Kafka, and what becomes of its processes when it is stopped or killed."""

from __future__ import annotations

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumers import cli
from consumers.demo_live import View
from consumers.exits import Exit
from consumers.layers import load
from consumers.liveview import lines
from consumers.processes import Rate, seen_in
from streaming.metrics import Metrics, StepReport
from streaming.report import read_report
from tests.kafka_cluster import KafkaCluster
from tests.small_runs import Stream, fill, small
from tests.test_promises import findings

ROOT = Path(__file__).parent.parent
USERS, ITEMS = 60, 90


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("COLDSTREAM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def write_data(folder: Path, events: int) -> Path:
    """Files of the shape of MovieLens-100K, in no order of time."""
    dice = random.Random(7)
    folder.mkdir()
    rated = [f"{dice.randrange(USERS)}\t{dice.randrange(ITEMS)}\t{dice.randint(1, 5)}\t{880_000_000 + n // 3}\n" for n in range(events)]
    dice.shuffle(rated)
    (folder / "ml-100k.inter").write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(rated))
    people = "".join(f"{n}\t{20 + n}\t{'MF'[n % 2]}\twriter\n" for n in range(USERS))
    (folder / "ml-100k.user").write_text("user_id:token\tage:token\tgender:token\toccupation:token\n" + people)
    films = "".join(f"{n}\tfilm\t{1920 + n}\tDrama War\n" for n in range(ITEMS))
    (folder / "ml-100k.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n" + films)
    return folder


@pytest.mark.kafka
@pytest.mark.timeout(240)  # three processes that load torch, on cores that others may be using
def test_on_apache_kafka_every_event_is_scored_once(
    kafka_broker: KafkaCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, out = write_data(tmp_path / "data", 800), tmp_path / "out"
    options = ["--events", "600", "--set", "topic_prefix=demo-live.", "--set", "threads=1"]
    command = ["demo", "--broker", kafka_broker.url, "--data", str(data), "--out", str(out), *options]
    assert cli.execute(command) == 0, capsys.readouterr().err
    report = read_report(out / "report.json")
    assert (report.events, report.scores, report.unscored, report.partitions) == (600, 600, 0, 4)
    assert (report.duplicate_scores, report.orphan_scores, report.earlier_disagreements) == (0, 0, 0)
    assert (report.runs, report.events_processed) == (1, 600)
    assert report.seconds is not None
    assert 0 < report.seconds < 120
    assert report.seconds_by_stage["commit"] > 0
    assert report.seconds_by_stage["fold"] > 0, "the trainer is among them"
    assert (out / "report.html").exists()
    said = capsys.readouterr().out
    assert "600 of 600 events scored, 600 sent" in said
    assert "worker-2: " in said
    assert "600 events, each scored before it was learned from" in said
    assert findings(load(out / "settings.toml").settings) == []
    assert running(out) == []

    # The log is in use now: a demo in it would report the events of both.
    assert cli.execute(command) == Exit.USAGE
    assert "has interactions already" in capsys.readouterr().err


def test_a_log_with_interactions_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small(tmp_path / "mine.db")
    fill(settings, Stream(5).messages)
    data = write_data(tmp_path / "data", 10)
    assert cli.execute(["demo", "--broker", settings.broker, "--data", str(data), "--out", str(tmp_path / "out")]) == Exit.USAGE
    assert "topic interactions has interactions already" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_demo_ends_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    data, out = write_data(tmp_path / "data", 50), tmp_path / "out"
    command = ["demo", "--workers", "1", "--data", str(data), "--out", str(out), "--set", "threads=1"]
    program = [sys.executable, "-c", "from consumers.cli import main; main()", *command]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as demo:
        try:
            soon(lambda: len(running(out)) >= 3)
            demo.send_signal(number)
            _, err = demo.communicate(timeout=60)
            soon(lambda: running(out) == [])
        finally:
            demo.kill()
            for pid in running(out):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert demo.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert ("run again, it starts anew" in err) == (number != signal.SIGKILL)
    assert not (out / "report.json").exists()


def test_a_process_that_fails_fails_the_demo_with_its_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_data(tmp_path / "data", 10), tmp_path / "out"
    (data / "ml-100k.user").write_text("id:token\n1\n")
    assert cli.execute(["demo", "--workers", "1", "--data", str(data), "--out", str(out), "--set", "threads=1"]) == Exit.DATA
    err = capsys.readouterr().err
    assert "replayer ended with exit code 6" in err
    assert "there is no column 'user_id'" in err
    assert "replayer.log" in err
    assert running(out) == []


def running(out: Path) -> list[int]:
    """The ids of processes whose settings are this demo's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"consumers.tied" in words and str(out / "settings.toml").encode() in words:
                found.append(int(path.parent.name))
    return found


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_an_endpoint_says_is_read() -> None:
    from prometheus_client import generate_latest

    metrics = Metrics()
    metrics.observe_step(StepReport(partition=1, events=3, errors=[0.5, -1.5], earlier=[0, 30]), 0.0)
    metrics.observe_step(StepReport(partition=0, events=4), 0.0)
    metrics.observe_fold(query=5, rehearsal=2)
    metrics.observe_lag({0: 7, 1: 0})
    metrics.observe_version(12, 1000)
    with metrics.stage("commit"):
        pass
    seen = seen_in(generate_latest(metrics.registry).decode())
    assert (seen.events, seen.updates, seen.lag, seen.version) == (7, 7, {0: 7, 1: 0}, 12)
    assert seen.mae == pytest.approx(1.0, abs=0.01)
    assert seen.memory > 1e6
    assert math.isnan(seen.attention["users"])
    assert 0 < seen.stages["commit"] < 1


def test_lines_say_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr("consumers.processes.time.monotonic", lambda: next(clock))
    rate = Rate()
    rate.update(100)
    rate.update(1500)
    blank: dict[str, Any] = {"ready": True, "events": 0, "updates": 0, "lag": {}, "mae": math.nan, "version": math.nan, "memory": math.nan}
    worker = SimpleNamespace(**blank | {"state": "ready", "events": 1500, "lag": {2: 31, 0: 5}, "mae": 0.75, "version": 9, "memory": 4e8})
    processes = [
        SimpleNamespace(name="replayer", said="", rate=rate, seen=SimpleNamespace(**blank | {"state": "done"})),
        SimpleNamespace(name="worker-1", said="", rate=rate, seen=worker),
    ]
    assert lines(View(cast("Any", processes), sent=1600, total=2000, scored=1500, seconds=65)) == [
        "1,500 of 2,000 events scored, 1,600 sent, 1:05",
        "  replayer: done, 1,600 events, 500 events/s",
        "  worker-1: ready, 1,500 events, 500 events/s, lag 0:5 2:31, running MAE 0.7500, version 9, 400 MB",
    ]
