"""A partition that a worker holds, and its steps that are not committed yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from consumers.step import Computed, UnderWay
    from streaming.log import Writer
    from streaming.support import SupportSets

ENOUGH_EVENTS = 64
"""Behind a backlog, a transaction has as many micro-batches as go into so many events; it costs about as much, in client and broker, as to
compute them."""

MOST_EVENTS = 256
"""As many may be computed ahead of their transaction while the log takes its time with the one before."""

logger = structlog.get_logger()


@dataclass(slots=True)
class Partition:
    """A partition that this worker holds: its writer, whose opening fenced any earlier owner, its users' state, and where to go on."""

    number: int
    writer: Writer
    support: SupportSets
    offset: int
    """Where the next step begins: where the last one ends, be it committed or not."""
    owners: list[tuple[bytes, int]]
    """As `streaming.events.Position.owners`."""
    lost: int = 0
    """Offsets before it that retention took before they were scored, until a step is committed behind them."""
    under_way: UnderWay | None = None
    computed: list[Computed] = field(default_factory=list)
    """Steps behind those under way, whose own transaction is not begun."""
    full: str = ""
    """Why its local store has no room, as far as that was said; empty where it has."""

    @property
    def events_under_way(self) -> int:
        """How many events were read and are not committed."""
        return sum(step.report.events for step in (*(self.under_way.steps if self.under_way else ()), *self.computed))

    def gathers(self, micro_batch: int) -> bool:
        """Whether another micro-batch may be computed before the transaction of the last is begun.

        Not where there is somebody to be forgotten, or a letter about a profile: of these each belongs to one step.
        """
        answered = self.under_way is None or self.under_way.commit.done
        events, last = sum(step.report.events for step in self.computed), self.computed[-1].tables
        return events + micro_batch <= (ENOUGH_EVENTS if answered else MOST_EVENTS) and not (last.letters or last.forgotten)

    def settle(self) -> None:
        """Let the local store write down what waits, and say so when it has no room, and when it has again."""
        self.support.settle()
        full = self.support.held.full
        if full and not self.full:
            logger.warning("the local store has no room; changes wait in memory", partition=self.number, reason=full)
        elif self.full and not full:
            logger.warning("the local store has room again", partition=self.number)
        self.full = full
