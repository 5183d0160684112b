"""The least log that a reader needs: records in lists, read by partitions in turn and in batches that do not fit the readers' own.

Beside it what fills a log with events and their scores.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from streaming.codec import encode
from streaming.errors import UnknownTopic
from streaming.events import Interaction, Score
from streaming.log import Bounds, Log, Member, Message, Reader, Record, Topic, TopicPartition, Writer
from streaming.partitioner import partition_of

T0 = 880_000_000_000


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

    def identity(self) -> str:
        return f"lists {id(self)}"

    def topics(self) -> dict[str, Topic]:
        return self._topics

    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        try:
            return {tp: Bounds(0, self.records[tp][-1].offset + 2 if self.records[tp] else 0) for tp in tps}
        except KeyError as error:
            raise UnknownTopic(str(error)) from error

    def committed(self, group: str, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        raise NotImplementedError

    def append(self, messages: Sequence[Message]) -> list[int]:
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


def a_log(partitions: int = 1, *, gap: int = 0, prefix: str = "") -> ReadingLog:
    names = ("interactions", "scores")
    return ReadingLog([*(Topic(prefix + n, partitions) for n in names), Topic(prefix + "dead-letters")], gap=gap)


def put(log: Log, event: Interaction, prefix: str = "") -> tuple[str, int, int]:
    topic = f"{prefix}interactions"
    partition = partition_of(event.user.encode(), log.topics()[topic].partitions)
    return topic, partition, log.append([Message(topic, event.user.encode(), msgspec.msgpack.encode(event), partition)])[0]


def score_of(event: Interaction, source: tuple[str, int, int], score: float = 3.5, **fields: Any) -> Score:  # noqa: ANN401
    given: dict[str, Any] = {"sd": 1.0, "model_version": 7, "support_size": 0, "earlier": 0, "step": 0}
    return Score(event.user, event.item, score, source=source, timestamp=event.timestamp, **(given | fields))


def put_score(log: Log, score: Score, prefix: str = "") -> None:
    log.append(
        [Message(f"{prefix}scores", score.user.encode(), encode(score), score.source[1] % log.topics()[f"{prefix}scores"].partitions)]
    )
