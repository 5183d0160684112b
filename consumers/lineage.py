"""The versions that a log holds: which there are, which of them can be made again, and making one again.

A version holds what changed since its parent, so it is made again from the nearest version before it that holds everything: a snapshot, a
version that replaced another, or version 0, which settings and seed make.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from consumers.system import new_model
from consumers.versions import take
from model import checkpoint
from model.meta import Optimiser
from streaming.chunks import Joiner
from streaming.codec import decode
from streaming.errors import ChunkError, VersionLost
from streaming.events import Version
from streaming.headers import VersionHeader
from streaming.log import TopicPartition, present

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from consumers.settings import Settings
    from streaming.log import Log, Record, Topic

READ_AT_ONCE = 16
"""Version records taken from the log in one go: each can be a megabyte."""


class Place(NamedTuple):
    """A version in `model`, and the offset of its first record."""

    header: VersionHeader
    start: int


class Lineage:
    """Every version in the log, as it stood when this was made. Reading it reads `model` and `snapshots` once, and keeps no values.

    Raises `FormatMismatch` for a version of another layout, and `LogUnavailable`.
    """

    def __init__(self, log: Log, topics: Mapping[str, Topic]) -> None:
        self._log = log
        self._model = TopicPartition(topics["model"].name, 0)
        self._snapshots = TopicPartition(topics["snapshots"].name, 0)
        self.snapshots = {
            header.version: header for header in (_header(value, self._snapshots) for value in snapshots(log, self._snapshots))
        }
        self.kept: dict[int, Place] = {}
        for start, value in _values(present(log, [self._model], at_once=READ_AT_ONCE)):
            header = _header(value, self._model)
            self.kept[header.version] = Place(header, start)

    @property
    def last(self) -> int:
        """The version in force, 0 where there is none in the log."""
        return max([0, *self.kept, *self.snapshots])

    def header(self, number: int) -> VersionHeader:
        """What is known of a version. Raises `VersionLost` for one that is not in the log."""
        place, snapshot = self.kept.get(number), self.snapshots.get(number)
        if place is not None:
            return place.header
        if snapshot is None:
            raise VersionLost(self._absent(number))
        return snapshot

    def folded(self, number: int) -> dict[int, int]:
        """By partition of updates, the offset after the last one in a version's values. Raises `VersionLost`."""
        return self.header(number).folded if number else {}

    def path(self, number: int) -> list[int]:
        """The versions to take on, the first of which holds every value (0 is the untrained model). Raises `VersionLost`."""
        path, at = [number], number
        while at and at not in self.snapshots:
            place = self.kept.get(at)
            if place is None:
                raise VersionLost(self._absent(number) if at == number else self._cut(number, at))
            if place.header.replaces is not None:
                break
            assert place.header.parent is not None  # noqa: S101  only what replaces another has no parent
            at = place.header.parent
            path.append(at)
        return path[::-1]

    def restorable(self) -> list[int]:
        """Every version that can be made again, in rising order."""
        whole = {0}
        for number in sorted({*self.kept, *self.snapshots}):
            place = self.kept.get(number)
            if number in self.snapshots or (place is not None and (place.header.replaces is not None or place.header.parent in whole)):
                whole.add(number)
        return sorted(whole)

    def state(self, settings: Settings, number: int) -> checkpoint.State:
        """All values of a version. Raises `VersionLost`, and `OtherSettings` for one made with others than ``settings``."""
        model = new_model(settings)
        optimiser = Optimiser(model)
        first, *later = self.path(number)
        if first in self.snapshots:
            values = (
                decode(value, Version, what=f"snapshot in {self._snapshots.topic}") for value in snapshots(self._log, self._snapshots)
            )
            snapshot = next((version for version in values if version.version == first), None)
            if snapshot is None:
                raise VersionLost(f"the snapshot of version {first} was written over in this moment; try again")
            take(snapshot, settings.digest(), model, optimiser, whole=True)
        elif first:
            later = [first, *later]
        wanted = {self.kept[each].start: each for each in later}
        if wanted:
            for start, value in _values(present(self._log, [self._model], at_once=READ_AT_ONCE, since=min(wanted))):
                if wanted.pop(start, None) is not None:
                    version = decode(value, Version, what=f"{self._model.topic} at offset {start}")
                    take(version, settings.digest(), model, optimiser, whole=version.replaces is not None)
                if not wanted:
                    break
        if wanted:
            raise VersionLost(f"version {number}: retention removed version {min(wanted.values())}, on which it stands, in this moment")
        return checkpoint.export(model, optimiser)

    def _absent(self, number: int) -> str:
        if number > self.last:
            return f"there is no version {number}: the last is {self.last}"
        return (
            f"there is no version {number} in {self._model.topic}: retention has removed it, or it was folded in one commit with the next; "
            f"those that can be made again are {spans(self.restorable(), self._numbers())}"
        )

    def _cut(self, number: int, at: int) -> str:
        return (
            f"version {number} cannot be made again: it stands on version {at}, which retention (topics.model_bytes) has removed from "
            f"{self._model.topic}, and no snapshot is between the two; those that can be are {spans(self.restorable(), self._numbers())}"
        )

    def _numbers(self) -> list[int]:
        return sorted({0, *self.kept, *self.snapshots})


def spans(numbers: Iterable[int], among: list[int]) -> str:
    """``numbers`` in words, as `0, 40 to 60`, where those that follow each other in ``among`` run together."""
    place = {number: index for index, number in enumerate(among)}
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and place[number] == place[runs[-1][-1]] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def snapshots(log: Log, tp: TopicPartition) -> Iterator[bytes]:
    """Every complete snapshot in the log, by slots. Chunks left over from an older, longer one in the same slot are passed over."""
    slots: dict[bytes, list[Record]] = {}
    for record in present(log, [tp], at_once=READ_AT_ONCE):
        if record.key is not None and record.value is not None:
            slots.setdefault(record.key.partition(b"/")[0], []).append(record)
    for records in slots.values():
        # A snapshot's chunks were written in one transaction, so those of the slot's newest stand last and together.
        whole = [value for _, value in _values(records)]
        yield from whole[-1:]


def _values(records: Iterable[Record]) -> Iterator[tuple[int, bytes]]:
    """Whole values with the offset of their first record; those of which retention or compaction took a part are passed over."""
    joiner = Joiner()
    start: int | None = None
    for record in records:
        start = record.offset if start is None else start
        try:
            value = joiner.feed(record)
        except ChunkError:
            start = None
            continue
        if value is not None:
            yield start, value
            start = None


def _header(value: bytes, tp: TopicPartition) -> VersionHeader:
    return decode(value, VersionHeader, what=f"a version in {tp.topic}")
