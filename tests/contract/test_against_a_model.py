"""The broker against a model of lists and dicts, over random sequences of everything that can be done to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streaming.errors import Fenced, RecordTooLarge
from streaming.log import Log, Message, TopicPartition, Writer
from tests.contract.conftest import Broker, everything

KEYS = [b"a", b"b", b"c"]
LIMIT = 20

messages = st.lists(
    st.tuples(
        st.sampled_from(["plain", "table"]),
        st.sampled_from(KEYS),
        st.one_of(st.none(), st.binary(max_size=4)),
        st.integers(0, 1),
    ),
    max_size=6,
)
offsets = st.dictionaries(st.integers(0, 1), st.integers(0, 50), max_size=2)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), messages),
        st.tuples(st.just("commit"), messages, offsets),
        st.tuples(st.just("too large"), messages, offsets),
        st.tuples(st.just("fenced"), messages, offsets),
        st.tuples(st.just("reopen")),
        st.tuples(st.just("read"), st.integers(1, 7), st.integers(0, 3)),
    ),
    max_size=30,
)


class Model:
    """What the log should hold: all records ever appended, in order; compaction is a filter on reading."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, int], list[tuple[bytes, bytes | None]]] = {(t, p): [] for t in ("plain", "table") for p in (0, 1)}
        self.offsets: dict[int, int] = {}

    def append(self, batch: list[tuple[str, bytes, bytes | None, int]]) -> None:
        for topic, key, value, partition in batch:
            self.records[topic, partition].append((key, value))

    def kept(self, topic: str, partition: int) -> list[tuple[bytes, bytes | None]]:
        rows = self.records[topic, partition]
        if topic == "plain":
            return rows
        return [row for n, row in enumerate(rows) if all(later[0] != row[0] for later in rows[n + 1 :])]


class Run:
    """One sequence of actions on topics of its own."""

    def __init__(self, broker: Broker, log: Log) -> None:
        self.broker, self.log, self.model = broker, log, Model()
        self.names = {
            "plain": broker.topic(log, 2, max_record_bytes=LIMIT),
            "table": broker.topic(log, 2, "compact", max_record_bytes=LIMIT),
        }
        self.group = self.names["plain"]
        self.writer = self.open()
        self.tps = [TopicPartition(self.names["plain"], partition) for partition in (0, 1)]
        self.reader = log.reader()
        self.reader.assign(dict.fromkeys(self.tps, 0))
        self.seen: dict[int, list[tuple[bytes | None, bytes | None]]] = {0: [], 1: []}

    def open(self) -> Writer:
        return self.log.writer(self.group)

    def messages(self, batch: list[tuple[str, bytes, bytes | None, int]]) -> list[Message]:
        return [Message(self.names[topic], key, value, partition) for topic, key, value, partition in batch]

    def do(self, action: tuple[Any, ...]) -> None:
        match action:
            case ("append", batch):
                self.log.append(self.messages(batch))
                self.model.append(batch)
            case ("commit", batch, consumed):
                found = self.writer.commit(self.messages(batch), {self.tps[p]: offset for p, offset in consumed.items()}, self.group)
                assert len(found) == len(batch)
                self.model.append(batch)
                self.model.offsets |= consumed
            case ("too large", batch, consumed):
                large = Message(self.names["table"], b"a", b"x" * LIMIT)
                with pytest.raises(RecordTooLarge):
                    self.writer.commit([*self.messages(batch), large], {self.tps[p]: offset for p, offset in consumed.items()}, self.group)
            case ("fenced", batch, consumed):
                old, self.writer = self.writer, self.open()
                if not batch and not consumed and not self.broker.can.empty_commit_is_fenced:
                    return
                with pytest.raises(Fenced):
                    old.commit(self.messages(batch), {self.tps[p]: offset for p, offset in consumed.items()}, self.group)
            case ("reopen",):
                self.log = self.broker.connect()
                self.writer = self.open()
            case ("read", count, which):
                only = [tp for tp in self.tps if which in (2, 3) or tp.partition == which]
                for record in self.reader.poll(count, only=only):
                    self.seen[record.partition].append((record.key, record.value))

    def check(self) -> None:
        for (topic, partition), rows in self.model.records.items():
            records = everything(self.log, self.names[topic], partition)
            assert sorted({record.offset for record in records}) == [record.offset for record in records]
            expected = self.model.kept(topic, partition)
            if topic == "table" and not self.broker.can.compacts_at_once:
                last = {record.key: record.value for record in records}
                assert last == dict(expected)
            else:
                assert [(record.key, record.value) for record in records] == expected
            if self.broker.can.contiguous:
                end = self.log.bounds([TopicPartition(self.names[topic], partition)])
                assert [bounds.end for bounds in end.values()] == [len(rows)]
        assert self.log.committed(self.group, self.tps) == {self.tps[p]: offset for p, offset in self.model.offsets.items()}
        for partition, rows_seen in self.seen.items():
            assert rows_seen == self.model.records["plain", partition][: len(rows_seen)]


@pytest.fixture
def shared(broker: Broker) -> tuple[Broker, Log, Iterator[int]]:
    return broker, broker.connect(), iter(range(broker.can.examples))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=actions)
def test_the_log_holds_what_lists_and_dicts_would(shared: tuple[Broker, Log, Iterator[int]], script: list[tuple[Any, ...]]) -> None:
    broker, log, left = shared
    # The first example is the empty one.
    if script and next(left, None) is None:
        return
    run = Run(broker, log)
    for action in script:
        run.do(action)
    run.check()
