"""The scored events of a run, read from the log alone: every valid interaction with the score that was made for it.

The reader shares nothing with the worker but the codec, so what it counts (scores that are missing, double or without an event) is
evidence of its own. Columns are numpy arrays and ids are interned, about 100 bytes an event.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import msgpack
import msgspec
import numpy as np
from numpy.typing import NDArray

from streaming.codec import decode
from streaming.errors import Malformed, UnknownTopic
from streaming.events import Source
from streaming.log import Log, Reader, Record, TopicPartition, catch_up
from streaming.validation import Limits, decode_interaction

_POLL_RECORDS = 4096
_OFFSET_BITS = 44  # of the join's key; the bits above hold the partition


@dataclass(frozen=True, slots=True)
class ScoredRun:
    """Columns of one value an event, all of length n and in the order of evaluation.

    That order is the partition's where there is one. Several partitions are merged by event time, ties by partition, without ever
    leaving a partition's own order: an event that carries an earlier time than one before it counts as simultaneous with that one.

    ``user`` and ``item`` index ``users`` and ``items``. ``earlier`` is how many events the user had before this one. ``score`` and
    ``sd`` are NaN where there is none; ``scored`` says whether there is a score that is a finite number.

    Counts of what should not be: ``duplicate_scores`` (records beyond the first for one event), ``orphan_scores`` (records whose
    source, user or item is not that of a valid event), ``earlier_disagreements`` (scores that state another number of earlier events).
    ``nonfinite_scores`` are NaN or infinite; their events count as not ``scored``. ``unscored`` are events without any score, which may
    still come. ``refused`` are interactions that are no valid events; ``dead_letters`` the records that say so.
    """

    partition: NDArray[np.int64]
    offset: NDArray[np.int64]
    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64]
    timestamp: NDArray[np.int64]
    earlier: NDArray[np.int64]
    scored: NDArray[np.bool_]
    score: NDArray[np.float64]
    sd: NDArray[np.float64]
    users: list[str]
    items: list[str]
    scores: int
    duplicate_scores: int
    orphan_scores: int
    nonfinite_scores: int
    earlier_disagreements: int
    unscored: int
    refused: int
    dead_letters: int
    scores_sha256: str

    def __len__(self) -> int:
        return len(self.rating)


class Events(NamedTuple):
    """What a run's events say, in the order of evaluation, each of shape (n,). ``user`` and ``item`` stand for ids."""

    user: NDArray[np.int64]
    item: NDArray[np.int64]
    rating: NDArray[np.float64]


class _ScoreFields(msgspec.Struct):
    """What is read of a record of ``scores``. The answer to a request has no source."""

    format: int
    source: Source | None = None
    user: str = ""
    item: str = ""
    score: float = 0.0
    sd: float | None = None
    model_version: int = 0
    earlier: int = -1


@dataclass(slots=True)
class _Ids:
    """Interned ids: every text is held once, and stands for its place of first appearance."""

    texts: list[str] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)

    def intern(self, text: str) -> int:
        place = self.index.setdefault(text, len(self.texts))
        if place == len(self.texts):
            self.texts.append(text)
        return place


def _ints() -> array[int]:
    return array("q")


def _floats() -> array[float]:
    return array("d")


@dataclass(slots=True)
class _Events:
    partition: array[int] = field(default_factory=_ints)
    offset: array[int] = field(default_factory=_ints)
    user: array[int] = field(default_factory=_ints)
    item: array[int] = field(default_factory=_ints)
    rating: array[float] = field(default_factory=_floats)
    timestamp: array[int] = field(default_factory=_ints)
    refused: int = 0


@dataclass(slots=True)
class _Scores:
    partition: array[int] = field(default_factory=_ints)
    offset: array[int] = field(default_factory=_ints)
    user: array[int] = field(default_factory=_ints)
    item: array[int] = field(default_factory=_ints)
    score: array[float] = field(default_factory=_floats)
    sd: array[float] = field(default_factory=_floats)
    model_version: array[int] = field(default_factory=_ints)
    earlier: array[int] = field(default_factory=_ints)
    foreign: int = 0


def read_run(log: Log, limits: Limits, prefix: str = "") -> ScoredRun:
    """Read ``interactions``, ``scores`` and ``dead-letters`` of the given topic prefix up to where they end now.

    ``limits`` are those the worker had: they decide what is a valid event.
    Raises `UnknownTopic` if one of them does not exist, `Malformed` for a record of ``scores`` that is none, `FormatMismatch` for one of
    another format, `OffsetOutOfRange` if retention overtakes the reader, and `LogUnavailable` if the broker stops answering.
    """
    with RunReader(log, limits, prefix) as reader:
        return reader.run()


class RunReader:
    """Reads a run while it is being made: what it has read is not read again. Its parameters are those of `read_run`. A context manager."""

    def __init__(self, log: Log, limits: Limits, prefix: str = "") -> None:
        self._log, self._limits, self._prefix = log, limits, prefix
        self._users, self._items = _Ids(), _Ids()
        self._events, self._scores, self._dead_letters = _Events(), _Scores(), 0
        self._readers = ExitStack()
        self._reader_of: dict[str, Reader] = {}

    def read_on(self) -> None:
        """Read up to where the topics end now. Raises as `read_run` does."""
        # Scores first: a score that is visible now has its event before the end that is asked for later.
        self._read_scores()
        for _ in self._records("dead-letters"):
            self._dead_letters += 1
        self._read_events()

    def events(self) -> Events:
        """The events read so far."""
        events = self._events
        partition = np.asarray(events.partition, np.int64)
        by_offset = np.lexsort((np.asarray(events.offset, np.int64), partition))
        order = by_offset[_evaluation_order(partition[by_offset], np.asarray(events.timestamp, np.int64)[by_offset])]
        user, item, rating = np.asarray(events.user, np.int64), np.asarray(events.item, np.int64), np.asarray(events.rating, np.float64)
        return Events(user[order], item[order], rating[order])

    def run(self) -> ScoredRun:
        """Read on, and join what was read so far. Raises as `read_run` does."""
        self.read_on()
        ids = list(self._users.texts), list(self._items.texts)
        return _join(f"{self._prefix}interactions", self._events, self._scores, *ids, self._dead_letters)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._readers.close()

    def _records(self, name: str) -> Iterator[Record]:
        """The records of a topic that have come since the last time, partitions by turns, each in offset order."""
        topic = f"{self._prefix}{name}"
        tps = [TopicPartition(topic, number) for number in range(self._partitions(name))]
        if name not in self._reader_of:
            reader = self._readers.enter_context(self._log.reader())
            reader.assign({tp: bounds.start for tp, bounds in self._log.bounds(tps).items()})
            self._reader_of[name] = reader
        for batch in catch_up(self._log, self._reader_of[name], tps, at_once=_POLL_RECORDS):
            yield from batch

    def _partitions(self, name: str) -> int:
        topic = self._log.topics().get(f"{self._prefix}{name}")
        if topic is None:
            raise UnknownTopic(f"there is no topic {self._prefix + name!r}")
        return topic.partitions

    def _read_events(self) -> None:
        events, partitions = self._events, self._partitions("interactions")
        for record in self._records("interactions"):
            try:
                interaction = decode_interaction(record, self._limits, partitions=partitions)
            except Malformed:
                events.refused += 1
                continue
            events.partition.append(record.partition)
            events.offset.append(record.offset)
            events.user.append(self._users.intern(interaction.user))
            events.item.append(self._items.intern(interaction.item))
            events.rating.append(interaction.rating)
            events.timestamp.append(interaction.timestamp)

    def _read_scores(self) -> None:
        scores, source_topic = self._scores, f"{self._prefix}interactions"
        for record in self._records("scores"):
            fields = decode(record.value, _ScoreFields, what=f"{record.topic}[{record.partition}] at offset {record.offset}")
            if fields.source is None:
                continue
            name, partition, offset = fields.source
            if name != source_topic or not (0 <= offset < 1 << _OFFSET_BITS and 0 <= partition < 1 << (63 - _OFFSET_BITS)):
                scores.foreign += 1
                continue
            scores.partition.append(partition)
            scores.offset.append(offset)
            scores.user.append(self._users.intern(fields.user))
            scores.item.append(self._items.intern(fields.item))
            scores.score.append(fields.score)
            scores.sd.append(float("nan") if fields.sd is None else fields.sd)
            scores.model_version.append(fields.model_version)
            scores.earlier.append(fields.earlier)


def _join(topic: str, events: _Events, scores: _Scores, users: list[str], items: list[str], dead_letters: int) -> ScoredRun:
    partition, offset = np.asarray(events.partition, np.int64), np.asarray(events.offset, np.int64)
    by_offset = np.lexsort((offset, partition))
    partition, offset = partition[by_offset], offset[by_offset]
    user, item = np.asarray(events.user, np.int64)[by_offset], np.asarray(events.item, np.int64)[by_offset]
    timestamp = np.asarray(events.timestamp, np.int64)[by_offset]
    earlier = count_earlier(user)
    n = len(offset)

    in_order = np.lexsort((np.asarray(scores.offset, np.int64), np.asarray(scores.partition, np.int64)))
    keys = (partition << _OFFSET_BITS) | offset
    source = ((np.asarray(scores.partition, np.int64) << _OFFSET_BITS) | np.asarray(scores.offset, np.int64))[in_order]
    place = np.searchsorted(keys, source)
    found = place < n
    found[found] = keys[place[found]] == source[found]
    found[found] = (user[place[found]] == np.asarray(scores.user, np.int64)[in_order][found]) & (
        item[place[found]] == np.asarray(scores.item, np.int64)[in_order][found]
    )
    # The sort is stable, so that of several scores the first one written is taken.
    event, first = np.unique(place[found], return_index=True)
    record = in_order[found][first]
    scored, score, sd = np.zeros(n, np.bool_), np.full(n, np.nan), np.full(n, np.nan)
    stated = np.asarray(scores.score, np.float64)[record]
    finite = np.isfinite(stated)
    scored[event] = finite
    score[event[finite]] = stated[finite]
    sd[event] = np.asarray(scores.sd, np.float64)[record]

    order = _evaluation_order(partition, timestamp)
    return ScoredRun(
        partition=partition[order],
        offset=offset[order],
        user=user[order],
        item=item[order],
        rating=np.asarray(events.rating, np.float64)[by_offset][order],
        timestamp=timestamp[order],
        earlier=earlier[order],
        scored=scored[order],
        score=score[order],
        sd=sd[order],
        users=users,
        items=items,
        scores=len(in_order) + scores.foreign,
        duplicate_scores=int(found.sum()) - len(event),
        orphan_scores=int((~found).sum()) + scores.foreign,
        nonfinite_scores=int((~finite).sum()),
        earlier_disagreements=int((np.asarray(scores.earlier, np.int64)[record] != earlier[event]).sum()),
        unscored=n - len(event),
        refused=events.refused,
        dead_letters=dead_letters,
        scores_sha256=_digest(topic, scores, in_order, users, items),
    )


def count_earlier(user: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every place of ``user`` (n,), how many places before it hold the same user."""
    together = np.argsort(user, kind="stable")
    ordered = user[together]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(user) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(user)])
    earlier = np.empty(len(user), np.int64)
    earlier[together] = np.arange(len(user)) - np.repeat(starts, lengths)
    return earlier


def _evaluation_order(partition: NDArray[np.int64], timestamp: NDArray[np.int64]) -> NDArray[np.int64]:
    """Order of `ScoredRun`, of events that stand by partition and offset."""
    clock = timestamp.copy()
    for p in np.unique(partition):
        of_partition = partition == p
        clock[of_partition] = np.maximum.accumulate(clock[of_partition])
    return np.lexsort((partition, clock)).astype(np.int64) if len(np.unique(partition)) > 1 else np.arange(len(partition))


def _digest(topic: str, scores: _Scores, in_order: NDArray[np.int64], users: list[str], items: list[str]) -> str:
    """The sha256 of all scores of a topic's events, hex.

    It is taken over the concatenation, by partition and then offset of the event, of one MessagePack array a score: [topic, partition,
    offset, user, item, score, model_version], integers and strings in their shortest form, the score as a 32-bit float (0xca). topic,
    partition and offset are the event's.
    """
    packer = msgpack.Packer(use_single_float=True)
    digest = hashlib.sha256()
    for i in in_order.tolist():
        digest.update(
            packer.pack(
                [
                    topic,
                    scores.partition[i],
                    scores.offset[i],
                    users[scores.user[i]],
                    items[scores.item[i]],
                    scores.score[i],
                    scores.model_version[i],
                ]
            )
        )
    return digest.hexdigest()
