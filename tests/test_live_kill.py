"""Promises (a) to (e) while live processes are killed, paused and replaced, on either broker; on Apache Kafka the broker is
killed too, and connections to it are cut or left half open."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.opening import connect
from consumers.settings import Settings
from streaming.log import TopicPartition, left
from streaming.partitioner import partition_of
from tests.kafka_cluster import KILLED, KafkaCluster
from tests.nursery import Nursery
from tests.small_runs import Stream, fill, profile, small
from tests.test_promises import findings, reasons_of

PARTITIONS, BURSTS = 3, 8


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def settings_of(log: Path) -> Settings:
    return small(
        log,
        topics={"partitions": PARTITIONS},
        worker={"poll_timeout_ms": 20, "linger_ms": 2, "max_users": 11, "state_dir": str(log.parent / "state")},
        log={"session_timeout_ms": 1000},
        kafka={"transaction_timeout_ms": 5000, "request_timeout_ms": 3000},
    )


def test_on_the_embedded_log(nursery: Nursery, tmp_path: Path) -> None:
    disturb(nursery, settings_of(tmp_path / "log.db"), None)


@pytest.mark.kafka
def test_on_apache_kafka(nursery: Nursery, tmp_path: Path) -> None:
    with KafkaCluster(tmp_path / "kafka", settings=KILLED, proxied=True) as cluster:
        disturb(nursery, settings_of(tmp_path / "unused.db").model_copy(update={"broker": cluster.url}), cluster)


def disturb(nursery: Nursery, settings: Settings, cluster: KafkaCluster | None) -> None:
    """Partitions move between workers by kill -9 and by a pause beyond the session's timeout; what the paused one then does is void."""
    partitions, bursts = PARTITIONS, BURSTS
    stream = Stream(bursts * 100, seed=12, partitions=partitions)
    fill(settings, stream.profiles)
    theirs = settings if cluster is None else settings.model_copy(update={"broker": cluster.proxied_url})
    workers = [nursery.start(theirs, role="worker") for _ in range(2)]
    trainer = nursery.start(theirs, role="trainer")
    dice = random.Random(3)
    offsets: list[int] = []
    nulls: dict[tuple[str, int, int], str] = {}
    for burst in range(bursts):
        leaving = [f"u{(burst * 5 + n) % 40}" for n in range(3)]
        for user, place in zip(leaving, fill(settings, [profile("users", user, None) for user in leaving]), strict=True):
            nulls["users", partition_of(user.encode(), partitions), place] = user
        offsets += fill(settings, stream.messages[burst * 100 : burst * 100 + 100])
        time.sleep(dice.uniform(0.05, 0.25))
        if burst in {1, 3}:
            os.kill(workers.pop(0), signal.SIGKILL)
            workers.append(nursery.start(theirs, role="worker"))
        elif burst in {2, 5}:
            os.kill(trainer, signal.SIGKILL)
            trainer = nursery.start(theirs, role="trainer")
        elif burst == 4:
            os.kill(workers[0], signal.SIGSTOP)
            time.sleep(1.5)
            os.kill(workers[0], signal.SIGCONT)
        elif burst == 6 and cluster is not None:
            (broker,) = cluster.nodes
            broker.kill()
            time.sleep(1)
            broker.start()
            cluster.wait()
        elif burst == 7 and cluster is not None:
            while not cluster.proxies[0].cut():  # After the outage they come back one by one.
                time.sleep(0.1)
    deadline = time.monotonic() + (30 if cluster is None else 80)
    # A promise that is broken for good stays so; one not kept yet only needs time.
    while (found := findings(settings, reasons=reasons_of(stream, offsets), nulls=nulls)) or waiting(settings):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1 if cluster is None else 1.0)
    for pid in (*workers, trainer):
        os.kill(pid, signal.SIGTERM)
    assert found == []
    assert waiting(settings) == 0


def waiting(settings: Settings) -> int:
    """Interactions that no step has committed yet."""
    with connect(settings) as log:
        tps = [TopicPartition("interactions", number) for number in range(settings.topics.partitions)]
        done = log.committed(settings.group_id, tps)
        return sum(left(log, {tp: done.get(tp, 0) for tp in tps}).values())
