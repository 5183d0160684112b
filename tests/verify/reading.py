"""Topics read from their first record to their end, and events judged by rules of the verifier's own."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack

from streaming.chunks import Joiner
from streaming.log import Log, Record, TopicPartition

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # kafka-python reads its own protocol schemas by an old name.
    from kafka.partitioner.default import murmur2


def read(log: Log, topic: str, partition: int) -> list[Record]:
    """Every record of a partition."""
    tp = TopicPartition(topic, partition)
    start, end = log.bounds([tp])[tp]
    found: list[Record] = []
    with log.reader() as reader:
        reader.assign({tp: start})
        while reader.position(tp) < end:
            found += reader.poll(1000, timeout=1.0)
    return found


class Whole(NamedTuple):
    """A value joined from its chunks: the offset of its first record, the offset after its last, and the bytes."""

    start: int
    end: int
    value: bytes


def joined(records: Iterable[Record]) -> list[Whole]:
    """The whole values of a partition."""
    joiner, found, start = Joiner(), [], None
    for record in records:
        start = record.offset if start is None else start
        if (value := joiner.feed(record)) is not None:
            found.append(Whole(start, record.offset + 1, value))
            start = None
    assert start is None, "a value of which chunks are missing stands at the end"
    return found


class Event(NamedTuple):
    """A valid interaction."""

    offset: int
    user: str
    item: str
    rating: float
    timestamp: int


def event_of(record: Record, scale: tuple[float, float], partitions: int) -> Event | None:
    """The event that a record holds, None where it holds none. Plain checks, for events without exotic but lawful spellings."""
    if not record.value or record.key is None or len(record.value) > 65_536:
        return None
    try:
        fields: Any = json.loads(record.value) if record.value[:1] == b"{" else msgpack.unpackb(record.value)
        user, item, rating, timestamp = (fields[name] for name in ("user", "item", "rating", "timestamp"))
        few = len(fields) <= 256
    except Exception:  # noqa: BLE001 - whatever goes wrong in reading it, it is no event
        return None
    user, item = (str(name) if type(name) is int else name for name in (user, item))
    right = (
        few
        and all(is_id(name) for name in (user, item))
        and type(rating) in (int, float)
        and math.isfinite(rating)
        and scale[0] <= rating <= scale[1]
        and type(timestamp) is int
        and 86_400_000 <= timestamp <= 7_258_118_400_000
        and in_place(record, user, partitions)
    )
    return Event(record.offset, user, item, float(rating), timestamp) if right else None


def in_place(record: Record, user: str, partitions: int) -> bool:
    """Whether a record's key is its user, and its partition that of the key."""
    return record.key == user.encode() and (murmur2(record.key) & 0x7FFFFFFF) % partitions == record.partition


def is_id(name: object) -> bool:
    """Whether it is text that may name a user or item."""
    return isinstance(name, str) and name.isprintable() and name == name.strip() and 0 < len(name.encode()) <= 256
