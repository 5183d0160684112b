"""Restoring support sets from the changelog: whether what is held fits it, and reading the rest in slices."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from streaming.codec import decode
from streaming.errors import BrokerUnreachable
from streaming.events import Position
from streaming.log import TopicPartition
from streaming.support import SETTLE_USERS
from streaming.topics import POSITION_KEY

if TYPE_CHECKING:
    from streaming.log import Bounds, Log
    from streaming.store.held import Covered
    from streaming.support import SupportSets

AT_ONCE = 1000
BULK_USERS = 16_000
BULK_SECONDS = 0.5
"""In slices of this length or longer, so many users' changes may wait in memory for the local store."""

_LAST = (64, 1024, 16_384)
_PATIENCE_SECONDS = 30.0


def newest_position(log: Log, changelog: TopicPartition, bounds: Bounds) -> Position | None:
    """The last position record of a changelog, None where there is none.

    It is the last record of its step, so the last few records are looked at before any more are. Raises as `Restoration.advance` does.
    """
    for last in (*_LAST, bounds.end):
        start = max(bounds.start, bounds.end - last)
        found = _newest_from(log, changelog, start, bounds.end)
        if found is not None or start == bounds.start:
            return found
    return None


def _newest_from(log: Log, changelog: TopicPartition, start: int, end: int) -> Position | None:
    value, silent_since = None, time.monotonic()
    with log.reader() as reader:
        reader.assign({changelog: start})
        while reader.position(changelog) < end:
            records = reader.poll(AT_ONCE, timeout=0.5)
            for record in records:
                if record.key == POSITION_KEY and record.offset < end:
                    value = record.value
            silent_since = _heard(changelog, records, silent_since)
    return None if value is None else decode(value, Position, what=f"position record of {changelog.topic}[{changelog.partition}]")


def _heard(changelog: TopicPartition, records: object, silent_since: float) -> float:
    """Now if something came; raises `BrokerUnreachable` after 30 s of silence."""
    now = time.monotonic()
    if records:
        return now
    if now - silent_since > _PATIENCE_SECONDS:
        where = f"{changelog.topic}[{changelog.partition}]"
        raise BrokerUnreachable(f"{where}: no record for {_PATIENCE_SECONDS:.0f} s, although the end has not been reached")
    return silent_since


def misfit(covered: Covered, bounds: Bounds, newest: Position | None, removals_kept_ms: int | None, now_ms: int) -> str:
    """Why a state cannot be continued from the changelog, empty where it can.

    ``removals_kept_ms`` is how long the changelog remembers a removal, None for ever: a state that lacks records that old may lack the
    removal of a user, too.
    """
    if covered.offset == 0:
        return ""
    name = newest.changelog if newest else ""
    if covered.changelog != name:
        return "it belongs to another changelog of the same name: the log was made anew"
    if covered.offset > bounds.end:
        return f"it goes to offset {covered.offset} of the changelog, which ends at {bounds.end}: the log has lost records"
    if covered.offset < bounds.start:
        return f"it goes to offset {covered.offset} of the changelog, which begins at {bounds.start} now"
    held = None if covered.position is None else decode(covered.position, Position, what="position record of a local store")
    if held is not None and newest is not None and held.owners and newest.owners:
        following = {name: begin for (name, _), (_, begin) in pairwise([*newest.owners, (b"", covered.offset)])}
        end = following.get(held.owners[-1][0])
        if end is None:
            return "it was left by an owner of the partition whom the changelog does not know, or no more"
        if covered.offset > end:
            return f"it goes to offset {covered.offset} of the changelog, whose next owner began at {end}: the log has lost records"
    if held is not None and (newest is None or held.offset > newest.offset):
        return f"it goes to offset {held.offset} of interactions, the changelog only to {newest.offset if newest else 0}"
    age = now_ms - covered.timestamp
    if removals_kept_ms is not None and age >= removals_kept_ms and held != newest:
        return f"it is {age / 3_600_000:.1f} hours old, and the changelog remembers removals for {removals_kept_ms / 3_600_000:.1f}"
    return ""


class Restoration:
    """Reads a changelog into support sets, from where they go up to the end that it had when this was made.

    Nothing may be written to the partition meanwhile: its earlier owner is fenced before.
    """

    def __init__(self, log: Log, changelog: TopicPartition, sets: SupportSets, bounds: Bounds) -> None:
        self._changelog = changelog
        self._sets = sets
        self._start = max(sets.covered.offset, bounds.start)
        self._at = self._start
        self._end = bounds.end
        self._reader = log.reader()
        self._reader.assign({changelog: self._start})
        self._silent_since = time.monotonic()
        self.records = 0
        """Records read so far."""

    @property
    def done(self) -> bool:
        """Whether all is read."""
        return self._at >= self._end

    @property
    def share(self) -> float:
        """How much of it is read, from 0 to 1."""
        whole = self._end - self._start
        return 1.0 if self.done or whole <= 0 else (self._at - self._start) / whole

    def advance(self, seconds: float, beat: Callable[[], None] = lambda: None) -> bool:
        """Read for about so long; returns whether all is read. ``beat`` is called after every thousand records.

        Raises `BrokerUnreachable` where nothing comes for 30 s, `OffsetOutOfRange` where records are removed meanwhile, `Malformed` or
        `FormatMismatch` for what is no support set, and `StoreError`.
        """
        ends = time.monotonic() + seconds
        # A large transaction changes a page of the store once for many users, and holds up all else for as long as it takes.
        users = BULK_USERS if seconds >= BULK_SECONDS else SETTLE_USERS
        while not self.done:
            records = self._reader.poll(AT_ONCE, timeout=max(0.0, min(0.5, ends - time.monotonic())))
            for record in records:
                self._sets.restore(record)
            self.records += len(records)
            self._at = self._reader.position(self._changelog)
            self._silent_since = _heard(self._changelog, records, self._silent_since)
            self._sets.settle(users, math.inf)
            beat()
            if time.monotonic() >= ends:
                break
        if self.done:
            self._sets.restored()
        return self.done

    def close(self) -> None:
        """Release the reader. Closing twice does nothing."""
        self._reader.close()
