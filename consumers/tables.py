"""Users and items topics read as tables: the newest profile of every id, in the model that is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streaming.deadletters import dead_letter_message
from streaming.errors import Malformed
from streaming.log import TopicPartition
from streaming.validation import decode_profile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from model.mamo import Mamo
    from streaming.log import Log, Message, Record, Topic
    from streaming.validation import Limits

READ_AT_ONCE = 1000


class ProfileTables:
    """Reads items whole and the users of the partitions held, up to the end of what is there, whenever `advance` is called.

    Every process that holds partition 0 answers for the dead letters of items; those of users go with their partition. ``letters``
    waits for the next step to commit it, together with ``positions``: so a profile that cannot be taken is reported once,
    although the tables are read anew after each start.
    """

    def __init__(self, log: Log, topics: dict[str, Topic], model: Mamo, limits: Limits, group: str) -> None:
        self._log = log
        self._items = topics["items"]
        self._users = topics["users"]
        self._dead_letters = topics["dead-letters"].name
        self._model = model
        self._limits = limits
        self._group = group
        self._reader = log.reader()
        self._reported: dict[TopicPartition, int] = {}
        self._letters: dict[int, list[Message]] = {}
        self.unknown_fields = 0

    def assign(self, partitions: Iterable[int]) -> None:
        """Hold the users of these partitions; what is held already is not read again."""
        items = TopicPartition(self._items.name, 0)
        wanted = [items, *(TopicPartition(self._users.name, partition) for partition in sorted(partitions))]
        bounds = self._log.bounds(wanted)
        committed = self._log.committed(self._group, wanted)
        held = set(self._reported)
        self._reported = {tp: committed.get(tp, 0) for tp in wanted}
        self._letters = {}
        self._reader.assign({tp: self._reader.position(tp) if tp in held else bounds[tp].start for tp in wanted})

    def advance(self, beat: Callable[[], None] = lambda: None) -> None:
        """Take in every profile that has come; ``beat`` is called as often as a long read goes on."""
        while records := self._reader.poll(READ_AT_ONCE):
            for record in records:
                self._take(record)
            beat()

    def _take(self, record: Record) -> None:
        is_item = record.topic == self._items.name
        partitions = self._items.partitions if is_item else self._users.partitions
        try:
            profile = decode_profile(record, self._limits, self._count_unknown, partitions=partitions)
        except Malformed as error:
            if record.offset >= self._reported[TopicPartition(record.topic, record.partition)]:
                self._letters.setdefault(record.partition, []).append(dead_letter_message(self._dead_letters, record, error))
            return
        assert record.key is not None, "decode_profile refuses a record without a key"  # noqa: S101
        side = self._model.items if is_item else self._model.users
        side.set(record.key.decode(), None if profile is None else profile.features)

    def _count_unknown(self, fields: int) -> None:
        self.unknown_fields += fields

    def pending(self, partition: int) -> tuple[list[Message], dict[TopicPartition, int]]:
        """The dead letters that a step of ``partition`` has to commit, and the positions of the tables with them."""
        tables = [TopicPartition(self._users.name, partition)]
        if partition == 0:
            tables.append(TopicPartition(self._items.name, 0))
        return self._letters.get(partition, []), {tp: self._reader.position(tp) for tp in tables if tp in self._reported}

    def positions(self, partition: int) -> dict[str, int]:
        """How far users and items are read, by topic, for the plan of a step of ``partition``."""
        tables = (TopicPartition(self._users.name, partition), TopicPartition(self._items.name, 0))
        return {tp.topic: self._reader.position(tp) for tp in tables}

    def committed(self, partition: int, positions: dict[TopicPartition, int]) -> None:
        """The step that took `pending` along was committed."""
        self._letters.pop(partition, None)
        self._reported.update(positions)

    def close(self) -> None:
        """Release the reader."""
        self._reader.close()
