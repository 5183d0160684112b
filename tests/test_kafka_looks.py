"""Looks at a broker that would find nothing are spared, and what comes is found all the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streaming.brokers import open_log
from streaming.kafka.member import KafkaMember
from streaming.kafka.reader import KafkaReader
from streaming.log import Log, Message, Record, Topic, TopicPartition
from tests.kafka_cluster import KafkaCluster

pytestmark = pytest.mark.kafka

PARTITIONS = 4
ALL = [TopicPartition("events", number) for number in range(PARTITIONS)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Log]:
    """Two brokers, so that a reader asks both."""
    with KafkaCluster(tmp_path_factory.mktemp("looks"), nodes=2) as cluster, open_log(cluster.url) as log:
        log.create([Topic("events", PARTITIONS)])
        yield log


def counted(of: Any, name: str) -> list[float]:  # noqa: ANN401 - an object of the client's
    """When a method was called, from now on."""
    original: Callable[..., object] = getattr(of, name)
    calls = list[float]()

    def noted(*arguments: object, **named: object) -> object:
        calls.append(time.monotonic())
        return original(*arguments, **named)

    setattr(of, name, noted)
    return calls


def read_until(reader: KafkaReader, count: int, most: int = 16) -> list[Record]:
    """So many records, by polls that do not wait."""
    found, ends = list[Record](), time.monotonic() + 10
    while len(found) < count and time.monotonic() < ends:
        found += reader.poll(most)
    return found


def test_a_reader_that_does_not_wait_asks_no_oftener_than_it_must_and_misses_nothing(log: Log) -> None:
    with log.reader() as reader:
        assert isinstance(reader, KafkaReader)
        reader.assign(dict.fromkeys(ALL, 0))
        reader.poll(1, 0.5)
        calls, turns, until = counted(reader._consumer, "poll"), 0, time.monotonic() + 1
        while time.monotonic() < until:
            assert reader.poll(16) == []
            turns += 1
        assert turns > 2_000
        # As often as either broker's answer has come, which each gives after 100 ms.
        assert 5 < len(calls) < 60
        for round_ in range(5):
            sent = [(tp.partition, b"%d" % number) for number in range(100 * round_, 100 * round_ + 100) for tp in ALL]
            since = time.monotonic()
            log.append([Message("events", None, value, partition) for partition, value in sent])
            found = [(record.partition, record.value) for record in read_until(reader, len(sent))]
            assert time.monotonic() - since < 2
            for partition in range(PARTITIONS):
                of = [value for number, value in found if number == partition]
                assert of == [value for number, value in sent if number == partition]


def test_what_is_at_hand_is_taken_without_asking(log: Log) -> None:
    with log.reader() as reader:
        assert isinstance(reader, KafkaReader)
        tp = TopicPartition("events", 0)
        start = log.append([Message("events", None, b"x", 0) for _ in range(2_000)])[0]
        reader.assign({tp: start})
        first = reader.poll(1, 5.0)
        calls = counted(reader._consumer, "poll")
        found = first + read_until(reader, 1_999, most=1)
        assert [record.offset for record in found] == list(range(start, start + 2_000))
        assert len(calls) < 400, "a poll of the client's for each record"


def test_a_member_with_nothing_to_do_rests(log: Log) -> None:
    with log.member("resting", "events") as member:
        assert isinstance(member, KafkaMember)
        while not member.assignment().partitions:
            time.sleep(0.05)
        time.sleep(0.5)
        calls, until = counted(member._consumer._fetcher, "fetch_records"), time.monotonic() + 2
        while time.monotonic() < until:
            assert len(member.assignment().partitions) == PARTITIONS
            time.sleep(0.05)
        assert 0 < len(calls) < 120
