"""One partition under audit: its events folded, and held against its scores, dead letters and support sets."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from consumers.audit.changelog import Changelog, Seal
from consumers.audit.fold import Before, Entries, Fold
from consumers.audit.places import Places, Plan, Plans
from model.tasks import Task
from streaming.codec import decode
from streaming.errors import Malformed
from streaming.events import DeadLetter, Score
from streaming.log import TopicPartition, present
from streaming.validation import decode_interaction

if TYPE_CHECKING:
    from consumers.audit.findings import Findings
    from consumers.audit.profiles import ProfileHistory
    from consumers.settings import Settings
    from streaming.events import Interaction
    from streaming.log import Log, Record, Topic

AT_ONCE = 256
"""Scores made again in one batch, at most."""

BY_LIMITS = frozenset({"too-large", "too-deep", "bad-id", "bad-feature", "too-many-features", "timestamp-out-of-range", "rating-off-scale"})
"""Reasons that depend on settings: what was refused by them under other limits may be valid today."""


class Scored(NamedTuple):
    """A score and the task that it answers. ``sure`` is False where the user was forgotten later: an earlier forgetting left no trace."""

    score: Score
    task: Task
    sure: bool


class Step(NamedTuple):
    """Scores made at one version, with the plan of their step, None where no update tells it."""

    partition: int
    version: int
    plan: Plan | None
    scored: list[Scored]


class _Head(msgspec.Struct):
    """What tells the answer to a request from the score of an event."""

    request: str | None = None


class PartitionAudit:
    """Walks along one partition. `steps` yields what is to be scored again; the rest is checked on the way, and at its end."""

    def __init__(
        self,
        log: Log,
        settings: Settings,
        topics: dict[str, Topic],
        number: int,
        changelog: Changelog,
        users: ProfileHistory,
        found: Findings,
    ) -> None:
        self.log, self.settings, self.number, self.users, self.found = log, settings, number, users, found
        self.names = {name: topic.name for name, topic in topics.items()}
        self.partitions = topics["interactions"].partitions
        self.limits = settings.event_limits()
        self.tp = TopicPartition(self.names["interactions"], number)
        self.changelog = changelog
        self.start = log.bounds([self.tp])[self.tp].start
        self.end = self.changelog.position.offset if self.changelog.position else 0
        """The offset up to which support sets, and so scores, are made."""
        self.done = self.start
        self.events = self.compared = self.letters_seen = 0
        self._forgets = deque(sorted((since, user) for user, since in self.changelog.forgotten.items()))
        self._nulls = deque(users.nulls())
        self.fold = Fold(settings.worker.support_size, settings.worker.max_users, cut=self.start > 0)
        self._plans = Plans(log, TopicPartition(self.names["updates"], number))
        self._scores = Places(self._read_scores(), self._stray_score)
        self._letters = Places(self._read_letters(), self._stray_letter)

    def _is_cut(self, name: str) -> bool:
        """Whether retention has removed something of scores or dead letters by now: it goes on while the audit reads."""
        tp = TopicPartition(self.names[name], self.number if name == "scores" else 0)
        return self.log.bounds([tp])[tp].start > 0

    def _from_first(self, records: Iterator[Record]) -> Iterator[Record]:
        """The partition's records; where retention has moved on since the audit was made, it begins with the first that there is."""
        first = next(records, None)
        if first is None:
            return
        if first.offset > self.start and self.log.bounds([self.tp])[self.tp].start:
            self.start = self.done = first.offset
            self.fold.cut = True
        yield from itertools.chain([first], records)

    def _read_scores(self) -> Iterator[tuple[int, Score]]:
        tp = TopicPartition(self.names["scores"], self.number)
        for record in present(self.log, [tp]):
            what = f"{tp.topic}[{tp.partition}] at offset {record.offset}"
            if decode(record.value, _Head, what=what).request is not None:
                continue
            score = decode(record.value, Score, what=what)
            if score.source[:2] == self.tp:
                yield score.source[2], score
            else:
                self.found.differs("score of another partition", what, f"it names {score.source}")

    def _read_letters(self) -> Iterator[tuple[int, DeadLetter]]:
        tp = TopicPartition(self.names["dead-letters"], 0)
        for record in present(self.log, [tp]):
            letter = decode(record.value, DeadLetter, what=f"{tp.topic} at offset {record.offset}")
            if letter.source[:2] == self.tp:
                yield letter.source[2], letter

    def _place(self, offset: int) -> str:
        return f"{self.tp.topic}[{self.number}] at {offset}"

    def _stray_score(self, offset: int, score: Score) -> None:
        if self.start <= offset < self.log.committed(self.settings.group_id, [self.tp]).get(self.tp, 0) and offset >= self.end:
            return  # of a step made while the audit goes on
        if offset < self.start:
            self.found.beyond("score: its event was removed by retention", self.number, offset)
        else:
            self.found.differs("score too many", self._place(offset), f"of version {score.model_version}: a second one, or of no event")

    def _stray_letter(self, offset: int, letter: DeadLetter) -> None:
        if offset >= self.start and not self.end <= offset < self.log.committed(self.settings.group_id, [self.tp]).get(self.tp, 0):
            self.found.differs("dead letter too many", self._place(offset), f"{letter.reason}: a second one, or of no record")

    def steps(self, since: int = 0, limit: int | None = None) -> Iterator[Step]:
        """Steps with what is to be scored again: the first ``limit`` scores of events from offset ``since`` on, all without a limit."""
        step: Step | None = None
        taken = 0
        for record in self._from_first(present(self.log, [self.tp])):
            if record.offset >= self.end:
                break
            self.done = record.offset + 1
            event = self._judge(record)
            if event is None:
                continue
            plan = self._plans.at(record.offset)
            self._forget(record.offset, plan)
            sure = self.changelog.forgotten.get(event.user, 0) <= record.offset
            before = self.fold.take(event, record.offset)
            self.events += 1
            score = self._score_of(record.offset, event, before, plan)
            if score is None or record.offset < since or (limit is not None and taken >= limit):
                continue
            if not before.known:
                self.found.beyond("score: its user's support began before what retention has kept", self.number, record.offset)
                continue
            taken += 1
            if step is None or step.plan != plan or step.version != score.model_version or len(step.scored) == AT_ONCE:
                if step is not None:
                    yield step
                step = Step(self.number, score.model_version, plan, [])
            step.scored.append(Scored(score, _task(event, before.entries), sure))
        if step is not None:
            yield step
        if self.start:
            self.found.beyond("interactions removed by retention", self.number, 0, self.start - 1, self.start)
        self._finish()

    def _forget(self, offset: int, plan: Plan | None) -> None:
        """Forget who is forgotten before the event at ``offset`` counts: by markers in ``support``, and by nulls that the step had read.

        Both are needed: a marker is gone once its user was evicted, a null once a newer profile came.
        """
        while self._forgets and self._forgets[0][0] <= offset:
            since, user = self._forgets.popleft()
            self.fold.forget(user, since)
        while plan is not None and self._nulls and self._nulls[0][0] < plan.tables.get(self.users.tp.topic, 0):
            _, user = self._nulls.popleft()
            if user not in self.changelog.forgotten:
                self.fold.forget(user, plan.source[2])

    def _judge(self, record: Record) -> Interaction | None:
        """The event that a record holds, None for a dead letter."""
        letter = self._letters.at(record.offset)
        self.letters_seen += letter is not None
        place = self._place(record.offset)
        try:
            event = decode_interaction(record, self.limits, partitions=self.partitions)
        except Malformed as error:
            if letter is None:
                if not self._letters.begun and self._is_cut("dead-letters"):
                    self.found.beyond("dead letter removed by retention", self.number, record.offset)
                else:
                    self.found.differs("dead letter missing", place, str(error))
            elif letter.digest != hashlib.sha256(record.value or b"").hexdigest():
                self.found.differs("dead letter of other bytes", place, f"digest {letter.digest[:12]}")
            elif letter.reason != error.reason and not {letter.reason, error.reason} & BY_LIMITS:
                self.found.differs("dead letter of another reason", place, f"{letter.reason}, not {error.reason}")
            return None
        if letter is None:
            return event
        if letter.reason in BY_LIMITS:
            self.found.beyond(f"refused as {letter.reason}, valid under today's limits", self.number, record.offset)
        else:
            self.found.differs("dead letter of a valid event", place, f"{letter.reason}: {letter.detail}")
        return None

    def _score_of(self, offset: int, event: Interaction, before: Before, plan: Plan | None) -> Score | None:
        """The event's score, if it is there and names what it should."""
        score, place = self._scores.at(offset), self._place(offset)
        if score is None:
            if not self._scores.begun and self._is_cut("scores"):
                self.found.beyond("score removed by retention", self.number, offset)
            else:
                self.found.differs("score missing", place, f"of user {event.user!a}, item {event.item!a}")
            return None
        if (score.user, score.item, score.timestamp) != (event.user, event.item, event.timestamp):
            self.found.differs("score of another event", place, f"of {score.user!a}, {score.item!a}, not {event.user!a}, {event.item!a}")
            return None
        size = len({item for item, _, _ in before.entries})
        sure = self.changelog.forgotten.get(event.user, 0) <= offset
        if before.known and sure and (score.support_size != size or before.earlier not in (None, score.earlier)):
            stated = f"states {score.support_size} of {score.earlier} earlier events, not {size} of {before.earlier}"
            self.found.differs("score of another support", place, stated)
        if plan is not None and (score.model_version, score.step) != (plan.version, plan.source[2]):
            stated = f"version {score.model_version}, step {score.step}, not {plan.version}, {plan.source[2]} as the step's updates"
            self.found.differs("score of another version or step", place, stated)
            return None
        if plan is None:
            why = "removed by retention" if self._plans.cut and not self._plans.begun else "never written (a frozen worker writes none)"
            self.found.beyond(f"plan of the step: its updates were {why}", self.number, offset)
        return score

    def _finish(self) -> None:
        """The end of the partition: nothing may be left over, and the support sets held must be what the fold gives."""
        self._scores.rest()
        self._letters.rest()
        self._forget(self.end, None)
        where = f"{self.names['support']}[{self.number}]"
        committed = self.log.committed(self.settings.group_id, [self.tp]).get(self.tp, 0)
        support = TopicPartition(self.names["support"], self.number)
        if committed < self.end or (committed != self.end and self.log.bounds([support])[support].end == self.changelog.end):
            self.found.differs("position", where, f"stands at {self.end}, but group {self.settings.group_id} has committed {committed}")
        self._compare(where)

    def _compare(self, where: str) -> None:
        seals, fold, forgotten = self.changelog.seals, self.fold, bool(self.changelog.forgotten)
        decoder = msgspec.msgpack.Decoder(Seal)
        exact = not fold.cut and not forgotten
        for user in list(fold.users):
            wanted, whole = fold.seal(user)
            encoded = seals.get(user)
            if encoded is None:
                self.found.differs(
                    "support set missing", f"{where} of {user!a}", f"{wanted.length} interactions up to offset {wanted.last}"
                )
                continue
            held = decoder.decode(encoded)
            if not whole and wanted.length < fold.size:
                self.found.beyond("support set: it began before what retention has kept", self.number, wanted.last)
                continue
            self.compared += 1
            names = ["length", "last", "digest", *(["earlier", "since"] if whole else []), *(["ordinal"] if exact else [])]
            if differing := [name for name in names if getattr(held, name) != getattr(wanted, name)]:
                told = [f"{name} {getattr(held, name)} not {getattr(wanted, name)}" for name in differing if name != "digest"]
                self.found.differs("support set", f"{where} of {user!a}", ", ".join(told) or "other interactions")
        for user in seals.keys() - fold.users.keys():
            last = decoder.decode(seals[user]).last
            if last < self.start:
                self.found.beyond("support set: it began before what retention has kept", self.number, last)
            else:
                self.found.differs("support set too many", f"{where} of {user!a}", f"up to offset {last}")
        if self.changelog.markers != {user: since for user, since in fold.markers.items() if user in self.changelog.forgotten}:
            self.found.differs("marker", where, "markers of forgotten users stand for users with support sets, or the other way round")
        if exact and self.changelog.position and self.changelog.position.users != fold.ordinals:
            self.found.differs("position", where, f"counts {self.changelog.position.users} users, not {fold.ordinals}")
        if exact and seals.keys() == fold.users.keys() and list(seals) != list(fold.users):
            self.found.differs("support set", where, "the order of last changes, by which users are evicted, is another")
        if forgotten:
            self.found.beyond("ordinals of support sets: users were forgotten, perhaps more than once", self.number, 0, self.end)


def _task(event: Interaction, entries: Entries) -> Task:
    """Of an item rated again, the latest rating counts, in its place."""
    latest: dict[str, float] = {}
    for item, rating, _ in entries:
        latest.pop(item, None)
        latest[item] = rating
    return Task(event.user, list(latest), list(latest.values()), [event.item], [event.rating])
