"""The replayer: fills a topic from a historical log, each line exactly once, however often it is killed and started again."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from streaming.codec import decode, encode
from streaming.deadletters import dead_letter_message
from streaming.errors import SourceError
from streaming.events import ReplayPosition
from streaming.log import Message, Record, TopicPartition, present
from streaming.textfiles import Place
from streaming.timeorder import by_time

if TYPE_CHECKING:
    from streaming.log import Log, Topic, Writer
    from streaming.sources import Entry, Source

_COMMIT_BYTES = 1 << 22
_TICK_SECONDS = 0.02
_NAP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay has done. ``events`` and ``dead_letters`` (by reason) count over all runs of this file.

    ``sent`` is how many entries (lines that are not blank) this run took, ``skipped`` how many earlier runs had taken. ``done`` is False
    where the run was stopped before the file's end.
    """

    events: int
    dead_letters: dict[str, int]
    sent: int
    skipped: int
    done: bool


class Progress(NamedTuple):
    """How far a replay is, told after each commit: ``share`` of the whole from 0 to 1, and counts over all runs."""

    share: float
    events: int
    dead_letters: int


def replay(
    log: Log,
    source: Source,
    topics: Mapping[str, Topic],
    *,
    into: Literal["interactions", "users", "items"] = "interactions",
    group: str = "coldstream",
    rate: float | Literal["max"] = "max",
    batch: int = 1000,
    sort_by_time: bool = False,
    restart: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> ReplayResult:
    """Send what ``source`` holds to the topic ``into`` of ``topics`` (see `streaming.topics.topics`), from where the last run ended.

    Records, dead letters and the position in the file are committed together, ``batch`` lines at a time. ``rate`` is a multiple of the
    recorded pace (2.0 is twice as fast) or ``"max"``; at a pace, lines whose time is within 20 ms are committed together.
    ``sort_by_time`` sends lines in the order of their event times (`streaming.timeorder.by_time`, which bounds the memory it takes).
    ``restart`` forgets the position and sends every line again. ``stop`` is asked before each line; what was taken is then committed.

    Raises `SourceError` if the file changed since the last run, was read with other settings then, cannot be sorted, or has no times
    to keep pace with; `Fenced` if another replay of the same file took over; and what `Writer.commit` raises.
    """
    path = source.file.path
    if rate != "max" and not 0 < rate < float("inf"):
        raise SourceError(f"{path}: the rate must be above 0, or max; it is {rate}")
    if batch < 1:
        raise SourceError(f"{path}: the batch must be at least 1 line; it is {batch}")
    if not source.timed and (sort_by_time or rate != "max"):
        raise SourceError(f"{path}: profiles have no time to sort by or to keep pace with")
    key = hashlib.sha256(f"{group}\0{topics[into].name}\0{path}".encode()).hexdigest()[:24]
    # The position is read after the writer was opened: from then on no older replay of this file can move it.
    with log.writer(f"{group}-replay-{key}") as writer:
        start = _beginning(source, topics[into].name, sort_by_time=sort_by_time)
        before = None if restart else _last_position(log, topics["replays"].name, key.encode())
        if before is not None:
            _check_same(path.name, before, start)
            start = before
        run = _Run(writer, start, topics, into, key.encode())
        if not start.done:
            entries = by_time(source, start.entries) if sort_by_time else source.entries(Place(start.line, start.end))
            _send(run, entries, _Pace(rate, clock, sleep, stop), batch, on_progress)
        return ReplayResult(run.events, dict(run.dead), run.entries - start.entries, start.entries, run.done)


class _Run:
    """What has been taken since the last commit, and the position after it."""

    def __init__(self, writer: Writer, start: ReplayPosition, topics: Mapping[str, Topic], into: str, key: bytes) -> None:
        self.writer, self.start, self.key = writer, start, key
        self.into, self.dead_letters, self.replays = topics[into].name, topics["dead-letters"].name, topics["replays"].name
        self.entries, self.events, self.done = start.entries, start.events, start.done
        self.dead = Counter(start.dead_letters)
        self.place = Place(start.line, start.end)
        self.pending: list[Message] = []
        self.pending_bytes = 0

    def take(self, entry: Entry) -> None:
        if entry.error is None:
            self.pending.append(Message(self.into, entry.key, entry.value))
            self.events += 1
        else:
            record = Record(f"file:{self.start.name}", 0, entry.line.number, 0, entry.key, entry.value)
            self.pending.append(dead_letter_message(self.dead_letters, record, entry.error))
            self.dead[entry.error.reason] += 1
        self.entries += 1
        self.place = Place(entry.line.number, entry.line.end)
        self.pending_bytes += len(self.pending[-1].value or b"")

    def commit(self, *, done: bool = False) -> None:
        position = msgspec.structs.replace(
            self.start,
            entries=self.entries,
            line=self.place.line,
            end=self.place.end,
            events=self.events,
            dead_letters=dict(self.dead),
            done=done,
        )
        self.writer.commit([*self.pending, Message(self.replays, self.key, encode(position), partition=0)])
        self.pending, self.pending_bytes, self.done = [], 0, done


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


def _send(run: _Run, entries: Iterable[tuple[Entry, float]], pace: _Pace, batch: int, on_progress: Callable[[Progress], None]) -> None:
    def commit(share: float, *, done: bool = False) -> None:
        run.commit(done=done)
        on_progress(Progress(share, run.events, run.dead.total()))

    share = 0.0
    for entry, share_after in entries:
        due = pace.due(entry.timestamp)
        if due is not None:
            if run.pending:
                commit(share)
            pace.wait(due)
        if pace.stop():
            if run.pending:
                commit(share)
            return
        run.take(entry)
        share = share_after
        if len(run.pending) >= batch or run.pending_bytes >= _COMMIT_BYTES:
            commit(share)
    commit(1.0, done=True)


def _beginning(source: Source, topic: str, *, sort_by_time: bool) -> ReplayPosition:
    return ReplayPosition(
        topic=topic,
        name=source.file.path.name,
        size=source.file.size,
        digest=source.file.digest(),
        settings=source.settings + ("-by-time" if sort_by_time else ""),
        entries=0,
        line=source.file.start.line,
        end=source.file.start.end,
        events=0,
        dead_letters={},
        done=False,
    )


def _check_same(name: str, before: ReplayPosition, now: ReplayPosition) -> None:
    advice = f"{before.entries} of its lines are in {before.topic} already; with --restart all of it is sent again"
    if (before.size, before.digest) != (now.size, now.digest):
        raise SourceError(f"{name} has changed since it was last replayed ({before.size} bytes then, {now.size} now): {advice}")
    if before.settings != now.settings:
        raise SourceError(f"{name} was last replayed with other columns, format or order: {advice}")


def _last_position(log: Log, topic: str, key: bytes) -> ReplayPosition | None:
    last: Record | None = None
    for record in present(log, [TopicPartition(topic, 0)]):
        if record.key == key:
            last = record
    if last is None or last.value is None:
        return None
    return decode(last.value, ReplayPosition, what=f"{topic}[0] at offset {last.offset}")
