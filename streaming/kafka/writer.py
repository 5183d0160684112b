"""A transactional writer of Apache Kafka.

The client says less than it seems to: ``commit_transaction`` may return although a record was lost, waits for a broker that is gone have no
end, and a producer that failed once carries offsets of its failed transaction into the next. So every record's own answer is looked
at, every wait has a deadline, and a writer that failed is done with: whoever wants to go on opens a new one of the same id, which ends
what the old one left open, and looks at what is committed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import kafka
from kafka import errors
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

from streaming.errors import BrokerUnreachable, Fenced, LogError
from streaming.kafka import transaction_v2
from streaming.kafka.client import BATCH_BYTES
from streaming.kafka.transaction import Transaction
from streaming.log import Assignment, Commit, Committed, Message, TopicPartition, Writer

if TYPE_CHECKING:
    from streaming.kafka.broker import KafkaLog

END_SECONDS = 1.0
"""Longest wait for the producer's thread to end. No transaction is open then, so that nothing waits in it."""

ABORT_SECONDS = 2.0
"""Longest wait for an abort. Without it the transaction ends with the next writer of the id, or by its own timeout."""


class KafkaCommit(Commit):
    """A commit of a `KafkaWriter`."""

    def __init__(self, writer: KafkaWriter, transaction: Transaction, messages: Sequence[Message]) -> None:
        self._writer = writer
        self._transaction = transaction
        self._messages = messages
        self._offsets: list[int] | None = None

    @property
    def done(self) -> bool:
        """As `Commit.done`."""
        return self._transaction.done

    @property
    def ended(self) -> float:
        """As `Commit.ended`."""
        return self._transaction.ended

    def result(self) -> list[int]:
        """As `Commit.result`."""
        if self._offsets is None:
            self._offsets = self._writer.finish(self._transaction, self._messages)
        return self._offsets


class KafkaWriter(Writer):
    """One producer of one transactional id."""

    def __init__(self, log: KafkaLog, transactional_id: str) -> None:
        self._log = log
        self._id = transactional_id
        self._failed: LogError | None = None
        self._under_way: Transaction | None = None
        options = log.client.options
        self._seconds = options.transaction_timeout_ms / 1000
        with log.client.told(f"opening the writer {transactional_id}", "WRITE"):
            self._producer = kafka.KafkaProducer(
                **log.client.common(
                    transactional_id=transactional_id,
                    transaction_timeout_ms=options.transaction_timeout_ms,
                    # Above the transaction's, or a batch expires in silence inside it.
                    delivery_timeout_ms=2 * options.transaction_timeout_ms + options.request_timeout_ms,
                    max_block_ms=options.transaction_timeout_ms,
                    max_request_size=128 * 1024 * 1024,
                    batch_size=BATCH_BYTES,
                    # The producer's thread is woken when all records of a transaction are at hand; none are to wait for more then.
                    linger_ms=0,
                    allow_auto_create_topics=False,
                    metrics_enabled=False,
                )
            )
            try:
                self._producer.init_transactions()
                if transaction_v2.offered(log.features()):
                    transaction_v2.teach(self._producer)
            except BaseException:
                self._producer.close(timeout=0)
                raise

    def begin(
        self,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> Commit:
        """As `Writer.begin`."""
        if offsets and owner is None:
            raise ValueError("offsets were given without the assignment or group that consumed them")
        if isinstance(owner, Assignment):
            self._require_owned(owner, offsets or {})
        if self._failed is not None:
            raise type(self._failed)(f"the writer {self._id} failed before ({self._failed}); open a new one")
        if self._under_way is not None:
            raise ValueError(f"the writer {self._id} has a commit under way whose result has not been asked for")
        for tp in offsets or {}:
            self._log.require(tp)
        placed = self._log.placed(messages)
        if not placed and not offsets:
            return Committed([])
        with self._failing(placed):
            self._under_way = self._transaction(placed, offsets or {}, owner)
        return KafkaCommit(self, self._under_way, placed)

    def _transaction(
        self, messages: Sequence[Message], offsets: Mapping[TopicPartition, int], owner: Assignment | str | None
    ) -> Transaction:
        group = None
        if offsets and owner is not None:
            # Of the time when the last records were read. What the client would say now may be a later generation, or none, which passes.
            of = (owner.group, owner.generation, owner.member_id) if isinstance(owner, Assignment) else (owner,)
            group = ConsumerGroupMetadata(*of)
        consumed = {kafka.TopicPartition(*tp): OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()}
        return Transaction(self._producer, messages, consumed, group, name=self._id, place=self._log.client.place, seconds=self._seconds)

    def finish(self, transaction: Transaction, messages: Sequence[Message]) -> list[int]:
        """Wait for the end of one of this writer's transactions. Raises as `Writer.commit` does."""
        if self._failed is not None:
            raise self._failed
        with self._failing(messages):
            places = transaction.result()
        self._under_way = None
        return places

    @contextlib.contextmanager
    def _failing(self, messages: Sequence[Message]) -> Iterator[None]:
        """After a failure in the block, be done with."""
        try:
            yield
        except LogError as error:
            self._failed = error
            self._give_up()
            raise
        except errors.KafkaError as error:
            self._failed = self._log.client.translated(
                error, f"the transaction of {self._id}", "WRITE", (message.topic for message in messages)
            )
            self._give_up()
            raise self._failed from error

    def _require_owned(self, owner: Assignment, offsets: Mapping[TopicPartition, int]) -> None:
        if owner.generation < 0:
            raise Fenced(f"this member of group {owner.group} was evicted")
        for tp in offsets:
            if tp.partition not in owner.partitions:
                raise Fenced(f"{tp.topic}/{tp.partition} does not belong to this member of group {owner.group}")

    def _give_up(self) -> None:
        """Abort, if that is still possible, so that readers need not wait for the transaction to time out."""
        if not isinstance(self._failed, BrokerUnreachable):
            with contextlib.suppress(errors.KafkaError):
                end = self._producer._transaction_manager.begin_abort()  # noqa: SLF001 - the producer's own way waits without end
                self._producer._sender.wakeup()  # noqa: SLF001
                end.wait(ABORT_SECONDS * 1000)
        self._end()

    def _end(self) -> None:
        """Let the producer go. Its own way is to flush first, and to stay, with its thread and sockets, where that fails."""
        self._producer._sender.force_close()  # noqa: SLF001
        self._producer._sender.join(END_SECONDS)  # noqa: SLF001
        with contextlib.suppress(errors.KafkaError):
            self._producer.close(timeout=0)

    def close(self) -> None:
        """As `Writer.close`."""
        self._log.forget(self)
        if self._failed is None:
            self._failed = LogError("it is closed")
            self._end()
