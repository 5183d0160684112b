"""A log that can only be read: for whoever looks at a log that others live on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from streaming.errors import LogError
from streaming.log import Log

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streaming.log import Bounds, Member, Message, Reader, Topic, TopicPartition, Writer
    from streaming.risks import Risk


class ReadOnlyLog(Log):
    """``log`` without anything that changes it: what would write, fence a writer or join a group raises `LogError`.

    Closing it closes ``log``.
    """

    def __init__(self, log: Log) -> None:
        self._log = log

    def identity(self) -> str:
        """As `Log.identity`."""
        return self._log.identity()

    def topics(self) -> dict[str, Topic]:
        """As `Log.topics`."""
        return self._log.topics()

    def risks(self, wanted: Iterable[Topic]) -> list[Risk]:
        """As `Log.risks`."""
        return self._log.risks(wanted)

    def bounds(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, Bounds]:
        """As `Log.bounds`."""
        return self._log.bounds(tps)

    def committed(self, group: str, tps: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """As `Log.committed`."""
        return self._log.committed(group, tps)

    def reader(self) -> Reader:
        """As `Log.reader`: reading by assignment leaves no trace in the log."""
        return self._log.reader()

    def create(self, topics: Iterable[Topic]) -> NoReturn:
        """Refused."""
        self._refuse(f"create {', '.join(topic.name for topic in topics)}")

    def append(self, messages: Sequence[Message]) -> NoReturn:
        """Refused."""
        self._refuse(f"append {len(messages)} records")

    def member(self, group: str, topic: str) -> Member:
        """Refused: a member makes the group's other members give up partitions."""
        self._refuse(f"join the group {group} for {topic}")

    def writer(self, transactional_id: str) -> Writer:
        """Refused: opening a writer fences the one that is at work."""
        self._refuse(f"open the writer {transactional_id}")

    def _refuse(self, what: str) -> NoReturn:
        raise LogError(f"this log was opened for reading only; it was asked to {what}")

    def close(self) -> None:
        """As `Log.close`."""
        self._log.close()
