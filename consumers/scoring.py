"""What a user will rate highest, now: the ranking that answers requests, and the same from the log alone, beside a stopped system."""

from __future__ import annotations

from heapq import nsmallest
from typing import TYPE_CHECKING, NamedTuple

from consumers.histories import history_of
from consumers.system import new_model
from consumers.tables import ProfileTables
from consumers.threads import limit_threads
from consumers.versions import Versions
from model.catalogue import Catalogue
from model.meta import predict
from model.tasks import Task
from streaming.events import BEST
from streaming.log import TopicPartition, present
from streaming.partitioner import partition_of
from streaming.support import SupportSets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from consumers.settings import Settings
    from model.mamo import Mamo
    from streaming.events import Request, Support
    from streaming.log import Log, Topic

ITEMS_AT_ONCE = 4096
USERS_AT_ONCE = 16
"""One batch scores this many items for this many users, so that memory grows neither with the catalogue nor with the requests."""


class ItemScore(NamedTuple):
    """An item's score and its standard deviation, None where the model has none."""

    score: float
    sd: float | None
    item: str


class Ranking(NamedTuple):
    """Scores, best first, and what they were made from: the size of the support set, and how many interactions the user ever had."""

    scores: list[ItemScore]
    support_size: int
    earlier: int


class _Open(NamedTuple):
    """A question that is being worked on; the support set as a task has it."""

    request: Request
    support: tuple[Sequence[str], Sequence[float]]
    candidates: Sequence[str]
    best: list[ItemScore]


def rank(model: Mamo, asked: Sequence[tuple[Request, Support | None]], catalogue: Catalogue | None = None) -> list[Ranking]:
    """Answer each request from its user's support set, users in batches. Nothing is learned.

    Of a catalogue, only the items that can be among the best are scored as queries; one that is given is not made anew.
    """
    supports = [(history.items, history.ratings) for history in (history_of(support) for _, support in asked)]
    every = [number for number, (request, _) in enumerate(asked) if request.items is None]
    found = (catalogue or Catalogue(model)).candidates(
        [Task(asked[number][0].user, *supports[number], [], []) for number in every],
        [(asked[number][0].n or BEST) + (len(supports[number][0]) if asked[number][0].exclude_rated else 0) for number in every],
    )
    of_catalogue = dict(zip(every, found, strict=True))
    questions = []
    for number, ((request, _), support) in enumerate(zip(asked, supports, strict=True)):
        rated = set(support[0]) if request.exclude_rated else set[str]()
        candidates = [item for item in (of_catalogue.get(number) or request.items or ()) if item not in rated]
        questions.append(_Open(request, support, candidates, []))
    for start in range(0, len(questions), USERS_AT_ONCE):
        _score(model, questions[start : start + USERS_AT_ONCE])
    return [
        Ranking(question.best, len(question.support[0]), support.earlier if support else 0)
        for question, (_, support) in zip(questions, asked, strict=True)
    ]


def _score(model: Mamo, questions: Sequence[_Open]) -> None:
    for start in range(0, max(len(question.candidates) for question in questions), ITEMS_AT_ONCE):
        left = [question for question in questions if len(question.candidates) > start]
        slices = [question.candidates[start : start + ITEMS_AT_ONCE] for question in left]
        tasks = [
            Task(question.request.user, *question.support, query, [0.0] * len(query)) for question, query in zip(left, slices, strict=True)
        ]
        found = predict(model, tasks)
        scores = found.score.tolist()
        sds = [[None] * len(row) for row in scores] if found.sd is None else found.sd.tolist()
        for question, query, score, sd in zip(left, slices, scores, sds, strict=True):
            wanted = question.request.n or (len(question.candidates) if question.request.items is not None else BEST)
            # Padding stands behind the query, so the shortest of the three ends the row. Equal scores stand by id, whoever ranks.
            rows = map(ItemScore, score, sd, query)
            question.best[:] = nsmallest(wanted, [*question.best, *rows], key=lambda each: (-each.score, each.item))


def offline(log: Log, settings: Settings, topics: dict[str, Topic], request: Request) -> tuple[Ranking, int]:
    """Answer a request from what stands in the log, and say at which model version. Nothing is written."""
    limit_threads(settings.cores())
    partition = partition_of(request.user.encode(), topics["interactions"].partitions)
    model = new_model(settings)
    versions = Versions(log, {name: topic.name for name, topic in topics.items()}, settings.digest(), model)
    tables = ProfileTables(log, topics, model, settings.event_limits(), settings.group_id)
    tables.assign([partition])
    tables.advance()
    (ranking,) = rank(model, [(request, support_of(log, topics["support"].name, partition, request.user))])
    tables.close()
    versions.close()
    return ranking, versions.version


def support_of(log: Log, topic: str, partition: int, user: str) -> Support | None:
    """The user's support set as the changelog has it, None for a user without one."""
    sets = SupportSets(size=1)
    for record in present(log, [TopicPartition(topic, partition)]):
        if record.key == user.encode():
            sets.restore(record)
    return sets.get(user)
