"""The verifier finds what breaks the exactly-once step on a real Apache Kafka; the same disturbance without the break leaves it silent.

Each test breaks one part of the product's own step and disturbs the run so that the part is needed.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kafka
import msgspec
import pytest
from kafka.producer.transaction_manager import TransactionManager
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

from consumers.live import run_worker
from consumers.opening import connect
from consumers.settings import Settings
from consumers.state import State
from consumers.system import System
from consumers.trainer import Trainer
from streaming.codec import decode, encode
from streaming.errors import BrokerUnreachable, LogError
from streaming.events import Position, Support
from streaming.kafka import KafkaLog
from streaming.kafka.member import KafkaMember
from streaming.kafka.transaction import Transaction
from streaming.kafka.writer import KafkaWriter
from streaming.log import Assignment, Bounds, Commit, Committed, Member, Message, Record, TopicPartition, Writer, catch_up
from streaming.support import SupportSets
from streaming.topics import POSITION_KEY
from tests.kafka_cluster import KafkaCluster
from tests.small_runs import MICRO_BATCH, Stream, fill, small
from tests.test_promises import findings, reasons_of

pytestmark = pytest.mark.kafka

Patch = pytest.MonkeyPatch
Offsets = Mapping[TopicPartition, int]
Owner = Assignment | str | None
STREAM = Stream(128, seed=3, garbage=0.1)
STEPS = len(STREAM.messages) // MICRO_BATCH


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def settings(kafka_broker: KafkaCluster, tmp_path: Path) -> Settings:
    """A run of its own on the broker that all tests share."""
    patience = {"transaction_timeout_ms": 5000, "request_timeout_ms": 3000, "max_poll_interval_ms": 1000}
    made = small(
        tmp_path / "unused.db",
        topic_prefix=f"f{uuid.uuid4().hex[:8]}-",
        log={"session_timeout_ms": 1000},
        kafka=patience,
        worker={"poll_timeout_ms": 20, "linger_ms": 20},
    )
    return made.model_copy(update={"broker": kafka_broker.url})


def put(settings: Settings, messages: Sequence[Message]) -> list[int]:
    return fill(settings, [message._replace(topic=settings.topic_prefix + message.topic) for message in messages])


def interactions(settings: Settings) -> TopicPartition:
    return TopicPartition(settings.topic_prefix + "interactions", 0)


def score(settings: Settings) -> None:
    """A worker's life: it takes over the partition and makes the steps that are left, each while the one before is committed.

    One that dies leaves its transaction open.
    """
    with System(settings) as system:
        worker, tp = system.worker(), interactions(settings)
        offset = worker.open(0)
        # Only now that what an earlier owner left open has ended: offsets are waited for that it may be about to change.
        worker.tables.assign([0])
        worker.tables.advance()
        with system.log.reader() as reader:
            reader.assign({tp: offset})
            for records in catch_up(system.log, reader, [tp], at_once=MICRO_BATCH):
                worker.begin(0, records, settings.group_id)
        worker.finish(0)


def train(settings: Settings) -> None:
    """A trainer's life: it folds what is there."""
    with System(settings) as system:
        trainer = system.trainer()
        tp = TopicPartition(settings.topic_prefix + "updates", 0)
        while trainer._reader.position(tp) < system.log.bounds([tp])[tp].end:
            trainer.step(0.2)


def found(settings: Settings, **rest: Any) -> dict[str, list[str]]:  # noqa: ANN401 - as Rules
    """What the verifier finds, by promise."""
    told: dict[str, list[str]] = {}
    for finding in findings(settings, **rest):
        told.setdefault(finding.promise, []).append(finding.text)
    return told


class Death:
    """Kills at the moment of this number."""

    def __init__(self, number: int) -> None:
        self.number, self.moments = number, 0

    def passes(self) -> None:
        self.moments += 1
        if self.moments == self.number:
            raise Killed


def die_before_the_commit(patch: Patch, death: Death) -> None:
    """The records of a step and its offsets are sent, and the process is gone before it has said that they count."""
    begin = TransactionManager.begin_commit

    def begin_commit(transactions: TransactionManager) -> Any:  # noqa: ANN401 - as the method
        death.passes()
        return begin(transactions)

    patch.setattr(TransactionManager, "begin_commit", begin_commit)


def commit_offsets_outside(patch: Patch, death: Death, *, first: str) -> None:
    """The consumer commits the offsets, as it does everywhere else; the process is gone between that and the transaction."""
    transaction = KafkaWriter._transaction

    def in_halves(writer: KafkaWriter, messages: Sequence[Message], offsets: Offsets, owner: Owner) -> Transaction:
        if not isinstance(owner, str):
            return transaction(writer, messages, offsets, owner)
        log = writer._log
        log.committed(owner, offsets)
        consumed = {kafka.TopicPartition(*tp): OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()}
        if first == "offsets":
            log._groups[owner].commit(consumed)
            death.passes()
            return transaction(writer, messages, {}, None)
        begun = transaction(writer, messages, {}, None)
        begun.result()
        death.passes()
        log._groups[owner].commit(consumed)
        return begun

    patch.setattr(KafkaWriter, "_transaction", in_halves)


def believe_the_offsets(patch: Patch) -> None:
    """Break the second line of defence: a worker otherwise will not go on where offsets and changelog do not belong together."""
    fit = State.fit

    def believing(state: State, number: int, sets: SupportSets) -> tuple[Bounds, Position | None]:
        bounds, newest = fit(state, number, sets)
        source = TopicPartition(state.interactions, number)
        offset = state.log.committed(state.settings.group_id, [source])[source]
        return bounds, newest and msgspec.structs.replace(newest, offset=offset)

    patch.setattr(State, "fit", believing)


@pytest.mark.parametrize(("first", "shows"), [("messages", "has 2 scores"), ("offsets", "has no score"), (None, "")])
def test_offsets_committed_outside_the_transaction(first: str | None, shows: str, settings: Settings, monkeypatch: Patch) -> None:
    """Killed in the fourth step, its events are scored twice or not at all; killed in a whole one, they are scored once."""
    reasons = reasons_of(STREAM, put(settings, STREAM.messages), interactions(settings).topic)
    death = Death(4)
    with monkeypatch.context() as patch:
        if first is None:
            die_before_the_commit(patch, death)
        else:
            commit_offsets_outside(patch, death, first=first)
        with pytest.raises(Killed):
            score(settings)
    if first is not None:
        with pytest.raises(LogError, match="do not belong together"):
            score(settings)
        believe_the_offsets(monkeypatch)
    score(settings)
    train(settings)
    told = found(settings, reasons=reasons)
    assert told == {} if first is None else any(shows in text for text in told["b"])


class Ask:
    """Asked to stop from another thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.ask = self._event.set

    def __bool__(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)


@contextmanager
def live(settings: Settings, name: str) -> Iterator[None]:
    """A live worker on a thread of this name."""
    stop, errors = Ask(), list[BaseException]()

    def work() -> None:
        try:
            with System(settings) as system:
                run_worker(system, stop)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            errors.append(error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.ask()
        thread.join(20)
    assert not thread.is_alive()
    assert errors == []


def wait_for(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask_for_metadata_at_commit_time(patch: Patch) -> None:
    """What the client says of its membership when the step is done, not what it said when the batch was read."""
    members = dict[str, KafkaMember]()
    join, transaction = KafkaLog.member, KafkaWriter._transaction

    def member(log: KafkaLog, group: str, topic: str) -> Member:
        joined = join(log, group, topic)
        assert isinstance(joined, KafkaMember)
        members[threading.current_thread().name] = joined
        return joined

    def late(writer: KafkaWriter, messages: Sequence[Message], offsets: Offsets, owner: Owner) -> Transaction:
        if isinstance(owner, Assignment):
            now: ConsumerGroupMetadata = members[threading.current_thread().name]._consumer.group_metadata()
            owner = owner._replace(generation=now.generation_id, member_id=now.member_id)
        return transaction(writer, messages, offsets, owner)

    patch.setattr(KafkaLog, "member", member)
    patch.setattr(KafkaWriter, "_transaction", late)


def name_writers_after_their_workers(patch: Patch) -> None:
    """Without one transactional id for each partition, whoever takes over fences nobody by opening its writer."""
    writer = KafkaLog.writer

    def own(log: KafkaLog, transactional_id: str) -> Writer:
        return writer(log, f"{transactional_id}-{threading.current_thread().name}")

    patch.setattr(KafkaLog, "writer", own)


@pytest.mark.parametrize(
    ("own_ids", "late_metadata"),
    [(True, False), (False, True), (True, True)],
    ids=["fenced by generation alone", "fenced by epoch alone", "broken"],
)
def test_group_metadata_taken_at_commit_time(settings: Settings, monkeypatch: Patch, *, own_ids: bool, late_metadata: bool) -> None:
    """A worker hangs in its second transaction until another has its partition and has done all of it; then it commits what it had in hand.

    Either line of defence holds alone: the generation of the batch, and one transactional id for each partition. So both are broken.
    """
    if late_metadata:
        ask_for_metadata_at_commit_time(monkeypatch)
    if own_ids:
        name_writers_after_their_workers(monkeypatch)
    hung, go_on, committed, steps = threading.Event(), threading.Event(), threading.Event(), [0]
    begin = KafkaWriter.begin

    def hanging(writer: KafkaWriter, *args: Any) -> Commit:  # noqa: ANN401 - as the method
        steps[0] += threading.current_thread().name == "first"
        if steps[0] != 2 or threading.current_thread().name != "first":
            return begin(writer, *args)
        hung.set()
        assert go_on.wait(30)
        try:
            return begin(writer, *args)
        finally:
            committed.set()

    monkeypatch.setattr(KafkaWriter, "begin", hanging)
    end = put(settings, STREAM.messages)[-1] + 1
    tp = interactions(settings)
    with connect(settings) as log, live(settings, "first"):
        assert hung.wait(20)
        with live(settings, "second"):
            wait_for(lambda: log.committed(settings.group_id, [tp]).get(tp, 0) >= end)
            go_on.set()
            assert committed.wait(20)
    monkeypatch.undo()
    train(settings)
    told = found(settings)
    broken = own_ids and late_metadata
    assert ("b" in told) is broken, told
    assert any("has 2 scores" in text for text in told["b"]) if broken else told == {}


def expire(patch: Patch, step: int, name: str, *, ignored: bool) -> None:
    """In the step of this number the batch of one topic waits behind another until its delivery timeout, and is given up in silence.

    The client's classifier calls that a matter of trying again, so the transaction stands, and its commit goes through.
    """
    transaction, steps = KafkaWriter._transaction, [0]

    def careless(writer: KafkaWriter, messages: Sequence[Message], offsets: Offsets, owner: Owner) -> Transaction | Committed:
        steps[0] += owner is not None
        accumulator = writer._producer._accumulator
        if steps[0] == step and offsets:
            accumulator.config["delivery_timeout_ms"] = 300
            accumulator.muted.add(kafka.TopicPartition(name, 0))
        if not ignored:
            return transaction(writer, messages, offsets, owner)
        writer._producer.begin_transaction()
        sent = [writer._producer.send(topic, value, key, partition=partition) for topic, key, value, partition in messages]
        writer._producer.flush()
        consumed = {kafka.TopicPartition(*tp): OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()}
        if consumed:
            writer._producer.send_offsets_to_transaction(consumed, ConsumerGroupMetadata(str(owner)))
        writer._producer.commit_transaction()
        return Committed([future.value.offset if future.succeeded() else -1 for future in sent])

    patch.setattr(KafkaWriter, "_transaction", careless)


@pytest.mark.parametrize(
    ("topic", "ignored", "promise", "shows"),
    [("scores", True, "b", "has no score"), ("support", True, "a", "support[0]"), ("scores", False, "", "")],
)
def test_a_failed_send_ignored(topic: str, promise: str, shows: str, settings: Settings, monkeypatch: Patch, *, ignored: bool) -> None:
    put(settings, STREAM.messages)
    # The last step, so that no later one puts the changelog right.
    with monkeypatch.context() as patch:
        expire(patch, STEPS, settings.topic_prefix + topic, ignored=ignored)
        if ignored:
            score(settings)
        else:
            with pytest.raises(BrokerUnreachable, match="Timeout"):
                score(settings)
    if not ignored:
        score(settings)
    train(settings)
    told = found(settings)
    assert set(told) == ({promise} if ignored else set())
    assert not ignored or any(shows in text for text in told[promise])


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "control"])
def test_an_update_folded_twice(settings: Settings, monkeypatch: Patch, *, broken: bool) -> None:
    """The trainer dies with a version made and not committed, and another begins: where the last version ends, or somewhere else."""
    put(settings, STREAM.messages)
    score(settings)
    with monkeypatch.context() as patch:
        patch.setattr("consumers.trainer.READ_AT_ONCE", 8)
        patch.setattr("consumers.trainer.FOLD_UPDATES", 8)
        die_before_the_commit(patch, Death(3))
        with pytest.raises(Killed):
            train(settings)
    if broken:
        begin = Trainer._begin
        monkeypatch.setattr(Trainer, "_begin", lambda trainer, positions: begin(trainer, dict.fromkeys(positions, 0)))
    train(settings)
    told = found(settings)
    assert set(told) == ({"c"} if broken else set())
    assert not broken or any("queries" in text for text in told["c"])


@pytest.mark.parametrize("broken", [True, False], ids=["broken", "control"])
def test_a_support_set_one_event_short(settings: Settings, monkeypatch: Patch, *, broken: bool) -> None:
    """The worker dies in a step, and another restores what it had: all of it, or each user without the last event."""
    put(settings, STREAM.messages)
    with monkeypatch.context() as patch:
        die_before_the_commit(patch, Death(4))
        with pytest.raises(Killed):
            score(settings)
    if broken:
        restore = SupportSets.restore

        def short(sets: SupportSets, record: Record) -> None:
            if record.key != POSITION_KEY and record.value is not None:
                held = decode(record.value, Support, what="support")
                lost = msgspec.structs.replace(held, interactions=held.interactions[:-1], earlier=held.earlier - 1)
                record = record._replace(value=encode(lost))
            restore(sets, record)

        monkeypatch.setattr(SupportSets, "restore", short)
    score(settings)
    train(settings)
    told = found(settings)
    assert set(told) == ({"a", "d"} if broken else set()), "a wrong support set, and scores made from it"
    assert not broken or any("support[0] of" in text for text in told["a"])
