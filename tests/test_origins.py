"""What a replay can read, files and topics: one suite for all, then the order in which a topic's partitions are merged."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.origins import FileOrigin, Item, Origin, TopicOrigin
from streaming.brokers import open_log
from streaming.codec import decode, encode
from streaming.errors import LogUnavailable, SourceError, UnknownTopic
from streaming.events import Interaction, ReplayPosition
from streaming.log import Log, Message, Record, Topic, TopicPartition
from streaming.partitioner import partition_of
from streaming.sources import interaction_source
from streaming.topicsource import READ_AHEAD, TopicSource
from tests.reading_log import ReadingLog, _Reading

T0 = 880_000_000_000
EVENTS = [Interaction(f"u{n * 7 % 5}", f"i{n}", float(n % 5 + 1), T0 + 1000 * (n * 13 % 40)) for n in range(40)]
BAD = (3, 17)
Make = Callable[[Path], Origin]


def lines() -> str:
    rows = [json.dumps(msgspec.to_builtins(event)) for event in EVENTS]
    for n in BAD:
        rows[n] = rows[n].replace('"rating"', '"stars"')
    return "\n".join(rows)


def of_file(*, packed: bool = False, by_time: bool = False) -> Make:
    def make(folder: Path) -> Origin:
        path = folder / ("log.jsonl.gz" if packed else "log.jsonl")
        path.write_bytes(gzip.compress(lines().encode()) if packed else lines().encode())
        return FileOrigin(interaction_source(path), sort_by_time=by_time)

    return make


def messages(partitions: int) -> list[Message]:
    found = []
    for n, event in enumerate(EVENTS):
        value = encode(event).replace(b"rating", b"stars!") if n in BAD else encode(event)
        found.append(Message("history", event.user.encode(), value, partition_of(event.user.encode(), partitions)))
    return found


def of_topic(partitions: int, *, gap: int | None = None) -> Make:
    def make(folder: Path) -> Origin:
        log: Log = open_log(f"embedded:{folder / 'log.db'}") if gap is None else GappyLog([Topic("history", partitions)], gap=gap)
        if gap is None:
            log.create([Topic("history", partitions)])
        log.append(messages(partitions))
        return TopicOrigin(TopicSource(log, "history"))

    return make


class GappyLog(ReadingLog):
    """Compaction and Kafka's markers leave gaps between offsets; this one can be read from any of them on."""

    def reader(self) -> Reading:
        return Reading(self)


class Reading(_Reading):
    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        self.read = {tp: sum(record.offset < start for record in self.log.records[tp]) for tp, start in positions.items()}


MAKES = {
    "lines": of_file(),
    "lines, gzip": of_file(packed=True),
    "lines by time": of_file(by_time=True),
    "a topic": of_topic(1),
    "a topic of 4 partitions": of_topic(4),
    "a topic with gaps": of_topic(3, gap=2),
}
every = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())


def shown(item: Item) -> tuple[bytes | None, bytes | None, int | None, int]:
    return item.record.key, item.record.value, item.timestamp, item.record.offset


def items(origin: Origin, position: ReplayPosition | None = None) -> list[Item]:
    return [item for item, _ in origin.items(position or origin.beginning("interactions"))]


@every
def test_every_entry_comes_once_with_its_time_and_bad_ones_without(make: Make, tmp_path: Path) -> None:
    found = items(make(tmp_path))
    good = {event.item: event for n, event in enumerate(EVENTS) if n not in BAD}
    assert len(found) == len(EVENTS)
    timed = [item for item in found if item.timestamp is not None]
    taken = [msgspec.msgpack.decode(item.record.value or b"", type=Interaction) for item in timed]
    assert {event.item: event for event in taken} == good
    assert [(item.record.key, item.timestamp) for item in timed] == [(event.user.encode(), event.timestamp) for event in taken]


@every
def test_reading_goes_on_from_any_place_and_a_place_survives_the_codec(make: Make, tmp_path: Path) -> None:
    origin = make(tmp_path)
    start = origin.beginning("interactions")
    whole = items(origin)
    place = origin.place(start)
    for read, item in enumerate(whole, 1):
        place.after(item)
        position = msgspec.structs.replace(start, entries=read, **place.fields())
        kept = decode(encode(position), ReplayPosition, what="the position")
        assert [shown(each) for each in items(origin, kept)] == [shown(each) for each in whole[read:]]


@every
def test_the_share_rises_to_one(make: Make, tmp_path: Path) -> None:
    origin = make(tmp_path)
    shares = [share for _, share in origin.items(origin.beginning("interactions"))]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1


@every
def test_the_newest_event_is_that_of_the_latest_time(make: Make, tmp_path: Path) -> None:
    assert make(tmp_path).newest() == max(event.timestamp for n, event in enumerate(EVENTS) if n not in BAD)


def merged(partitions: list[list[int | None]]) -> list[tuple[int, int]]:
    """Partition and offset in the order of running latest times, ties by partition: the order in which `ScoredRun` evaluates."""
    keys = []
    for number, times in enumerate(partitions):
        clock = -1
        for offset, time in enumerate(times):
            clock = max(clock, -1 if time is None else time)
            keys.append((clock, number, offset))
    return [(number, offset) for _, number, offset in sorted(keys)]


def topic_of(partitions: list[list[int | None]]) -> ReadingLog:
    log = GappyLog([Topic("history", len(partitions))])
    for number, times in enumerate(partitions):
        for time in times:
            value = b"\xc1" if time is None else encode(Interaction("u", "i", 3.0, T0 + time))
            log.append([Message("history", b"u", value, number)])
    return log


clocks = st.lists(st.lists(st.one_of(st.none(), st.integers(0, 20)), max_size=12), min_size=1, max_size=4)


@given(clocks, st.data())
def test_partitions_are_merged_by_time_and_never_out_of_their_order(partitions: list[list[int | None]], data: st.DataObject) -> None:
    source = TopicSource(topic_of(partitions), "history")
    found = [(entry.record.partition, entry.record.offset) for entry, _ in source.entries()]
    assert found == merged(partitions)
    stop = data.draw(st.integers(0, len(found)))
    offsets = {number: offset + 1 for number, offset in found[:stop]}
    assert [(entry.record.partition, entry.record.offset) for entry, _ in source.entries(offsets)] == found[stop:]


def test_without_times_partitions_follow_each_other() -> None:
    source = TopicSource(topic_of([[5, 1], [], [3, None]]), "history", timed=False)
    assert [(entry.record.partition, entry.record.offset) for entry, _ in source.entries()] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert all(entry.timestamp is None and entry.error is None for entry, _ in source.entries())


def test_what_comes_later_is_not_in_it(tmp_path: Path) -> None:
    with open_log(f"embedded:{tmp_path / 'log.db'}") as log:
        log.create([Topic("history", 2)])
        log.append(messages(2))
        source = TopicSource(log, "history")
        log.append(messages(2))
        assert len(list(source.entries())) == len(EVENTS)
        assert len(list(TopicSource(log, "history").entries())) == 2 * len(EVENTS)


def test_few_records_are_held_however_long_the_topic_is() -> None:
    asked: list[int] = []

    class Counting(Reading):
        def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
            asked.append(max_records)
            return super().poll(max_records, timeout, only)

    class Watched(GappyLog):
        def reader(self) -> Reading:
            return Counting(self)

    log = Watched([Topic("history", 4)], batch=100_000)
    value = encode(Interaction("u", "i", 3.0, T0))
    log.append([Message("history", b"u", value, n % 4) for n in range(4 * READ_AHEAD)])
    entries = TopicSource(log, "history").entries()
    list(itertools.islice(entries, 10))
    assert sum(asked) == READ_AHEAD
    assert sum(1 for _ in entries) == 4 * READ_AHEAD - 10
    assert max(asked) == READ_AHEAD // 4


def test_a_topic_that_is_not_there_and_one_that_lost_its_place_are_named(tmp_path: Path) -> None:
    clock: Iterator[int] = itertools.count(T0, 1000)
    with open_log(f"embedded:{tmp_path / 'log.db'}", clock=lambda: next(clock)) as log:
        log.create([Topic("history", 1, retention_ms=5000)])
        with pytest.raises(UnknownTopic, match="no topic other in the old log"):
            TopicSource(log, "other", place="the old log")
        for event in EVENTS[:20]:
            log.append([Message("history", event.user.encode(), encode(event), 0)])
        source = TopicSource(log, "history", place="the old log")
        with pytest.raises(SourceError, match=r"the old log history\[0\]: records 2 to \d+ come next, but retention has removed them"):
            list(source.entries({0: 2}))
        with pytest.raises(SourceError, match=r"ends at 20, before the offset to go on from, 21"):
            list(source.entries({0: 21}))


def test_a_broker_that_falls_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.topicsource._PATIENCE_SECONDS", 0.0)

    class Mute(Reading):
        def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
            return []

    class Silent(GappyLog):
        def reader(self) -> Reading:
            return Mute(self)

    log = Silent([Topic("history", 1)])
    log.append([Message("history", b"u", b"x", 0)])
    with pytest.raises(LogUnavailable, match=r"history\[0\]: no record"):
        list(TopicSource(log, "history").entries())
