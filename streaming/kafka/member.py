"""Membership of a consumer group of Apache Kafka."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import kafka
import structlog
from kafka import errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

from streaming.errors import LogError
from streaming.log import Assignment, Member

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streaming.kafka.broker import KafkaLog

STABLE_POLL_MS = 100
REST_MS = 50
REJOIN_POLL_MS = 5_000
"""A poll that ends in the middle of a rebalance abandons it and begins another, so it must be given time."""

logger = structlog.get_logger()


class _Listener(kafka.ConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on the client's own thread, so it only takes notes."""

    def __init__(self) -> None:
        self.lost = False

    def on_partitions_assigned(self, assigned: Iterable[kafka.TopicPartition]) -> None:
        pass

    def on_partitions_revoked(self, revoked: Iterable[kafka.TopicPartition]) -> None:
        pass

    def on_partitions_lost(self, lost: Iterable[kafka.TopicPartition]) -> None:  # noqa: ARG002 - which ones makes no difference
        self.lost = True


class KafkaMember(Member):
    """Subscribes to one topic and reads nothing of it.

    Cooperative and sticky: partitions that stay keep flowing while others move. The other topics' partitions follow this one's by
    number, so no assignor has to keep them together. A thread takes part in the group as long as somebody asks for the assignment: a
    process that computes for a second stays in, one that hangs does not.
    """

    def __init__(self, log: KafkaLog, group: str, topic: str) -> None:
        self._log = log
        self._group = group
        self._topic = topic
        self._closing = threading.Event()
        self._refused: LogError | None = None
        self._last = Assignment(group, topic, "", -1, frozenset())
        self._listener = _Listener()
        self._asked = time.monotonic()
        options = log.client.options
        self._patience = options.max_poll_interval_ms / 1000
        with log.client.told(f"joining group {group}", "READ"):
            self._consumer = kafka.KafkaConsumer(
                **log.client.common(
                    group_id=group,
                    session_timeout_ms=options.session_timeout_ms,
                    # The answer to a heartbeat is how a member learns that another has gone; meanwhile the other's partitions wait.
                    heartbeat_interval_ms=max(50, options.session_timeout_ms // 12),
                    max_poll_interval_ms=options.max_poll_interval_ms,
                    partition_assignment_strategy=[CooperativeStickyAssignor],
                    enable_auto_commit=False,
                    allow_auto_create_topics=False,
                    auto_offset_reset="earliest",
                    # Between assignment and pause a fetch may go out; let it bring next to nothing.
                    fetch_max_bytes=1,
                    max_partition_fetch_bytes=1,
                    metrics_enabled=False,
                )
            )
            # For so long the client rests where all partitions are paused; it would wake two hundred times a second to do nothing.
            self._consumer.config["retry_backoff_ms"] = REST_MS
            self._consumer.subscribe([topic], listener=self._listener)
            # A leader that does not know the topic yet would share out nothing, and begin anew once it does.
            self._consumer.topics()
        self._thread = threading.Thread(target=self._take_part, name=f"member of {group}", daemon=True)
        self._thread.start()

    def _take_part(self) -> None:
        while not self._closing.is_set():
            if time.monotonic() - self._asked > self._patience:
                # The client leaves the group by itself once it is not polled for max_poll_interval_ms.
                self._closing.wait(0.05)
                continue
            moving = self._consumer._coordinator.need_rejoin()  # noqa: SLF001 - nothing public says that a rebalance is due
            try:
                self._consumer.poll(timeout_ms=REJOIN_POLL_MS if moving else STABLE_POLL_MS, max_records=1)
                if owned := self._consumer.assignment():
                    self._consumer.pause(*owned)
            except (errors.AuthorizationError, errors.SaslAuthenticationFailedError) as error:
                self._refused = self._log.client.translated(error, f"taking part in group {self._group}", "READ")
                return
            except Exception as error:  # noqa: BLE001 - closing takes the ground from under a poll, and else it must go on taking part
                if self._closing.is_set():
                    return
                logger.warning("group membership troubled", group=self._group, error=f"{type(error).__name__}: {error}")
                self._closing.wait(1.0)

    def assignment(self) -> Assignment:
        """As `Member.assignment`."""
        if self._closing.is_set():
            raise LogError(f"this membership of group {self._group} has ended")
        if self._refused is not None:
            raise self._refused
        self._asked = time.monotonic()
        before = self._consumer.group_metadata()
        owned = self._consumer.assignment()
        after = self._consumer.group_metadata()
        if self._listener.lost or (before.generation_id < 0 <= self._last.generation):
            self._listener.lost = False
            self._last = Assignment(self._group, self._topic, "", -1, frozenset())
            return self._last
        # In the middle of a rebalance the last assignment holds; its generation is refused once the next one is in force.
        if before == after and after.state is MemberState.STABLE and after.generation_id >= 0:
            partitions = frozenset(tp.partition for tp in owned)
            self._last = Assignment(self._group, self._topic, after.member_id, after.generation_id, partitions)
        return self._last

    def close(self) -> None:
        """As `Member.close`."""
        if not self._closing.is_set():
            self._closing.set()
            self._log.forget(self)
            self._thread.join(2 * STABLE_POLL_MS / 1000)
            self._consumer.close(autocommit=False, timeout_ms=2000)
            self._thread.join(1.0)
