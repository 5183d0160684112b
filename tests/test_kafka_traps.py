"""What a first version on Apache Kafka falls into, each on a real broker that is made to do its worst."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient

from streaming.brokers import open_log
from streaming.errors import BrokerUnreachable, LogError
from streaming.kafka import KafkaLog
from streaming.kafka.reader import KafkaReader
from streaming.kafka.writer import KafkaWriter
from streaming.log import Log, Message, Topic, TopicPartition
from tests.contract.conftest import everything, values
from tests.kafka_cluster import KafkaCluster
from tests.kafka_proxy import END_TXN, TXN_OFFSET_COMMIT

pytestmark = pytest.mark.kafka

SECONDS = 3
PATIENCE = {"transaction_timeout_ms": SECONDS * 1000, "request_timeout_ms": 2000, "session_timeout_ms": 2000}
OUT, SOURCE = Topic("out", 2), Topic("source", 2)
TP = TopicPartition("source", 0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """A broker that can also be reached through a proxy."""
    settings = {"group.min.session.timeout.ms": "200"}
    with KafkaCluster(tmp_path_factory.mktemp("traps"), settings=settings, proxied=True) as cluster:
        with open_log(cluster.url, **PATIENCE) as log:
            log.create([OUT, SOURCE])
        yield cluster


@pytest.fixture
def log(cluster: KafkaCluster) -> Iterator[Log]:
    with open_log(cluster.url, **PATIENCE) as log:
        yield log


@pytest.mark.parametrize("lost", ["answer", "request"])
def test_a_commit_whose_answer_is_lost_is_settled_by_the_next_writer(cluster: KafkaCluster, log: Log, lost: str) -> None:
    name, (proxy,) = f"lost-{lost}", cluster.proxies
    with open_log(cluster.proxied_url, **PATIENCE) as behind:
        writer = behind.writer(name)
        before = proxy.lost
        (proxy.lose_answers if lost == "answer" else proxy.lose_requests).add(END_TXN)
        start = time.monotonic()
        with pytest.raises(BrokerUnreachable, match=name):
            writer.commit([Message("out", None, name.encode())], {TP: 7}, name)
        assert time.monotonic() - start < SECONDS + 4
        assert proxy.lost > before
        with pytest.raises(BrokerUnreachable, match="failed before"):
            writer.commit([Message("out", None, b"again")])
        proxy.lose_answers.clear()
        proxy.lose_requests.clear()
    log.writer(name)
    took_place = lost == "answer"
    assert log.committed(name, [TP]) == ({TP: 7} if took_place else {})
    assert (name.encode() in values(everything(log, "out"))) is took_place


@pytest.mark.parametrize("lost", ["answer", "request"])
def test_records_are_not_committed_where_nobody_knows_of_the_offsets(cluster: KafkaCluster, log: Log, lost: str) -> None:
    """Lost on the way there or back: the step is void as a whole, and the next one is made on what was committed before."""
    name, (proxy,) = f"offsets-{lost}", cluster.proxies
    with open_log(cluster.proxied_url, **PATIENCE) as behind:
        writer = behind.writer(name)
        writer.commit([Message("out", None, f"{name}, one".encode())], {TP: 7}, name)
        before = proxy.lost
        (proxy.lose_answers if lost == "answer" else proxy.lose_requests).add(TXN_OFFSET_COMMIT)
        with pytest.raises(BrokerUnreachable, match=name):
            writer.commit([Message("out", None, f"{name}, two".encode())], {TP: 8}, name)
        assert proxy.lost > before
        proxy.lose_answers.clear()
        proxy.lose_requests.clear()
        writer.close()
        time.sleep(SECONDS)
    log.writer(name)
    found = {value for value in values(everything(log, "out")) if value and value.startswith(name.encode())}
    assert found == {f"{name}, one".encode()}
    assert log.committed(name, [TP]) == {TP: 7}


def test_offsets_that_the_client_forgets_to_send_are_not_passed_over(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """kafka-python 3.0.12 drops a request of a transaction where waiting for its node raises; what stands behind it is then sent."""
    writer = log.writer("forgotten")
    assert isinstance(writer, KafkaWriter)
    writer.commit([Message("out", None, b"forgotten, one")], {TP: 7}, "forgotten")
    client, transactions = writer._producer._sender._client, writer._producer._transaction_manager
    ready, dropped = client.await_ready, list[str]()

    def fails_once(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - as the client
        if transactions._pending_txn_offset_commits and not dropped:
            dropped.append("TxnOffsetCommit")
            raise errors.KafkaConnectionError("the node has just gone")
        return ready(*args, **more)

    monkeypatch.setattr(client, "await_ready", fails_once)
    commit, began = writer.begin([Message("out", None, b"forgotten, two")], {TP: 8}, "forgotten"), time.monotonic()
    # Where no event follows nobody waits for it: a worker looks now and then.
    while not commit.done:
        assert time.monotonic() < began + 10 * SECONDS
        time.sleep(0.05)
    assert dropped
    with pytest.raises(BrokerUnreachable, match="forgotten"):
        commit.result()
    time.sleep(SECONDS)
    log.writer("forgotten")
    found = {value for value in values(everything(log, "out")) if value and value.startswith(b"forgotten")}
    assert found == {b"forgotten, one"}
    assert log.committed("forgotten", [TP]) == {TP: 7}


def test_a_send_that_failed_fails_the_step(cluster: KafkaCluster, log: Log) -> None:
    log.create([Topic("strict", 1), Topic("other", 1)])
    writer = log.writer("strict")
    writer.commit([Message("strict", None, b"before")])
    admin = KafkaAdminClient(bootstrap_servers=cluster.url.removeprefix("kafka:"))
    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, "strict", configs={"max.message.bytes": "500"})])
    admin.close()
    # Ours is not the only hand that changes a topic: the client still takes the record, the broker does not.
    with pytest.raises(LogError):
        writer.commit([Message("other", None, b"lost?"), Message("strict", None, b"x" * 10_000)], {TP: 9}, "strict")
    log.writer("strict").commit([Message("other", None, b"after")], {TP: 10}, "strict")
    assert values(everything(log, "other")) == [b"after"], "what was sent before goes with it"
    assert values(everything(log, "strict")) == [b"before"]
    assert log.committed("strict", [TP]) == {TP: 10}


def test_a_topic_that_another_process_makes_at_the_same_moment_is_no_refusal(
    cluster: KafkaCluster, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, refresh, looked = Topic("at-once", 1), KafkaLog._refresh, [0]
    with open_log(cluster.url, **PATIENCE) as other:

        def refreshed(self: KafkaLog) -> None:
            refresh(self)
            looked[0] += self is log
            if self is log and looked[0] == 1:
                other.create([topic])

        monkeypatch.setattr(KafkaLog, "_refresh", refreshed)
        log.create([topic])
    assert log.topics()["at-once"].partitions == 1


KILLED = """
import os, signal, sys
from streaming.brokers import open_log
log = open_log(sys.argv[1])
writer = log.writer("killed")
writer._producer.begin_transaction()
writer._producer.send("out", b"never", partition=1).get(10)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_follows_one_that_was_killed_in_a_transaction_need_not_wait_for_its_end(cluster: KafkaCluster, log: Log) -> None:
    # With the default fifteen seconds for a transaction, so that its own end cannot be what helps.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, cluster.url], env=environment, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    start = time.monotonic()
    writer = log.writer("killed")
    writer.commit([Message("out", None, b"next", 1)])
    assert values(everything(log, "out", 1)) == [b"next"]
    assert time.monotonic() - start < 8


def test_an_answer_that_came_too_late_is_not_taken_for_that_to_a_later_question(cluster: KafkaCluster, log: Log) -> None:
    group, (node,) = "late", cluster.nodes
    log.writer(group).commit([], {TP: 1}, group)
    with open_log(cluster.url) as asks:
        assert asks.committed(group, [TP]) == {TP: 1}
        node.send(signal.SIGSTOP)
        threading.Timer(4.5, node.send, [signal.SIGCONT]).start()
        assert asks.committed(group, [TP]) == {TP: 1}, "after the client's question has timed out, by another"
        log.writer(group).commit([], {TP: 2}, group)
        time.sleep(2)
        assert asks.committed(group, [TP]) == {TP: 2}


def test_without_an_answer_in_time_offsets_are_those_committed_by_then(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.writer("slow").commit([], {TP: 5}, "slow")

    def late(*_: object) -> None:
        raise errors.KafkaTimeoutError("no broker answers, so that there is no client either")

    assert isinstance(log, KafkaLog)
    assert log.committed("slow", [TP]) == {TP: 5}
    monkeypatch.setattr(log, "_settled_offsets", late)
    for _ in range(2):  # The first has a client to let go of.
        assert log.committed("slow", [TP]) == {TP: 5}


def test_a_broker_that_the_client_has_forgotten_is_found_again(log: Log) -> None:
    """It was gone when the client looked last, and leads partitions again since."""
    assert isinstance(log, KafkaLog)
    assert log.bounds([TP])
    manager = log._admin._manager
    other = copy.copy(manager.cluster._brokers.pop(1))
    other.node_id = 99
    manager.cluster._brokers[99] = other
    manager._conns.clear()
    with pytest.raises(BrokerUnreachable, match="UnknownBrokerId"):
        log.bounds([TP])
    deadline = time.monotonic() + 15
    while True:
        with contextlib.suppress(BrokerUnreachable):
            log.bounds([TP])
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_broker_that_stands_still_stops_no_wait_from_ending_and_when_it_goes_on_so_do_we(cluster: KafkaCluster, log: Log) -> None:
    writer = log.writer("still")
    (node,) = cluster.nodes
    node.send(signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(LogError):
            writer.commit([Message("out", b"still", b"1", 0)], {TP: 3}, "still")
        with pytest.raises(BrokerUnreachable):
            log.bounds([TP])
        assert time.monotonic() - start < 40, "some seconds each, but not for ever"
    finally:
        node.send(signal.SIGCONT)
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(BrokerUnreachable):
            log.writer("still").commit([Message("out", b"still", b"2", 0)], {TP: 4}, "still")
            break
        assert time.monotonic() < deadline
    assert [record.value for record in everything(log, "out") if record.key == b"still"][-1] == b"2"
    assert log.committed("still", [TP]) == {TP: 4}


def test_nothing_is_fetched_while_records_that_came_are_not_taken(cluster: KafkaCluster, log: Log) -> None:
    """Where an answer comes just as the next fetch is made, that fetch would be for the other partitions alone, and be waited for."""
    log.create([Topic("busy"), Topic("idle")])
    busy, idle = TopicPartition("busy", 0), TopicPartition("idle", 0)
    with log.reader() as reader:
        assert isinstance(reader, KafkaReader)
        reader.assign({busy: 0, idle: 0})
        fetcher = reader._consumer._fetcher
        drain, came, since, waits = fetcher.fetched_records, list[bool](), list[float](), list[float]()

        def answered_meanwhile(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - as the client
            fetcher.fetched_records = drain
            found = drain(*args, **more)
            log.append([Message("busy", None, b"it", 0)])
            deadline = time.monotonic() + 2
            while not fetcher._completed_fetches and time.monotonic() < deadline:
                time.sleep(0.001)
            came.append(not found[0] and bool(fetcher._completed_fetches))
            since.append(time.monotonic())
            return found

        for _ in range(10):
            while not fetcher._nodes_with_pending_fetch_requests:
                assert reader.poll(10, 0.01) == []
            fetcher.fetched_records = answered_meanwhile
            assert [record.value for record in reader.poll(10, 1.0)] == [b"it"]
            waits.append(time.monotonic() - since[-1])
    assert all(came), "it did not come to what is looked at here"
    assert sorted(waits)[5] < 0.05, "the longest wait of a fetch is 0.1 s"
