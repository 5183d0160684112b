"""Users and items topics read as tables: the newest profile of every id, in the model that is served."""

from __future__ import annotations

from bisect import bisect_left
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from streaming.deadletters import dead_letter_message
from streaming.errors import Malformed
from streaming.log import Message, TopicPartition, at_hand, catch_up
from streaming.validation import decode_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from model.mamo import Mamo
    from streaming.log import Log, Record, Topic
    from streaming.validation import Count, Limits

READ_AT_ONCE = 1000

PENDING_AT_ONCE = 1000
"""Dead letters and users to forget, of each table, that one step commits: there may be as many as a table has records."""


class Pending(NamedTuple):
    """What a step of a partition commits for the tables: dead letters, users to forget, and the positions up to which both are complete."""

    letters: list[Message]
    forgotten: list[str]
    positions: dict[TopicPartition, int]


class ProfileTables:
    """Reads items whole and the users of the partitions held, up to the end of what is there, whenever `advance` is called.

    Every process that holds partition 0 answers for the dead letters of items; those of users go with their partition, as does the
    forgetting of users whose profile is null. Both wait for the next step, which commits the positions of the tables with them: so each
    is done once, although the tables are read anew after each start. What a step has taken along waits for its commit, and is not taken
    along by the next one.
    """

    def __init__(self, log: Log, topics: dict[str, Topic], model: Mamo, limits: Limits, group: str, unknown: Count | None = None) -> None:
        self._log = log
        self._items = topics["items"]
        self._users = topics["users"]
        self._dead_letters = topics["dead-letters"].name
        self._model = model
        self._limits = limits
        self._group = group
        self._unknown = unknown
        self._reader = log.reader()
        self._behind = False
        self._done: dict[TopicPartition, int] = {}
        """How far each table is committed: what stands before has been reported and forgotten."""
        self._waiting: dict[TopicPartition, list[tuple[int, Message | str]]] = {}
        """By offset, the dead letters and the ids of users to forget that no step has committed yet."""
        self._taken: dict[TopicPartition, int] = {}
        """How far each table was when a step that is under way took it along."""
        self._answers_for_items = False
        self._known: dict[int, set[str]] = {}
        """Users with a profile, by partition."""

    def assign(self, partitions: Collection[int]) -> None:
        """Hold the users of these partitions and drop those of all others; what is held already is not read again."""
        items = TopicPartition(self._items.name, 0)
        wanted = [items, *(TopicPartition(self._users.name, partition) for partition in sorted(partitions))]
        bounds = self._log.bounds(wanted)
        committed = self._log.committed(self._group, wanted)
        held = set(self._done)
        before, self._answers_for_items = self._answers_for_items, 0 in partitions
        self._done = {tp: committed.get(tp, 0) for tp in wanted}
        # What waited may have been committed by another worker, which held the partition meanwhile.
        self._waiting = {
            tp: [entry for entry in self._waiting[tp] if entry[0] >= done]
            for tp, done in self._done.items()
            if tp in self._waiting and (tp != items or self._answers_for_items)
        }
        for partition in self._known.keys() - set(partitions):
            for user in self._known.pop(partition):
                self._model.users.set(user, None)
        positions = {tp: self._reader.position(tp) if tp in held else bounds[tp].start for tp in wanted}
        if self._answers_for_items and not before:
            # Read again is what was not ours to report when it was read.
            positions[items] = max(bounds[items].start, min(positions[items], self._done[items]))
        self._reader.assign(positions)
        self._behind = True

    def advance(self, beat: Callable[[], None] = lambda: None) -> None:
        """Take in every profile that has come; ``beat`` is called as often as a long read goes on.

        After `assign` that is all that is there; else what is at hand, so that no step waits for a profile.
        """
        if self._behind:
            for records in catch_up(self._log, self._reader, self._done, at_once=READ_AT_ONCE):
                for record in records:
                    self._take(record)
                beat()
            self._behind = False
        for records in at_hand(self._reader, at_once=READ_AT_ONCE):
            for record in records:
                self._take(record)
            beat()

    def _take(self, record: Record) -> None:
        is_item = record.topic == self._items.name
        tp = TopicPartition(record.topic, record.partition)
        new = record.offset >= self._done[tp] and (self._answers_for_items or not is_item)
        partitions = self._items.partitions if is_item else self._users.partitions
        try:
            profile = decode_profile(record, self._limits, self._unknown, partitions=partitions)
        except Malformed as error:
            if new:
                self._waiting.setdefault(tp, []).append((record.offset, dead_letter_message(self._dead_letters, record, error)))
            return
        assert record.key is not None, "decode_profile refuses a record without a key"  # noqa: S101
        key = record.key.decode()
        side = self._model.items if is_item else self._model.users
        side.set(key, None if profile is None else profile.features)
        if is_item:
            return
        if profile is not None:
            self._known.setdefault(record.partition, set()).add(key)
            return
        self._known.get(record.partition, set()).discard(key)
        if new:
            self._waiting.setdefault(tp, []).append((record.offset, key))

    def _of(self, partition: int) -> list[TopicPartition]:
        """The tables that a step of ``partition`` answers for."""
        users = TopicPartition(self._users.name, partition)
        return [users, TopicPartition(self._items.name, 0)] if partition == 0 else [users]

    def _left(self, tp: TopicPartition) -> list[tuple[int, Message | str]]:
        """What no step has taken along of what waits in a table, by offset."""
        waiting = self._waiting.get(tp, [])
        return waiting[bisect_left(waiting, self._taken.get(tp, 0), key=itemgetter(0)) :]

    def waiting(self, partition: int) -> bool:
        """Whether something waits for a step of ``partition``, be it one without interactions."""
        return any(map(self._left, self._of(partition)))

    def crowded(self, partition: int) -> bool:
        """Whether more waits than goes into one step of ``partition``."""
        return any(len(self._left(tp)) > PENDING_AT_ONCE for tp in self._of(partition))

    def pending(self, partition: int) -> Pending:
        """What a step of ``partition`` has to commit: `PENDING_AT_ONCE` of each table at most, the others wait for the next steps."""
        letters, forgotten, positions = list[Message](), list[str](), dict[TopicPartition, int]()
        for tp in self._of(partition):
            if tp not in self._done:
                continue
            left = self._left(tp)
            entries = [entry for _, entry in left[:PENDING_AT_ONCE]]
            letters += [entry for entry in entries if isinstance(entry, Message)]
            forgotten += [entry for entry in entries if isinstance(entry, str)]
            positions[tp] = left[PENDING_AT_ONCE][0] if len(left) > PENDING_AT_ONCE else self._reader.position(tp)
        return Pending(letters, forgotten, positions)

    def begun(self, positions: dict[TopicPartition, int]) -> None:
        """A step has taken along what was pending, up to these positions, and its commit is under way."""
        self._taken |= positions

    def positions(self, partition: int) -> dict[str, int]:
        """How far users and items are read, by topic, for the plan of a step of ``partition``."""
        tables = (TopicPartition(self._users.name, partition), TopicPartition(self._items.name, 0))
        return {tp.topic: self._reader.position(tp) for tp in tables}

    def committed(self, positions: dict[TopicPartition, int]) -> None:
        """The step that was begun with these positions was committed."""
        for tp, position in positions.items():
            self._taken.pop(tp, None)
            self._waiting[tp] = [entry for entry in self._waiting.get(tp, []) if entry[0] >= position]
        self._done.update(positions)

    def given_up(self, positions: dict[TopicPartition, int]) -> None:
        """The step that was begun with these positions was not committed, or nobody knows: what it took along waits again."""
        for tp in positions:
            self._taken.pop(tp, None)

    def close(self) -> None:
        """Release the reader."""
        self._reader.close()
