"""The replayer: fills a topic from a file or another topic, each entry exactly once, however often it is killed and started again."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from consumers.origins import FileOrigin, TopicOrigin, again
from streaming.codec import decode, encode
from streaming.deadletters import dead_letter_message
from streaming.errors import Malformed, SourceError
from streaming.events import ReplayPosition
from streaming.log import Message, TopicPartition, present
from streaming.timerange import TimeRange, inside
from streaming.topicsource import TopicSource

if TYPE_CHECKING:
    from consumers.origins import Item, Origin
    from streaming.log import Log, Record, Topic, Writer
    from streaming.sources import Source

_COMMIT_BYTES = 1 << 22
_TICK_SECONDS = 0.02
_NAP_SECONDS = 0.5
_PASSED_OVER = 100
"""After so many batches outside the range of time, the place is committed although nothing was sent."""

_RECORD_ROOM = 64
"""Bytes of a record's own that a broker may count to its size."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay has done. ``events`` and ``dead_letters`` (by reason) count over all runs of this file or topic.

    ``sent`` is how many entries (records, or lines that are not blank) this run took, ``skipped`` how many earlier runs had taken. Of both
    together, ``outside`` lay outside the range of time. ``done`` is False where the run was stopped before the end. ``since`` and ``until``
    are the bounds that a range came to, in milliseconds since the epoch.
    """

    events: int
    dead_letters: dict[str, int]
    sent: int
    skipped: int
    done: bool
    outside: int = 0
    since: int | None = None
    until: int | None = None


class Progress(NamedTuple):
    """How far a replay is, told after each commit: ``share`` of the whole from 0 to 1, and counts over all runs."""

    share: float
    events: int
    dead_letters: int


def replay(
    log: Log,
    source: Source | TopicSource,
    topics: Mapping[str, Topic],
    *,
    into: Literal["interactions", "users", "items"] = "interactions",
    group: str = "coldstream",
    rate: float | Literal["max"] = "max",
    batch: int = 1000,
    sort_by_time: bool = False,
    within: TimeRange = TimeRange(),  # noqa: B008 - immutable
    restart: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ReplayResult:
    """Send what ``source`` holds to the topic ``into`` of ``topics`` (see `streaming.topics.topics`), from where the last run ended.

    Records, dead letters and the position in the source are committed together, ``batch`` entries at a time. ``rate`` is a multiple of the
    recorded pace (2.0 is twice as fast) or ``"max"``; at a pace, entries whose time is within 20 ms are committed together.
    ``sort_by_time`` sends a file's lines in the order of their event times (`streaming.timeorder.by_time`, which bounds the memory it
    takes); a topic always comes merged by them (`streaming.topicsource`).

    ``within`` sends only events of these times; each range of a source is a replay of its own, with a position of its own. What is
    relative to the newest event is settled by the first run. An entry whose time cannot be told is always taken: a line goes to
    dead-letters, a record goes on as it is, so that the worker refuses it where it would have refused it before.

    A run ends where the source ended when it began; the next run of a topic that has grown goes on from there. ``restart`` forgets the
    position and sends everything again. ``stop`` is asked before each entry; what was taken is then committed.

    Raises `SourceError` if the source changed since the last run, was read with other settings then, cannot be sorted, has no times
    to keep pace or a range with, or is the very topic to be filled; `Fenced` if another replay of the same source took over; and what
    `Writer.commit` raises.
    """
    origin: Origin = TopicOrigin(source) if isinstance(source, TopicSource) else FileOrigin(source, sort_by_time=sort_by_time)
    name = origin.identity
    if rate != "max" and not 0 < rate < float("inf"):
        raise SourceError(f"{name}: the rate must be above 0, or max; it is {rate}")
    if batch < 1:
        raise SourceError(f"{name}: the batch must be at least 1 entry; it is {batch}")
    if not source.timed and (sort_by_time or rate != "max" or not within.whole):
        raise SourceError(f"{name}: profiles have no time to sort by or to keep pace with, nor to choose by")
    if isinstance(source, TopicSource) and source.topic.name == topics[into].name and source.log.identity() == log.identity():
        raise SourceError(f"{name}: a topic cannot be replayed into itself; name another topic_prefix or another log")
    identity = [group, topics[into].name, name, *([] if within.whole else [str(within)])]
    key = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    # The position is read after the writer was opened: from then on no older replay of this source can move it.
    with log.writer(f"{group}-replay-{key}") as writer:
        start = origin.beginning(topics[into].name)
        before = None if restart else _last_position(log, topics["replays"].name, key.encode())
        if before is not None:
            _check_same(start.name, before, start)
            start = before
        elif not within.whole:
            newest = origin.newest() if within.relative else None
            if within.relative and newest is None:
                raise SourceError(f"{name}: it holds no event yet, so that nobody can say what is before the newest")
            since, until = within.resolved(newest)
            start = msgspec.structs.replace(start, since=since, until=until)
        run = _Run(writer, origin, start, topics, into, key.encode())
        if not (start.done and origin.fixed):
            _send(run, _Pace(rate, clock, sleep, stop), batch, on_progress)
        sent = run.entries - start.entries
        return ReplayResult(run.events, dict(run.dead), sent, start.entries, run.done, run.outside, start.since, start.until)


class _Run:
    """What has been taken since the last commit, and the position after it."""

    def __init__(self, writer: Writer, origin: Origin, start: ReplayPosition, topics: Mapping[str, Topic], into: str, key: bytes) -> None:
        self.writer, self.origin, self.start, self.key = writer, origin, start, key
        self.target, self.dead_letters, self.replays = topics[into], topics["dead-letters"].name, topics["replays"].name
        self.entries, self.events, self.outside, self.done = start.entries, start.events, start.outside, start.done
        self.dead = Counter(start.dead_letters)
        self.place = origin.place(start)
        self.pending: list[Message] = []
        self.pending_bytes = 0
        self.passed_over = 0

    def outside_range(self, item: Item) -> bool:
        """Whether ``item`` is known to lie outside the range of time."""
        return not inside(item.timestamp, self.start.since, self.start.until)

    def pass_over(self, item: Item) -> None:
        """Leave ``item`` out, and go on behind it."""
        self.outside += 1
        self.passed_over += 1
        self._behind(item)

    def take(self, item: Item) -> None:
        """Send ``item``, be it to dead-letters."""
        record = item.record
        error = item.error or self._unfit(record.key, record.value)
        if error is None:
            self.pending.append(Message(self.target.name, record.key, record.value))
            self.events += 1
        else:
            self.pending.append(dead_letter_message(self.dead_letters, record, error, item.length))
            self.dead[error.reason] += 1
        self.pending_bytes += len(self.pending[-1].value or b"")
        self._behind(item)

    def _behind(self, item: Item) -> None:
        self.entries += 1
        self.place.after(item)

    def _unfit(self, key: bytes | None, value: bytes | None) -> Malformed | None:
        """Why the target's topic could not hold a record that is carried as it is."""
        size = len(key or b"") + len(value or b"")
        if size + _RECORD_ROOM > self.target.max_record_bytes:
            return Malformed("too-large", f"{size} bytes, {self.target.name} holds records of at most {self.target.max_record_bytes}")
        if key is None and self.target.cleanup == "compact":
            return Malformed("wrong-key", "no key; the key of a profile is the user's or item's id")
        return None

    def commit(self, *, done: bool = False) -> None:
        """Make visible what was taken, and the position behind it."""
        position = msgspec.structs.replace(
            self.start,
            entries=self.entries,
            events=self.events,
            dead_letters=dict(self.dead),
            outside=self.outside,
            done=done,
            **self.place.fields(),
        )
        self.writer.commit([*self.pending, Message(self.replays, self.key, encode(position), partition=0)])
        self.pending, self.pending_bytes, self.passed_over, self.done = [], 0, 0, done


class _Pace:
    """Waits until an event's time has come, the run having begun with its first event."""

    def __init__(self, rate: float | str, clock: Callable[[], float], sleep: Callable[[float], None], stop: Callable[[], bool]) -> None:
        self.rate = None if rate == "max" else float(rate)
        self.clock, self.sleep, self.stop = clock, sleep, stop
        self.began: tuple[float, int] | None = None

    def due(self, timestamp: int | None) -> float | None:
        """The clock's time at which an event is to be sent, None for now."""
        if self.rate is None or timestamp is None:
            return None
        if self.began is None:
            self.began = self.clock(), timestamp
        at = self.began[0] + (timestamp - self.began[1]) / 1000 / self.rate
        return at if at > self.clock() + _TICK_SECONDS else None

    def wait(self, until: float) -> None:
        while not self.stop() and (left := until - self.clock()) > 0:
            self.sleep(min(left, _NAP_SECONDS))


def _send(run: _Run, pace: _Pace, batch: int, on_progress: Callable[[Progress], None]) -> None:
    def commit(share: float, *, done: bool = False) -> None:
        run.commit(done=done)
        on_progress(Progress(share, run.events, run.dead.total()))

    share = 0.0
    for item, share_after in run.origin.items(run.start):
        outside = run.outside_range(item)
        due = None if outside else pace.due(item.timestamp)
        if due is not None:
            if run.pending:
                commit(share)
            pace.wait(due)
        if pace.stop():
            if run.pending:
                commit(share)
            return
        if outside:
            run.pass_over(item)
        else:
            run.take(item)
        share = share_after
        if len(run.pending) >= batch or run.pending_bytes >= _COMMIT_BYTES or run.passed_over >= _PASSED_OVER * batch:
            commit(share)
    commit(1.0, done=True)


def _check_same(name: str, before: ReplayPosition, now: ReplayPosition) -> None:
    advice = again(before)
    # That of a topic is of the last record taken from it, and is for whoever reads on to compare.
    if before.size != now.size or (now.digest and before.digest != now.digest):
        raise SourceError(f"{name} has changed since it was last replayed (its size was {before.size} then, {now.size} now): {advice}")
    if before.settings != now.settings:
        raise SourceError(f"{name} was last replayed with other columns, format, order, or limits to sort by: {advice}")


def _last_position(log: Log, topic: str, key: bytes) -> ReplayPosition | None:
    last: Record | None = None
    for record in present(log, [TopicPartition(topic, 0)]):
        if record.key == key:
            last = record
    if last is None or last.value is None:
        return None
    return decode(last.value, ReplayPosition, what=f"{topic}[0] at offset {last.offset}")
