"""The replayer killed with SIGKILL at random moments, in a process of its own."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from streaming.brokers import open_log
from streaming.codec import decode
from streaming.events import DeadLetter
from tests.cutting import cut_down
from tests.test_replayer import events, lines, new_log, records, write

PROGRAM = """
import sys
from collections.abc import Callable
from pathlib import Path
from consumers.replayer import replay
from streaming.brokers import open_log
from streaming.sources import interaction_source
from streaming.topics import topics
with open_log(sys.argv[1]) as log:
    source = interaction_source(Path(sys.argv[2]))
    tell = lambda progress: print(progress.events, flush=True)
    result = replay(log, source, topics(partitions=1), batch=5, sort_by_time=sys.argv[3] == "sorted", on_progress=tell)
    print("sent", result.sent)
"""


@pytest.mark.parametrize("order", ["as it is", "sorted"])
def test_killed_at_random_moments_it_neither_repeats_nor_drops_a_line(order: str, tmp_path: Path) -> None:
    n, bad = 2500, (7, 1200, 2499)
    path = write(tmp_path, lines(n, bad=bad, backwards=True))
    new_log(tmp_path).close()
    command = [sys.executable, "-c", PROGRAM, f"embedded:{tmp_path / 'log.db'}", str(path), order]
    chance = random.Random(order)
    cut_down(command, chance)
    with open_log(f"embedded:{tmp_path / 'log.db'}") as log:
        before = len(records(log, "interactions"))
        assert 20 < before < n - 20
    last = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    assert last.returncode == 0, last.stderr
    wanted = [i for i in (range(n - 1, -1, -1) if order == "sorted" else range(n)) if i not in bad]
    with open_log(f"embedded:{tmp_path / 'log.db'}") as log:
        assert [int(event["item"]) for event in events(log)] == wanted
        letters = [decode(record.value, DeadLetter, what="it").source[2] - 2 for record in records(log, "dead-letters")]
        assert sorted(letters) == list(bad)
