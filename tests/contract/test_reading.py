from __future__ import annotations

import threading
import time

import pytest

from streaming.errors import LogError, OffsetOutOfRange
from streaming.log import Log, Message, Record, TopicPartition
from tests.contract.conftest import Broker, fill, values


def test_a_reader_without_an_assignment_reads_nothing(log: Log) -> None:
    assert log.reader().poll(10) == []


def test_a_poll_gives_at_most_what_was_asked_for_and_the_next_goes_on(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    tp = TopicPartition(name, 0)
    fill(log, name, b"a", b"b", b"c", b"d", b"e")
    reader = log.reader()
    reader.assign({tp: 1})
    assert reader.position(tp) == 1
    assert values(reader.poll(3, timeout=5)) == [b"b", b"c", b"d"]
    assert reader.position(tp) == 4
    assert values(reader.poll(3, timeout=5)) == [b"e"]
    assert reader.position(tp) == log.bounds([tp])[tp].end
    assert reader.poll(3) == []


def test_a_new_assignment_replaces_the_old(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    fill(log, name, b"a", b"b")
    fill(log, name, b"c", partition=1)
    reader = log.reader()
    reader.assign({TopicPartition(name, 0): 0})
    reader.poll(1, timeout=5)
    reader.assign({TopicPartition(name, 1): 0})
    assert values(reader.poll(10, timeout=5)) == [b"c"]
    with pytest.raises(ValueError, match="not assigned"):
        reader.position(TopicPartition(name, 0))


def test_only_restricts_a_poll_and_leaves_the_other_positions(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 3)
    tps = [TopicPartition(name, partition) for partition in range(3)]
    for tp in tps:
        fill(log, name, b"a", b"b", partition=tp.partition)
    reader = log.reader()
    reader.assign(dict.fromkeys(tps, 0))
    records = reader.poll(100, timeout=5, only=[tps[1]])
    assert [(record.partition, record.value) for record in records] == [(1, b"a"), (1, b"b")]
    assert [reader.position(tp) for tp in tps] == [0, 2, 0]
    assert reader.poll(100, only=[tps[1]]) == []
    with pytest.raises(ValueError, match="nowhere/0"):
        reader.poll(1, only=[TopicPartition("nowhere", 0)])


def test_an_assignment_reads_what_the_poll_before_it_left_out(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    tps = [TopicPartition(name, partition) for partition in range(2)]
    for tp in tps:
        fill(log, name, b"a", partition=tp.partition)
    reader = log.reader()
    reader.assign(dict.fromkeys(tps, 0))
    assert [record.partition for record in reader.poll(100, timeout=5, only=[tps[1]])] == [1]
    for assigned in ([tps[0], tps[1]], [tps[0]], [tps[0], tps[1]]):
        reader.assign(dict.fromkeys(assigned, 0))
        read, until = set[int](), time.monotonic() + 20
        while len(read) < len(assigned) and time.monotonic() < until:
            read |= {record.partition for record in reader.poll(100, timeout=0.5)}
        assert read == {tp.partition for tp in assigned}


def test_partitions_read_by_turns_all_come_to_their_ends(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    tps = [TopicPartition(name, partition) for partition in range(2)]
    for tp, count in zip(tps, (20, 50), strict=True):
        fill(log, name, *(b"%d" % number for number in range(count)), partition=tp.partition)
    reader = log.reader()
    reader.assign(dict.fromkeys(tps, 0))
    found: dict[int, list[bytes | None]] = {0: [], 1: []}
    deadline = time.monotonic() + 10
    while unread := [tp for tp in tps if reader.position(tp) < log.bounds([tp])[tp].end]:
        assert time.monotonic() < deadline, f"{unread} stand at {[reader.position(tp) for tp in unread]}"
        for tp in unread:
            found[tp.partition] += values(reader.poll(7, timeout=0.5, only=[tp]))
    assert found == {0: [b"%d" % number for number in range(20)], 1: [b"%d" % number for number in range(50)]}


def test_partitions_take_turns_so_that_none_starves(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 3)
    for partition in range(3):
        fill(log, name, *[b"%d" % n for n in range(50)], partition=partition)
    reader = log.reader()
    reader.assign({TopicPartition(name, partition): 0 for partition in range(3)})
    seen = set()
    for _ in range(broker.can.polls_to_turn):
        records = reader.poll(10, timeout=5)
        fill(log, name, b"more", partition=records[0].partition)  # The one just read is never short of work.
        seen |= {record.partition for record in records}
    assert seen == {0, 1, 2}


def test_records_of_one_partition_stand_together_in_order(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 4)
    log.append([Message(name, None, b"%d" % n, n % 4) for n in range(40)])
    reader = log.reader()
    reader.assign({TopicPartition(name, partition): 0 for partition in range(4)})
    records: list[Record] = []
    while len(records) < 40:
        batch = reader.poll(15, timeout=5)
        partitions = [record.partition for record in batch]
        assert partitions == [p for p in dict.fromkeys(partitions) for _ in range(partitions.count(p))]
        records += batch
    for partition in range(4):
        assert [int(record.value or b"") for record in records if record.partition == partition] == list(range(partition, 40, 4))


def test_two_readers_read_on_their_own(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    fill(log, name, b"a", b"b")
    first, second = log.reader(), log.reader()
    for reader in (first, second):
        reader.assign({TopicPartition(name, 0): 0})
    assert values(first.poll(1, timeout=5)) == values(second.poll(1, timeout=5)) == [b"a"]


@pytest.mark.parametrize("position", [-1, 4, 1000])
def test_a_position_outside_the_records_is_out_of_range(broker: Broker, log: Log, position: int) -> None:
    name = broker.topic(log)
    fill(log, name, b"a", b"b", b"c")
    reader = log.reader()
    reader.assign({TopicPartition(name, 0): position})
    with pytest.raises(OffsetOutOfRange, match=name):
        reader.poll(10, timeout=5)


def test_a_position_that_retention_has_passed_is_out_of_range(broker: Broker, log: Log) -> None:
    if not broker.can.retains_at_once:
        pytest.skip("this broker drops whole segments, later")
    name = broker.topic(log, retention_bytes=100)
    tp = TopicPartition(name, 0)
    fill(log, name, b"x" * 40, b"y" * 40)
    reader = log.reader()
    reader.assign({tp: 1})
    fill(log, name, b"z" * 40)
    with pytest.raises(OffsetOutOfRange, match=f"{name}.*position 1"):
        reader.poll(10)
    reader.assign({tp: log.bounds([tp])[tp].start})
    assert values(reader.poll(10)) == [b"z" * 40]


def test_a_poll_waits_for_what_another_process_appends(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    other = broker.connect()
    reader = log.reader()
    reader.assign({TopicPartition(name, 0): 0})
    timer = threading.Timer(0.15, fill, (other, name, b"a"))
    timer.start()
    start = time.monotonic()
    assert values(reader.poll(10, timeout=20)) == [b"a"]
    assert time.monotonic() - start < 10
    timer.join()


def test_a_poll_waits_for_another_thread_of_its_process(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    reader = log.reader()
    reader.assign({TopicPartition(name, 0): 0})
    timer = threading.Timer(0.15, fill, (log, name, b"a"))
    timer.start()
    assert values(reader.poll(10, timeout=20)) == [b"a"]
    timer.join()


def test_a_poll_that_finds_nothing_ends_with_its_timeout(broker: Broker, log: Log) -> None:
    name, other = broker.topic(log), broker.topic(log)
    reader = log.reader()
    reader.assign({TopicPartition(name, 0): 0})
    timer = threading.Timer(0.05, fill, (broker.connect(), other, b"not for us"))
    timer.start()
    start = time.monotonic()
    assert reader.poll(10, timeout=0.2) == []
    assert 0.19 < time.monotonic() - start < 5
    timer.join()


def test_a_closed_reader_says_so(broker: Broker, log: Log) -> None:
    with log.reader() as reader:
        reader.close()
    with pytest.raises(LogError, match="closed"):
        reader.poll(1)


def test_a_poll_shows_one_moment(broker: Broker, log: Log) -> None:
    if not broker.can.one_moment:
        pytest.skip("this broker fetches each partition by itself")
    name = broker.topic(log, 2)
    writer = broker.connect().writer("pairs")
    stop = threading.Event()

    def write() -> None:
        for n in range(300):
            writer.commit([Message(name, None, b"%d" % n, partition) for partition in (1, 0)])
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    reader = log.reader()
    reader.assign({TopicPartition(name, partition): 0 for partition in (0, 1)})
    counts = [0, 0]
    while not stop.is_set() or counts != [300, 300]:
        for record in reader.poll(10_000, timeout=0.01):
            counts[record.partition] += 1
        assert counts[0] == counts[1]
    thread.join()
