"""A partition that a worker holds, and its step that is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import structlog

if TYPE_CHECKING:
    from consumers.tables import Pending
    from streaming.log import Commit, Writer
    from streaming.metrics import StepReport
    from streaming.support import SupportSets

logger = structlog.get_logger()


class UnderWay(NamedTuple):
    """A step whose commit was begun, and what is to be done once it has taken place."""

    commit: Commit
    begun: float
    """In seconds since the epoch."""
    report: StepReport
    position: bytes
    tables: Pending


@dataclass(slots=True)
class Partition:
    """A partition that this worker holds: its writer, whose opening fenced any earlier owner, its users' state, and where to go on."""

    number: int
    writer: Writer
    support: SupportSets
    offset: int
    """Where the next step begins: where the last one ends, be it committed or under way."""
    owners: list[tuple[bytes, int]]
    """As `streaming.events.Position.owners`."""
    lost: int = 0
    """Offsets before it that retention took before they were scored, until a step is committed behind them."""
    under_way: UnderWay | None = None
    full: str = ""
    """Why its local store has no room, as far as that was said; empty where it has."""

    @property
    def events_under_way(self) -> int:
        """How many events wait for the commit of the step that is under way."""
        return self.under_way.report.events if self.under_way else 0

    def settle(self) -> None:
        """Let the local store write down what waits, and say so when it has no room, and when it has again."""
        self.support.settle()
        full = self.support.held.full
        if full and not self.full:
            logger.warning("the local store has no room; changes wait in memory", partition=self.number, reason=full)
        elif self.full and not full:
            logger.warning("the local store has room again", partition=self.number)
        self.full = full
