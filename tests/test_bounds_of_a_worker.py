"""What a worker keeps in memory and commits at once is bounded, whatever is sent, and what it cannot have is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import streaming.store.restoration
from consumers import lockstep
from consumers.live import read
from consumers.requests import Requests
from consumers.stop import Stop
from consumers.system import System
from consumers.tables import PENDING_AT_ONCE
from streaming.embedded.writer import EmbeddedWriter
from streaming.errors import BrokerUnreachable, OffsetOutOfRange
from streaming.events import Support
from streaming.log import Message, TopicPartition
from streaming.store.restoration import Restoration
from streaming.support import SupportSets
from tests.small_runs import SMALL, T0, Stream, fill, packed, run, small
from tests.test_promises import findings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from consumers.settings import Settings
    from streaming.log import Assignment, Commit

LETTERS = 3 * PENDING_AT_ONCE + 7


def letters(settings: Settings) -> int:
    with System(settings) as system:
        return system.log.bounds([TopicPartition("dead-letters", 0)])[TopicPartition("dead-letters", 0)].end


@pytest.mark.parametrize("value", [b"\xc1", None], ids=["malformed", "null"])
@pytest.mark.parametrize("events", [0, 40])
def test_however_many_profiles_wait_each_step_takes_a_bounded_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes | None, events: int
) -> None:
    """And all are dealt with once, at the end of a run too."""
    settings, most, begin = small(tmp_path / "log.db"), [0], EmbeddedWriter.begin
    fill(settings, [Message("users", b"x%d" % number, value) for number in range(LETTERS)])
    fill(settings, Stream(events, garbage=0.0).messages)

    def begun(
        writer: EmbeddedWriter,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> Commit:
        most[0] = max(most[0], len(messages))
        return begin(writer, messages, offsets, owner)

    monkeypatch.setattr(EmbeddedWriter, "begin", begun)
    run(settings)
    run(settings)
    assert letters(settings) == (LETTERS if value else 0)
    assert PENDING_AT_ONCE <= most[0] < PENDING_AT_ONCE + 100
    assert findings(settings) == []


def test_letters_of_items_wait_with_whoever_reports_them_and_nobody_else(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"partitions": 2})
    fill(settings, Stream(20, garbage=0.0, partitions=2).messages)
    with System(settings) as system:
        here, there = system.worker(), system.worker()
        here.tables.assign([0])
        there.tables.assign([1])
        here.open(0)
        there.open(1)
        fill(settings, [Message("items", b"i%d" % number, b"\xc1") for number in range(PENDING_AT_ONCE + 300)])
        for worker in (here, there):
            worker.tables.advance()
        items = TopicPartition("items", 0)
        assert len(here.tables._waiting[items]) == PENDING_AT_ONCE + 300
        assert items not in there.tables._waiting
        here._compute(0, [])
        here.complete(0, settings.group_id)
        # Taken over, what was not reported yet is reported by who has the partition now.
        there.tables.assign([0, 1])
        there.tables.advance()
        assert len(there.tables._waiting[items]) == 300
        there.tables.assign([1])
        assert items not in there.tables._waiting


def test_a_silent_broker_is_waited_for_while_a_partition_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(40, garbage=0.0).messages)
    run(settings)
    monkeypatch.setattr(streaming.store.restoration, "_PATIENCE_SECONDS", 0.1)
    with System(settings) as system:
        changelog = TopicPartition("support", 0)
        restoration = Restoration(system.log, changelog, SupportSets(4), system.log.bounds([changelog])[changelog])
        monkeypatch.setattr(restoration._reader, "poll", lambda *_, **__: [])
        with pytest.raises(BrokerUnreachable, match="although the end has not been reached"):
            restoration.advance(1.0)
        restoration.close()


def test_requests_are_read_as_fast_as_they_are_answered(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker=SMALL["worker"] | {"micro_batch": 256})
    fill(settings, Stream(20, garbage=0.0).messages)
    asked = {"request": "r", "user": "ann", "n": 1, "timestamp": T0}
    fill(settings, [Message("requests", b"ann", msgspec.msgpack.encode(asked), 0) for _ in range(1000)])
    with System(settings) as system, system.log.reader() as reader:
        worker = system.worker()
        worker.tables.assign([0])
        worker.tables.advance()
        position = worker.open(0)
        requests = Requests(worker, 1_000_000)
        events = TopicPartition("interactions", 0)
        reader.assign({events: position} | requests.start(worker.held))
        most = 0
        for _ in range(8):
            batches, _ = read(system, reader, requests.without_full(worker.held, "interactions"), 0.0, 0.0, stepped=False)
            requests.take(batches.get(TopicPartition("requests", 0), []))
            most = max(most, len(requests))
        assert requests.at_once <= most <= requests.at_once + 256
        assert reader.position(events) == 20, "interactions are read on"


def test_a_support_set_of_the_longest_ids_finds_room_whatever_the_limit_of_records_is(tmp_path: Path) -> None:
    settings = small(
        tmp_path / "log.db",
        topics={"partitions": 1, "max_record_bytes": 4096},
        worker=SMALL["worker"] | {"support_size": 100},
    )
    user = "u" * 256
    events = [packed(user=user, item=f"{number:04d}".ljust(256, "i"), timestamp=T0 + number) for number in range(150)]
    fill(settings, [Message("interactions", user.encode(), value, 0) for value in events])
    run(settings)
    assert findings(settings) == []
    with System(settings) as system:
        worker = system.worker()
        worker.open(0)
        support = worker.held[0].support.get(user)
        assert isinstance(support, Support)
        assert len(support.interactions) == 100


@pytest.mark.parametrize("skip", [False, True])
def test_events_that_retention_took_before_they_were_scored_are_said_and_passed_over_if_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, skip: bool
) -> None:
    settings = small(tmp_path / "log.db", worker=SMALL["worker"] | {"skip_lost": skip})
    fill(settings, Stream(96, garbage=0.0).messages)
    with System(settings) as system, Stop() as stop:
        lockstep.run(system, stop, until_end=True, limit=32)
    with System(settings) as system:
        bounds = system.log.bounds
        # As retention by time leaves it, whose clock no test can wait for.
        monkeypatch.setattr(
            system.log,
            "bounds",
            lambda tps: {tp: each._replace(start=64) if tp.topic == "interactions" else each for tp, each in bounds(tps).items()},
        )
        worker = system.worker()
        if not skip:
            with pytest.raises(OffsetOutOfRange, match=r"offsets 32 to 64 were removed.*worker\.skip_lost"):
                worker.open(0)
            return
        assert worker.open(0) == 64
        # Taken over again before a step was committed behind them, they are lost once.
        worker.give_up(0).close()
        assert worker.open(0) == 64
        value, (tp, committed) = system.metrics.registry.get_sample_value, (TopicPartition("interactions", 0), system.log.committed)
        assert value("coldstream_events_lost_total") == 0
        worker.tables.assign([0])
        with system.log.reader() as reader:
            reader.assign({tp: 64})
            worker.step(0, reader.poll(16), settings.group_id)
        assert value("coldstream_events_lost_total") == 32
        assert committed(settings.group_id, [tp]) == {tp: 80}


def test_a_lower_bound_on_users_is_come_to_by_and_by(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(200, garbage=0.0).messages)
    run(settings)
    lower = small(tmp_path / "log.db", worker=SMALL["worker"] | {"max_users": 10})
    fill(lower, [Message("interactions", b"new%d" % number, packed(user=f"new{number}"), 0) for number in range(60)])
    run(lower)
    with System(lower) as system:
        worker = system.worker()
        worker.open(0)
        assert len(worker.held[0].support) == 10


def test_what_no_contract_names_is_counted_wherever_it_stands(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", model=SMALL["model"] | {"memory": "off"})
    extra = msgspec.msgpack.encode({"features": {"job": "x"}, "colour": "red"})
    fill(settings, [Message("users", b"ann", extra), *Stream(40, garbage=0.0).messages])
    with System(settings) as system:
        worker = system.worker()
        worker.tables.assign([0])
        worker.tables.advance()
        with system.log.reader() as reader:
            reader.assign({TopicPartition("interactions", 0): worker.open(0)})
            worker.step(0, reader.poll(16), settings.group_id)
        value = system.metrics.registry.get_sample_value
        assert value("coldstream_unknown_fields_total") == 1
        assert value("coldstream_memory_writes_total") == 0, "memories are off"
        assert value("coldstream_adaptations_total") == 16
