"""Transactions of version 2 where a cluster has them, and of version 1 where it has not: what is asked for, and what comes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from kafka.net.compat import KafkaNetClient

from streaming.brokers import open_log
from streaming.errors import Fenced, LogError
from streaming.kafka import transaction_v2
from streaming.kafka.writer import KafkaWriter
from streaming.log import Log, Message, Topic, TopicPartition
from tests.contract.conftest import everything, values
from tests.kafka_cluster import KafkaCluster

OUT, SOURCE = Topic("out", 2), Topic("source", 1)
OFFSETS = {TopicPartition("source", 0): 7}


@pytest.mark.parametrize(
    ("features", "has"),
    [
        ({}, False),
        ({"metadata.version": {"finalized": (7, 28)}}, False),
        ({"transaction.version": {"supported": (0, 2)}}, False),
        ({"transaction.version": {"supported": (0, 2), "finalized": (1, 1)}}, False),
        ({"transaction.version": {"supported": (0, 2), "finalized": (2, 2)}}, True),
    ],
)
def test_version_2_is_what_all_brokers_have_agreed_on(features: dict[str, dict[str, Any]], has: bool) -> None:
    assert transaction_v2.offered(features) is has


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    with KafkaCluster(tmp_path_factory.mktemp("versions")) as cluster:
        with open_log(cluster.url) as log:
            log.create([OUT, SOURCE])
        yield cluster


@pytest.fixture
def log(cluster: KafkaCluster) -> Iterator[Log]:
    with open_log(cluster.url) as log:
        yield log


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that producers make, in order."""
    names, send = list[str](), KafkaNetClient.send

    def noted(self: KafkaNetClient, node: object, request: object, *more: object, **named: object) -> object:
        names.append(type(request).__name__.removesuffix("Request"))
        return send(self, node, request, *more, **named)

    monkeypatch.setattr(KafkaNetClient, "send", noted)
    return names


def epoch_of(writer: object) -> tuple[int, int]:
    assert isinstance(writer, KafkaWriter)
    found = writer._producer._transaction_manager.producer_id_and_epoch
    return found.producer_id, found.epoch


def to_out(text: str) -> list[Message]:
    return [Message("out", text.encode(), text.encode(), number) for number in range(2)]


@pytest.mark.kafka
def test_a_transaction_is_three_requests_and_leaves_an_epoch_behind(log: Log, asked: list[str]) -> None:
    writer = log.writer("three")
    writer.commit(to_out("before"), OFFSETS, "group")  # Coordinators are looked for once.
    asked.clear()
    before = epoch_of(writer)
    writer.commit(to_out("a"), OFFSETS, "group")
    # Where the broker is not yet done with the one before, offsets are sent again.
    assert list(dict.fromkeys(asked)) == ["TxnOffsetCommit", "Produce", "EndTxn"]
    assert epoch_of(writer) == (before[0], before[1] + 1)
    asked.clear()
    writer.commit(to_out("b"))
    assert list(dict.fromkeys(asked)) == ["Produce", "EndTxn"]
    writer.close()
    assert log.committed("group", list(OFFSETS)) == OFFSETS


@pytest.mark.kafka
def test_where_not_all_brokers_have_it_it_is_the_first_version(log: Log, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction_v2, "LEVEL", 3)
    writer = log.writer("five")
    before = epoch_of(writer)
    writer.commit(to_out("first"), OFFSETS, "group")
    assert {"AddPartitionsToTxn", "AddOffsetsToTxn", "TxnOffsetCommit", "Produce", "EndTxn"} <= set(asked)
    assert epoch_of(writer) == before
    writer.close()


@pytest.mark.kafka
def test_writers_of_both_versions_follow_and_fence_one_another(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cluster is upgraded, or goes back, under processes that run."""
    start = len(everything(log, "out"))
    for number, level in enumerate([2, 3, 2, 3, 2]):
        earlier = log.writer("both")
        earlier.commit(to_out(f"{number} earlier"), OFFSETS, "group")
        monkeypatch.setattr(transaction_v2, "LEVEL", level)
        writer = log.writer("both")
        with pytest.raises(Fenced):
            earlier.commit(to_out(f"{number} too late"))
        for text in ("a", "b"):
            writer.commit(to_out(f"{number} {text}"), OFFSETS, "group")
        writer.close()
    wanted = [f"{number} {text}".encode() for number in range(5) for text in ("earlier", "a", "b")]
    assert values(everything(log, "out"))[start:] == wanted


@pytest.mark.kafka
def test_what_was_not_committed_is_not_seen_and_nothing_waits_for_it(log: Log) -> None:
    """Aborted as version 2, by a writer whose offsets nobody may commit."""
    start = len(everything(log, "out"))
    writer = log.writer("aborted")
    writer.commit(to_out("seen"), OFFSETS, "group")
    member = log.member("members", "source")
    deadline = time.monotonic() + 30
    while not (assignment := member.assignment()).partitions:
        assert time.monotonic() < deadline, "the only member was given nothing"
        time.sleep(0.05)
    stale = assignment._replace(generation=assignment.generation + 40)
    with pytest.raises(LogError, match="IllegalGeneration"):
        writer.commit(to_out("never"), OFFSETS, stale)
    member.close()
    following = log.writer("aborted")
    following.commit(to_out("after"), OFFSETS, "group")
    following.close()
    assert values(everything(log, "out"))[start:] == [b"seen", b"after"]
