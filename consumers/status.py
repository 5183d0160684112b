"""How a system stands, from the log alone: whether it runs or not does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from streaming.chunks import last_value
from streaming.codec import decode
from streaming.headers import VersionHeader
from streaming.log import Bounds, TopicPartition, left

if TYPE_CHECKING:
    from consumers.settings import Settings
    from streaming.log import Log, Topic


class TopicStatus(msgspec.Struct, frozen=True):
    """A topic: how many partitions it has and offsets it holds, and the latest end of any of its partitions."""

    name: str
    partitions: int
    offsets: int
    end: int


class PartitionStatus(msgspec.Struct, frozen=True):
    """A partition of interactions: its bounds, the workers' committed offset (None: never committed), and what is not consumed yet.

    ``lag`` is 0 where all is; a long one counts a broker's own marks with the events.
    """

    partition: int
    start: int
    end: int
    committed: int | None
    lag: int


class VersionStatus(msgspec.Struct, frozen=True):
    """The last model version. ``waiting`` counts records of updates not folded yet; ``ours``: whether its settings are those in force."""

    version: int
    parent: int | None
    made_at: int
    events: int
    waiting: int
    ours: bool


class Status(msgspec.Struct, frozen=True):
    """The whole. ``missing`` names the topics that do not exist; ``model`` is None where there is no version yet."""

    broker: str
    group: str
    topics: list[TopicStatus]
    missing: list[str]
    partitions: list[PartitionStatus]
    model: VersionStatus | None


def status_of(log: Log, settings: Settings, topics: Mapping[str, Topic]) -> Status:
    """Look at ``topics`` (by plain name) in ``log``. Raises `LogUnavailable`, or `FormatMismatch` for a version of another layout."""
    existing = log.topics()
    here = {plain: existing[topic.name] for plain, topic in topics.items() if topic.name in existing}
    bounds = {plain: log.bounds(TopicPartition(topic.name, number) for number in range(topic.partitions)) for plain, topic in here.items()}
    return Status(
        broker=settings.broker,
        group=settings.group_id,
        topics=[_topic(here[plain], bounds[plain]) for plain in here],
        missing=[topic.name for plain, topic in topics.items() if plain not in here],
        partitions=_partitions(log, settings.group_id, bounds.get("interactions", {})),
        model=_model(log, settings.digest(), bounds.get("model", {}), bounds.get("updates", {})),
    )


def _topic(topic: Topic, bounds: Mapping[TopicPartition, Bounds]) -> TopicStatus:
    return TopicStatus(
        name=topic.name,
        partitions=topic.partitions,
        offsets=sum(bound.end - bound.start for bound in bounds.values()),
        end=max((bound.end for bound in bounds.values()), default=0),
    )


def _partitions(log: Log, group: str, bounds: Mapping[TopicPartition, Bounds]) -> list[PartitionStatus]:
    committed = log.committed(group, bounds)
    lags = left(log, {tp: committed.get(tp, 0) for tp in bounds})
    return [PartitionStatus(tp.partition, bound.start, bound.end, committed.get(tp), lags[tp]) for tp, bound in sorted(bounds.items())]


def _model(log: Log, digest: str, model: Mapping[TopicPartition, Bounds], updates: Mapping[TopicPartition, Bounds]) -> VersionStatus | None:
    newest = [version for tp in model if (version := _last_version(log, tp)) is not None]
    if not newest:
        return None
    last = max(newest, key=lambda version: version.version)
    waiting = sum(left(log, {tp: last.folded.get(tp.partition, 0) for tp in updates}).values())
    return VersionStatus(last.version, last.parent, last.made_at, last.events, waiting, last.settings == digest)


def _last_version(log: Log, tp: TopicPartition) -> VersionHeader | None:
    found = last_value(log, tp)
    return None if found is None else decode(found[1], VersionHeader, what=f"the last version in {tp.topic}")
