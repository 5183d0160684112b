"""What the chaos run is told to do and says it did, without a broker."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from tests.chaos import Chaos
from tests.chaos_outcome import Outcome, write_table
from tests.kafka_cluster import KafkaCluster
from tests.nursery import Nursery, ended
from tests.small_runs import small


def chaos(folder: Path, seed: int) -> Chaos:
    return Chaos(small(folder / "log.db"), KafkaCluster(folder, proxied=False), cast("Nursery", None), seed)


def test_every_kind_of_fault_comes_as_often_as_any_other_in_an_order_of_the_seed(tmp_path: Path) -> None:
    hand = chaos(tmp_path, 1)
    counts = Counter(hand.plan(50))
    assert counts.keys() == hand.faults.keys()
    assert counts.total() == 50
    assert max(counts.values()) - min(counts.values()) == 1
    assert chaos(tmp_path, 5).plan(50) == chaos(tmp_path, 5).plan(50) != chaos(tmp_path, 6).plan(50)


@pytest.mark.parametrize("bad", [{"findings": ["(a) x"]}, {"waiting": 1}, {"deaths": ["a worker by itself, with 3"]}])
def test_a_run_that_broke_anything_has_not_passed(bad: dict[str, object]) -> None:
    assert Outcome(1, 10, 3).passed
    assert not Outcome(1, 10, 3, **bad).passed  # type: ignore[arg-type]


def test_the_table_of_the_runs_replaces_the_one_before(tmp_path: Path) -> None:
    page, lines = tmp_path / "page.md", tmp_path / "runs.jsonl"
    page.write_text("before\n<!-- runs -->\nold\n<!-- end of runs -->\nafter\n")
    one = Outcome(1, 100_000, 3, Counter({"cut": 2, "kill": 1}), seconds=407.04, recovery_seconds=57.6, date="2026-11-24")
    two = Outcome(2, 6000, 3, Counter({"kill": 4}), deaths=["a worker by itself, with 3"], findings=["(a) x"], date="2026-11-25")
    lines.write_text(one.line() + two.line())
    assert Outcome.read(two.line()) == two
    write_table(lines, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 2026-11-24 | 1 | 100,000 | 0 | 3 | 3 | 6.8 | 58 s | 0 | 0 | kept every promise |" in text
    assert "| FAILED: 1 findings, 0 events not scored, ended: a worker by itself, with 3 |" in text
    assert "| kill | 1 | 4 | 5 |" in text
    write_table(lines, page)
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for runs"):
        write_table(lines, page)


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize(("end", "code"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_the_end_of_a_process_that_nobody_waited_for_is_seen(end: str, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", f"input(); {end}"], stdin=subprocess.PIPE) as process:
        assert ended(process.pid) is None
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert ended(process.pid) == code
