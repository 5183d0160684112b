"""A second trainer: it stands by, takes over however the first one ends, and a trainer that was fenced goes back to standing by."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from consumers.lineage import Lineage
from consumers.opening import connect, topics_of
from consumers.replacing import rollback
from consumers.settings import Settings
from consumers.status import status_of
from consumers.stop import Stop
from consumers.system import System
from consumers.trainer import Trainer
from consumers.training import REST_SECONDS, run_trainer
from streaming.embedded.reader import EmbeddedReader
from streaming.errors import Fenced
from streaming.log import Message, TopicPartition
from tests.nursery import Nursery
from tests.small_runs import Stream, fill, run, small
from tests.test_live_kill import waiting
from tests.test_promises import findings

SESSION_MS = 1000
STREAM = Stream(600, seed=14)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return small(
        tmp_path / "log.db",
        worker={"poll_timeout_ms": 20, "linger_ms": 2},
        trainer={"snapshot_every": 10},
        log={"session_timeout_ms": SESSION_MS},
    )


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def until(holds: Callable[[], bool], seconds: float = 20.0) -> float:
    """Wait until it holds; returns how long that took."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() - begin < seconds, "it never came to be"
        time.sleep(0.02)
    return time.monotonic() - begin


class Process:
    """A trainer in a thread of this process, whose health can be looked at."""

    def __init__(self, settings: Settings, stop: Stop) -> None:
        self.stop = stop
        self.system: System | None = None
        self.error: BaseException | None = None
        self._settings = settings
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with System(self._settings) as system:
                self.system = system
                run_trainer(system, self.stop)
        except BaseException as error:  # noqa: BLE001  shown by `end`
            self.error = error

    def conditions(self) -> dict[str, str]:
        """The details of /readyz; empty while it is not ready."""
        ready = {} if self.system is None else self.system.health.ready()
        return {name: condition.detail for name, condition in ready.items()} if all(each.ok for each in ready.values()) else {}

    def holds(self, partitions: int) -> bool:
        return self.conditions().get("assignment") == f"{partitions} partitions"

    def end(self) -> None:
        self.stop.ask()
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.error is None


def test_the_second_is_ready_as_a_stand_by_and_takes_over_at_once_when_the_first_is_asked_to_stop(settings: Settings) -> None:
    fill(settings, STREAM.messages[:50])
    run(settings)
    with Stop() as one, Stop() as other, capture_logs() as logs:
        first = Process(settings, one)
        until(lambda: first.holds(1))
        second = Process(settings, other)
        until(lambda: second.holds(0))
        last = last_version(settings)
        assert second.conditions()["model"] == f"version {last}"
        time.sleep(0.3)
        assert first.holds(1), "whoever joins takes nothing away"
        first.end()
        assert until(lambda: second.holds(1)) < SESSION_MS / 1000
        second.end()
    assert [entry["event"] for entry in logs].count("standing by") == 1
    assert [entry["event"] for entry in logs].count("training") == 2


def test_a_trainer_that_somebody_fenced_goes_on_from_the_version_that_was_gone_back_to(settings: Settings) -> None:
    fill(settings, STREAM.messages[:100])
    run(settings)
    then = last_version(settings)
    fill(settings, STREAM.messages[100:160])
    run(settings)
    with Stop() as stop, capture_logs() as logs:
        trainer = Process(settings, stop)
        until(lambda: trainer.holds(1))
        with connect(settings) as log:
            made = rollback(log, settings, topics_of(settings), then)
            # An update comes, of which nothing but its place counts here: the verifier is not asked.
            log.append([repeated(settings)])
        until(lambda: last_version(settings) > made.version)
        assert parents(settings)[last_version(settings)] == made.version
        trainer.end()
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["fenced; standing by"]


def repeated(settings: Settings) -> Message:
    """The first update once more."""
    with connect(settings) as log, log.reader() as reader:
        reader.assign({TopicPartition("updates", 0): 0})
        (record,) = reader.poll(1)
    return Message(record.topic, record.key, record.value, 0)


def lineage(settings: Settings) -> Lineage:
    with connect(settings) as log:
        return Lineage(log, topics_of(settings))


def unfolded(settings: Settings) -> bool:
    """Whether updates wait for a trainer."""
    with connect(settings) as log:
        model = status_of(log, settings, topics_of(settings)).model
    return model is None or model.waiting > 0


def last_version(settings: Settings) -> int:
    return lineage(settings).last


def parents(settings: Settings) -> dict[int, int | None]:
    return {number: place.header.parent for number, place in lineage(settings).kept.items()}


def test_killed_paused_and_stopped_trainers_are_taken_over_from_and_none_ends_by_itself(nursery: Nursery, settings: Settings) -> None:
    """Whoever is at work, the verifier finds every update folded once; each trainer but the last is put out of work in a way of its own."""
    sent = 0

    def burst() -> None:
        nonlocal sent
        fill(settings, STREAM.messages[sent : sent + 40])
        sent += 40
        until(lambda: not waiting(settings) and not unfolded(settings))
        assert findings(settings) == []

    fill(settings, [])
    worker = nursery.start(settings, role="worker")
    first = nursery.start(settings, role="trainer")
    burst()
    second = nursery.start(settings, role="trainer")
    burst()
    os.kill(first, signal.SIGKILL)
    burst()
    third = nursery.start(settings, role="trainer")
    burst()
    # The second is at work now. Paused for longer than its session it loses the lock; back, it stands by.
    os.kill(second, signal.SIGSTOP)
    burst()
    os.kill(second, signal.SIGCONT)
    burst()
    with connect(settings) as log:
        made = rollback(log, settings, topics_of(settings), sorted(Lineage(log, topics_of(settings)).kept)[-5])
    burst()
    assert parents(settings)[min(number for number in parents(settings) if number > made.version)] == made.version
    # So the second lives and takes over, at once.
    os.kill(third, signal.SIGTERM)
    burst()
    for pid in (worker, second):
        os.kill(pid, signal.SIGTERM)


def test_a_trainer_paused_inside_a_round_commits_nothing(settings: Settings) -> None:
    fill(settings, STREAM.messages[:64])
    run(settings)
    with System(settings) as system:
        log = system.log
        paused, other = (Trainer(log, settings, system.topics, system.learner(), system.metrics) for _ in range(2))
        log.append([repeated(settings)])
        before = last_version(settings)
        with pytest.raises(Fenced):
            paused.step()
        assert last_version(settings) == before
        assert other.step() == 1
        assert last_version(settings) == before + 1


def test_it_is_heard_of_between_the_rounds(settings: Settings) -> None:
    fill(settings, STREAM.messages[:64])
    run(settings)
    with System(settings) as system:
        trainer = system.trainer()
        system.log.append([repeated(settings)] * 6)
        beats: list[None] = []
        assert trainer.step(0.0, lambda: beats.append(None)) == 6
        assert len(beats) >= 6


def test_it_rests_only_once_it_has_read_all_there_is(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker gives what fits into an answer, of large updates a few: it once rested after these, and fell ever further behind."""
    fill(settings, STREAM.messages[:64])
    run(settings)
    before, poll, wait = last_version(settings), EmbeddedReader.poll, Stop.wait

    def rest(stop: Stop, seconds: float) -> None:
        if seconds == REST_SECONDS:
            stop.ask()
        wait(stop, seconds)

    monkeypatch.setattr(EmbeddedReader, "poll", lambda reader, most, *how, **more: poll(reader, min(most, 3), *how, **more))
    monkeypatch.setattr(Stop, "wait", rest)
    with System(settings) as system, Stop() as stop:
        system.log.append([repeated(settings)] * 10)
        run_trainer(system, stop)
    assert last_version(settings) == before + 10
