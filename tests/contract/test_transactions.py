from __future__ import annotations

import threading
from collections import Counter

import pytest

from streaming.errors import Fenced, LogError, RecordTooLarge, UnknownTopic
from streaming.log import NEAR_END, Bounds, Log, Message, TopicPartition, left
from tests.contract.conftest import Broker, everything, fill, values


def test_messages_and_offsets_become_visible_together(broker: Broker, log: Log) -> None:
    source, out = broker.topic(log), broker.topic(log, 2)
    tp = TopicPartition(source, 0)
    writer = log.writer("w")
    offsets = writer.commit([Message(out, None, b"a", 0), Message(out, None, b"b", 1)], {tp: 7}, "g")
    assert [record.offset for partition in (0, 1) for record in everything(log, out, partition)] == offsets
    other = broker.connect()
    assert values(everything(other, out, 1)) == [b"b"]
    assert other.committed("g", [tp]) == {tp: 7}


def test_offsets_belong_to_their_group_and_missing_ones_are_left_out(broker: Broker, log: Log) -> None:
    source = broker.topic(log, 2)
    first, second = TopicPartition(source, 0), TopicPartition(source, 1)
    writer = log.writer("w")
    writer.commit([], {first: 1}, "g")
    writer.commit([], {first: 5}, "h")
    writer.commit([], {first: 2}, "g")
    assert log.committed("g", [first, second]) == {first: 2}
    assert log.committed("h", [first, second]) == {first: 5}
    assert log.committed("nobody", [first]) == {}


def test_an_empty_commit_is_one(log: Log) -> None:
    assert log.writer("w").commit([]) == []


@pytest.mark.parametrize(
    ("bad", "offsets", "owner", "error"),
    [
        (Message("out", None, b"x" * 11), {0: 1}, "g", RecordTooLarge),
        (Message("nowhere", None, b"x"), {0: 1}, "g", UnknownTopic),
        (Message("out", None, b"x"), {0: 1, 9: 1}, "g", UnknownTopic),
        (Message("out", None, b"x"), {0: 1}, None, ValueError),
        (Message("table", None, b"x"), {0: 1}, "g", LogError),
    ],
    ids=["large", "unknown-topic", "unknown-partition", "ownerless", "keyless"],
)
def test_after_an_error_nothing_of_the_commit_is_visible_and_the_next_one_works(
    broker: Broker, log: Log, bad: Message, offsets: dict[int, int], owner: str | None, error: type[Exception]
) -> None:
    source, out, table = broker.topic(log), broker.topic(log, max_record_bytes=10), broker.topic(log, cleanup="compact")
    tp = TopicPartition(source, 0)
    log.append([Message(table, b"k", b"before")])
    writer = log.writer("w")
    messages = [Message(out, None, b"fits"), Message(table, b"k", b"after")]
    bad = bad._replace(topic={"out": out, "table": table}.get(bad.topic, bad.topic))
    with pytest.raises(error, match=r"."):
        writer.commit([*messages, bad], {TopicPartition(source, partition): offset for partition, offset in offsets.items()}, owner)
    assert everything(log, out) == []
    assert log.committed("g", [tp]) == {}
    assert values(everything(log, table)) == [b"before"]
    assert log.bounds([TopicPartition(out, 0)])[TopicPartition(out, 0)] == Bounds(0, 0)
    writer.commit(messages, {tp: 1}, "g")
    assert values(everything(log, table))[-1] == b"after"
    assert log.committed("g", [tp]) == {tp: 1}


def test_a_newer_writer_fences_the_older_one(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    tp = TopicPartition(name, 0)
    old = log.writer("w")
    old.commit([Message(name, None, b"old")])
    new = broker.connect().writer("w")
    for _ in range(2):
        with pytest.raises(Fenced, match="w"):
            old.commit([Message(name, None, b"late")], {tp: 9}, "g")
    new.commit([Message(name, None, b"new")])
    assert values(everything(log, name)) == [b"old", b"new"]
    assert log.committed("g", [tp]) == {}


def test_a_fenced_writer_is_fenced_even_where_it_writes_nothing(broker: Broker, log: Log) -> None:
    if not broker.can.empty_commit_is_fenced:
        pytest.skip("this broker is not asked where there is nothing to commit")
    old = log.writer("w")
    log.writer("w")
    with pytest.raises(Fenced):
        old.commit([])


def test_writers_of_other_ids_do_not_fence_each_other(broker: Broker, log: Log) -> None:
    name = broker.topic(log)
    first, second = log.writer("a"), log.writer("b")
    for writer in (first, second, first):
        writer.commit([Message(name, None, b"x")])
    assert len(everything(log, name)) == 3


def test_a_closed_writer_says_so(broker: Broker, log: Log) -> None:
    with log.writer("w") as writer:
        writer.close()
    with pytest.raises(LogError, match="closed"):
        writer.commit([])


def test_writers_in_several_threads_and_connections_lose_nothing(broker: Broker, log: Log) -> None:
    name = broker.topic(log, 2)
    other = broker.connect()
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            writer = (log, other)[number % 2].writer(f"w{number}")
            for n in range(40):
                writer.commit([Message(name, None, b"%d %d" % (number, n), partition) for partition in (0, 1)])
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below.
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    orders = [values(everything(log, name, partition)) for partition in (0, 1)]
    assert not broker.can.one_order or orders[0] == orders[1], "commits have one order"
    assert Counter(orders[0]) == Counter(orders[1])
    for number in range(4):
        assert [v for v in orders[0] if v and v.startswith(b"%d " % number)] == [b"%d %d" % (number, n) for n in range(40)]


def test_what_was_read_to_its_end_has_nothing_left_whatever_marks_the_broker_leaves(broker: Broker, log: Log) -> None:
    tp = TopicPartition(broker.topic(log), 0)
    with log.writer(f"{tp.topic}-w") as writer:
        places = [writer.commit([Message(tp.topic, b"k", b"%d" % n)])[0] for n in range(3)]
    assert left(log, {tp: places[-1] + 1}) == {tp: 0}
    assert left(log, {tp: places[-1]}) == {tp: 1}
    assert left(log, {tp: 0}) == {tp: 3}
    assert left(log, {tp: places[-1] + 100}) == {tp: 0}


def test_a_long_way_is_counted_as_it_stands(broker: Broker, log: Log) -> None:
    tp = TopicPartition(broker.topic(log), 0)
    fill(log, tp.topic, *(b"%d" % n for n in range(NEAR_END + 5)))
    assert left(log, {tp: 0}) == {tp: NEAR_END + 5}
