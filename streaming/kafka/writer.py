"""A transactional writer of Apache Kafka.

The client says less than it seems to: ``commit_transaction`` may return although a record was lost, waits for a broker that is gone have no
end, and a producer that failed once carries offsets of its failed transaction into the next. So every record's own answer is looked
at, every wait has a deadline, and a writer that failed is done with: whoever wants to go on opens a new one of the same id, which ends
what the old one left open, and looks at what is committed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import kafka
from kafka import errors
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

from streaming.errors import BrokerUnreachable, Fenced, LogError
from streaming.kafka.client import BATCH_BYTES
from streaming.log import Assignment, Message, TopicPartition, Writer

if TYPE_CHECKING:
    from kafka.producer.transaction_manager import TransactionalRequestResult

    from streaming.kafka.broker import KafkaLog

END_SECONDS = 1.0
"""Longest wait for the producer's thread to end. No transaction is open then, so that nothing waits in it."""

ABORT_SECONDS = 2.0
"""Longest wait for an abort. Without it the transaction ends with the next writer of the id, or by its own timeout."""


class KafkaWriter(Writer):
    """One producer of one transactional id."""

    def __init__(self, log: KafkaLog, transactional_id: str) -> None:
        self._log = log
        self._id = transactional_id
        self._failed: LogError | None = None
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
                    # Nothing goes before `flush`: else the producer's thread takes the first records of each partition at once, and the
                    # rest in many small requests, each with a round trip.
                    linger_ms=1_000,
                    allow_auto_create_topics=False,
                    metrics_enabled=False,
                )
            )
            try:
                self._producer.init_transactions()
            except BaseException:
                self._producer.close(timeout=0)
                raise

    def commit(
        self,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> list[int]:
        """As `Writer.commit`."""
        if offsets and owner is None:
            raise ValueError("offsets were given without the assignment or group that consumed them")
        if isinstance(owner, Assignment):
            self._require_owned(owner, offsets or {})
        if self._failed is not None:
            raise type(self._failed)(f"the writer {self._id} failed before ({self._failed}); open a new one")
        for tp in offsets or {}:
            self._log.require(tp)
        placed = self._log.placed(messages)
        if not placed and not offsets:
            return []
        try:
            return self._transaction(placed, offsets or {}, owner)
        except LogError as error:
            self._failed = error
            self._give_up()
            raise
        except errors.KafkaError as error:
            self._failed = self._log.client.translated(
                error, f"the transaction of {self._id}", "WRITE", (message.topic for message in placed)
            )
            self._give_up()
            raise self._failed from error

    def _transaction(self, messages: Sequence[Message], offsets: Mapping[TopicPartition, int], owner: Assignment | str | None) -> list[int]:
        producer, transactions = self._producer, self._producer._transaction_manager  # noqa: SLF001 - see `_wait`
        producer.begin_transaction()
        sent = [producer.send(topic, value, key, partition=partition) for topic, key, value, partition in messages]
        producer.flush(self._seconds)
        # Whatever the commit says: a record whose send failed is not in the log.
        places = [future.get(0).offset for future in sent]
        if offsets and owner is not None:
            if isinstance(owner, Assignment):
                # Of the time when the batch was read. What the client would say now may be a later generation, or none, which passes.
                group = ConsumerGroupMetadata(owner.group, owner.generation, owner.member_id)
            else:
                group = ConsumerGroupMetadata(owner)
            consumed = {kafka.TopicPartition(*tp): OffsetAndMetadata(offset, "", -1) for tp, offset in offsets.items()}
            self._wait(transactions.send_offsets_to_transaction(consumed, group), "sending offsets")
        self._wait(transactions.begin_commit(), "the commit")
        return places

    def _wait(self, result: TransactionalRequestResult, what: str, seconds: float | None = None) -> None:
        """Wait for a step of the transaction: the producer's own methods wait for ever when the broker is gone."""
        seconds = self._seconds if seconds is None else seconds
        self._producer._sender.wakeup()  # noqa: SLF001
        if not result.wait(timeout_ms=seconds * 1000):
            raise BrokerUnreachable(
                f"{what} of {self._id} was not answered for {seconds:.0f} s ({self._log.client.place}); whether it took place shows "
                "when the next writer of this id has been opened"
            )

    def _require_owned(self, owner: Assignment, offsets: Mapping[TopicPartition, int]) -> None:
        if owner.generation < 0:
            raise Fenced(f"this member of group {owner.group} was evicted")
        for tp in offsets:
            if tp.partition not in owner.partitions:
                raise Fenced(f"{tp.topic}/{tp.partition} does not belong to this member of group {owner.group}")

    def _give_up(self) -> None:
        """Abort, if that is still possible, so that readers need not wait for the transaction to time out."""
        try:
            if not isinstance(self._failed, BrokerUnreachable):
                self._wait(self._producer._transaction_manager.begin_abort(), "the abort", ABORT_SECONDS)  # noqa: SLF001
        except (errors.KafkaError, LogError):
            pass
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
