"""A connection to Apache Kafka."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import kafka
from kafka import errors
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from kafka.protocol.consumer import IsolationLevel, OffsetSpec

from streaming.errors import AccessRefused, BrokerUnreachable, LogError, RecordTooLarge, UnknownTopic
from streaming.kafka.client import BATCH_BYTES, Client, KafkaOptions
from streaming.kafka.member import KafkaMember
from streaming.kafka.probe import greet
from streaming.kafka.reader import KafkaReader
from streaming.kafka.topics import checked, from_configs, own_risks, to_configs
from streaming.kafka.writer import KafkaWriter
from streaming.log import Bounds, Log, Member, Message, Reader, Topic, TopicPartition, Writer
from streaming.partitioner import partition_of
from streaming.risks import Risk, require_alike

SETTLE_MS = 3_000
"""How long is waited for an offset that an open transaction may be about to change, and for a topic that is just being made."""

METADATA_MS = 5_000
"""How old what the admin client knows of brokers may be: one that came back since, it would go on not to know."""

Kind = TypeVar("Kind", Reader, Member, Writer)


class KafkaLog(Log):
    """Topics, offsets and clients of one cluster; ``servers`` are some of its brokers as HOST:PORT."""

    marks = True

    def __init__(self, servers: str | Sequence[str], options: KafkaOptions | None = None) -> None:
        self.client = Client(servers.split(",") if isinstance(servers, str) else list(servers), options or KafkaOptions())
        self._lock = threading.RLock()
        self._known: dict[str, Topic] = {}
        self._opened: list[Reader | Member | Writer] = []
        self._groups: dict[str, kafka.KafkaConsumer] = {}
        self._appender: kafka.KafkaProducer | None = None
        self._closed = False
        greet(self.client.servers, self.client.options.security)
        try:
            self._admin = KafkaAdminClient(**self.client.common(metadata_max_age_ms=METADATA_MS))
        except (errors.KafkaError, OSError) as error:
            raise BrokerUnreachable(f"{self.client.place}: no broker answers ({type(error).__name__}: {error})") from error

    def create(self, topics: Iterable[Topic]) -> None:
        """As `Log.create`."""
        wanted = list(topics)
        for topic in wanted:
            checked(topic)
        self._refresh()
        options = self.client.options
        begun = time.monotonic()
        deadline = begun + options.request_timeout_ms / 1000
        while missing := {topic.name: topic for topic in wanted if topic.name not in self._known}:
            try:
                self._require_visible(missing)
            except AccessRefused:
                # One that was made a moment ago, here or by another process, is known by its name before it is by its settings.
                if time.monotonic() - begun > SETTLE_MS / 1000:
                    raise
            else:
                self._make(missing.values())
            self._refresh()
            # What one broker has made another hears of a moment later.
            if missing.keys() - self._known.keys():
                if time.monotonic() > deadline:
                    raise BrokerUnreachable(f"{', '.join(missing)}: created, but not all brokers know of it yet ({self.client.place})")
                time.sleep(0.1)
        for topic in wanted:
            found = self._known[topic.name]
            require_alike(topic, found.partitions, found.cleanup)

    def _make(self, topics: Iterable[Topic]) -> None:
        options = self.client.options
        wanted = {
            topic.name: {
                "num_partitions": topic.partitions,
                "replication_factor": options.replication or -1,
                "configs": to_configs(topic, options.min_insync),
            }
            for topic in topics
        }
        # Another process may have been faster, with some of them or with all.
        with self.client.told(f"creating {', '.join(wanted)}", "CREATE"), contextlib.suppress(errors.TopicAlreadyExistsError):
            self._admin.create_topics(wanted, timeout_ms=options.request_timeout_ms)

    def identity(self) -> str:
        """As `Log.identity`: the cluster's id, whichever of its brokers answers."""
        with self.client.told("asking for the cluster's id", "DESCRIBE"), self._lock:
            return f"cluster {self._admin.describe_cluster()['cluster_id']}"

    def features(self) -> dict[str, dict[str, Any]]:
        """What the cluster's brokers have agreed on, by feature; nothing where they are older than that (2.4)."""
        with self.client.told("asking for the cluster's features", "DESCRIBE"), self._lock:
            with contextlib.suppress(errors.UnsupportedVersionError):
                found: dict[str, dict[str, Any]] = self._admin.describe_features()
                return found
            return {}

    def topics(self) -> dict[str, Topic]:
        """As `Log.topics`."""
        self._refresh()
        return dict(self._known)

    def risks(self, wanted: Iterable[Topic]) -> list[Risk]:
        """As `Log.risks`, and what only Kafka can get wrong."""
        topics = list(wanted)
        described = self._described()
        if unseen := [topic.name for topic in topics if topic.name not in described]:
            # What may not be looked at must not pass for what is in order.
            self._require_visible(unseen)
        found = super().risks(topics)
        for topic in topics:
            if topic.name in described:
                partitions, configs = described[topic.name]
                found += own_risks(topic, configs, min(len(partition["replica_nodes"]) for partition in partitions))
        return found

    def _refresh(self) -> None:
        found = {name: from_configs(name, len(partitions), configs) for name, (partitions, configs) in self._described().items()}
        with self._lock:
            self._known = found

    def _described(self) -> dict[str, tuple[list[dict[str, Any]], dict[str, str]]]:
        """Partitions and settings of every topic, by Kafka's names."""
        self._require_open()
        with self.client.told("listing topics", "DESCRIBE"), self._lock:
            topics = {topic["name"]: topic["partitions"] for topic in self._admin.describe_topics() if not topic["name"].startswith("__")}
            resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in topics]
            configs = self._admin.describe_configs(resources, config_filter="all").get("topic", {}) if resources else {}
        return {
            name: (partitions, {key: entry["value"] for key, entry in configs[name].items()})
            for name, partitions in topics.items()
            if partitions and configs.get(name)
        }

    def _require_visible(self, names: Iterable[str]) -> None:
        """Raise `AccessRefused` for topics that may well exist, were we allowed to look."""
        wanted = list(names)
        with self.client.told(f"looking for {', '.join(wanted)}", "DESCRIBE"), self._lock:
            codes = {topic["name"]: topic["error_code"] for topic in self._admin.describe_topics(wanted)}
        for right, code in (("DESCRIBE", errors.TopicAuthorizationFailedError.errno), ("DESCRIBE_CONFIGS", errors.NoError.errno)):
            if hidden := sorted(name for name in wanted if codes.get(name) == code):
                raise AccessRefused(
                    f"{self.client.options.security.who()} needs {right} of the topics {', '.join(hidden)}; docs/security.md lists what "
                    f"each process needs ({self.client.place})"
                )

    def _topic(self, name: str) -> Topic:
        if name not in self._known:
            self._refresh()
        if name not in self._known:
            self._require_visible([name])
            raise UnknownTopic(f"topic {name} does not exist ({self.client.place})")
        return self._known[name]

    def require(self, tp: TopicPartition) -> None:
        """Raise `UnknownTopic` for a partition that does not exist."""
        if not 0 <= tp.partition < self._topic(tp.topic).partitions:
            raise UnknownTopic(f"topic {tp.topic} has no partition {tp.partition}")

    def placed(self, messages: Iterable[Message]) -> list[Message]:
        """The messages with their partitions; what the broker would refuse is refused here, before any is sent."""
        found = []
        for message in messages:
            topic = self._topic(message.topic)
            partition = message.partition
            if partition is None:
                partition = 0 if message.key is None else partition_of(message.key, topic.partitions)
            if not 0 <= partition < topic.partitions:
                raise UnknownTopic(f"topic {topic.name} has no partition {partition}")
            size = len(message.key or b"") + len(message.value or b"")
            if size > topic.max_record_bytes:
                raise RecordTooLarge(f"a record of {size} bytes for {topic.name}, which takes {topic.max_record_bytes}")
            if topic.cleanup == "compact" and message.key is None:
                raise LogError(f"a message without a key for {topic.name}, which is compacted by key")
            if message.key is None and message.value is None:
                raise LogError(f"a message for {topic.name} with neither key nor value, which the client does not send")
            found.append(message if message.partition == partition else message._replace(partition=partition))
        return found

    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        """As `Log.bounds`."""
        wanted = list(tps)
        for tp in wanted:
            self.require(tp)
        if not wanted:
            return {}
        partitions = [kafka.TopicPartition(*tp) for tp in wanted]
        with self.client.told("looking up offsets", "DESCRIBE"):
            start, end = (
                self._admin.list_partition_offsets(dict.fromkeys(partitions, spec), isolation_level=IsolationLevel.READ_COMMITTED)
                for spec in (OffsetSpec.EARLIEST, OffsetSpec.LATEST)
            )
        return {tp: Bounds(start[partition].offset, end[partition].offset) for tp, partition in zip(wanted, partitions, strict=True)}

    def committed(self, group: str, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """As `Log.committed`."""
        wanted = list(tps)
        for tp in wanted:
            self.require(tp)
        if not wanted:
            return {}
        with self.client.told(f"looking up offsets of group {group}", "DESCRIBE"), self._lock:
            try:
                found = self._settled_offsets(group, wanted)
            except errors.KafkaTimeoutError:
                # The client keeps a question that was not answered in time, and would take its answer for that to a later one.
                if (late := self._groups.pop(group, None)) is not None:
                    late.close(autocommit=False, timeout_ms=0)
                # Another's transaction is open. Whoever owns a partition has opened its writer, which ended any; to others, what was
                # committed before it is the truth.
                answer = self._admin.list_group_offsets({group: [kafka.TopicPartition(*tp) for tp in wanted]}).get(group, {})
                found = {TopicPartition(tp.topic, tp.partition): entry.offset for tp, entry in answer.items()}
        return {tp: offset for tp, offset in found.items() if offset >= 0}

    def _settled_offsets(self, group: str, tps: list[TopicPartition]) -> dict[TopicPartition, int]:
        """Offsets once no transaction is pending on them: a commit that was answered becomes visible a moment later."""
        if group not in self._groups:
            self._groups[group] = kafka.KafkaConsumer(
                **self.client.common(group_id=group, isolation_level="read_committed", enable_auto_commit=False, metrics_enabled=False)
            )
        found = {tp: self._groups[group].committed(kafka.TopicPartition(*tp), timeout_ms=SETTLE_MS) for tp in tps}
        return {tp: offset for tp, offset in found.items() if offset is not None}

    def append(self, messages: Sequence[Message]) -> list[int]:
        """As `Log.append`."""
        self._require_open()
        placed = self.placed(messages)
        if not placed:
            return []
        with self.client.told("appending", "WRITE", {message.topic for message in placed}), self._lock:
            if self._appender is None:
                options = self.client.options
                self._appender = kafka.KafkaProducer(
                    **self.client.common(
                        acks="all",
                        enable_idempotence=True,
                        batch_size=BATCH_BYTES,
                        max_request_size=128 * 1024 * 1024,
                        max_block_ms=options.request_timeout_ms,
                        delivery_timeout_ms=2 * options.request_timeout_ms,
                        allow_auto_create_topics=False,
                        metrics_enabled=False,
                    )
                )
            sent = [self._appender.send(topic, value, key, partition=partition) for topic, key, value, partition in placed]
            self._appender.flush(3 * self.client.options.request_timeout_ms / 1000)
            return [future.get(0).offset for future in sent]

    def reader(self) -> Reader:
        """As `Log.reader`."""
        self._require_open()
        return self._keep(KafkaReader(self))

    def member(self, group: str, topic: str) -> Member:
        """As `Log.member`."""
        self._topic(topic)
        return self._keep(KafkaMember(self, group, topic))

    def writer(self, transactional_id: str) -> Writer:
        """As `Log.writer`."""
        self._require_open()
        return self._keep(KafkaWriter(self, transactional_id))

    def _keep(self, opened: Kind) -> Kind:
        with self._lock:
            self._opened.append(opened)
        return opened

    def forget(self, closed: Reader | Member | Writer) -> None:
        """Take note that one of this connection's clients was closed."""
        with self._lock:
            if closed in self._opened:
                self._opened.remove(closed)

    def _require_open(self) -> None:
        if self._closed:
            raise LogError("this connection is closed")

    def close(self) -> None:
        """As `Log.close`."""
        if self._closed:
            return
        self._closed = True
        for opened in list(self._opened):
            opened.close()
        for consumer in self._groups.values():
            consumer.close(autocommit=False, timeout_ms=1000)
        if self._appender is not None:
            self._appender.close(timeout=1)
        self._admin.close()
