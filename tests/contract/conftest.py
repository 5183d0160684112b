"""The brokers that the contract suite runs against, and what each promises beyond or short of the interface."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from streaming.brokers import open_log
from streaming.kafka import transaction_v2
from streaming.log import Log, Message, Record, Topic, TopicPartition
from tests.kafka_cluster import KafkaCluster

SESSION_MS = 300


@dataclass(frozen=True)
class Capabilities:
    """What a broker promises beyond `Log`; a test that needs one says so.

    * ``contiguous``: offsets of appended records have no gaps.
    * ``compacts_at_once``: superseded records are gone when the commit returns, not when a cleaner has run.
    * ``retains_at_once``: so are those past retention, at the next append.
    * ``one_moment``: a poll shows all partitions as of one moment.
    * ``plain_group_is_fenced``: a plain group name may not commit while the group has members.
    * ``empty_commit_is_fenced``: a commit of nothing tells an old writer that it is fenced.
    * ``commits_at_once``: a commit has taken place when it was begun.
    * ``one_order``: commits of several writers have one order in all partitions.
    * ``writes_nothing``: takes a message with neither key nor value.
    * ``polls_to_turn``: after how many polls each partition has had a turn.
    * ``settle_seconds``: how long an assignment must last before it is taken for the last one.
    * ``examples``: how many random sequences of actions there is time for.
    * ``session_ms``: the session timeout that the suite's members have.
    """

    contiguous: bool
    compacts_at_once: bool
    retains_at_once: bool
    one_moment: bool
    plain_group_is_fenced: bool
    empty_commit_is_fenced: bool
    commits_at_once: bool
    one_order: bool
    writes_nothing: bool
    polls_to_turn: int
    settle_seconds: float
    examples: int
    session_ms: int


@dataclass
class Broker:
    """A broker under test. ``connect`` opens another connection to the same log, as another process has it."""

    connect: Callable[[], Log]
    can: Capabilities
    prefix: str

    def topic(
        self,
        log: Log,
        partitions: int = 1,
        cleanup: str = "delete",
        retention_ms: int | None = None,
        retention_bytes: int | None = None,
        max_record_bytes: int = 1_000_000,
    ) -> str:
        """Make a topic of a name not used before."""
        name = f"{self.prefix}{uuid.uuid4().hex[:8]}"
        log.create([Topic(name, partitions, cleanup, retention_ms, retention_bytes, max_record_bytes)])  # type: ignore[arg-type]
        return name


EMBEDDED = Capabilities(
    contiguous=True,
    compacts_at_once=True,
    retains_at_once=True,
    one_moment=True,
    plain_group_is_fenced=True,
    empty_commit_is_fenced=True,
    commits_at_once=True,
    one_order=True,
    writes_nothing=True,
    polls_to_turn=3,
    settle_seconds=0.0,
    examples=60,
    session_ms=SESSION_MS,
)

KAFKA = Capabilities(
    contiguous=False,
    compacts_at_once=False,
    retains_at_once=False,
    one_moment=False,
    plain_group_is_fenced=False,
    empty_commit_is_fenced=False,
    commits_at_once=False,
    one_order=False,
    writes_nothing=False,
    polls_to_turn=20,
    settle_seconds=0.4,
    examples=6,
    session_ms=1000,
)


@pytest.fixture(params=["embedded", *(pytest.param(name, marks=pytest.mark.kafka) for name in ("kafka", "kafka, transactions 1"))])
def broker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """Each broker in turn. A further one is a further parameter, with its own capabilities."""
    if request.param == "kafka, transactions 1":  # As of a cluster that has no others.
        monkeypatch.setattr(transaction_v2, "LEVEL", transaction_v2.LEVEL + 1)
    with ExitStack() as opened:
        if request.param == "embedded":

            def connect() -> Log:
                return opened.enter_context(open_log(f"embedded:{tmp_path / 'log.db'}", session_timeout_ms=SESSION_MS))

            yield Broker(connect, EMBEDDED, "t-")
        else:
            cluster: KafkaCluster = request.getfixturevalue("kafka_broker")

            def connect_kafka() -> Log:
                patience = {"session_timeout_ms": KAFKA.session_ms, "max_poll_interval_ms": KAFKA.session_ms}
                return opened.enter_context(open_log(cluster.url, **patience))

            yield Broker(connect_kafka, KAFKA, f"t-{uuid.uuid4().hex[:6]}-")


@pytest.fixture
def log(broker: Broker) -> Log:
    return broker.connect()


def fill(log: Log, topic: str, *values: bytes, partition: int = 0) -> list[int]:
    return log.append([Message(topic, value, value, partition) for value in values])


def everything(log: Log, topic: str, partition: int = 0) -> list[Record]:
    """All records of a partition, by a reader that starts at the first one kept."""
    tp = TopicPartition(topic, partition)
    records: list[Record] = []
    with log.reader() as reader:
        bounds = log.bounds([tp])[tp]
        reader.assign({tp: bounds.start})
        while reader.position(tp) < bounds.end:
            records += reader.poll(100, timeout=5)
    return records


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]
