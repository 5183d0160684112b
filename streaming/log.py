"""The log: what Coldstream asks of a broker.

Everything that Coldstream knows travels through a partitioned, append-only log. Two brokers stand behind this interface, the
embedded one (SQLite, one machine) and Apache Kafka; both pass the contract suite in ``tests/contract``. The interface is
Kafka's model with its traps taken out:

* A `Reader` is assigned its partitions and positions by number and sees committed records only.
* A `Member` takes part in a group and learns which partitions it owns, and of which generation; it reads nothing. So one reader may
  follow partitions of many topics while membership is decided by a single topic.
* A `Writer` has a transactional id. Opening one fences every older writer of that id. All that it writes, consumed offsets included,
  becomes visible in one `Writer.commit`, or never.

Offsets rise strictly within a partition but need not be contiguous (compaction and Kafka's own markers leave gaps).
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from streaming.errors import BrokerUnreachable, OffsetOutOfRange
from streaming.risks import Risk, risks

if TYPE_CHECKING:
    from types import TracebackType


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int


class Record(NamedTuple):
    """A record as read. ``timestamp`` is the time of its append in milliseconds since the epoch, not the event's own time."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


class Message(NamedTuple):
    """A record to be written.

    Without ``partition`` the key decides (murmur2, as Java's and kafka-python's default partitioner), and without both it is partition 0.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    partition: int | None = None


class Topic(NamedTuple):
    """A topic's settings.

    ``cleanup`` is how old records go: ``delete`` drops them by age and size, ``compact`` keeps the last record of every key (a null
    value removes the key). ``retention_ms`` and ``retention_bytes`` (per partition) bound a ``delete`` topic, and ``retention_ms``
    is how long a ``compact`` topic keeps the null of a removed key; None is without bound. ``max_record_bytes`` bounds key and
    value together.
    """

    name: str
    partitions: int = 1
    cleanup: Literal["delete", "compact"] = "delete"
    retention_ms: int | None = None
    retention_bytes: int | None = None
    max_record_bytes: int = 1_000_000


class Bounds(NamedTuple):
    """``start`` is the first offset that can be read from, ``end`` the offset after the last committed record.

    Retention moves ``start``, up to ``end`` where nothing is left. Compaction does not: what it removes has been superseded, so that a
    reader may begin at 0, or in any gap.
    """

    start: int
    end: int


class Assignment(NamedTuple):
    """The partitions that a group member owns in one ``generation`` of its group. ``member_id`` names the member to the broker."""

    group: str
    topic: str
    member_id: str
    generation: int
    partitions: frozenset[int]


class Reader(abc.ABC):
    """Reads committed records of the partitions assigned to it, in offset order within each partition."""

    @abc.abstractmethod
    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        """Replace the assignment: read each partition from the given offset on.

        Raises `UnknownTopic` for a topic that does not exist. A position before the first record kept raises `OffsetOutOfRange` at the
        next `poll`: nothing is skipped in silence.
        """

    @abc.abstractmethod
    def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
        """Return up to ``max_records`` records, waiting up to ``timeout`` seconds for the first.

        ``only`` restricts this poll to some of the assigned partitions (ValueError for another one); the positions of the others stay
        where they are. Records of one partition stand together in offset order, and partitions take turns so that none starves.
        """

    @abc.abstractmethod
    def position(self, tp: TopicPartition) -> int:
        """The offset that the next `poll` of this partition starts from. After a poll it is past every record and gap that was read.

        Raises ValueError for a partition that is not assigned.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the reader holds. Closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Member(abc.ABC):
    """Membership of a group: which partitions of ``topic`` are ours. Call `assignment` at least every few seconds, it is the heartbeat."""

    @abc.abstractmethod
    def assignment(self) -> Assignment:
        """The assignment in force now. A generation below 0 means that the member was evicted; it rejoins with the next call."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the group at once, so that its partitions move without waiting for the session to time out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Commit(abc.ABC):
    """A commit that was begun, and goes on by itself."""

    @property
    @abc.abstractmethod
    def done(self) -> bool:
        """Whether `result` returns or raises without waiting."""

    @property
    @abc.abstractmethod
    def ended(self) -> float:
        """When it was answered, in seconds since the epoch; 0 before."""

    @abc.abstractmethod
    def result(self) -> list[int]:
        """Wait for its end; returns the offset of every message, in order. Raises as `Writer.commit` does, whenever it is asked."""


class Committed(Commit):
    """One that took place when it was begun."""

    def __init__(self, offsets: list[int]) -> None:
        self._offsets = offsets
        self._ended = time.time()

    @property
    def done(self) -> bool:
        """It is."""
        return True

    @property
    def ended(self) -> float:
        """As `Commit.ended`."""
        return self._ended

    def result(self) -> list[int]:
        """As `Commit.result`."""
        return self._offsets


class Writer(abc.ABC):
    """A transactional writer. Opening it fences every older writer of the same transactional id."""

    @abc.abstractmethod
    def begin(
        self,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> Commit:
        """Begin what `commit` does, so that something else can be done while the broker is at it.

        One at a time: a broker that is still at the one before, or whose result was not asked for, may raise ValueError. What `commit`
        raises is raised here or by `Commit.result`. Of one whose result nobody waits for, nobody knows what it came to: the next writer
        of this id settles it.
        """

    def commit(
        self,
        messages: Sequence[Message],
        offsets: Mapping[TopicPartition, int] | None = None,
        owner: Assignment | str | None = None,
    ) -> list[int]:
        """Make ``messages`` and the consumed ``offsets`` (next offset to read) visible together, or neither.

        ``owner`` is the assignment under which the offsets were consumed: it must be the one of the generation in force, and hold their
        partitions. A plain group name commits offsets of a group without members (lockstep, replayer, trainer).
        Returns the offset of every message, in order.

        Raises `Fenced` if a newer writer of this id was opened or the assignment is no longer in force, `RecordTooLarge`, `UnknownTopic`,
        `LogFull` if the disk is full, `LogError` for a message without a key to a compacted topic, ValueError for offsets without an
        owner. After any of these nothing of the commit is visible. Raises `BrokerUnreachable` if the answer is lost: the commit may
        have taken place. Opening a new writer of this id settles it one way or the other, and what is committed then shows which.
        """
        return self.begin(messages, offsets, owner).result()

    @abc.abstractmethod
    def close(self) -> None:
        """Release what the writer holds. Closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Log(abc.ABC):
    """A connection to a broker. One per process; its readers, members and writers may be used from one thread each."""

    marks = False
    """Whether a broker's own marks, such as those that end Kafka's transactions, take offsets too."""

    @abc.abstractmethod
    def create(self, topics: Iterable[Topic]) -> None:
        """Create the topics that do not exist.

        Raises `TopicMismatch` where one exists with another number of partitions or another cleanup.
        """

    @abc.abstractmethod
    def identity(self) -> str:
        """What tells this log from every other, under whatever address or path it was opened."""

    @abc.abstractmethod
    def topics(self) -> dict[str, Topic]:
        """Every topic by name."""

    def risks(self, wanted: Iterable[Topic]) -> list[Risk]:
        """What about the topics that exist would lose data, compared with those wanted."""
        return risks(wanted, self.topics())

    @abc.abstractmethod
    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        """First offset kept and end of each partition. Raises `UnknownTopic`."""

    @abc.abstractmethod
    def committed(self, group: str, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """The committed offsets of a group; partitions without one are left out. Raises `UnknownTopic`."""

    @abc.abstractmethod
    def append(self, messages: Sequence[Message]) -> list[int]:
        """Write outside any transaction; durable when it returns. Returns the offsets. Raises as `Writer.commit` does."""

    @abc.abstractmethod
    def reader(self) -> Reader:
        """A reader without an assignment yet."""

    @abc.abstractmethod
    def member(self, group: str, topic: str) -> Member:
        """Join a group that shares out the partitions of ``topic``."""

    @abc.abstractmethod
    def writer(self, transactional_id: str) -> Writer:
        """Open a transactional writer, fencing every older one of this id."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connection. Closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_PATIENCE_SECONDS = 30.0

NEAR_END = 16
"""Offsets from the end within which `left` looks at what is there."""


def left(log: Log, since: Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
    """How much each partition has from these offsets on.

    A broker's own marks, such as those that end Kafka's transactions, take offsets too. Where few offsets are left they are read, so that
    what was read to its end has nothing left; where many are, they are counted as they stand.
    """
    bounds = log.bounds(since)
    found = {tp: max(0, end - max(start, since[tp])) for tp, (start, end) in bounds.items()}
    near = {tp: max(bounds[tp].start, since[tp]) for tp, offsets in found.items() if 0 < offsets <= NEAR_END}
    if near:
        found |= dict.fromkeys(near, 0)
        with log.reader() as reader:
            reader.assign(near)
            for batch in catch_up(log, reader, near):
                for record in batch:
                    tp = TopicPartition(record.topic, record.partition)
                    found[tp] += record.offset < bounds[tp].end
    return found


def at_hand(reader: Reader, *, at_once: int) -> Iterator[list[Record]]:
    """Yield what the reader finds without waiting, ``at_once`` records at a time.

    It asks once more only after as many as that: whoever looks before every step is not to look twice.
    """
    while batch := reader.poll(at_once):
        yield batch
        if len(batch) < at_once:
            return


def present(
    log: Log, tps: Iterable[TopicPartition], *, at_once: int = 1000, since: int = 0, on_lost: Callable[[], object] | None = None
) -> Iterator[Record]:
    """Yield every record that the partitions hold now, from offset ``since`` on, partitions by turns, each in offset order.

    ``at_once`` of them are read in one go. Where retention removes what comes next while it is waited for, ``on_lost`` is called, and
    reading goes on with what is kept.

    Raises `UnknownTopic`, `LogUnavailable` where nothing comes for 30 s although an end has not been reached, and, without ``on_lost``,
    `OffsetOutOfRange` where retention was faster.
    """
    bounds = log.bounds(tps)
    unread = {tp: max(start, since) for tp, (start, end) in bounds.items() if max(start, since) < end}
    if not unread:
        return
    with log.reader() as reader:
        while unread:
            reader.assign(unread)
            try:
                for batch in catch_up(log, reader, unread, at_once=at_once):
                    for record in batch:
                        if record.offset < bounds[TopicPartition(record.topic, record.partition)].end:
                            yield record
            except OffsetOutOfRange:
                if on_lost is None:
                    raise
                on_lost()
                kept = {tp: max(reader.position(tp), each.start) for tp, each in log.bounds(unread).items()}
                unread = {tp: position for tp, position in kept.items() if position < bounds[tp].end}
            else:
                return


def catch_up(log: Log, reader: Reader, tps: Iterable[TopicPartition], *, at_once: int = 1000) -> Iterator[list[Record]]:
    """Yield what the reader finds in these of its partitions until it has come to where they end now, ``at_once`` records at a time.

    A poll that finds nothing does not say that there is nothing: a broker may not have answered yet. Raises as `present` does.
    """
    bounds = log.bounds(tps)
    unread = {tp for tp in bounds if reader.position(tp) < bounds[tp].end}
    silent_since = time.monotonic()
    while unread:
        if batch := reader.poll(at_once, timeout=0.5, only=unread):
            yield batch
        done = {tp for tp in unread if reader.position(tp) >= bounds[tp].end}
        unread -= done
        if batch or done:
            silent_since = time.monotonic()
        elif time.monotonic() - silent_since > _PATIENCE_SECONDS:
            names = ", ".join(f"{tp.topic}[{tp.partition}]" for tp in sorted(unread))
            raise BrokerUnreachable(f"{names}: no record for {_PATIENCE_SECONDS:.0f} s, although the end has not been reached")
