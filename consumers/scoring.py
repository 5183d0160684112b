"""Scores for one user from the log alone: what a worker would answer now, beside a running or a stopped system."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple

from consumers.system import new_model
from consumers.tables import ProfileTables
from consumers.versions import Versions
from consumers.worker import latest
from model.meta import predict
from model.tasks import Task
from streaming.codec import decode
from streaming.events import Support
from streaming.log import TopicPartition, present
from streaming.partitioner import partition_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumers.settings import Settings
    from model.mamo import Mamo
    from streaming.log import Log, Topic

AT_ONCE = 4096
"""Items scored in one batch, so that memory does not grow with the catalogue."""


class ItemScore(NamedTuple):
    """An item's score and its standard deviation, None where the model has none."""

    score: float
    sd: float | None
    item: str


class Answer(NamedTuple):
    """Scores, best first, and what they were made from: model version, size of the support set, interactions the user ever had."""

    scores: list[ItemScore]
    version: int
    support_size: int
    earlier: int


def answer(log: Log, settings: Settings, topics: dict[str, Topic], user: str, items: Sequence[str] | None, best: int) -> Answer:
    """Score ``items`` for ``user``, or without them find the ``best`` of the catalogue that the user has not rated lately.

    The catalogue is every item that has a profile or was ever rated. Nothing is written.
    """
    partition = partition_of(user.encode(), topics["interactions"].partitions)
    model = new_model(settings)
    versions = Versions(log, {name: topic.name for name, topic in topics.items()}, settings.digest(), model)
    tables = ProfileTables(log, topics, model, settings.event_limits(), settings.group_id)
    tables.assign([partition])
    tables.advance()
    support = support_of(log, topics["support"].name, partition, user)
    support_items, ratings = latest(support)
    rated = set(support_items)
    candidates = items if items is not None else [item for item in catalogue(model) if item not in rated]
    scores: list[ItemScore] = []
    for start in range(0, len(candidates), AT_ONCE):
        query = candidates[start : start + AT_ONCE]
        result = predict(model, [Task(user, support_items, ratings, query, [0.0] * len(query))])
        sds = [None] * len(query) if result.sd is None else result.sd[0].tolist()
        scores += map(ItemScore, result.score[0].tolist(), sds, query)
        if items is None:
            scores = heapq.nlargest(best, scores, key=lambda each: each.score)
    scores.sort(key=lambda each: -each.score)
    tables.close()
    versions.close()
    return Answer(scores, versions.version, len(support_items), support.earlier if support else 0)


def catalogue(model: Mamo) -> list[str]:
    """Every item with a profile, and every item that the model has learned an id row for."""
    known = dict.fromkeys(model.items.features)
    names = [name for name, feature in model.items.schema.items() if feature.kind == "id"]
    for name in names:
        known |= dict.fromkeys(key.removeprefix(f"{name}=") for key in model.item_table.keys if key.startswith(f"{name}="))
    return list(known)


def support_of(log: Log, topic: str, partition: int, user: str) -> Support | None:
    """The user's support set as the changelog has it, None for a user without one."""
    found = None
    for record in present(log, [TopicPartition(topic, partition)]):
        if record.key == user.encode():
            found = record.value
    return None if found is None else decode(found, Support, what=f"support set of {user!r}")
