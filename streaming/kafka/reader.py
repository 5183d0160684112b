"""A reader of Apache Kafka: one consumer without a group."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import kafka
from kafka import errors

from streaming.errors import LogError, OffsetOutOfRange
from streaming.log import Reader, Record, TopicPartition

if TYPE_CHECKING:
    from streaming.kafka.broker import KafkaLog

LOOK_SECONDS = 0.1
"""Time between two polls of the client's own, where one would only find that brokers were asked and have not answered, or what is at hand:
each is two turns through the client's thread, a millisecond and more where that competes with a step for Python's lock."""


class KafkaReader(Reader):
    """Reads committed records by partition and position."""

    def __init__(self, log: KafkaLog) -> None:
        self._log = log
        self._closed = False
        self._positions: dict[TopicPartition, int] = {}
        """Where reading began, by partition; kept only to tell what was asked for."""
        self._paused: frozenset[TopicPartition] = frozenset()
        self._looked = 0.0
        """When the client's own poll was called last, by the monotonic clock."""
        with log.client.told("opening a reader", "READ"):
            self._consumer = kafka.KafkaConsumer(
                **log.client.common(
                    group_id=None,
                    isolation_level="read_committed",
                    # A position that is not there must be said, not replaced by another.
                    auto_offset_reset="none",
                    enable_auto_commit=False,
                    allow_auto_create_topics=False,
                    fetch_max_wait_ms=100,
                    metrics_enabled=False,
                )
            )
        self._fetch_all_or_nothing()

    def _fetch_all_or_nothing(self) -> None:
        """Ask a broker for nothing while records that came are not yet taken: it would be asked for the other partitions alone.

        Until one of these has something, or the longest wait of a fetch is over, the client waits for that answer with the records in its
        hands, and asks for no more. So it went where an answer came just as the next fetch was made: once a second or two, at 1,000 events
        a second, nothing was read for 100 ms (kafka-python 3.0.12).
        """
        fetcher = self._consumer._fetcher  # noqa: SLF001 - nothing public says what is fetched
        fetchable = fetcher._fetchable_partitions  # noqa: SLF001
        fetcher._fetchable_partitions = lambda: [] if fetcher._completed_fetches else fetchable()  # noqa: SLF001

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """As `Reader.assign`."""
        self._require_open()
        for tp in positions:
            self._log.require(tp)
        self._positions = dict(positions)
        with self._log.client.told("assigning partitions", "READ"):
            self._consumer.assign([kafka.TopicPartition(*tp) for tp in positions])
            # The client leaves a partition paused that was assigned before.
            self._consumer.resume(*(kafka.TopicPartition(*tp) for tp in positions))
            self._paused, self._looked = frozenset(), 0.0
            for tp, position in positions.items():
                if position >= 0:
                    self._consumer.seek(kafka.TopicPartition(*tp), position)

    def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
        """As `Reader.poll`."""
        self._require_open()
        if not self._positions:
            return []
        wanted = self._positions.keys() if only is None else set(only)
        if strangers := wanted - self._positions.keys():
            tp = min(strangers)
            raise ValueError(f"{tp.topic}/{tp.partition} is not assigned to this reader")
        for tp, position in self._positions.items():
            if position < 0:
                raise OffsetOutOfRange(f"{tp.topic}/{tp.partition}: position {position} is before the first record")
        self._restrict(frozenset(self._positions.keys() - wanted))
        self._unpark()
        with self._log.client.told("reading", "READ"):
            try:
                found = self._taken(max_records, timeout)
            except (errors.OffsetOutOfRangeError, errors.NoOffsetForPartitionError) as error:
                raise OffsetOutOfRange(self._out_of_range(error)) from error
        return [
            Record(record.topic, record.partition, record.offset, record.timestamp, record.key, record.value)
            for records in found.values()
            for record in records
        ]

    def _taken(self, max_records: int, timeout: float) -> dict[kafka.TopicPartition, list[Any]]:
        """What the client has at hand, or else what its poll gives, which is not called where it would find nothing."""
        fetcher, now = self._consumer._fetcher, time.monotonic()  # noqa: SLF001 - nothing public says what is at hand
        if now - self._looked < LOOK_SECONDS:
            found: dict[kafka.TopicPartition, list[Any]] = fetcher.fetched_records(max_records)[0]
            if found:
                if not fetcher._completed_fetches and not fetcher._next_partition_records:  # noqa: SLF001
                    fetcher.send_fetches()  # What comes next is on its way while these are worked on.
                return found
            asked = list(fetcher._fetch_futures)  # noqa: SLF001
            if timeout == 0 and asked and not any(answer.is_done for answer in asked):
                return {}
        self._looked = now
        return cast("dict[kafka.TopicPartition, list[Any]]", self._consumer.poll(timeout_ms=int(timeout * 1000), max_records=max_records))

    def _unpark(self) -> None:
        """Let go of records that are used up: while it holds them the client does not take back those of a partition that was paused.

        They would never come, and nothing be fetched in their place (kafka-python 3.0.12).
        """
        fetcher = self._consumer._fetcher  # noqa: SLF001 - nothing public reaches what is parked there
        if fetcher._next_partition_records is not None and not fetcher._next_partition_records:  # noqa: SLF001
            fetcher._next_partition_records = None  # noqa: SLF001

    def _restrict(self, paused: frozenset[TopicPartition]) -> None:
        if paused == self._paused:
            return
        self._consumer.resume(*(kafka.TopicPartition(*tp) for tp in self._paused - paused))
        self._consumer.pause(*(kafka.TopicPartition(*tp) for tp in paused - self._paused))
        self._paused, self._looked = paused, 0.0

    def _out_of_range(self, error: errors.KafkaError) -> str:
        bounds = self._log.bounds(self._positions)
        for tp, (start, end) in bounds.items():
            position = self._position(tp)
            if not start <= position <= end:
                return f"{tp.topic}/{tp.partition}: position {position} is outside the records kept, {start} to {end}"
        return f"{', '.join(sorted({tp.topic for tp in self._positions}))}: {error}"

    def _position(self, tp: TopicPartition) -> int:
        found = self._consumer.position(kafka.TopicPartition(*tp), timeout_ms=0)
        return self._positions[tp] if found is None else found

    def position(self, tp: TopicPartition) -> int:
        """As `Reader.position`."""
        if tp not in self._positions:
            raise ValueError(f"{tp.topic}/{tp.partition} is not assigned to this reader")
        return self._position(tp)

    def _require_open(self) -> None:
        if self._closed:
            raise LogError("this reader is closed")

    def close(self) -> None:
        """As `Reader.close`."""
        if not self._closed:
            self._closed = True
            self._log.forget(self)
            self._consumer.close(autocommit=False, timeout_ms=1000)
