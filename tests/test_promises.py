"""The promises (a) to (e) over whole runs of the real system, checked from the log alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from consumers.lockstep import Progress
from consumers.opening import connect
from consumers.settings import Settings
from streaming.errors import Fenced
from tests.small_runs import Stream, fill, run, small
from tests.verify import Finding, Rules, verify


def rules_of(settings: Settings, **rest: Any) -> Rules:  # noqa: ANN401 - as Rules
    return Rules(
        group=settings.group_id,
        prefix=settings.topic_prefix,
        scale=(settings.rating.minimum, settings.rating.maximum),
        support_size=settings.worker.support_size,
        max_users=settings.worker.max_users,
        max_staleness=settings.trainer.max_staleness,
        round_updates=settings.trainer.round_updates,
        stale_rounds=settings.trainer.stale_rounds,
        meta_update=settings.trainer.meta_update,
        **rest,
    )


def findings(settings: Settings, **rest: Any) -> list[Finding]:  # noqa: ANN401 - as Rules
    with connect(settings) as log:
        return verify(log, rules_of(settings, **rest))


def reasons_of(stream: Stream, offsets: list[int], topic: str = "interactions") -> dict[tuple[str, int, int], str]:
    """The reasons of garbage by its place."""
    found = {}
    for message, reason, offset in zip(stream.messages, stream.reasons, offsets, strict=True):
        if reason is not None:
            assert message.partition is not None
            found[topic, message.partition, offset] = reason
    return found


@pytest.mark.parametrize(
    ("partitions", "sections"),
    [
        (1, {}),
        (1, {"worker": {"max_users": 7, "micro_batch": 13}, "trainer": {"round_updates": 3}}),
        (3, {"trainer": {"meta_update": 5, "snapshot_every": 7}}),
        (1, {"worker": {"support_size": 1, "max_users": 2, "micro_batch": 64}, "rehearsal": {"users": 0}}),
        (1, {"topics": {"max_record_bytes": 4096}, "model": {"embedding_size": 12}}),
    ],
    ids=["plain", "bounded users and rounds", "partitions", "one interaction and two users", "chunks"],
)
def test_a_run_keeps_its_promises(tmp_path: Path, partitions: int, sections: dict[str, Any]) -> None:
    topics = {"partitions": partitions} | sections.get("topics", {})
    settings = small(tmp_path / "log.db", **sections | {"topics": topics})
    stream = Stream(500, seed=partitions, garbage=0.1, partitions=partitions)
    fill(settings, stream.profiles)
    reasons = reasons_of(stream, fill(settings, stream.messages))
    assert 30 < len(reasons) < 80
    run(settings)
    assert findings(settings, reasons=reasons) == []


def test_a_run_that_goes_on_keeps_its_promises(tmp_path: Path) -> None:
    """Events come while nobody runs, and the end of one run is inside the micro-batch of another."""
    settings = small(tmp_path / "log.db", worker={"max_users": 9})
    stream = Stream(400, seed=5)
    fill(settings, stream.profiles)
    for start in range(0, 400, 130):
        fill(settings, stream.messages[start : start + 130])
        run(settings)
        assert findings(settings) == []


def test_with_a_prefix_and_a_group_of_its_own(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topic_prefix="a.", group="g", rating={"minimum": 0, "maximum": 1})
    stream = Stream(60, garbage=0)
    fill(settings, [m._replace(topic="a.interactions") for m in stream.messages])
    run(settings)
    assert findings(settings) == []
    with connect(settings) as log:
        assert len(verify(log, Rules(group="g", prefix="a."))) > 0, "by another scale, other events are valid"


def test_two_at_once_are_kept_apart_by_fencing(tmp_path: Path) -> None:
    """A second run starts while the first is between two steps: it does all that is left, and the first can commit nothing more."""
    settings = small(tmp_path / "log.db")
    stream = Stream(300, seed=8)
    fill(settings, stream.messages)
    steps = []

    def another(progress: Progress) -> None:
        steps.append(progress.done)
        if len(steps) == 5:
            run(settings)

    with pytest.raises(Fenced):
        run(settings, on_step=another)
    assert steps == [16, 32, 48, 64, 80]
    assert findings(settings) == []
