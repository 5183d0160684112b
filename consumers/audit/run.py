"""The whole of an audit: partitions walked side by side, their scores made again in the order of model versions."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from consumers.audit.changelog import Changelog
from consumers.audit.findings import Difference, Findings, Reach
from consumers.audit.partition import PartitionAudit, Scored, Step
from consumers.audit.profiles import ProfileHistory
from consumers.audit.versions import VersionWalk
from model.mamo import Mamo
from model.meta import predict
from streaming.codec import decode
from streaming.errors import UnknownTopic
from streaming.events import DeadLetter
from streaming.log import TopicPartition, present

if TYPE_CHECKING:
    from consumers.settings import Settings
    from streaming.log import Log, Topic

TOLERANCE = 1e-5
"""How far a score or its standard deviation may be from what is made again: batches of another size round otherwise."""


class Progress(NamedTuple):
    """How far an audit is: offsets walked and to walk, scores made again."""

    done: int
    total: int
    scores: int


class Report(msgspec.Struct, frozen=True):
    """What an audit found. ``differences`` counts them by kind; of each kind the first are ``shown``.

    ``events`` are the valid ones, ``scores`` those made again, the largest of their deviations (of score or sd) is ``deviation``.
    ``versions`` are those that the model was set to, one after another, ``support_sets`` and ``dead_letters`` those compared.
    """

    partitions: list[int]
    tolerance: float
    events: int
    scores: int
    deviation: float
    versions: int
    support_sets: int
    dead_letters: int
    differences: dict[str, int]
    shown: list[Difference]
    out_of_reach: list[Reach]


def audit(
    log: Log,
    settings: Settings,
    topics: dict[str, Topic],
    *,
    partitions: Collection[int] = (),
    since: int = 0,
    limit: int | None = None,
    on_progress: Callable[[Progress], object] = lambda _: None,
) -> Report:
    """Recompute the scores and support sets of these partitions (none named: all) as they stand now, beside a running system or not.

    ``since`` and ``limit`` bound which scores are made again, in each partition: ``limit`` of them, of events from offset ``since`` on.
    Everything else is checked in any case. Raises `UnknownTopic` for a partition that does not exist, `OtherSettings` where the model
    in the log was made with other settings, and what reading raises.
    """
    count = topics["interactions"].partitions
    numbers = sorted(partitions) or list(range(count))
    if wrong := [number for number in numbers if number not in range(count)]:
        raise UnknownTopic(f"{topics['interactions'].name} has partitions 0 to {count - 1}, not {wrong[0]}")
    found, limits = Findings(), settings.event_limits()
    model = Mamo(settings.model, settings.feature_schema, (settings.rating.minimum, settings.rating.maximum), seed=settings.seed)
    # Before the profiles: whatever the steps up to there have read of these is there then.
    changelogs = {n: Changelog(log, TopicPartition(topics["support"].name, n)) for n in numbers}
    items = ProfileHistory(log, TopicPartition(topics["items"].name, 0), model.items, limits, topics["items"].partitions)
    users = {n: ProfileHistory(log, TopicPartition(topics["users"].name, n), model.users, limits, count) for n in numbers}
    walks = [PartitionAudit(log, settings, topics, number, changelogs[number], users[number], found) for number in numbers]
    # Read last: every version that a score so far names is there.
    versions = VersionWalk(log, {name: topic.name for name, topic in topics.items()}, settings.digest(), model)
    recomputation = Recomputation(model, versions, items, users, found)
    total = sum(max(0, walk.end - walk.start) for walk in walks)
    # Versions are deltas, so partitions take turns by version, and each version is applied once.
    for step in heapq.merge(*(walk.steps(since, limit) for walk in walks), key=lambda step: step.version):
        recomputation.check(step)
        on_progress(Progress(sum(walk.done - walk.start for walk in walks), total, recomputation.made))
    on_progress(Progress(total, total, recomputation.made))
    _profile_letters(log, settings, topics, [items, *users.values()] if 0 in numbers else list(users.values()), found)
    return Report(
        partitions=numbers,
        tolerance=TOLERANCE,
        events=sum(walk.events for walk in walks),
        scores=recomputation.made,
        deviation=recomputation.deviation,
        versions=versions.applied,
        support_sets=sum(walk.compared for walk in walks),
        dead_letters=sum(walk.letters_seen for walk in walks),
        differences=dict(found.counts),
        shown=found.differences,
        out_of_reach=list(found.reaches.values()),
    )


class Recomputation:
    """Makes scores again, with the model at the version that they name and profiles as their step had read them."""

    def __init__(
        self, model: Mamo, versions: VersionWalk, items: ProfileHistory, users: dict[int, ProfileHistory], found: Findings
    ) -> None:
        self.model, self.versions, self.items, self.users, self.found = model, versions, items, users, found
        self.made = 0
        self.deviation = 0.0

    def check(self, step: Step) -> None:
        """Score the step again. Steps come in the order of their versions."""
        where = self.versions.to(step.version)
        if where == "removed":
            what = "score: its model version was removed by retention (numbers are of versions)"
            self.found.beyond(what, step.partition, step.version, count=len(step.scored))
            return
        if where == "none":
            for scored in step.scored:
                self.found.differs("score of another version or step", _place(scored), f"version {step.version} was never in the log")
            return
        tables = {} if step.plan is None else step.plan.tables
        for table in (self.items, self.users[step.partition]):
            table.to(tables.get(table.tp.topic, table.end))
        again = predict(self.model, [scored.task for scored in step.scored]).pairs()
        for scored, (score, sd) in zip(step.scored, again, strict=True):
            self._compare(step, scored, score, sd)

    def _compare(self, step: Step, scored: Scored, score: float, sd: float | None) -> None:
        stated = scored.score
        off = abs(score - stated.score)
        if (sd is None) != (stated.sd is None):
            off = float("inf")
        elif sd is not None and stated.sd is not None:
            off = float(np.maximum(off, abs(sd - stated.sd)))  # What is not a number stays so, and is no more than nothing.
        if off <= TOLERANCE:
            self.made += 1
            self.deviation = max(self.deviation, off)
        elif step.plan is None:
            self._beyond("score: not as profiles are now, and what its step had read is unknown", step, scored)
        elif not scored.sure:
            self._beyond("score: made before its user was forgotten", step, scored)
        elif self._superseded(step, scored):
            self._beyond("score: a profile that it was made from may have been superseded", step, scored)
        else:
            self.made += 1
            self.deviation = max(self.deviation, off)
            self.found.differs("score", _place(scored), f"{stated.score:.6f} (sd {_sd(stated.sd)}), not {score:.6f} (sd {_sd(sd)})")

    def _beyond(self, what: str, step: Step, scored: Scored) -> None:
        self.found.beyond(what, step.partition, scored.score.source[2])

    def _superseded(self, step: Step, scored: Scored) -> bool:
        assert step.plan is not None  # noqa: S101 - the caller has looked
        items, users, task = self.items, self.users[step.partition], scored.task
        at = step.plan.tables.get(items.tp.topic, items.end)
        return users.superseded(task.user, step.plan.tables.get(users.tp.topic, users.end)) or any(
            items.superseded(item, at) for item in (*task.support_items, *task.query_items)
        )


def _place(scored: Scored) -> str:
    topic, partition, offset = scored.score.source
    return f"{topic}[{partition}] at {offset}"


def _sd(sd: float | None) -> str:
    return "none" if sd is None else f"{sd:.6f}"


def _profile_letters(log: Log, settings: Settings, topics: dict[str, Topic], tables: list[ProfileHistory], found: Findings) -> None:
    """Whatever is no profile, and stands before where a step has read, has a dead letter."""
    committed = log.committed(settings.group_id, [table.tp for table in tables])
    wanted = {(*table.tp, offset) for table in tables for offset in table.refused if offset < committed.get(table.tp, 0)}
    letters = TopicPartition(topics["dead-letters"].name, 0)
    for record in present(log, [letters]) if wanted else ():
        wanted.discard(decode(record.value, DeadLetter, what=f"{letters.topic} at offset {record.offset}").source)
    cut = log.bounds([letters])[letters].start > 0
    for topic, partition, offset in sorted(wanted):
        if cut:
            found.beyond(f"dead letter of {topic} removed by retention", partition, offset)
        else:
            found.differs("dead letter missing", f"{topic}[{partition}] at {offset}", "it is no profile")
