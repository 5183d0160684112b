"""A live worker whose loop a test turns by hand, over a log of several partitions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from consumers.moving import Moving
from consumers.requests import Requests
from consumers.settings import Settings
from consumers.system import System
from streaming.errors import Fenced, StoreDamaged
from streaming.log import Assignment, TopicPartition
from tests.small_runs import small
from tests.test_promises import findings
from tests.verify import Finding

PARTITIONS = 4


class Hand:
    """A live worker whose loop is turned by hand."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        self.system = self._stack.enter_context(System(settings))
        self.worker = self.system.worker()
        self.reader = self._stack.enter_context(self.system.log.reader())
        requests = Requests(self.worker, self.system.topics["scores"].max_record_bytes)
        self.moving = Moving(self.system, self.worker, requests, self.reader)
        self._stack.callback(self.moving.close)
        self.member = self._stack.enter_context(self.system.log.member(settings.group_id, "interactions"))
        self.restored: dict[int, int] = {}
        self.gather: Callable[[], bool] = lambda: True

    def share(self) -> Assignment:
        """The first half of a turn: partitions come and go, and are restored for a while."""
        assignment = self.member.assignment()
        self.moving.follow(assignment, lambda: None)
        taking = dict(self.moving._takeovers)
        self.moving.advance(lambda: None)
        self.restored |= {number: takeover.records for number, takeover in taking.items() if number in self.worker.held}
        return assignment

    def score(self, assignment: Assignment, most: int = 16) -> int:
        """The second half: at most so many events; returns how many."""
        events = [TopicPartition("interactions", number) for number in self.worker.held]
        records = sorted(self.reader.poll(most, only=events), key=attrgetter("partition", "offset"))
        for number, batch in groupby(records, attrgetter("partition")):
            try:
                self.worker.begin(number, list(batch), assignment, behind=len(records) == most and self.gather())
            except (Fenced, StoreDamaged) as error:
                self.moving.give_up_step(number, error)
                break
        if not records:
            self.finish()
            self.moving.idle()
        return len(records)

    def finish(self) -> None:
        """Wait for what is computed and what is under way."""
        assignment = self.member.assignment()
        for number in list(self.worker.held):
            try:
                self.worker.complete(number, assignment)
            except (Fenced, StoreDamaged) as error:
                self.moving.give_up_step(number, error)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.score(self.share())

    def until_idle(self) -> None:
        """Turn until nothing is restored and nothing waits."""
        while self.score(self.share()) or self.moving.busy or self.moving._void:
            pass

    def leave(self) -> None:
        self._stack.close()


def settings_of(folder: Path, name: str = "", *, paused: bool = False, **worker: Any) -> Settings:  # noqa: ANN401 - whatever a setting may be
    place = {"state_dir": str(folder / name)} if name else {}
    return small(
        folder / "log.db",
        topics={"partitions": PARTITIONS},
        worker=place | worker,
        rehearsal={"users": 0},
        log={"session_timeout_ms": 1000 if paused else 60_000},
    )


def broken(settings: Settings) -> list[Finding]:
    """Broken promises, but for that of the trainer, which there is none of here."""
    return [finding for finding in findings(settings) if finding.promise != "c"]
