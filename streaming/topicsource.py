"""A topic as a source of records: all that it holds now, in the order of event time.

Partitions are merged without leaving the order of any of them: of the records that stand next, one in each partition, the one with the
earliest event time comes first, ties by partition. So an event that carries an earlier time than one before it in its partition counts as
simultaneous with that one, and so does a record whose time cannot be told. What follows depends on the offsets reached and nothing else,
which makes them a place to go on from. It is the order in which `streaming.scored` evaluates.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from streaming.errors import LogUnavailable, Malformed, SourceError, UnknownTopic
from streaming.log import TopicPartition
from streaming.validation import Limits, decode_interaction

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streaming.log import Bounds, Log, Reader, Record

READ_AHEAD = 4096
"""Records held in memory, shared by the partitions; `_LEAST_AHEAD` each at the least."""

_LEAST_AHEAD = 32
_PATIENCE_SECONDS = 30.0


class TopicEntry(NamedTuple):
    """A record as it stands in the topic, its event time (None where it has none), and why it is no event (None where it is one)."""

    record: Record
    timestamp: int | None
    error: Malformed | None


class TopicSource:
    """The records of one topic that are there when it is made.

    ``timed`` tells whether they are interactions, which have event times; others come partition by partition. ``place`` says where the
    topic is, in errors and wherever a source is told from another, such as the setting ``broker`` of its log.

    Raises `UnknownTopic`, and `LogUnavailable` if the broker does not answer.
    """

    def __init__(self, log: Log, topic: str, *, place: str = "", timed: bool = True, limits: Limits = Limits()) -> None:  # noqa: B008 - immutable
        found = log.topics().get(topic)
        if found is None:
            raise UnknownTopic(f"there is no topic {topic} in {place or 'this log'}")
        self.topic = found
        self.place = place
        self.name = f"{place} {topic}".strip()
        self.timed = timed
        self.log = log
        self._limits = limits
        self._bounds = log.bounds(TopicPartition(topic, number) for number in range(found.partitions))

    def entries(self, offsets: Mapping[int, int] | None = None) -> Iterator[tuple[TopicEntry, float]]:
        """Yield the records from ``offsets`` on (by partition; those not named from their start), each with the share done so far.

        Raises `SourceError` where records that should come next were removed by retention, or the topic ends before an offset, and
        `LogUnavailable` where nothing comes for 30 s although an end has not been reached.
        """
        # Where a partition is begun at its start, that is where it starts by now: retention may have been at work since `newest`.
        now = self.log.bounds(self._bounds)
        starts = {tp: self._start(tp, bounds._replace(start=now[tp].start), offsets or {}) for tp, bounds in self._bounds.items()}
        left = {tp: self._bounds[tp].end - start for tp, start in starts.items() if start < self._bounds[tp].end}
        total = sum(left.values())
        if not total:
            return
        ahead = max(_LEAST_AHEAD, READ_AHEAD // len(left))
        with self.log.reader() as reader:
            reader.assign({tp: starts[tp] for tp in left})
            streams = {tp: self._partition(reader, tp, ahead) for tp in left}
            heads = ((tp, next(stream, None)) for tp, stream in streams.items())
            heap = [(self._clock(entry), tp.partition, tp, entry) for tp, entry in heads if entry is not None]
            heapq.heapify(heap)
            while heap:
                _, number, tp, entry = heap[0]
                left[tp] = self._bounds[tp].end - entry.record.offset - 1
                following = next(streams[tp], None)
                if following is None:
                    heapq.heappop(heap)
                    left[tp] = 0
                else:
                    heapq.heapreplace(heap, (self._clock(following), number, tp, following))
                yield entry, 1.0 if not heap else 1 - sum(left.values()) / total

    def newest(self) -> int | None:
        """The time of the newest event, None where there is none. Reads the topic once."""
        return max((entry.timestamp for entry, _ in self.entries() if entry.timestamp is not None), default=None)

    def _start(self, tp: TopicPartition, bounds: Bounds, offsets: Mapping[int, int]) -> int:
        start = offsets.get(tp.partition, bounds.start)
        where = f"{self.name}[{tp.partition}]"
        if start < bounds.start:
            raise SourceError(f"{where}: records {start} to {bounds.start - 1} come next, but retention has removed them")
        if start > bounds.end and tp.partition in offsets:
            raise SourceError(f"{where} ends at {bounds.end}, before the offset to go on from, {start}: it is another topic of that name")
        return start

    def _clock(self, entry: TopicEntry) -> int:
        """What the merge goes by; without times all are equal, and partitions follow each other."""
        return entry.timestamp if self.timed and entry.timestamp is not None else -(2**63)

    def _partition(self, reader: Reader, tp: TopicPartition, ahead: int) -> Iterator[TopicEntry]:
        """The records of one partition in offset order, ``ahead`` of them read in one go."""
        end = self._bounds[tp].end
        silent_since = time.monotonic()
        while reader.position(tp) < end:
            batch = deque(reader.poll(ahead, timeout=0.5, only=[tp]))
            heard = bool(batch)
            if not heard and time.monotonic() - silent_since > _PATIENCE_SECONDS:
                raise LogUnavailable(
                    f"{self.name}[{tp.partition}]: no record for {_PATIENCE_SECONDS:.0f} s, although its end is not reached"
                )
            while batch:
                record = batch.popleft()
                if record.offset >= end:
                    return
                yield self._entry(record)
            if heard:
                silent_since = time.monotonic()  # However long whoever takes them has taken.

    def _entry(self, record: Record) -> TopicEntry:
        if not self.timed:
            return TopicEntry(record, None, None)
        try:
            # Its time does not depend on the partition that it lies in.
            event = decode_interaction(record._replace(partition=0), self._limits, partitions=1)
        except Malformed as error:
            return TopicEntry(record, None, error)
        return TopicEntry(record, event.timestamp, None)
