"""The support sets of partitions: opened in memory or in local stores, checked against the changelog, restored from it."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from consumers.partition import Partition
from streaming.errors import Fenced, LogError, OffsetOutOfRange, StoreDamaged, StoreFull, StoreLocked
from streaming.log import NEAR_END, TopicPartition
from streaming.store.file import Place
from streaming.store.restoration import Restoration, misfit, newest_position
from streaming.store.stored import Stored
from streaming.support import SupportSets

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumers.settings import Settings
    from streaming.events import Position
    from streaming.log import Bounds, Log
    from streaming.metrics import Metrics

LET_GO_SECONDS = 2.0
"""How long a store that another process has is waited for: the earlier owner of its partition, as a rule, which is just closing it."""

SETTLE_SECONDS = 1.0
"""How long support sets and committed offset may differ: both are of one commit, but a broker shows the one a moment before the other."""

OWNERS = 16
"""Takeovers that a position record names. A store left before all of them is not used any more."""

TELL_SECONDS = 5.0
"""Time between two lines of the log about one restoration."""

logger = structlog.get_logger()


class State:
    """Where the support sets of this process's partitions are held: in ``worker.state_dir``, or in memory where it is empty."""

    def __init__(self, log: Log, settings: Settings, metrics: Metrics, topics: dict[str, str]) -> None:
        self.log = log
        self.settings = settings
        self.metrics = metrics
        self.interactions = topics["interactions"]
        self._topic = topics["support"]
        self._removals_kept_ms = log.topics()[self._topic].retention_ms

    def changelog(self, number: int) -> TopicPartition:
        """The changelog of a partition."""
        return TopicPartition(self._topic, number)

    def in_memory(self) -> SupportSets:
        """Empty support sets in memory."""
        return SupportSets(self.settings.worker.support_size, max_users=self.settings.worker.max_users)

    def open(self, number: int, beat: Callable[[], None]) -> SupportSets:
        """What is held of a partition, as it was left. Raises `StoreLocked` while another process has its store, and `StoreError`."""
        worker, group = self.settings.worker, self.settings.group_id
        if not worker.state_dir:
            return self.in_memory()
        try:
            place = Place(group, *self.changelog(number))
            held = Stored(Path(worker.state_dir) / f"{group}-{number}.db", place, ordered=worker.max_users > 0, beat=beat)
        except StoreFull as error:
            logger.warning("held in memory, without a local store", partition=number, reason=str(error))
            return self.in_memory()
        if held.set_aside:
            self.set_aside(number, held.set_aside)
        return SupportSets(worker.support_size, max_users=worker.max_users, held=held)

    def fit(self, number: int, sets: SupportSets) -> tuple[Bounds, Position | None]:
        """Empty support sets that cannot be continued from the changelog; returns its bounds and its newest position record."""
        changelog = self.changelog(number)
        bounds = self.log.bounds([changelog])[changelog]
        newest = newest_position(self.log, changelog, bounds)
        while newest is None and (moved := self.log.bounds([changelog])[changelog]) != bounds:
            # A step of an owner who is there has removed the record, and its own lies beyond.
            bounds, newest = moved, newest_position(self.log, changelog, moved)
        if reason := misfit(sets.covered, bounds, newest, self._removals_kept_ms, time.time_ns() // 1_000_000):
            self.set_aside(number, sets.begin_anew(reason))
        sets.begin_restoring(newest)
        return bounds, newest

    def set_aside(self, number: int, reason: str) -> None:
        """Say that what was held of a partition is not used any more."""
        logger.warning("what was held is not used; state is rebuilt from the changelog", partition=number, reason=reason)
        self.metrics.stores_set_aside.inc()


class Takeover:
    """A partition on its way to this process: its earlier owner is fenced, its support sets are being restored, in slices.

    ``sets`` are what this process has of it already; they are the takeover's from then on. ``offset`` is where the partition's steps go on.
    """

    def __init__(self, state: State, number: int, sets: SupportSets | None = None) -> None:
        self.number = number
        self.lost = 0
        self.version = 0
        """The model version of the last step before the takeover."""
        self.restored_at = 0.0
        """When all was read, by the monotonic clock; 0 before."""
        self.owners: list[tuple[bytes, int]] = []
        """What its position records say of whose the partition was, this takeover the last."""
        self._state = state
        # The writer first: from here on no earlier owner can move the committed offset.
        self.writer = state.log.writer(f"{state.settings.group_id}-{number}")
        source = TopicPartition(state.interactions, number)
        try:
            self._committed = state.log.committed(state.settings.group_id, [source]).get(source)
            self.offset = self._first(source)
        except BaseException:
            self.writer.close()
            raise
        self._sets = sets
        self._restoration: Restoration | None = None
        self._damaged = False
        self._unlike_since = 0.0
        self._begun = self._told = time.monotonic()

    def _first(self, source: TopicPartition) -> int:
        """Where steps go on: at the committed offset, or at the first event kept, where nothing is committed or retention has passed it."""
        (start, end), committed = self._state.log.bounds([source])[source], self._committed
        if committed is None or committed >= start:
            return start if committed is None else committed
        if self._state.log.marks and start == end and end - committed <= NEAR_END:
            # Behind the last event there are a broker's own marks, which went with it: nobody can tell any more that it was only these.
            logger.warning("retention removed the last offsets unread", partition=source.partition, first=committed, end=end)
            return start
        what = f"{source.topic}[{source.partition}]: offsets {committed} to {start} were removed by retention before they were scored"
        if not self._state.settings.worker.skip_lost:
            raise OffsetOutOfRange(
                f"{what}; with worker.skip_lost = true the partition goes on behind them; topics.retention_ms.interactions says how long "
                "events are kept"
            )
        logger.warning("events lost to retention", partition=source.partition, first=committed, first_kept=start)
        self.lost = start - committed
        return start

    @property
    def sets(self) -> SupportSets:
        """The support sets, once they are restored."""
        assert self._sets is not None, "there are none before advance() has returned True"  # noqa: S101
        return self._sets

    def partition(self) -> Partition:
        """The partition as it is held from now on, once its support sets are restored."""
        return Partition(self.number, self.writer, self.sets, self.offset, self.owners, self.lost)

    @property
    def share(self) -> float:
        """How much of what is to be read is read, from 0 to 1."""
        return 0.0 if self._restoration is None else self._restoration.share

    @property
    def records(self) -> int:
        """How many records of the changelog were read."""
        return 0 if self._restoration is None else self._restoration.records

    def advance(self, seconds: float, beat: Callable[[], None] = lambda: None) -> bool:
        """Go on with restoring for about so long; returns whether it is done.

        Raises `Fenced` where another has taken the partition over meanwhile, `LogError` where support sets and committed offset do not
        belong together, and as `Restoration.advance` does.
        """
        if self.restored_at:
            return True
        try:
            if self._restoration is None:
                self._restoration = self._begin(beat)
            if self._restoration is None:
                return False
            done = self._restoration.advance(seconds, beat)
        except StoreDamaged as error:
            if self._damaged:
                raise
            self._state.set_aside(self.number, str(error))
            self._damaged = True
            self._drop()
            return False
        self._tell(done=done)
        if done:
            self._restoration.close()
            self.restored_at = time.monotonic()
        return done

    def _begin(self, beat: Callable[[], None]) -> Restoration | None:
        """Open what is held and see how far it goes; None while another process has the store."""
        if self._sets is None:
            try:
                self._sets = self._state.open(self.number, beat)
            except StoreLocked as error:
                if time.monotonic() - self._begun < LET_GO_SECONDS:
                    time.sleep(0.005)
                    return None
                logger.warning("held in memory, without a local store", partition=self.number, reason=str(error))
                self._sets = self._state.in_memory()
        bounds, newest = self._state.fit(self.number, self._sets)
        found = newest.offset if newest else None
        if found != self._committed:
            self._wait_or_refuse(found)
            return None
        before = newest.owners[1 - OWNERS :] if newest else []
        self.version = newest.model_version if newest else 0
        self.owners = [*before, (secrets.token_bytes(8), bounds.end)]
        return Restoration(self._state.log, self._state.changelog(self.number), self._sets, bounds)

    def _wait_or_refuse(self, found: int | None) -> None:
        """Support sets are as of another offset than the committed one: whoever has moved both on meanwhile has fenced us."""
        state, (topic, number) = self._state, self._state.changelog(self.number)
        source = TopicPartition(state.interactions, number)
        now = state.log.committed(state.settings.group_id, [source]).get(source)
        if now != self._committed:
            raise Fenced(f"{source.topic}[{number}] went on from offset {self._committed} to {now} while it was being taken over")
        self._unlike_since = self._unlike_since or time.monotonic()
        if time.monotonic() - self._unlike_since < SETTLE_SECONDS:
            time.sleep(0.005)
            return
        raise LogError(
            f"{topic}[{number}] holds the support sets as of offset {found}, but group {state.settings.group_id} has "
            f"committed {now}: the two do not belong together; use another group or topic_prefix, or the log they came from"
        )

    def _tell(self, *, done: bool) -> None:
        now = time.monotonic()
        self._state.metrics.observe_restore(self.number, self.share, done=done)
        if not done and now - self._told < TELL_SECONDS:
            return
        self._told, seconds = now, now - self._begun
        logger.info(
            "restored" if done else "restoring",
            partition=self.number,
            share=round(self.share, 3),
            records=self.records,
            records_per_second=round(self.records / seconds) if seconds else 0,
            users=len(self.sets),
        )

    def _drop(self) -> None:
        if self._restoration is not None:
            self._restoration.close()
        if self._sets is not None:
            self._sets.close()
        self._restoration = self._sets = None

    def give_up(self) -> SupportSets | None:
        """Give the partition up again; returns what is held of it, which is the caller's."""
        sets, self._sets = self._sets, None
        self.close()
        return sets

    def close(self) -> None:
        """Give the partition up again."""
        self._drop()
        self._state.metrics.observe_restore(self.number, 0.0, done=True)
        self.writer.close()
