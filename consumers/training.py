"""The trainer as a process of its own: one is at work, any others stand by with the model at hand and take over.

The one at work is the member that holds the only partition of the topic `trainer-lock` in the trainers' group. The lock keeps them from
fencing each other all the time; what keeps a version from being made twice is the transactional id, which only the last to open it holds.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import structlog

from consumers.patience import Patience
from consumers.trainer import Trainer, trainer_id
from streaming.errors import BrokerUnreachable, Fenced

if TYPE_CHECKING:
    from consumers.stop import Stop
    from consumers.system import System
    from streaming.log import Member

REST_SECONDS = 0.05
"""How long a trainer that keeps up lets updates gather: each version is a transaction, and is taken on by every worker."""

FENCED_SECONDS = 1.0
"""How long to keep still after having been fenced, so that whoever did it can commit what it came for."""

logger = structlog.get_logger()


def run_trainer(system: System, stop: Stop) -> None:
    """Fold updates into versions as they come while this process holds the lock, and stand by while it does not, until stopped.

    Being fenced is no error: another trainer took over while this one was paused, or somebody went back to an older version. What was in
    hand is forgotten, and the log is read anew.
    """
    system.health.assigned(0)
    patience = Patience()
    lock = patience.until(stop, lambda: system.log.member(trainer_id(system.settings), system.topics["trainer-lock"].name))
    if lock is None:
        return
    with lock as member:
        while not stop:
            try:
                turn(system, stop, member)
            except BrokerUnreachable as error:
                system.health.assigned(0)
                patience.wait(error, stop)
            except Fenced as error:
                system.health.assigned(0)
                system.metrics.fenced.inc()
                logger.warning("fenced; standing by", reason=str(error))
                stop.wait(FENCED_SECONDS)


def turn(system: System, stop: Stop, member: Member) -> None:
    """Stand by until the lock is ours, then train until it is not. Raises `Fenced`."""
    beat = partial(system.heard, member)
    with closing(system.learner(beat)) as versions:
        system.health.restored()
        system.health.loaded(versions.version)
        waiting = False
        while not stop and not leads(system, member):
            if not waiting:
                logger.info("standing by", version=versions.version)
                waiting = True
            # Its own lag is nobody's concern; the model is kept at hand so that taking over takes no longer than the lock.
            if versions.advance():
                system.health.loaded(versions.version)
            stop.wait(system.settings.worker.poll_timeout_ms / 1000)
        if stop:
            return
        with closing(Trainer(system.log, system.settings, system.topics, versions, system.metrics)) as trainer:
            system.health.assigned(system.topics["updates"].partitions)
            system.health.loaded(trainer.version)
            logger.info("training", version=trainer.version)
            while not stop and leads(system, member):
                folded = trainer.step(system.settings.worker.poll_timeout_ms / 1000, beat)
                if folded:
                    system.health.loaded(trainer.version)
                    system.health.committed()
                if folded and not trainer.behind:
                    stop.wait(REST_SECONDS)
        if not stop:
            system.health.assigned(0)
            logger.warning("the lock has gone to another trainer")


def leads(system: System, member: Member) -> bool:
    """Whether this process holds the lock; asking is its heartbeat."""
    system.health.beat()
    assignment = member.assignment()
    return assignment.generation >= 0 and bool(assignment.partitions)
