"""What about a topic that exists would lose data, setting by setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from streaming.errors import TopicMismatch

if TYPE_CHECKING:
    from streaming.log import Topic

FOREVER = "for ever"


class Risk(NamedTuple):
    """One setting of one topic: what it is, what it should be, and what is lost as it is."""

    topic: str
    setting: str
    found: str
    needed: str
    loss: str


def require_alike(wanted: Topic, partitions: int, cleanup: str) -> None:
    """Raise `TopicMismatch` where a topic has other partitions or another cleanup than wanted: nobody can change that."""
    if partitions != wanted.partitions:
        advice = f"and topics.partitions is {wanted.partitions}: set it to {partitions}"
        if wanted.partitions == 1:
            advice = (
                f"and should have 1: if it is one that is shared out by user, as interactions are, set topics.partitions to {partitions}; "
                "all others have 1, so delete it with the broker's own tools and run `coldstream topics create`"
            )
        raise TopicMismatch(f"topic {wanted.name} has {partitions} partitions, {advice}")
    if cleanup != wanted.cleanup:
        raise TopicMismatch(f"topic {wanted.name} has cleanup {cleanup}, and needs {wanted.cleanup}")


def risks(wanted: Iterable[Topic], existing: Mapping[str, Topic]) -> list[Risk]:
    """The risks that any broker has, topic by topic in the order of ``wanted``."""
    found: list[Risk] = []
    for topic in wanted:
        there = existing.get(topic.name)
        if there is None:
            found.append(Risk(topic.name, "topic", "missing", "to exist", "nothing can be written to it: run `coldstream topics create`"))
            continue
        if there.partitions != topic.partitions:
            loss = "users would be looked for in partitions where they are not"
            found.append(Risk(topic.name, "partitions", str(there.partitions), str(topic.partitions), loss))
        if there.cleanup != topic.cleanup:
            loss = (
                "state that is only kept here would be dropped by age"
                if topic.cleanup == "compact"
                else "all but the last record of every key would be dropped"
            )
            found.append(Risk(topic.name, "cleanup", there.cleanup, topic.cleanup, loss))
            continue
        found += _shorter(topic, there)
        if there.max_record_bytes < topic.max_record_bytes:
            loss = "records of the size that the settings allow would be refused"
            found.append(Risk(topic.name, "max_record_bytes", str(there.max_record_bytes), str(topic.max_record_bytes), loss))
    return found


def _shorter(topic: Topic, there: Topic) -> Iterable[Risk]:
    kept = "removals would be forgotten" if topic.cleanup == "compact" else "records would be dropped"
    bounds = [("retention_ms", topic.retention_ms, there.retention_ms), ("retention_bytes", topic.retention_bytes, there.retention_bytes)]
    for name, needed, found in bounds:
        if found is not None and (needed is None or found < needed):
            yield Risk(topic.name, name, str(found), FOREVER if needed is None else str(needed), f"{kept} sooner than the settings say")
