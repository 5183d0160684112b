"""What a run comes to whatever it is interrupted by, and what it says of events that were lost."""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from consumers import lockstep, tables
from consumers.live import open_worker, run_worker, score
from consumers.opening import connect, topics_of
from consumers.requests import Requests
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from streaming.embedded import EmbeddedLog
from streaming.embedded.file import OFFSET_BITS
from streaming.errors import OffsetOutOfRange
from streaming.log import Message, Record, TopicPartition
from streaming.scored import read_run
from streaming.store.held import InMemory
from tests.small_runs import SMALL, Stream, fill, profile, run, small

EVENTS = TopicPartition("interactions", 0)
HOUR = 3_600_000


def digest(settings: Settings) -> str:
    with connect(settings) as log:
        return read_run(log, settings.event_limits()).scores_sha256


@pytest.mark.parametrize("stops", [[3], [1, 4], [2, 2, 7]])
@pytest.mark.parametrize("partitions", [2, 5])
def test_stopped_with_several_partitions_the_same_steps_follow(partitions: int, stops: list[int], tmp_path: Path) -> None:
    """Promise (f), of more partitions than one: whose turn it is, is for what is committed to say."""
    stream, found = Stream(260, seed=11, partitions=partitions), []
    for name, asked in (("calm", []), ("stopped", stops)):
        settings = small(tmp_path / f"{name}.db", topics={"partitions": partitions})
        fill(settings, stream.profiles)
        fill(settings, stream.messages)
        for at in asked:
            with Stop() as stop, System(settings) as system:
                steps = list[object]()

                def after(step: lockstep.Progress, steps: list[object] = steps, stop: Stop = stop, at: int = at) -> None:
                    steps.append(step)
                    if len(steps) == at:
                        stop.ask()

                lockstep.run(system, stop, until_end=True, on_step=after)
                assert len(steps) == at
        run(settings)
        found.append(digest(settings))
    assert found[0] == found[1]


def marked(settings: Settings, path: Path) -> None:
    """An offset without a record at the end, as a transaction's mark is on Kafka."""
    (at,) = fill(settings, [Message("interactions", b"x", b"x", 0)])
    with sqlite3.connect(path) as db:
        (base,) = db.execute("SELECT base FROM topics WHERE name = 'interactions'").fetchone()
        assert db.execute("DELETE FROM records WHERE id = ?", (base << OFFSET_BITS | at,)).rowcount == 1
    db.close()


def test_marks_of_the_broker_do_not_cut_micro_batches(tmp_path: Path) -> None:
    """Fifteen events and a mark are no micro-batch of sixteen, whenever somebody looks."""
    stream, sizes = Stream(192, seed=5, garbage=0.0).messages, dict[str, list[int]]()
    parts = [stream[begin : begin + 15] for begin in range(0, 192, 15)]
    whole, followed = small(tmp_path / "whole.db"), small(tmp_path / "followed.db")
    for part in parts:
        fill(whole, part)
        marked(whole, tmp_path / "whole.db")
    with Stop() as stop, System(whole) as system:
        lockstep.run(system, stop, until_end=True, on_step=lambda done: sizes.setdefault("whole", []).append(done.step.events))
    left = list(parts)
    with Stop() as stop, System(followed) as system:

        def wait(seconds: float) -> bool:
            if not left:
                stop.ask()
                return True
            fill(followed, left.pop(0))
            marked(followed, tmp_path / "followed.db")
            return False

        stop.wait = wait  # type: ignore[method-assign]
        lockstep.run(system, stop, until_end=False, on_step=lambda done: sizes.setdefault("followed", []).append(done.step.events))
    assert sizes["whole"] == sizes["followed"] == [16] * 12
    assert digest(whole) == digest(followed)


class Clock:
    now = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now


def lost_some(settings: Settings, path: Path, scored: int, lost: int) -> EmbeddedLog:
    """A log of which the first ``scored`` events were scored, and the ``lost`` after them were removed by retention before they were."""
    clock, stream = Clock(), Stream(scored + lost, garbage=0.0).messages
    log = EmbeddedLog(path, clock=clock)
    log.create(topics_of(settings).values())
    log.append(stream[:scored])
    with Stop() as stop, System(settings, log=log) as system:
        lockstep.run(system, stop, until_end=True)
    log.append(stream[scored:])
    clock.now += 2 * HOUR
    for _ in range(8):
        clock.now += 2000
        log.append([Message("dead-letters", b"x", b"x", 0)])
    assert log.bounds([EVENTS])[EVENTS].start == scored + lost
    return log


@pytest.mark.parametrize("skip", [False, True])
def test_few_events_that_were_lost_at_the_end_are_lost_too(tmp_path: Path, *, skip: bool) -> None:
    sections: dict[str, Any] = {"topics": {"partitions": 1, "retention_ms": {"interactions": HOUR}}, "worker": {"skip_lost": skip}}
    settings = small(tmp_path / "log.db", **sections)
    with lost_some(settings, tmp_path / "log.db", 32, 14) as log, System(settings, log=log) as system:
        worker = system.worker()
        if not skip:
            with pytest.raises(OffsetOutOfRange, match=r"offsets 32 to 46 were removed.*worker\.skip_lost"):
                worker.open(0)
            return
        assert worker.open(0) == 46
        assert worker.held[0].lost == 14


@pytest.mark.parametrize("skip", [False, True])
def test_a_worker_that_retention_overtakes_goes_on_where_it_is_told_to(tmp_path: Path, *, skip: bool) -> None:
    """It stood still for two hours, as a laptop that was closed does."""
    sections: dict[str, Any] = {
        "topics": {"partitions": 1, "retention_ms": {"interactions": HOUR}},
        "worker": {"skip_lost": skip, "poll_timeout_ms": 1, "linger_ms": 0},
    }
    settings, clock, stream = small(tmp_path / "log.db", **sections), Clock(), Stream(400, garbage=0.0).messages
    with EmbeddedLog(tmp_path / "log.db", clock=clock) as log:
        log.create(topics_of(settings).values())
        log.append(stream[:32])

        class Turns(Stop):
            turns = 0

            def __bool__(self) -> bool:
                self.turns += 1
                if self.turns == 60:
                    log.append(stream[32:332])
                    clock.now += 2 * HOUR
                    for message in stream[332:362]:
                        clock.now += 2000
                        log.append([message])
                return self.turns > 400

        with System(settings, log=log) as system, structlog.testing.capture_logs() as said:
            if not skip:
                with pytest.raises(OffsetOutOfRange, match=r"were removed by retention before they were scored; with worker\.skip_lost"):
                    run_worker(system, Turns())
                return
            run_worker(system, Turns())
            assert system.metrics.registry.get_sample_value("coldstream_events_lost_total") == 300
        assert log.committed(settings.group_id, [EVENTS]) == {EVENTS: 362}
        assert [line["first_kept"] for line in said if line["event"] == "events lost to retention"] == [332]


def test_what_was_computed_is_committed_where_retention_overtakes_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be read again."""
    settings = small(tmp_path / "log.db", worker={"skip_lost": True, "poll_timeout_ms": 1})
    fill(settings, Stream(64, garbage=0.0).messages)
    with Stop() as stop, System(settings) as system, ExitStack() as stack:
        opened = open_worker(system, stack)
        worker, reader, moving = opened[0], opened[2], opened[4]
        poll, at = reader.poll, list[dict[TopicPartition, int]]()

        def overtaken(*of: Any) -> list[Record]:  # noqa: ANN401
            if worker.ahead:
                raise OffsetOutOfRange("position 16 is not within the records kept, 48 to 64")
            return poll(*of)

        def start_over() -> None:
            at.append(system.log.committed(settings.group_id, [EVENTS]))
            stop.ask()

        monkeypatch.setattr(reader, "poll", overtaken)
        monkeypatch.setattr(moving, "start_over", start_over)
        monkeypatch.setattr("consumers.live.overtaken", lambda *_: True)
        score(system, stop, *opened)
        assert at == [{EVENTS: 16}]


@pytest.mark.parametrize("turns", [12, 13, 14, 15, 60])
def test_a_live_worker_behind_a_backlog_commits_several_steps_together(tmp_path: Path, turns: int) -> None:
    """Four of 16 events at once, and what is left when no whole micro-batch is; stopped in the middle, it commits what is computed."""

    class Turns(Stop):
        left = turns

        def __bool__(self) -> bool:
            self.left -= 1
            return self.left < 0

    settings = small(tmp_path / "log.db", worker=SMALL["worker"] | {"poll_timeout_ms": 1, "linger_ms": 0})
    fill(settings, Stream(330, garbage=0.0).messages)
    with Turns() as stop, System(settings) as system, ExitStack() as stack:
        score(system, stop, *open_worker(system, stack))
        told = system.metrics.registry.get_sample_value
        steps, events = told("coldstream_micro_batch_events_count"), told("coldstream_micro_batch_events_sum")
        assert system.log.committed(settings.group_id, [EVENTS]) == {EVENTS: events}
        if turns == 60:
            assert (steps, events) == (21, 330)
            assert told("coldstream_commits_total") == 6
        else:
            assert steps is not None
            assert 4 < steps < 16
            assert told("coldstream_commits_total") == -(-steps // 4)


def test_a_log_that_ends_before_what_was_read_of_it_ends_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing behind which it could go on, and no use in looking again."""
    settings = small(tmp_path / "log.db", worker={"skip_lost": True, "poll_timeout_ms": 1})
    fill(settings, Stream(32, garbage=0.0).messages)
    with Stop() as stop, System(settings) as system, ExitStack() as stack:
        opened = open_worker(system, stack)

        poll = opened[2].poll

        def beyond(*of: Any) -> list[Record]:  # noqa: ANN401
            if opened[0].held:
                raise OffsetOutOfRange("position 90 is not within the records kept, 0 to 32")
            return poll(*of)

        monkeypatch.setattr(opened[2], "poll", beyond)
        with pytest.raises(OffsetOutOfRange, match="position 90"):
            score(system, stop, *opened)


def test_the_group_hears_of_a_worker_that_reads_many_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than a session where there are many, and whoever is not heard of meanwhile loses what it was given."""
    monkeypatch.setattr(tables, "READ_AT_ONCE", 10)
    settings = small(tmp_path / "log.db")
    fill(settings, [profile("users", f"u{number}", {"job": "x"}) for number in range(200)])
    with Stop() as stop, System(settings) as system, ExitStack() as stack:
        worker, requests, reader, member, moving = open_worker(system, stack)
        asked, heard = member.assignment, list[int]()

        def assignment() -> Any:  # noqa: ANN401
            heard.append(len(worker.model.users.features))
            if 0 in worker.held:
                stop.ask()
            return asked()

        monkeypatch.setattr(member, "assignment", assignment)
        score(system, stop, worker, requests, reader, member, moving)
    assert len(set(heard)) > 20, "while they are read"


def test_what_is_kept_of_users_goes_with_their_partition(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(64, garbage=0.0, seed=4).messages)
    with System(settings) as system:
        worker = system.worker()
        worker.tables.assign([0])
        with system.log.reader() as reader:
            reader.assign({EVENTS: worker.open(0)})
            worker.step(0, reader.poll(48), settings.group_id)
        assert worker.histories._kept
        worker.give_up(0).close()
        assert not worker.histories._kept


def test_requests_that_were_lost_are_said_to_be_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [])
    with System(settings) as system:
        asked, tp = Requests(system.worker(), 1_000_000), TopicPartition("requests", 0)
        bounds = system.log.bounds
        monkeypatch.setattr(system.log, "committed", lambda _group, _tps: {tp: 2})
        monkeypatch.setattr(system.log, "bounds", lambda tps: {each: found._replace(start=5, end=5) for each, found in bounds(tps).items()})
        with structlog.testing.capture_logs() as said:
            for _ in range(3):
                assert asked.start([0]) == {tp: 5}
    assert [line["unanswered"] for line in said if "requests lost" in line["event"]] == [3]


def test_who_was_silent_for_longest_is_found_at_once_however_many_went_before() -> None:
    held = InMemory(ordered=True)
    assert type(held._values) is not dict, "a dictionary that is emptied at its front passes over what was there each time"
    held.begin_anew("a test")
    assert type(held._values) is not dict
