"""Partitions that come and go while the others go on: what a live worker does when its group shares them out anew."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from consumers.standby import Standby
from consumers.state import Takeover
from streaming.errors import Fenced
from streaming.log import TopicPartition

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumers.requests import Requests
    from consumers.system import System
    from consumers.worker import Worker
    from streaming.errors import StoreDamaged
    from streaming.log import Assignment, Reader
    from streaming.support import SupportSets

SLICE_SECONDS = 0.05
"""How long a turn of the loop restores while other partitions wait for their steps."""

ALONE_SECONDS = 0.5
"""The same where nothing else is to do but to be heard of by the group."""

PAUSE_SECONDS = 0.5
"""How long to wait for word of a new assignment after a step was fenced, before the partition is taken back."""

VERSION_SECONDS = 10.0
"""How long to wait for the model version that the last owner of a partition had."""

logger = structlog.get_logger()


class Moving:
    """Which partitions a worker holds, takes over, and follows as a stand-by, by its group's assignment.

    Partitions that stay ours are kept as they are: whoever else had one meanwhile opened a writer for it, so that our next step of it is
    fenced. Then it is taken over anew, and restored by what the changelog has beyond what we hold.
    """

    def __init__(self, system: System, worker: Worker, requests: Requests, reader: Reader) -> None:
        self._system = system
        self._worker = worker
        self._requests = requests
        self._reader = reader
        self._topic = system.topics["interactions"]
        self._owner: Assignment | None = None
        self._takeovers: dict[int, Takeover] = {}
        self._void: dict[int, tuple[float, SupportSets | None]] = {}
        self._standby = Standby(worker.state) if system.settings.worker.standby else None

    @property
    def busy(self) -> bool:
        """Whether a partition is being restored, so that nobody should wait long for events."""
        return bool(self._takeovers)

    def follow(self, assignment: Assignment, beat: Callable[[], None]) -> None:
        """Let go of what is not ours any more, and begin to take over what is ours now. Call it at every turn.

        ``beat`` is called as often as profiles or copies take long to be read: the group is to hear of us meanwhile.
        """
        ours = assignment.partitions if assignment.generation >= 0 else frozenset[int]()
        if assignment != self._owner:
            self._system.health.assigned(len(ours) if assignment.generation >= 0 else None)
            logger.info("assigned", partitions=sorted(ours), generation=assignment.generation)
            self._let_go(ours)
        elif not any(time.monotonic() > until for until, _ in self._void.values()):
            return
        for number in sorted(ours - self._worker.held.keys() - self._takeovers.keys()):
            if number not in self._void:
                self._void[number] = 0.0, self._standby.take(number) if self._standby else None
            self._takeovers[number] = Takeover(self._worker.state, number, self._void[number][1])
            del self._void[number]
        # Only now that earlier owners are fenced: what they committed of the tables is read here.
        self._worker.tables.assign(ours)
        self._worker.tables.advance(beat)
        self._read_on()
        if self._standby is not None:
            self._standby.follow(set(range(self._topic.partitions)) - ours, beat)
        self._owner = assignment

    def _let_go(self, ours: frozenset[int]) -> None:
        for number in self._takeovers.keys() - ours:
            self._takeovers.pop(number).close()
        gone = {number: self._worker.give_up(number) for number in self._worker.held.keys() - ours}
        gone |= {number: sets for number in self._void.keys() - ours if (sets := self._void.pop(number)[1]) is not None}
        for number, sets in gone.items():
            if self._standby is None:
                sets.close()
            else:
                self._standby.keep(number, sets)

    def give_up_step(self, number: int, error: Fenced | StoreDamaged) -> None:
        """A step of this partition cannot be made: take it over anew, and read what stood behind it in this turn again."""
        logger.warning("step given up", partition=number, reason=str(error))
        sets = self._worker.give_up(number)
        if isinstance(error, Fenced):
            self._system.metrics.fenced.inc()
            self._void[number] = time.monotonic() + PAUSE_SECONDS, sets
        else:
            self._worker.state.set_aside(number, str(error))
            sets.close()
            self._void[number] = 0.0, None
        self._read_on()

    def start_over(self) -> None:
        """The broker was gone, and nothing is known of what it has of ours: take everything over anew, from what is held."""
        for number in list(self._worker.held):
            self._void[number] = 0.0, self._worker.give_up(number)
        for number, takeover in self._takeovers.items():
            self._void[number] = 0.0, takeover.give_up()
        self._takeovers, self._owner = {}, None
        self._reader.assign({})
        self._system.health.restored(done=False)

    def advance(self, beat: Callable[[], None]) -> None:
        """Restore for a while; a partition that is done is read from the next turn on. ``beat`` as in `follow`."""
        done = False
        for number, takeover in list(self._takeovers.items()):
            seconds = SLICE_SECONDS if self._worker.held else ALONE_SECONDS
            try:
                restored = takeover.advance(seconds, beat)
            except Fenced as error:
                logger.warning("takeover given up", partition=number, reason=str(error))
                self._system.metrics.fenced.inc()
                self._void[number] = time.monotonic() + PAUSE_SECONDS, self._takeovers.pop(number).give_up()
                continue
            if restored and self._behind(takeover):
                continue
            if restored:
                del self._takeovers[number]
                self._worker.hold(takeover)
                done = True
            elif takeover.records:
                # One after another, so that the first of them are of use as soon as they can be.
                break
        if done:
            self._read_on()
        shares = [takeover.share for takeover in self._takeovers.values()]
        detail = f"being restored: {len(shares)} partitions, the first of them {shares[0]:.0%}" if shares else ""
        self._system.health.restored(done=not shares, detail=detail)

    def _behind(self, takeover: Takeover) -> bool:
        """Whether a partition's last step was made at a version that is still to come here, and will: no score goes back to an older one.

        Nothing is waited for in vain: where the model has been lost, there is none to come.
        """
        versions = self._worker.versions
        return takeover.version > versions.version and time.monotonic() - takeover.restored_at < VERSION_SECONDS

    def idle(self) -> None:
        """Nothing waits for a step: follow the changelogs of others."""
        if self._standby is not None:
            self._standby.advance(SLICE_SECONDS)

    def _read_on(self) -> None:
        """Read each partition that is held from where its last committed step ended, and its requests from the last answer."""
        held = self._worker.held
        events = {TopicPartition(self._topic.name, number): partition.offset for number, partition in held.items()}
        self._reader.assign(events | self._requests.start(held))

    def close(self) -> None:
        """Give up what is not held, or not yet, and the copies."""
        for takeover in self._takeovers.values():
            takeover.close()
        for _, sets in self._void.values():
            if sets is not None:
                sets.close()
        self._takeovers, self._void = {}, {}
        if self._standby is not None:
            self._standby.close()
