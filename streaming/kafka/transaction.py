"""A transaction that the producer's own thread carries on while the thread that began it does something else.

The client's `send` is not used: it takes 14 microseconds a record beside the 5 of putting the record into its batch, wakes the thread at
the first record of each partition, and everything that it looks at is known here (kafka-python 3.0.12).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import kafka

from streaming.errors import BrokerUnreachable

if TYPE_CHECKING:
    from kafka.producer.future import FutureRecordMetadata
    from kafka.producer.transaction_manager import TransactionalRequestResult
    from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

    from streaming.log import Message


class Transaction:
    """One transaction of a producer, begun as it is made.

    Records and offsets are handed over; the commit is asked for by whoever sees the last answer, and only if every record is in the log
    and the offsets are with the group: `commit_transaction` would return although one was lost. A commit must not even be in the queue
    before. The client drops a request where waiting for its node raises, and sends what stands behind it: the records became visible
    without the offsets, for good (kafka-python 3.0.12). ``seconds`` is the longest wait for all records and offsets, and for the commit
    after them; ``name`` and ``place`` are for messages.
    """

    def __init__(
        self,
        producer: kafka.KafkaProducer,
        messages: Sequence[Message],
        offsets: Mapping[kafka.TopicPartition, OffsetAndMetadata],
        group: ConsumerGroupMetadata | None,
        *,
        name: str,
        place: str,
        seconds: float,
    ) -> None:
        self._sender, self._transactions = producer._sender, producer._transaction_manager  # noqa: SLF001 - nothing public goes on by itself
        self._name, self._place, self._seconds = name, place, seconds
        self._offsets: TransactionalRequestResult | None = None
        self._end: TransactionalRequestResult | None = None
        self._error: BaseException | None = None
        self._sent: list[FutureRecordMetadata] = []
        self._answered = threading.Event()
        self._count, self._expected = itertools.count(1), len(messages) + (group is not None)
        self._since = time.monotonic()
        self.ended = 0.0
        producer.begin_transaction()
        for topic in {message.topic for message in messages}:
            producer.partitions_for(topic)
        placed = [kafka.TopicPartition(message.topic, message.partition) for message in messages]
        # All at once, and before the first record: each request that adds some is a round trip.
        with self._transactions._lock:  # noqa: SLF001
            for tp in dict.fromkeys(placed):
                self._transactions.maybe_add_partition_to_transaction(tp)
            if group is not None:
                self._offsets = self._transactions.send_offsets_to_transaction(offsets, group)
                self._then(self._offsets, self._one_answered)
        append = producer._accumulator.append  # noqa: SLF001
        self._sent += [append(tp, None, message.key, message.value, [])[0] for tp, message in zip(placed, messages, strict=True)]
        for future in self._sent:
            # Of every record, not of every batch: a batch that the broker finds too large is split, and then never answered itself.
            future._add_cb_eb(self._one_answered, self._one_answered)  # noqa: SLF001
        if not self._expected:
            self._ask_for_commit()
        self._sender.wakeup()

    def _one_answered(self, _: object) -> None:
        # A failure is an answer too.
        if next(self._count) == self._expected:
            self._ask_for_commit()

    def _ask_for_commit(self) -> None:
        """Ask for the commit if all is well. Runs on the producer's thread, as a rule, where an error would be heard by nobody."""
        try:
            if all(future.succeeded() for future in self._sent) and (self._offsets is None or self._offsets.succeeded):
                self._end = self._transactions.begin_commit()
                self._then(self._end, self._note_end)
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._error = error
        self._since = time.monotonic()
        self._answered.set()

    def _note_end(self, _: object) -> None:
        self.ended = time.time()

    def _then(self, result: TransactionalRequestResult, told: Callable[[object], None]) -> None:
        """Tell when a step of the transaction is answered, with its error if it failed; once, for the client may say it again."""
        done = result.done

        def answered(error: BaseException | None = None) -> None:
            result.done = done
            done(error)
            told(error)

        result.done = answered

    @property
    def done(self) -> bool:
        """Whether `result` returns or raises without waiting.

        Also where the time for an answer is up: one that the client lost never comes, and where no event follows nobody would wait for it.
        """
        answered = self._answered.is_set() and (self._end is None or bool(self._end.is_done))
        return answered or time.monotonic() >= self._since + self._seconds

    def result(self) -> list[int]:
        """Wait for the end; returns the offset of every record.

        Raises `BrokerUnreachable` where an answer does not come in time, and else what the client gives as the reason of a failure.
        """
        if not self._answered.wait(max(0.0, self._since + self._seconds - time.monotonic())):
            raise self._unanswered("its offsets" if all(future.is_done for future in self._sent) else "the records")
        if self._error is not None:
            raise self._error
        # Whatever the client says of the commit: a record whose send failed is not in the log.
        offsets = [future.get(0).offset for future in self._sent]
        self._wait(self._offsets, "its offsets")
        self._wait(self._end, "the commit")
        return offsets

    def _wait(self, result: TransactionalRequestResult | None, what: str) -> None:
        """Wait for a step of the transaction: the producer's own methods wait for ever when the broker is gone."""
        if result is not None and not result.wait(max(0.0, self._since + self._seconds - time.monotonic()) * 1000):
            raise self._unanswered(what)

    def _unanswered(self, what: str) -> BrokerUnreachable:
        return BrokerUnreachable(
            f"{what} of {self._name} had no answer for {self._seconds:.0f} s ({self._place}); whether the transaction took place "
            "shows when the next writer of this id has been opened"
        )
