"""What stands for the places of one partition, met in their order: scores, dead letters, the plans of steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from streaming.chunks import Joiner
from streaming.codec import decode
from streaming.errors import ChunkError
from streaming.events import FORMAT
from streaming.log import TopicPartition, present

if TYPE_CHECKING:
    from streaming.log import Log, Record

LARGE_AT_ONCE = 8
"""Updates and versions read in one go: each record can be a megabyte."""

T = TypeVar("T")


class Places(Generic[T]):
    """Things that stand for offsets of one partition, in the order of these offsets, met one by one.

    ``stray`` is told of what stands for an offset that was not asked for, or is gone by: a second one, or one of nothing.
    """

    def __init__(self, entries: Iterator[tuple[int, T]], stray: Callable[[int, T], None]) -> None:
        self._entries = entries
        self._stray = stray
        self._next = next(entries, None)
        self.begun = False
        """Whether the first one has been met: before it, retention may have removed others."""

    def at(self, offset: int) -> T | None:
        """What stands for this offset, None where nothing does."""
        while self._next is not None and self._next[0] <= offset:
            place, thing = self._next
            self._next, self.begun = next(self._entries, None), True
            if place == offset:
                return thing
            self._stray(place, thing)
        return None

    def rest(self) -> None:
        """Tell of all that is left."""
        for place, thing in itertools.chain([] if self._next is None else [self._next], self._entries):
            self._stray(place, thing)
        self._next = None


class Plan(msgspec.Struct, frozen=True):
    """What an update says of its step: offsets, model version, and how far the tables were read. Its gradients are passed over."""

    source: tuple[str, int, int, int]
    version: int
    tables: dict[str, int] = {}
    format: int = FORMAT


class Plans:
    """The plans of one partition's steps, in order, as its updates tell them."""

    def __init__(self, log: Log, updates: TopicPartition) -> None:
        self.cut = log.bounds([updates])[updates].start > 0
        self._plans = (
            decode(value, Plan, what=f"{updates.topic}[{updates.partition}] at offset {record.offset}")
            for record, value in values(present(log, [updates], at_once=LARGE_AT_ONCE, on_lost=self._lose))
        )
        self._next = next(self._plans, None)
        self.begun = False

    def _lose(self) -> None:
        """Retention was faster than the audit: what it has removed is like what it had removed before."""
        self.cut, self.begun = True, False

    def at(self, offset: int) -> Plan | None:
        """The plan of the step that scored what stands at ``offset``, None where no update tells it. Offsets are asked for in order."""
        while self._next is not None and self._next.source[3] <= offset:
            self._next, self.begun = next(self._plans, None), True
        return self._next if self._next is not None and self._next.source[2] <= offset else None


def values(records: Iterator[Record]) -> Iterator[tuple[Record, bytes]]:
    """Values joined from their chunks, each with its last record. Where retention has cut into one, it is passed over."""
    joiner = Joiner()
    for record in records:
        try:
            value = joiner.feed(record)
        except ChunkError:
            continue
        if value is not None:
            yield record, value
