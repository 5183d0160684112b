"""Topics as Kafka keeps them: settings there and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from streaming.kafka.client import BATCH_BYTES
from streaming.log import Topic
from streaming.risks import Risk

NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
FOREVER = 2**63 - 1
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SEGMENT_BYTES = 64 << 20

ROOM_BYTES = BATCH_BYTES + 1024
"""What Kafka's limit, which is on a batch as sent, has above ours, which is on key and value."""


def checked(topic: Topic) -> None:
    """Raise ValueError for settings that no topic can have."""
    wrong = (
        not NAME.fullmatch(topic.name)
        or topic.partitions < 1
        or topic.cleanup not in ("delete", "compact")
        or any(bound is not None and bound < 0 for bound in (topic.retention_ms, topic.retention_bytes))
        or topic.max_record_bytes < 1
    )
    if wrong:
        raise ValueError(f"no topic can have these settings: {topic}")


def to_configs(topic: Topic, min_insync: int) -> dict[str, str]:
    """The topic's settings by Kafka's names."""
    configs = {
        "cleanup.policy": topic.cleanup,
        "max.message.bytes": str(topic.max_record_bytes + ROOM_BYTES),
        # With the event's own time there, a log of 1997 would be deleted on arrival.
        "message.timestamp.type": "LogAppendTime",
        "unclean.leader.election.enable": "false",
    }
    if min_insync:
        configs["min.insync.replicas"] = str(min_insync)
    if topic.cleanup == "delete":
        configs["retention.ms"] = str(-1 if topic.retention_ms is None else topic.retention_ms)
        configs["retention.bytes"] = str(-1 if topic.retention_bytes is None else topic.retention_bytes)
        # What is to go goes by whole segments, and of the last one nothing: Kafka's own are a gigabyte, and a week.
        if topic.retention_bytes is not None:
            least = max(SEGMENT_BYTES, 2 * (topic.max_record_bytes + ROOM_BYTES))
            configs["segment.bytes"] = str(min(1 << 30, max(least, topic.retention_bytes // 8)))
        if topic.retention_ms is not None:
            configs["segment.ms"] = str(min(7 * DAY_MS, max(HOUR_MS, topic.retention_ms // 8)))
    else:
        configs["delete.retention.ms"] = str(FOREVER if topic.retention_ms is None else topic.retention_ms)
        # The segment that is written to is never compacted: what a user wants forgotten must not wait there for a week. And whoever
        # restores reads all of it: of Kafka's own gigabyte, compressed, that is many times what the users have.
        configs["segment.ms"] = str(HOUR_MS)
        configs["segment.bytes"] = str(max(SEGMENT_BYTES, 2 * (topic.max_record_bytes + ROOM_BYTES)))
        configs["min.cleanable.dirty.ratio"] = "0.2"
        configs["max.compaction.lag.ms"] = str(DAY_MS)
    return configs


def from_configs(name: str, partitions: int, configs: Mapping[str, str]) -> Topic:
    """The topic whose settings by Kafka's names are ``configs``."""
    cleanup: Literal["delete", "compact"] = "compact" if "compact" in configs["cleanup.policy"] else "delete"
    limit = max(1, int(configs["max.message.bytes"]) - ROOM_BYTES)

    def bound(key: str) -> int | None:
        value = int(configs[key])
        return None if value in (-1, FOREVER) else value

    if cleanup == "compact":
        return Topic(name, partitions, cleanup, bound("delete.retention.ms"), None, limit)
    return Topic(name, partitions, cleanup, bound("retention.ms"), bound("retention.bytes"), limit)


def own_risks(topic: Topic, configs: Mapping[str, str], copies: int) -> list[Risk]:
    """What only Kafka can get wrong about an existing topic that has ``copies`` of each partition."""
    found: list[Risk] = []

    def risk(setting: str, needed: str, loss: str, value: str | None = None) -> None:
        found.append(Risk(topic.name, setting, configs[setting] if value is None else value, needed, loss))

    if copies < 2:
        risk("replication", "2 or more, 3 at best", "all of it goes with the one broker that has it", str(copies))
    elif int(configs["min.insync.replicas"]) < 2:
        risk("min.insync.replicas", "2", "a record counts as written when one broker has it, and goes with that broker")
    if configs["unclean.leader.election.enable"] == "true":
        risk("unclean.leader.election.enable", "false", "a replica that lags may become leader, without the records it lacks")
    if configs["message.timestamp.type"] != "LogAppendTime" and "delete" in configs["cleanup.policy"]:
        risk("message.timestamp.type", "LogAppendTime", "a sender that gives the event's own time has old events deleted on arrival")
    if topic.cleanup == "compact" and "delete" in configs["cleanup.policy"]:
        risk("cleanup.policy", "compact", "the state of users who are silent for long would be dropped by age")
    return found
