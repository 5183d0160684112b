"""Where a replay takes its entries from, a file or a topic, in one form: records, and the places to go on from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from streaming.errors import SourceError
from streaming.events import ReplayPosition
from streaming.log import Record, TopicPartition, present
from streaming.textfiles import Place
from streaming.timeorder import by_time

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streaming.errors import Malformed
    from streaming.sources import Source
    from streaming.topicsource import TopicSource


class Item(NamedTuple):
    """An entry: the record that it is or that a dead letter of it names, its event time where it is known.

    ``error`` says why it cannot be sent, None where it can. ``end`` is the byte offset after it, in a file, and ``length`` the size of
    a line of which the record holds only the beginning.
    """

    record: Record
    timestamp: int | None
    error: Malformed | None
    end: int = 0
    length: int = 0


class Origin(Protocol):
    """What a replay reads."""

    identity: str
    """What it is told from others by, and called in errors."""
    fixed: bool
    """Whether nothing can come behind its end."""

    def beginning(self, topic: str) -> ReplayPosition:
        """The position before its first entry, on the way to ``topic``."""

    def place(self, position: ReplayPosition) -> FilePlace | TopicPlace:
        """Where ``position`` is in it."""

    def items(self, position: ReplayPosition) -> Iterator[tuple[Item, float]]:
        """The entries after ``position``, each with the share of the whole done so far."""

    def newest(self) -> int | None:
        """The time of its newest event, None where there is none. Reads all of it."""


class FilePlace:
    """A place in a file, which moves behind each line taken."""

    def __init__(self, line: int, end: int) -> None:
        self.line, self.end = line, end

    def after(self, item: Item) -> None:
        """Move behind ``item``."""
        self.line, self.end = item.record.offset, item.end

    def fields(self) -> dict[str, Any]:
        """The place as `ReplayPosition` has it."""
        return {"line": self.line, "end": self.end}


class FileOrigin:
    """The lines of a file, in their own order or in that of their times."""

    fixed = True

    def __init__(self, source: Source, *, sort_by_time: bool) -> None:
        self.source, self.sort_by_time = source, sort_by_time
        self.identity = str(source.file.path)

    def beginning(self, topic: str) -> ReplayPosition:
        """The position before its first line."""
        file = self.source.file
        return ReplayPosition(
            topic=topic,
            name=file.path.name,
            size=file.size,
            digest=file.digest(),
            settings=self.source.settings + (f"-by-time-{self.source.valid}" if self.sort_by_time else ""),
            entries=0,
            line=file.start.line,
            end=file.start.end,
            events=0,
            dead_letters={},
            done=False,
        )

    def place(self, position: ReplayPosition) -> FilePlace:
        """The line and the byte offset."""
        return FilePlace(position.line, position.end)

    def items(self, position: ReplayPosition) -> Iterator[tuple[Item, float]]:
        """The lines after ``position``. Raises `SourceError` if the file fails or cannot be sorted."""
        name = f"file:{position.name}"
        place = Place(position.line, position.end)
        entries = by_time(self.source, position.entries) if self.sort_by_time else self.source.entries(place)
        for entry, share in entries:
            record = Record(name, 0, entry.line.number, 0, entry.key, entry.value)
            yield Item(record, entry.timestamp, entry.error, entry.line.end, entry.line.overlong), share

    def newest(self) -> int | None:
        """The time of its newest event."""
        return max((entry.timestamp for entry, _ in self.source.entries() if entry.timestamp is not None), default=None)


class TopicPlace:
    """A place in a topic: the next offset of each partition that was begun, and by which record to tell the topic again."""

    def __init__(self, offsets: dict[int, int], digest: str) -> None:
        self.offsets, self._digest = offsets, digest
        self._last: Record | None = None

    def after(self, item: Item) -> None:
        """Move behind ``item``."""
        self._last = item.record
        self.offsets[item.record.partition] = item.record.offset + 1

    def fields(self) -> dict[str, Any]:
        """The place as `ReplayPosition` has it."""
        return {"offsets": dict(self.offsets), "digest": self._digest if self._last is None else digest_of(self._last)}


def digest_of(record: Record) -> str:
    """Where a record stands, and by what it is told from another there."""
    text = b"\0".join([record.key or b"", record.value or b"", str(record.timestamp).encode()])
    return f"{record.partition}/{record.offset}/{hashlib.sha256(text).hexdigest()[:16]}"


def again(position: ReplayPosition) -> str:
    """What whoever cannot go on from a position is told."""
    return f"{position.entries} of its entries are in {position.topic} already; with --restart all of it is sent again"


class TopicOrigin:
    """The records of a topic, merged by event time. Those that are no events are sent like all others: it is the worker that refuses."""

    fixed = False

    def __init__(self, source: TopicSource) -> None:
        self.source = source
        self.identity = f"topic {source.name}"

    def beginning(self, topic: str) -> ReplayPosition:
        """The position before its first record that is kept."""
        return ReplayPosition(
            topic=topic,
            name=self.identity,
            size=self.source.topic.partitions,
            digest="",
            settings="",
            entries=0,
            line=0,
            end=0,
            events=0,
            dead_letters={},
            done=False,
        )

    def place(self, position: ReplayPosition) -> TopicPlace:
        """The offsets."""
        return TopicPlace(dict(position.offsets), position.digest)

    def items(self, position: ReplayPosition) -> Iterator[tuple[Item, float]]:
        """The records after ``position``. Raises as `TopicSource.entries` does, and `SourceError` for another topic of that name."""
        if position.digest:
            self._require_same(position)
        for entry, share in self.source.entries(position.offsets):
            yield Item(entry.record, entry.timestamp, None), share

    def newest(self) -> int | None:
        """The time of its newest event."""
        return self.source.newest()

    def _require_same(self, position: ReplayPosition) -> None:
        """Raise `SourceError` where the last record taken is another now.

        The path or the address of a log does not tell it from one that was made anew, or from that of another folder.
        """
        number, offset, _ = position.digest.split("/")
        tp, at = TopicPartition(self.source.topic.name, int(number)), int(offset)
        # What retention has removed cannot be compared; nor what was compacted away, in whose place a later record comes.
        found = next(present(self.source.log, [tp], at_once=1, since=at), None)
        if found is not None and found.offset == at and digest_of(found) != position.digest:
            raise SourceError(
                f"{self.identity}[{number}]: the record at {at} is not the one that was last replayed from there, "
                f"it is another topic of that name: {again(position)}"
            )
