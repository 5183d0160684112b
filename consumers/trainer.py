"""The trainer: folds what the workers' steps teach into the next versions of the model.

`Trainer.step` is the whole of it. It commits the new version and, in it, how far the updates are folded; so an update is folded once,
however often the trainer is killed: the last version says where to go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import structlog

from consumers.versions import other_settings, slot_of, snapshot_messages, version_messages
from consumers.wire import gradient_from_wire, rows_to_wire, to_wire, writes_from_wire
from model import checkpoint
from model.memory import compose
from model.meta import total
from streaming.chunks import Joiner
from streaming.codec import decode
from streaming.errors import BrokerUnreachable, ChunkError, OffsetOutOfRange
from streaming.events import Update, Version
from streaming.log import TopicPartition

if TYPE_CHECKING:
    from consumers.settings import Settings
    from consumers.versions import Versions
    from model.memory import Writes
    from model.meta import Gradient
    from model.numbering import Numbers
    from streaming.log import Log, Message, Record, Topic
    from streaming.metrics import Metrics

READ_AT_ONCE = 64
"""Update records read in one go: each can be a megabyte."""

FOLD_UPDATES, FOLD_BYTES = 512, 64 << 20
"""A step reads no further once it has so many meta-updates, or so much."""

NEXT_SECONDS = 0.1
"""How long a step that has something to fold waits for more of what is in the log: where it was aborted, nothing comes."""

TURN_SECONDS = 0.01
"""How long one look for updates takes that are in the log but not at hand, and `SILENT_SECONDS` how long nothing may come of them."""

SILENT_SECONDS = 30.0

SNAPSHOT_SHARE = 4
"""A snapshot is due once versions behind the last one fill one part in so many of what ``model`` keeps, however few they are."""

logger = structlog.get_logger()


def trainer_id(settings: Settings) -> str:
    """The transactional id of whoever may add to the versions, and the group that hands out the lock."""
    return f"{settings.group_id}-trainer"


class Lesson(NamedTuple):
    """An update as it is folded."""

    kind: str
    version: int
    gradient: Gradient
    writes: Writes | None
    place: tuple[int, int]
    """Its partition of ``updates`` and the offset after it."""
    completes: bool = True
    weight: float = 1.0

    def finite(self) -> bool:
        """Whether both are finite."""
        return self.gradient.finite() and (self.writes is None or self.writes.finite())

    def weighted(self, weight: float) -> Lesson:
        """The lesson at this weight: the gradient times it, and memory writes that go this part of their way.

        The count of queries that the sum of a round is divided by stays: a stale update makes a shorter step, and does not only give
        way to fresh ones in the same round.
        """
        writes = None if self.writes is None else self.writes.weighted(weight)
        return self._replace(gradient=self.gradient.weighted(weight), writes=writes, weight=weight)


class Trainer:
    """Reads updates, and writes versions and snapshots of the model and optimiser of ``versions``. Opening it fences any other trainer."""

    def __init__(self, log: Log, settings: Settings, topics: dict[str, Topic], versions: Versions, metrics: Metrics) -> None:
        assert versions.optimiser is not None  # noqa: S101  a trainer follows with its optimiser
        self.log = log
        self.settings = settings
        self.topics = topics
        self.versions = versions
        self.model = versions.model
        self.optimiser = versions.optimiser
        self.metrics = metrics
        # The writer first: from here on no other trainer can add a version to those read next.
        self.writer = log.writer(trainer_id(settings))
        versions.lead()
        self.folded = dict(versions.folded)
        self._snapshot, self._slot = versions.snapshot, versions.slot
        self._joiner = Joiner()
        self._parts: dict[int, list[Lesson]] = {}
        """By partition, the parts of a meta-update that has not been completed: they stay in the log until it is."""
        self._lost: list[tuple[int, int, int]] = []
        """What retention took before it was folded, as the next version says it: partition, first offset, offset after the last."""
        self._reader = log.reader()
        self._updates = [TopicPartition(topics["updates"].name, number) for number in range(topics["updates"].partitions)]
        self._begin({tp: self.folded.get(tp.partition, 0) for tp in self._updates})
        self.behind = False
        """Whether the last step left updates in the log that stood there when it began."""

    @property
    def version(self) -> int:
        """The last one committed."""
        return self.versions.version

    def catch_up(self, beat: Callable[[], object] = lambda: None) -> None:
        """Fold all updates that are in the log now, for workers who wait for it: no update is made behind the last version then.

        Raises `BrokerUnreachable` where nothing comes for 30 s although there is more, and as `step` does.
        """
        ends = self._ends()
        while self._left(ends):
            self.step(beat=beat, until=ends)

    def _ends(self) -> dict[TopicPartition, int]:
        return {tp: bounds.end for tp, bounds in self.log.bounds(self._updates).items()}

    def _begin(self, positions: Mapping[TopicPartition, int]) -> None:
        """Read on from these positions, or from the first update kept: what retention took before it was folded is said and counted."""
        bounds = self.log.bounds(positions)
        for tp, position in positions.items():
            if position > bounds[tp].end:
                raise OffsetOutOfRange(f"{tp.topic}[{tp.partition}]: folded up to offset {position}, but it ends at {bounds[tp].end}")
            if position < (kept := bounds[tp].start):
                folded = self.folded.get(tp.partition, 0)
                logger.warning("updates lost to retention", topic=tp.topic, partition=tp.partition, folded=folded, first_kept=kept)
                self._lost.append((tp.partition, folded, kept))
                self.folded[tp.partition] = kept
                self._parts.pop(tp.partition, None)
                self._joiner.forget(*tp)
        self._reader.assign({tp: max(position, bounds[tp].start) for tp, position in positions.items()})

    def step(
        self, timeout: float = 0.0, beat: Callable[[], object] = lambda: None, *, until: Mapping[TopicPartition, int] | None = None
    ) -> int:
        """Fold the updates that are there into new versions and commit the last of them; returns how many updates were folded.

        ``beat`` is called between the rounds, for whoever must be heard of while many are folded. With ``until``, where the updates end
        that workers wait for, it is these that are read, however long that takes. Raises `Fenced` once another trainer, or whoever went
        back to an older version, has taken over; what was folded since the last commit is then in no version, and this trainer of no
        more use. Raises `OtherSettings` for an update made with others.

        Meta-updates are taken as they were read, ``trainer.round_updates`` to a version or, unless workers wait for it, as many as `_round`
        says, each the sum of its parts. Versions between the last one committed and this one are seen by nobody, so they are
        not written.
        """
        stage = self.metrics.stage
        with stage("poll"):
            complete = self._read(timeout, beat) if until is None else self._read_until(until, beat)
        if not complete:
            return 0
        with stage("fold"):
            chosen, dropped = self._choose(complete)
            kept = list(chain.from_iterable(chosen))
            changed: dict[str, list[Numbers]] = {name: [] for name in self.model.tables}
            parent, version = self.version, self.version
            while chosen:
                size = self._round(chosen[0], version) if until is None else self.settings.trainer.round_updates
                group, chosen = list(chain.from_iterable(chosen[:size])), chosen[size:]
                beat()
                version += 1
                for name, rows in self.optimiser.step(
                    total([lesson.gradient for lesson in group]), compose(lesson.writes for lesson in group)
                ).items():
                    changed[name].append(rows)
        with stage("encode"):
            queries = sum(lesson.gradient.queries for lesson in kept)
            made = self._version(max(version, parent + 1), parent, checkpoint.export(self.model, self.optimiser, changed), queries, dropped)
            messages = version_messages(self.topics["model"], made)
            size = sum(len(message.value or b"") for message in messages)
            snapshot = self._snapshot_if_due(made, size)
            beat()
        with stage("commit"):
            self.writer.commit(messages + snapshot)
        self.versions.made(made)
        self.versions.since_snapshot = size if snapshot else self.versions.since_snapshot + size
        self.metrics.lost.inc(sum(kept - folded for _, folded, kept in self._lost))
        self._lost.clear()
        query = sum(lesson.kind == "query" for lesson in kept)
        weighted = sum(lesson.weight < 1 for lesson in kept)
        self.metrics.observe_fold(query=query, rehearsal=len(kept) - query, dropped=len(dropped), weighted=weighted)
        self.metrics.observe_version(made.version, made.made_at)
        return len(kept)

    def _read(self, timeout: float, beat: Callable[[], object]) -> list[list[Lesson]]:
        """The meta-updates that are complete; ``folded`` then is the position after them.

        All that are in the log when the first of them is read, or so many that they are enough for a step: what a broker gives at once is
        bounded in bytes. Of each poll they stand in the order of partition and offset.
        """
        complete: list[list[Lesson]] = []
        deadline, size, ends, wait = time.monotonic() + timeout, 0, dict[TopicPartition, int](), timeout
        while read := self._poll(wait, complete):
            size += read
            beat()
            wait = max(0.0, deadline - time.monotonic())
            if not complete and size < FOLD_BYTES:
                continue
            ends = ends or self._ends()
            left = self._left(ends)
            if not left or self._enough(complete, size):
                break
            # The last place may be the mark of a transaction, which nobody is given.
            wait = min(wait, NEXT_SECONDS) if left > 1 else 0.0
        self.behind = self._left(ends) > 1
        return complete

    def _read_until(self, ends: Mapping[TopicPartition, int], beat: Callable[[], object]) -> list[list[Lesson]]:
        """As `_read`, up to where the updates end that workers wait for: a broker may not have at hand what has just been committed."""
        complete: list[list[Lesson]] = []
        size, left, heard = 0, self._left(ends), time.monotonic()
        while left and not self._enough(complete, size):
            size += self._poll(TURN_SECONDS, complete)
            before, left = left, self._left(ends)
            if left != before:
                heard = time.monotonic()
            elif time.monotonic() - heard > SILENT_SECONDS:
                raise BrokerUnreachable(f"{self.topics['updates'].name}: no update for {SILENT_SECONDS:.0f} s, although there are more")
            beat()
        self.behind = left > 0
        return complete

    @staticmethod
    def _enough(complete: list[list[Lesson]], size: int) -> bool:
        """Whether a step reads no further, once it has so many meta-updates or so many bytes."""
        return len(complete) >= FOLD_UPDATES or size >= FOLD_BYTES

    def _poll(self, wait: float, complete: list[list[Lesson]]) -> int:
        """Add the meta-updates that the next records complete, in the order of partition and offset; returns the size of these records.

        Where retention took them first, the reader goes on at what is kept.
        """
        try:
            records = self._reader.poll(READ_AT_ONCE, wait)
        except OffsetOutOfRange:
            self._begin({tp: self._reader.position(tp) for tp in self._updates})
            return 0
        ordered = sorted(records, key=lambda record: (record.partition, record.offset))
        complete += filter(None, map(self._take, ordered))
        return sum(len(record.value or b"") for record in records)

    def _take(self, record: Record) -> list[Lesson] | None:
        """The parts of the meta-update that a record completes, if it completes one."""
        try:
            value = self._joiner.feed(record)
        except ChunkError as error:
            # Only where retention cut into an update: its rest is passed over, and said.
            logger.warning("part of an update lost", error=str(error))
            return None
        if value is None:
            return None
        update = decode(value, Update, what=f"{record.topic}[{record.partition}] at offset {record.offset}")
        if update.settings not in ("", self.versions.digest):
            raise other_settings(
                f"{record.topic}[{record.partition}] at offset {record.offset}: an update", update.settings, self.versions.digest
            )
        gradient = gradient_from_wire(update.events, update.tensors, update.rows)
        place = record.partition, record.offset + 1
        parts = self._parts.setdefault(record.partition, [])
        parts.append(Lesson(update.kind, update.version, gradient, writes_from_wire(update.writes), place, update.completes))
        if not update.completes:
            return None
        self.folded[record.partition] = record.offset + 1
        return self._parts.pop(record.partition)

    def _left(self, ends: Mapping[TopicPartition, int]) -> int:
        """How many places before these ends were not read yet, in the partition where they are most."""
        return max((0, *(end - self._reader.position(tp) for tp, end in ends.items())))

    def _choose(self, complete: list[list[Lesson]]) -> tuple[list[list[Lesson]], list[tuple[int, int]]]:
        """Drop updates that are too old by ``trainer.max_staleness``, or not finite: one of those would end all learning.

        The places of those dropped stand in the version, so that what it folded can be told from the log. Of the others, one made s
        versions before the last committed one has weight 0.5^(s / ``trainer.staleness_half_life``).
        """
        trainer = self.settings.trainer
        oldest = self.version - trainer.max_staleness if trainer.max_staleness else 0
        chosen, dropped = list[list[Lesson]](), list[tuple[int, int]]()
        for parts in complete:
            kept = []
            for lesson in parts:
                if lesson.version >= oldest and lesson.finite():
                    staleness = self.version - lesson.version
                    stale = trainer.staleness_half_life > 0 and staleness > 0
                    kept.append(lesson.weighted(0.5 ** (staleness / trainer.staleness_half_life)) if stale else lesson)
                else:
                    dropped.append(lesson.place)
            if kept:
                chosen.append(kept)
        if dropped:
            logger.warning("updates dropped", dropped=len(dropped), version=self.version)
        return chosen, dropped

    def _round(self, parts: list[Lesson], version: int) -> int:
        """How many meta-updates to fold into the version after this one, of which the first has these parts.

        Those made at one version all point from there: taken one by one once many others have been, they go the same way again and again.
        """
        trainer = self.settings.trainer
        if not trainer.stale_rounds:
            return trainer.round_updates
        staleness = version - min(lesson.version for lesson in parts)
        return max(trainer.round_updates, -(-staleness // trainer.stale_rounds))

    def _version(
        self,
        version: int,
        parent: int | None,
        state: checkpoint.State,
        events: int,
        dropped: list[tuple[int, int]],
    ) -> Version:
        return Version(
            version=version,
            parent=parent,
            folded=dict(self.folded),
            settings=self.versions.digest,
            tensors={name: to_wire(tensor) for name, tensor in state.tensors.items()},
            rows=rows_to_wire(state.rows),
            events=events,
            made_at=time.time_ns() // 1_000_000,
            dropped=dropped,
            skipped=list(self._lost),
        )

    def _snapshot_if_due(self, made: Version, size: int) -> list[Message]:
        """A snapshot of the version, of so many bytes, in the slot whose turn it is, once ``trainer.snapshot_every`` versions have passed.

        Before that where they are large: retention must never reach the last snapshot, or nobody could start any more.
        """
        every, kept = self.settings.trainer.snapshot_every, self.settings.topics.model_bytes
        if made.version // every == self._snapshot // every and self.versions.since_snapshot + size <= kept // SNAPSHOT_SHARE:
            return []
        tp = TopicPartition(self.topics["model"].name, 0)
        # The version itself follows in the same commit, so later ones stand behind the present end.
        end = self.log.bounds([tp])[tp].end
        whole = self._version(made.version, None, checkpoint.export(self.model, self.optimiser), made.events, made.dropped)
        messages = snapshot_messages(self.topics["snapshots"], msgspec.structs.replace(whole, position=end), self._slot)
        self._snapshot, self._slot = made.version, slot_of(messages[0])
        return messages

    def close(self) -> None:
        """Release readers and the writer."""
        self._reader.close()
        self.versions.close()
        self.writer.close()
