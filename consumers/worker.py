"""The worker: scores every event from its user's own adapted model before anything is learned from it.

`Worker.begin` is the whole of it; read that first. A step is one micro-batch of one partition, and as a rule one transaction. While the log
commits it, the next can be computed on top of what it changed; that is begun to be committed only when the one before is. Behind a backlog
several steps are one transaction.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import numpy as np

from consumers.histories import Histories, history_of
from consumers.partition import Partition
from consumers.state import State, Takeover
from consumers.step import Computed, Group, Learned, Taken, UnderWay
from consumers.tables import ProfileTables
from consumers.versions import Versions
from consumers.wire import gradient_to_wire, writes_to_wire
from model.history import History
from model.memory import Writes, compose, user_spread
from model.meta import adapt, differentiate, passes
from model.tasks import Task, cut
from streaming.chunks import split
from streaming.codec import decode, encode
from streaming.deadletters import dead_letter_message
from streaming.errors import LogError, Malformed, StoreError
from streaming.events import DeadLetter, Position, Score, Update
from streaming.log import Message, TopicPartition
from streaming.metrics import StepReport
from streaming.topics import POSITION_KEY
from streaming.validation import decode_interaction

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from consumers.settings import Settings
    from streaming.events import Interaction, Source
    from streaming.log import Assignment, Log, Record, Topic
    from streaming.metrics import Metrics
    from streaming.support import SupportSets


class Worker:
    """Holds partitions, a model version and profiles; turns micro-batches of records into committed steps."""

    def __init__(self, log: Log, settings: Settings, topics: dict[str, Topic], versions: Versions, metrics: Metrics) -> None:
        self.log = log
        self.settings = settings
        self.topics = {name: topic.name for name, topic in topics.items()}
        self.model = versions.model
        self.versions = versions
        self.metrics = metrics
        self.limits = settings.event_limits()
        self.partitions = topics["interactions"].partitions
        self.chunk_bytes = topics["updates"].max_record_bytes - 64
        self.tables = ProfileTables(log, topics, self.model, self.limits, settings.group_id, self.count_unknown)
        self.state = State(log, settings, metrics, self.topics)
        self.held: dict[int, Partition] = {}
        self.histories = Histories(metrics)
        self._attended: Tensor | None = None
        metrics.watch_attention(self.attention)
        self._unknown_fields = 0

    @property
    def under_way(self) -> bool:
        """Whether the commit of a step is under way."""
        return any(partition.under_way for partition in self.held.values())

    @property
    def ahead(self) -> bool:
        """Whether a step is computed whose commit is not begun."""
        return any(partition.computed for partition in self.held.values())

    def open(self, number: int, beat: Callable[[], None] = lambda: None) -> int:
        """Take over a partition: fence its earlier owner, restore its support sets, and return the offset to go on from."""
        takeover = Takeover(self.state, number)
        while not takeover.advance(1.0, beat):
            time.sleep(0.01)  # Where another process has the local store, it is waited for.
        self.hold(takeover)
        return takeover.offset

    def hold(self, takeover: Takeover) -> None:
        """Hold the partition of a takeover that is done."""
        self.held[takeover.number] = takeover.partition()
        self._observe_users()

    def give_up(self, number: int) -> SupportSets:
        """Let a partition go, once its commit under way has ended; returns its support sets, which are the caller's to close.

        What was computed behind it never was.
        """
        # Whether it took place makes no difference to who comes next: the log has it, or has not.
        with suppress(LogError, StoreError):
            self.finish(number)
        partition = self.held.pop(number)
        partition.support.discard_all()
        self.histories.clear()
        partition.writer.close()
        self._observe_users()
        return partition.support

    def close(self) -> None:
        """Let everything go."""
        for number in list(self.held):
            self.give_up(number).close()
        self.tables.close()
        self.versions.close()

    def step(self, number: int, records: Sequence[Record], owner: Assignment | str) -> StepReport:
        """A step from its beginning to its end, with nothing beside it. Raises as `begin` does."""
        self.begin(number, records, owner)
        return self.finish(number)[-1]

    def begin(self, number: int, records: Sequence[Record], owner: Assignment | str, *, behind: bool = False) -> list[StepReport]:
        """Score a micro-batch of one partition, learn from it, and begin to commit all of it at once; first forget who is to be forgotten.

        Without records there is only that to do, which `ProfileTables.waiting` tells. Returns the reports of the steps before whose commit
        was under way: that is waited for as soon as this one is computed. ``behind``, where it was whole at once, it is not as long as
        `Partition.gathers`: the next `begin` or `commit` takes the step along. Raises `Fenced` if the partition has gone to another worker,
        and what `Writer.commit` raises, for any of these steps; of this one nothing is then kept.
        """
        partition, finished = self.held[number], list[StepReport]()
        while self.tables.crowded(number):
            # Who is to be forgotten is forgotten before anything else is done for them.
            self._compute(number, [])
            finished += self.complete(number, owner)
        self._compute(number, records)
        if not (behind and partition.gathers(self.settings.worker.micro_batch)):
            finished += self.commit(number, owner)
        return finished

    def _compute(self, number: int, records: Sequence[Record]) -> None:
        """Score and learn, and put what is to be committed behind what else is computed; of the tables, what goes into one step."""
        partition, stage, tables = self.held[number], self.metrics.stage, self.tables.pending(number)
        first, after = (records[0].offset, records[-1].offset + 1) if records else (partition.offset, partition.offset)
        try:
            with stage("decode"):
                events, messages, reasons = self._decode(records)
            with stage("support"):
                for user in tables.forgotten:
                    partition.support.forget(user, first)
                after_events = dict[str, History]()
                taken = [self._take(partition.support, interaction, source, after_events) for interaction, source in events]
            learned = self._learn(partition, taken, after)
            with stage("encode"):
                messages += self._scores(number, first, taken, learned.scores)
                messages += self._updates(number, records, learned)
                changes = partition.support.changes()
                messages += [Message(self.topics["support"], key, value, number) for key, value in changes]
                position = self._position(partition, after)
                messages += tables.letters
            report = self._report(number, records, taken, learned, reasons, tables.letters)
        except BaseException:
            partition.support.discard()
            self.metrics.aborted.inc()
            raise
        partition.offset = after
        partition.support.begin(changes)
        partition.computed.append(Computed(messages, position, tables, report))
        self.histories.keep(changes, after_events)

    def commit(self, number: int, owner: Assignment | str) -> list[StepReport]:
        """Begin to commit all that is computed of a partition, once what is under way has its answer; returns and raises as `begin`."""
        partition = self.held[number]
        if not partition.computed:
            return []
        try:
            finished, steps = self.finish(number), partition.computed
            messages, last = [message for step in steps for message in step.messages], steps[-1]
            offsets = {TopicPartition(self.topics["interactions"], number): partition.offset, **last.tables.positions}
            with self.metrics.stage("commit"):
                begun, commit = time.time(), partition.writer.begin([*messages, last.position], offsets, owner)
        except BaseException:
            partition.support.discard_all()
            self.metrics.aborted.inc()
            raise
        finally:
            partition.computed = []
        self.tables.begun(last.tables.positions)
        partition.under_way = UnderWay(commit, begun, steps)
        return finished

    def complete(self, number: int, owner: Assignment | str) -> list[StepReport]:
        """Commit all that is computed of a partition, to the end; returns and raises as `begin`."""
        return self.commit(number, owner) + self.finish(number)

    def finish(self, number: int, *, wait: bool = True) -> list[StepReport]:
        """Wait for the commit of the partition's steps that are under way, and keep what they changed; returns their reports.

        Nothing where none are, or, without ``wait``, where they have no answer yet. Raises as `begin` does, and keeps nothing then.
        """
        partition = self.held[number]
        if (of := partition.under_way) is None or not (wait or of.commit.done):
            return []
        partition.under_way, last = None, of.steps[-1]
        try:
            with nullcontext() if of.commit.done else self.metrics.stage("commit"):
                written = of.commit.result()
        except BaseException:
            partition.support.discard_all()
            self.tables.given_up(last.tables.positions)
            self.metrics.aborted.inc()
            raise
        self.tables.committed(last.tables.positions)
        partition.support.commit(last.position.value or b"", written[-1], len(of.steps))
        self.metrics.forgotten.inc(len(set(last.tables.forgotten)))
        self.metrics.events_lost.inc(partition.lost)
        partition.lost = 0
        with self.metrics.stage("observe"):
            self.metrics.commits.inc()
            self.metrics.transactions.observe(of.commit.ended - of.begun)
            for step in of.steps:
                self.metrics.observe_step(step.report, of.commit.ended)
            self._observe_users()
        return [step.report for step in of.steps]

    def _decode(self, records: Sequence[Record]) -> tuple[list[tuple[Interaction, Source]], list[Message], dict[str, int]]:
        """The valid events with their sources, dead letters for the others, and the count of these by reason."""
        events, letters, reasons = [], [], dict[str, int]()
        for record in records:
            try:
                interaction = decode_interaction(record, self.limits, self.count_unknown, partitions=self.partitions)
            except Malformed as error:
                letters.append(dead_letter_message(self.topics["dead-letters"], record, error))
                reasons[error.reason] = reasons.get(error.reason, 0) + 1
            else:
                events.append((interaction, (record.topic, record.partition, record.offset)))
        return events, letters, reasons

    def _take(self, sets: SupportSets, event: Interaction, source: Source, after_events: dict[str, History]) -> Taken:
        """The event with its user's support as it stands before it, to which it is then appended.

        ``after_events`` has the histories that events of the step led to: they come in bursts of one user.
        """
        history = after_events.get(event.user) or self.histories.of(sets, event.user)
        earlier = sets.append(event.user, event, source)
        if not earlier:  # New, or dropped meanwhile to make room.
            history = history_of(None)
        after_events[event.user] = history.and_then(event.item, event.rating, sets.size)
        return Taken(event, source, earlier, Task(event.user, history.items, history.ratings, [event.item], [event.rating], history))

    def _learn(self, partition: Partition, taken: Sequence[Taken], end: int) -> Learned:
        """Adapt and score the events; unless frozen, differentiate what they and rehearsed users teach, a meta-update at a time.

        All of it is at one version, and so is done together. However the events are cut into steps, a meta-update is complete at every
        ``trainer.meta_update`` offsets of the partition, and past users are rehearsed then; a group that does not reach that far is a part
        of it. ``end`` is the offset after the step's last. A user writes to the memories once in a step, however many of its events are
        in it.
        """
        learning = not self.settings.worker.frozen
        with self.metrics.stage("support"):
            groups = self._groups(partition, taken, end, learning=learning)
        learned, writes = Learned([], [], None, sum(len(group.writers) for group in groups)), list[Writes | None]()
        for span in passes(self.model, [len(group.tasks) for group in groups]):
            part = groups[span]
            with self.metrics.stage("adapt"):
                adapted = adapt(self.model, *(group.tasks for group in part), learning=learning)
                pairs = adapted.scores.pairs()
                for group, tasks, users in zip(part, adapted.batch.tasks_of, adapted.batch.users_of, strict=True):
                    if group.kind == "query":
                        learned.scores.extend(pairs[tasks])
                    else:
                        self._attended = adapted.prediction.attention[users]
            if learning:
                with self.metrics.stage("gradient"):
                    gradients, writing = differentiate(self.model, adapted, *(group.writers for group in part))
                learned.lessons.extend(zip(part, gradients, strict=True))
                with self.metrics.stage("memory"):
                    writes.append(writing.composed())
        return learned._replace(writes=compose(writes))

    def _groups(self, partition: Partition, taken: Sequence[Taken], end: int, *, learning: bool) -> list[Group]:
        """The groups of tasks of which each has a gradient: the events by meta-update, and past users after each that is completed."""
        size, groups, written, begun = self.settings.trainer.meta_update, list[Group](), set[str](), partition.offset
        for start in range(0, len(taken), size):
            events, rest = taken[start : start + size], taken[start + size :]
            after = rest[0].source[2] if rest else end
            completes, begun = begun // size != after // size, after
            writers = {event.task.user for event in events if event.task.support_items} - written if learning else set[str]()
            written |= writers
            groups.append(Group("query", [event.task for event in events], completes, writers))
            if learning and completes and (rehearsed := self._rehearsal(partition, events[0].source[2])):
                groups.append(Group("rehearsal", rehearsed, completes, set()))
        return groups

    def _rehearsal(self, partition: Partition, offset: int) -> list[Task]:
        """Tasks from stored support sets: each drawn user's history is cut at random, and what follows is scored from what came before.

        The draw depends on the seed and the event's place alone, so that a step done again is the same step.
        """
        generator = np.random.default_rng([self.settings.seed, partition.number, offset])
        rehearsal, sets = self.settings.rehearsal, partition.support
        users = sets.draw(rehearsal.users, generator)
        return cut(users, [self.histories.of(sets, user) for user in users], rehearsal.query, generator)

    def _scores(self, number: int, step: int, taken: Sequence[Taken], scored: Sequence[tuple[float, float | None]]) -> list[Message]:
        return [
            Message(
                self.topics["scores"],
                event.interaction.user.encode(),
                encode(
                    Score(
                        user=event.interaction.user,
                        item=event.interaction.item,
                        score=score,
                        sd=sd,
                        source=event.source,
                        model_version=self.versions.version,
                        support_size=len(event.task.support_items),
                        earlier=event.earlier,
                        step=step,
                        timestamp=event.interaction.timestamp,
                    )
                ),
                number,
            )
            for event, (score, sd) in zip(taken, scored, strict=True)
        ]

    def _updates(self, number: int, records: Sequence[Record], learned: Learned) -> list[Message]:
        """One update for each lesson, the step's memory writes with the first."""
        messages = list[Message]()
        if not learned.lessons:
            return messages
        source = (self.topics["interactions"], number, records[0].offset, records[-1].offset + 1)
        writes, plan, versions = writes_to_wire(learned.writes), self.tables.positions(number), self.versions
        for group, gradient in learned.lessons:
            tensors, rows = gradient_to_wire(gradient)
            update = Update(
                group.kind, source, versions.version, gradient.queries, tensors, rows, writes, plan, group.completes, versions.digest
            )
            writes = {}
            key = b"%d" % number
            messages += [Message(self.topics["updates"], key, part, number) for part in split(encode(update), self.chunk_bytes)]
        return messages

    def _position(self, partition: Partition, offset: int) -> Message:
        position = Position(
            offset=offset,
            users=partition.support.ordinals_after,
            model_version=self.versions.version,
            tables=self.tables.positions(partition.number),
            changelog=partition.support.changelog,
            owners=partition.owners,
        )
        return Message(self.topics["support"], POSITION_KEY, encode(position), partition.number)

    def _report(
        self,
        number: int,
        records: Sequence[Record],
        taken: Sequence[Taken],
        learned: Learned,
        reasons: dict[str, int],
        letters: Sequence[Message],
    ) -> StepReport:
        """What is to be reported of a step once it is committed; ``letters`` are those of profiles."""
        for letter in letters:
            reason = decode(letter.value or b"", DeadLetter, what="dead letter of a profile").reason
            reasons[reason] = reasons.get(reason, 0) + 1
        unknown, self._unknown_fields = self._unknown_fields, 0
        appended = {record.offset: record.timestamp / 1000 for record in records}
        return StepReport(
            partition=number,
            events=len(records),
            errors=[score - event.interaction.rating for event, (score, _) in zip(taken, learned.scores, strict=True)],
            earlier=[event.earlier for event in taken],
            appended=[appended[event.source[2]] for event in taken],
            adaptations=len(taken),
            memory_writes=learned.writers if learned.writes is not None else 0,
            unknown_fields=unknown,
            dead_letters=reasons,
        )

    def attention(self) -> tuple[float, float]:
        """How different attention is over the users last rehearsed, who are drawn from all, and the rows of M_P.

        Where nobody is rehearsed it is unknown, NaN: 0 would be taken for memories that have died.
        """
        attended = self._attended
        return (math.nan, math.nan) if attended is None else (user_spread(attended), self.model.memory.row_spread())

    def count_unknown(self, fields: int) -> None:
        """Take in that a record had so many fields that no contract names; the next step reports them."""
        self._unknown_fields += fields

    def _observe_users(self) -> None:
        self.metrics.users_held.set(sum(len(partition.support) for partition in self.held.values()))
