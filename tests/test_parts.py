"""A meta-update counts its events by offset, however they are cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumers.opening import connect
from streaming.codec import decode
from streaming.events import Update, Version
from streaming.log import Log, TopicPartition
from tests.small_runs import Stream, fill, run, small
from tests.test_promises import findings
from tests.verify.reading import joined, read

STREAM = Stream(160, seed=4, garbage=0.0)


def updates_of(log: Log) -> list[Update]:
    return [decode(whole.value, Update, what="update") for whole in joined(read(log, "updates", 0))]


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8, 13, 16, 64])
def test_small_steps_learn_as_often_as_large_ones(tmp_path: Path, micro_batch: int) -> None:
    """One move for each 8 offsets from their queries, and one from rehearsal: with one of each update there were eight times as many."""
    settings = small(tmp_path / "log.db", worker={"micro_batch": micro_batch}, trainer={"meta_update": 8})
    fill(settings, STREAM.messages)
    run(settings)
    assert findings(settings) == []
    with connect(settings) as log:
        updates = updates_of(log)
        versions = [decode(value, Version, what="version") for _, _, value in joined(read(log, "model", 0))]
    queries = [update for update in updates if update.kind == "query"]
    assert sum(update.completes for update in queries) == 160 // 8
    # In the first step nobody is known yet.
    assert sum(update.kind == "rehearsal" for update in updates) == 160 // 8 - micro_batch // 8
    assert sum(update.events for update in queries) == 160
    assert versions[-1].version == sum(update.completes for update in updates)
    assert sum(version.events for version in versions) == sum(update.events for update in updates)


def test_parts_wait_for_the_one_that_completes_them(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"micro_batch": 4}, trainer={"meta_update": 16})
    for start in range(0, 36, 12):
        fill(settings, STREAM.messages[start : start + 12])
        run(settings)
        assert findings(settings) == []
    with connect(settings) as log:
        folded = [decode(value, Version, what="version").folded for _, _, value in joined(read(log, "model", 0))]
        ends = [whole.end for whole in joined(read(log, "updates", 0))]
        waiting = [end for end in ends if end > folded[-1][0]]
        assert len(waiting) == 1, "the last 4 events wait for 12 more"
        assert log.bounds([TopicPartition("updates", 0)])[TopicPartition("updates", 0)].end == waiting[-1]
