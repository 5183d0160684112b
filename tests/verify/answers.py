"""Requests: each valid one below the committed offset has one answer, made from what its user had at the position that it names."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

from streaming.codec import decode
from streaming.events import Answer, DeadLetter, Source
from streaming.log import Log, Record, TopicPartition
from tests.verify.finding import Finding
from tests.verify.reading import in_place, is_id, read

MOST_ITEMS, MOST_BEST = 1000, 100


class Asked(NamedTuple):
    """A valid request."""

    request: str
    user: str
    items: list[str] | None
    n: int | None


def is_answer(record: Record) -> bool:
    """Whether a record of `scores` answers a request."""
    return "asked" in msgpack.unpackb(record.value or b"\x80")


def asked_in(record: Record, partitions: int) -> Asked | None:
    """The request that a record holds, None where it holds none. Plain checks, as `event_of` has them."""
    try:
        value = record.value or b""
        fields: Any = json.loads(value) if value.lstrip()[:1] == b"{" else msgpack.unpackb(value)
        request, user, at = (fields[name] for name in ("request", "user", "timestamp"))
        items, n, exclude = (fields.get(name) for name in ("items", "n", "exclude_rated"))
        ids = [str(name) if type(name) is int else name for name in (request, user, *(items or ()))]
        right = (
            all(is_id(name) for name in ids)
            and type(at) is int
            and 86_400_000 <= at <= 7_258_118_400_000
            and (items is None or (isinstance(items, list) and 0 < len(items) <= MOST_ITEMS))
            and (n is None or (type(n) is int and 0 < n <= MOST_BEST))
            and type(exclude) in (type(None), bool)
            and in_place(record, ids[1], partitions)
        )
    except Exception:  # noqa: BLE001 - whatever goes wrong in reading it, it is no request
        return None
    return Asked(ids[0], ids[1], None if items is None else ids[2:], n) if right else None


def each_answered_once(
    log: Log,
    group: str,
    topics: dict[str, str],
    number: int,
    had: dict[Source, set[int]],
    answers: list[Answer],
    scale: tuple[float, float],
) -> Iterator[Finding]:
    """``had`` says of each answer, by the place of its request, how many interactions its user may have had."""
    tp = TopicPartition(topics["requests"], number)
    committed = log.committed(group, [tp]).get(tp, 0)
    partitions = log.topics()[tp.topic].partitions
    records = {(*tp, record.offset): asked_in(record, partitions) for record in read(log, *tp) if record.offset < committed}
    times = Counter(answer.asked for answer in answers)
    letters = Counter(decode(record.value, DeadLetter, what="it").source for record in read(log, topics["dead-letters"], 0))
    for place, asked in records.items():
        if (times[place], letters[place]) != ((1, 0) if asked else (0, 1)):
            yield Finding("b", f"the request at {place} has {times[place]} answers and {letters[place]} dead letters")
    for answer in answers:
        asked = records.get(answer.asked)
        if asked is None:
            yield Finding("b", f"an answer names {answer.asked}, where no request is committed")
            continue
        if (answer.request, answer.user) != asked[:2] or (asked.items and not set(answer.items) <= set(asked.items)):
            yield Finding("d", f"the answer of {answer.asked} is of another request")
        if answer.earlier not in had[answer.asked]:
            yield Finding("d", f"the answer of {answer.asked} states {answer.earlier} interactions, not {had[answer.asked]}")
        most = asked.n or (len(asked.items) if asked.items else 10)
        falling = all(a >= b for a, b in itertools.pairwise(answer.scores)) and all(scale[0] <= s <= scale[1] for s in answer.scores)
        if not falling or not len(answer.items) == len(answer.scores) <= most or len(set(answer.items)) < len(answer.items):
            yield Finding("d", f"the answer of {answer.asked} is no ranking of {most}: {answer.items}, {answer.scores}")
