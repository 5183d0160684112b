"""The real system in lockstep knows no rating before its event is scored: none of the same micro-batch, meta-update or user either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers.histories import history_of
from consumers.opening import connect
from model.tasks import Task
from streaming.codec import decode
from streaming.events import Interaction, Score
from tests.prequential_leak import Leak, assert_no_leak
from tests.small_runs import Stream, fill, message, run, small
from tests.verify.reading import read

EVENTS = [msgspec.msgpack.decode(m.value or b"", type=Interaction) for m in Stream(72, seed=2, garbage=0, users=6, items=12).messages]


class Runner:
    """A fresh system over the events it is given, in a log of its own."""

    def __init__(self, folder: Path, **sections: Any) -> None:  # noqa: ANN401 - as `small`
        self.folder = folder
        self.sections = sections
        self.runs = 0

    def __call__(self, events: Sequence[Interaction]) -> list[float]:
        self.runs += 1
        settings = small(self.folder / f"{self.runs}.db", **self.sections)
        fill(settings, [message(event) for event in events])
        run(settings)
        with connect(settings) as log:
            return [decode(record.value, Score, what="score").score for record in read(log, "scores", 0)]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"local": "all", "inner_steps": 2, "loss": "squared", "order": "second"}},
    ],
    ids=["closed form", "gradient steps"],
)
def test_a_rating_changes_no_score_up_to_its_own(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Micro-batches are 16, meta-updates 8: places at the beginning, at the end and inside of both."""
    assert_no_leak(Runner(tmp_path, **sections), EVENTS, [0, 15, 20, 24, 39, 50])


def test_a_step_that_appends_before_it_scores_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from consumers import step, worker

    original = worker.Worker._take

    def peeking(self: worker.Worker, sets: Any, event: Any, source: Any, before: Any) -> step.Taken:  # noqa: ANN401
        original(self, sets, event, source, before)
        after = sets.get(event.user)
        history = history_of(after)
        earlier = after.earlier if after else 0
        return step.Taken(event, source, earlier, Task(event.user, history.items, history.ratings, [event.item], [event.rating]))

    monkeypatch.setattr(worker.Worker, "_take", peeking)
    with pytest.raises(Leak, match="the score of event 20"):
        assert_no_leak(Runner(tmp_path), EVENTS, [20])
