"""Stand-by copies: the local stores of partitions that others own, kept warm by following their changelogs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from streaming.errors import OffsetOutOfRange, StoreError, StoreLocked
from streaming.store.restoration import AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from consumers.state import State
    from streaming.support import SupportSets

logger = structlog.get_logger()


class Standby:
    """Follows the changelogs of partitions that this process does not own; whoever takes one over goes on from its support sets."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._reader = state.log.reader()
        self._sets: dict[int, SupportSets] = {}
        self.records = 0
        """Records of changelogs read so far."""

    def follow(self, numbers: AbstractSet[int], beat: Callable[[], None]) -> None:
        """Follow these partitions and no others. One whose store another process has is left to that process's file."""
        for number in self._sets.keys() - numbers:
            self._sets.pop(number).close()
        for number in sorted(numbers - self._sets.keys()):
            try:
                sets = self._state.open(number, beat)
            except StoreLocked:
                continue
            self._state.fit(number, sets)
            self._sets[number] = sets
        self._assign()

    def keep(self, number: int, sets: SupportSets) -> None:
        """Follow a partition that this process owned until now."""
        self._sets[number] = sets
        self._assign()

    def take(self, number: int) -> SupportSets | None:
        """Stop following a partition; returns what is held of it."""
        sets = self._sets.pop(number, None)
        if sets is not None:
            self._assign()
        return sets

    def _assign(self) -> None:
        self._reader.assign({self._state.changelog(number): sets.covered.offset for number, sets in self._sets.items()})

    def advance(self, seconds: float) -> None:
        """Read what has come, for about so long. A copy that cannot be kept up is dropped; its owner has the state all the same."""
        ends = time.monotonic() + seconds
        try:
            while records := self._reader.poll(AT_ONCE):
                for record in records:
                    self._sets[record.partition].restore(record)
                self.records += len(records)
                if time.monotonic() >= ends:
                    break
            for sets in self._sets.values():
                sets.settle()
        except (OffsetOutOfRange, StoreError) as error:
            logger.warning("stand-by copies dropped until partitions move again", reason=str(error))
            self.close()
            self._reader = self._state.log.reader()

    def close(self) -> None:
        """Release the stores."""
        for sets in self._sets.values():
            sets.close()
        self._sets = {}
        self._reader.close()
