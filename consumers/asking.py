"""Asking a running system: a request is sent, and its answer waited for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from streaming.codec import decode, encode
from streaming.errors import Malformed
from streaming.events import Answer, DeadLetter
from streaming.log import Message, TopicPartition
from streaming.partitioner import partition_of

if TYPE_CHECKING:
    from streaming.events import Request, Source
    from streaming.log import Log, Record, Topic

READ_AT_ONCE = 500


class NoAnswer(Exception):
    """Nobody answered in time. The request stays in the log, and is answered when a worker comes to it."""


class _Head(msgspec.Struct):
    """What tells the answer to a request from the score of an event."""

    asked: tuple[str, int, int] | None = None


def ask(log: Log, topics: dict[str, Topic], request: Request, timeout: float) -> Answer:
    """Send a request and wait up to ``timeout`` seconds for its answer.

    Raises `NoAnswer`, and `Malformed` where the worker refused the request.
    """
    number = partition_of(request.user.encode(), topics["requests"].partitions)
    scores, letters = TopicPartition(topics["scores"].name, number), TopicPartition(topics["dead-letters"].name, 0)
    with log.reader() as reader:
        # From where the topics end before it is sent: the answer cannot stand earlier.
        reader.assign({tp: bounds.end for tp, bounds in log.bounds([scores, letters]).items()})
        name = topics["requests"].name
        (offset,) = log.append([Message(name, request.user.encode(), encode(request), number)])
        place = (name, number, offset)
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            for record in reader.poll(READ_AT_ONCE, left):
                if record.topic == letters.topic:
                    _refused(record, place)
                elif decode(record.value, _Head, what=_what(record)).asked == place:
                    return decode(record.value, Answer, what=_what(record))
    raise NoAnswer(
        f"no answer within {timeout:g} s: no worker holds partition {number}, or it is far behind; `coldstream status` shows how far. "
        "--timeout waits longer, --offline answers from the log alone"
    )


def _refused(record: Record, place: Source) -> None:
    letter = decode(record.value, DeadLetter, what=_what(record))
    if letter.source == place:
        raise Malformed(letter.reason, letter.detail)


def _what(record: Record) -> str:
    return f"{record.topic}[{record.partition}] at offset {record.offset}"
