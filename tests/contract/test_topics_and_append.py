from __future__ import annotations

import time

import pytest

from streaming.errors import LogError, RecordTooLarge, TopicMismatch, UnknownTopic
from streaming.log import Bounds, Log, Message, Topic, TopicPartition
from streaming.partitioner import partition_of
from tests.contract.conftest import Broker, everything, fill, values


def test_a_topic_has_the_settings_it_was_made_with(broker: Broker, log: Log) -> None:
    wanted = Topic(broker.prefix + "settings", 3, "compact", 1000, None, 5000)
    log.create([wanted])
    assert log.topics()[wanted.name] == wanted
    assert broker.connect().topics()[wanted.name] == wanted


def test_creating_a_topic_again_changes_nothing(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    fill(log, name, b"a")
    broker.connect().create([Topic(name, 2)])
    assert values(everything(log, name)) == [b"a"]


@pytest.mark.parametrize("other", [Topic("x", 3, "delete"), Topic("x", 2, "compact")])
def test_a_topic_of_another_shape_is_a_mismatch_that_names_it(broker: Broker, log: Log, other: Topic) -> None:
    name = broker.topic(log, 2)
    with pytest.raises(TopicMismatch, match=name):
        log.create([other._replace(name=name)])


def test_a_topic_that_has_one_partition_by_nature_is_not_helped_by_a_setting(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 3)
    with pytest.raises(TopicMismatch, match=r"3 partitions, and should have 1: .* all others have 1, so delete it"):
        log.create([Topic(name, 1)])


@pytest.mark.parametrize(
    "topic",
    [
        Topic("no/slash"),
        Topic(""),
        Topic("a", 0),
        Topic("a", cleanup="shred"),  # type: ignore[arg-type]
        Topic("a", retention_ms=-1),
        Topic("a", max_record_bytes=0),
    ],
)
def test_settings_that_no_topic_can_have_are_refused(log: Log, topic: Topic) -> None:
    with pytest.raises(ValueError, match="topic"):
        log.create([topic])


def test_bounds_of_an_empty_partition_are_nothing(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    assert log.bounds([TopicPartition(name, 0)]) == {TopicPartition(name, 0): Bounds(0, 0)}


def test_offsets_rise_and_are_returned_in_order(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    offsets = log.append([Message(name, None, str(n).encode(), n % 2) for n in range(20)])
    for partition in (0, 1):
        records = everything(log, name, partition)
        assert [record.offset for record in records] == offsets[partition::2]
        assert offsets[partition::2] == sorted(set(offsets[partition::2]))
        assert values(records) == [str(n).encode() for n in range(partition, 20, 2)]
        assert log.bounds([TopicPartition(name, partition)])[TopicPartition(name, partition)].end > offsets[partition::2][-1]


def test_offsets_are_contiguous(broker: Broker, log: Log) -> None:
    if not broker.can.contiguous:
        pytest.skip("this broker leaves gaps")
    name = broker.topic(log)
    assert [*fill(log, name, b"a", b"b"), *fill(log, name, b"c")] == [0, 1, 2]


def test_key_and_value_come_back_as_they_were(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    pairs = [(None, None)] * broker.can.writes_nothing + [(b"", b""), (b"\x00\xff", b"v" * 100_000), (b"k", None), (None, b"v")]
    log.append([Message(name, key, value) for key, value in pairs])
    assert [(record.key, record.value) for record in everything(log, name)] == pairs
    assert {record.topic for record in everything(log, name)} == {name}


def test_the_timestamp_is_the_time_of_the_append(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    before = time.time() * 1000
    fill(log, name, b"a")
    assert before - 50 <= everything(log, name)[0].timestamp <= time.time() * 1000 + 50


def test_the_key_places_a_message_and_a_number_overrides_it(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 5)
    keys = [f"user-{n}".encode() for n in range(40)]
    log.append([Message(name, key, key) for key in keys])
    found = {value: partition for partition in range(5) for value in values(everything(log, name, partition))}
    assert found == {key: partition_of(key, 5) for key in keys}
    log.append([Message(name, b"user-1", b"elsewhere", 4 - partition_of(b"user-1", 5))])
    assert everything(log, name, 4 - partition_of(b"user-1", 5))[-1].value == b"elsewhere"


def test_a_message_without_a_key_goes_to_partition_0(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 4)
    log.append([Message(name, None, b"a")] * 10)
    assert len(everything(log, name, 0)) == 10


def test_a_message_too_large_is_refused_by_name_and_nothing_is_kept(broker: Broker, log: Log) -> None:
    name = broker.topic(log, max_record_bytes=100)
    fill(log, name, b"x" * 50)  # Key and value together are exactly the limit.
    with pytest.raises(RecordTooLarge, match=rf"101.*{name}.*100"):
        log.append([Message(name, b"", b"fits"), Message(name, b"k", b"x" * 100)])
    assert len(everything(log, name)) == 1


@pytest.mark.parametrize("partition", [-1, 2, 10_000])
def test_unknown_topics_and_partitions_are_refused_by_name(broker: Broker, log: Log, partition: int) -> None:
    name = broker.topic(log, 2)
    missing = TopicPartition(name, partition)
    with pytest.raises(UnknownTopic, match=name):
        log.append([Message(name, b"k", b"fits"), Message(name, None, b"x", partition)])
    for tp in (missing, TopicPartition("nowhere", 0)):
        with pytest.raises(UnknownTopic, match=tp.topic):
            log.bounds([tp])
        with pytest.raises(UnknownTopic, match=tp.topic):
            log.committed("g", [tp])
        with pytest.raises(UnknownTopic, match=tp.topic):
            log.reader().assign({tp: 0})
    with pytest.raises(UnknownTopic, match="nowhere"):
        log.append([Message("nowhere", None, b"x")])
    assert log.bounds([TopicPartition(name, 0), TopicPartition(name, 1)]) == {
        TopicPartition(name, 0): Bounds(0, 0),
        TopicPartition(name, 1): Bounds(0, 0),
    }


def test_a_topic_made_by_another_process_is_found(broker: Broker, log: Log) -> None:
    name = broker.topic(broker.connect())
    assert fill(log, name, b"a") == [0]


def test_a_compacted_topic_keeps_the_last_record_of_every_key(broker: Broker, log: Log) -> None:
    name = broker.topic(log, cleanup="compact")
    keys = [b"a", b"b", b"a", b"c", b"a"]
    offsets = [log.append([Message(name, key, str(n).encode())])[0] for n, key in enumerate(keys)]
    records = everything(log, name)
    last = {record.key: record.value for record in records}
    assert last == {b"a": b"4", b"b": b"1", b"c": b"3"}
    if broker.can.compacts_at_once:
        assert [record.offset for record in records] == [offsets[1], offsets[3], offsets[4]]


def test_of_one_key_in_one_commit_the_last_message_is_kept(broker: Broker, log: Log) -> None:
    name = broker.topic(log, cleanup="compact")
    offsets = log.append([Message(name, b"k", b"1"), Message(name, b"j", b"2"), Message(name, b"k", b"3")])
    assert len(set(offsets)) == 3
    assert {record.key: record.value for record in everything(log, name)} == {b"k": b"3", b"j": b"2"}
    assert log.bounds([TopicPartition(name, 0)])[TopicPartition(name, 0)].end > offsets[-1]


def test_a_compacted_topic_can_be_read_from_0_and_from_a_gap(broker: Broker, log: Log) -> None:
    name = broker.topic(log, cleanup="compact")
    tp = TopicPartition(name, 0)
    for n in range(10):
        log.append([Message(name, b"k", str(n).encode())])
    for start in (0, 5):
        with log.reader() as reader:
            reader.assign({tp: start})
            while reader.position(tp) < log.bounds([tp])[tp].end:
                last = reader.poll(100, timeout=5)
            assert last[-1].value == b"9"


def test_a_null_removes_the_key_and_stays_as_long_as_it_was_told(broker: Broker, log: Log) -> None:
    name = broker.topic(log, cleanup="compact")  # Without bound.
    log.append([Message(name, b"a", b"1"), Message(name, b"b", b"2")])
    log.append([Message(name, b"a", None)])
    assert {record.key: record.value for record in everything(log, name)} == {b"a": None, b"b": b"2"}
    log.append([Message(name, b"a", b"back")])
    assert {record.key: record.value for record in everything(log, name)} == {b"a": b"back", b"b": b"2"}


def test_a_compacted_topic_takes_no_message_without_a_key(broker: Broker, log: Log) -> None:
    name = broker.topic(log, cleanup="compact")
    with pytest.raises(LogError, match=name):
        log.append([Message(name, b"k", b"fits"), Message(name, None, b"v")])
    assert everything(log, name) == []


def test_retention_by_size_drops_the_first_records_and_moves_the_start(broker: Broker, log: Log) -> None:
    if not broker.can.retains_at_once:
        pytest.skip("this broker drops whole segments, later")
    name = broker.topic(log, retention_bytes=100)
    for _ in range(10):
        log.append([Message(name, None, b"x" * 40)])
    assert [record.offset for record in everything(log, name)] == [8, 9]
    assert log.bounds([TopicPartition(name, 0)])[TopicPartition(name, 0)] == Bounds(8, 10)
    log.append([Message(name, None, b"x" * 500)])
    assert [record.offset for record in everything(log, name)] == [10], "the last record stays, however large"


def test_retention_by_age_may_empty_a_partition_but_keeps_its_end(broker: Broker, log: Log) -> None:
    if not broker.can.retains_at_once:
        pytest.skip("this broker drops whole segments, later")
    name, clock = broker.topic(log, 2, retention_ms=30), broker.topic(log)
    tp = TopicPartition(name, 1)
    fill(log, name, b"a", b"b", partition=1)
    deadline = time.monotonic() + 10
    while log.bounds([tp])[tp].start < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        fill(log, clock, b"tick")
    assert log.bounds([tp]) == {tp: Bounds(2, 2)}
    assert fill(log, name, b"c", partition=1) == [2]


def test_a_log_is_known_again_through_another_connection(broker: Broker, log: Log) -> None:
    assert broker.connect().identity() == log.identity()
    assert log.identity()
