"""The least log that a reader needs: records in lists, read by partitions in turn and in batches that do not fit the readers' own."""

from collections.abc import Iterable, Mapping

from streaming.errors import UnknownTopic
from streaming.log import Bounds, Log, Member, Message, Reader, Record, Topic, TopicPartition, Writer


class ReadingLog(Log):
    """``gap`` offsets are left out before each record, as compaction and Kafka's markers do."""

    def __init__(self, topics: Iterable[Topic], *, gap: int = 0, batch: int = 7) -> None:
        self._topics = {topic.name: topic for topic in topics}
        self.gap, self.batch = gap, batch
        self.records: dict[TopicPartition, list[Record]] = {
            TopicPartition(topic.name, p): [] for topic in self._topics.values() for p in range(topic.partitions)
        }

    def create(self, topics: Iterable[Topic]) -> None:
        raise NotImplementedError

    def topics(self) -> dict[str, Topic]:
        return self._topics

    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        try:
            return {tp: Bounds(0, self.records[tp][-1].offset + 2 if self.records[tp] else 0) for tp in tps}
        except KeyError as error:
            raise UnknownTopic(str(error)) from error

    def committed(self, group: str, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        raise NotImplementedError

    def append(self, messages: Iterable[Message]) -> list[int]:
        offsets = []
        for message in messages:
            tp = TopicPartition(message.topic, message.partition or 0)
            last = self.records[tp][-1].offset if self.records[tp] else -1
            offsets.append(last + 1 + self.gap)
            self.records[tp].append(Record(*tp, offsets[-1], 0, message.key, message.value))
        return offsets

    def reader(self) -> Reader:
        return _Reading(self)

    def member(self, group: str, topic: str) -> Member:
        raise NotImplementedError

    def writer(self, transactional_id: str) -> Writer:
        raise NotImplementedError

    def close(self) -> None: ...


class _Reading(Reader):
    def __init__(self, log: ReadingLog) -> None:
        self.log = log
        self.read: dict[TopicPartition, int] = {}
        self.turn = 0

    def assign(self, positions: Mapping[TopicPartition, int]) -> None:
        assert all(start == 0 for start in positions.values())
        self.read = dict.fromkeys(positions, 0)

    def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
        chosen = sorted(self.read if only is None else only)
        self.turn += 1
        tp = chosen[self.turn % len(chosen)]
        batch = self.log.records[tp][self.read[tp] :][: min(max_records, self.log.batch)]
        self.read[tp] += len(batch)
        return batch

    def position(self, tp: TopicPartition) -> int:
        records, read = self.log.records[tp], self.read[tp]
        return self.log.bounds([tp])[tp].end if read == len(records) else records[read].offset

    def close(self) -> None: ...
