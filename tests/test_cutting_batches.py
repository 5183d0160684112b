"""Where a live worker cuts its micro-batches: nobody waits for what is not there, and what came during a long step is one of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from consumers import live
from consumers.live import read
from consumers.settings import Settings, WorkerSettings
from streaming.log import Reader, Record, TopicPartition
from streaming.metrics import Metrics

if TYPE_CHECKING:
    from consumers.system import System

SYSTEM = cast("System", SimpleNamespace(settings=Settings(worker=WorkerSettings(linger_ms=500, micro_batch=256)), metrics=Metrics()))
LONG_AGO = -1000.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does meanwhile."""
    monkeypatch.setattr(live, "ANSWER_SECONDS", 0.5)


class Answers(Reader):
    """Gives so many records for each poll that does not have to wait longer than it may, then none."""

    def __init__(self, *answers: tuple[float, int]) -> None:
        self.answers = list(answers)
        self.given = 0

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        raise NotImplementedError

    def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
        seconds, count = self.answers[0] if self.answers else (timeout + 1.0, 0)
        time.sleep(min(seconds, timeout))
        if seconds > timeout:
            return []
        self.answers.pop(0)
        self.given += min(count, max_records)
        return [Record("interactions", 0, self.given - place, 0, None, None) for place in range(min(count, max_records))]

    def position(self, tp: TopicPartition) -> int:
        return self.given

    def close(self) -> None:
        pass


def count(answers: Answers, cut: float, wait: float = 2.0, *, stepped: bool = True) -> tuple[int, bool, float]:
    """How many records are read, whether the partition is behind, and the seconds that it took."""
    began = time.monotonic()
    batches, behind = read(SYSTEM, answers, None, cut, wait, stepped=stepped)
    return sum(map(len, batches.values())), behind, time.monotonic() - began


def test_what_came_during_a_long_step_is_asked_for_where_only_the_first_of_it_are_at_hand() -> None:
    assert count(Answers((0.0, 6), (0.001, 80)), LONG_AGO)[:2] == (86, False)


def test_one_who_comes_when_there_was_nothing_to_do_waits_for_nobody() -> None:
    found, behind, seconds = count(Answers((0.1, 1), (0.001, 80)), LONG_AGO, stepped=False)
    assert (found, behind) == (1, False)
    assert seconds < 2


def test_nobody_waits_for_more_than_a_micro_batch_or_where_a_step_is_computed_ahead() -> None:
    assert count(Answers((0.0, 300), (0.0, 80)), LONG_AGO)[:2] == (256, True)
    assert count(Answers((0.0, 6), (0.0, 80)), 0.0, wait=0.0, stepped=False)[:2] == (6, False)


def test_what_comes_within_a_linger_of_the_last_cut_is_waited_for() -> None:
    found, _, seconds = count(Answers((0.0, 6), (0.05, 7), (0.05, 8), (5.0, 9)), time.monotonic())
    assert found == 21
    assert 0.3 < seconds < 5
