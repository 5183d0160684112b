"""The task protocol of MeLU and MAMO: who is warm, who is cold, what is learned from and what is asked.

docs/evaluation.md says which rule is whose, and where this protocol is stricter than theirs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.tasks import Task
from streaming.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streaming.events import Interaction

SCENARIOS = ("W-W", "C-W", "W-C", "C-C")
"""User first, then item: warm or cold."""

PULL = 5.0
"""Ratings of the mean that each bias is pulled to 0 by."""


@dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol.

    A user takes part with ``fewest`` to ``most`` interactions. Users whose first one comes before the moment at which ``warm_share`` of
    all interactions are made are warm. Items that warm users rated more than ``warm_ratings`` times before that moment are warm. The
    last ``query`` interactions with warm items, and with cold ones, are asked; the other ones with warm items are the support.
    """

    fewest: int = 13
    most: int = 100
    warm_share: float = 0.8
    warm_ratings: int = 10
    query: int = 10


class Split(NamedTuple):
    """``train`` holds what is learned from: the supports of warm users, by user. ``test`` holds the tasks of each scenario."""

    train: dict[str, list[Interaction]]
    test: dict[str, list[Task]]
    counts: dict[str, int]


def split(interactions: Sequence[Interaction], protocol: Protocol) -> Split:
    """Split interactions, given in order of time and of each user and item at most one.

    Raises `SourceError` where no warm user is left to learn from, or nobody to ask.
    """
    if not interactions:
        raise SourceError("the data set holds no interaction")
    moment = interactions[min(round(protocol.warm_share * len(interactions)), len(interactions) - 1)].timestamp
    by_user: dict[str, list[Interaction]] = defaultdict(list)
    for one in interactions:
        by_user[one.user].append(one)
    taking_part = {user: rated for user, rated in by_user.items() if protocol.fewest <= len(rated) <= protocol.most}
    warm_users = {user for user, rated in taking_part.items() if rated[0].timestamp < moment}
    ratings = Counter(one.item for user in warm_users for one in taking_part[user] if one.timestamp < moment)
    warm_items = {item for item, count in ratings.items() if count > protocol.warm_ratings}

    train: dict[str, list[Interaction]] = {}
    test: dict[str, list[Task]] = {scenario: [] for scenario in SCENARIOS}
    enough = protocol.fewest - protocol.query
    for user, rated in taking_part.items():
        warm = [one for one in rated if one.item in warm_items]
        cold = [one for one in rated if one.item not in warm_items]
        if len(warm) < protocol.query + enough:
            continue
        support, query = warm[: -protocol.query], warm[-protocol.query :]
        state = "W" if user in warm_users else "C"
        test[f"{state}-W"].append(task(user, support, query))
        if cold:
            test[f"{state}-C"].append(task(user, support, cold[-protocol.query :]))
        if state == "W":
            train[user] = support
    if not train:
        raise SourceError(
            f"no warm user is left to learn from: of {len(by_user)} users {len(taking_part)} have {protocol.fewest} to {protocol.most} "
            f"interactions, and none of the warm ones {protocol.query + enough} with items rated more than {protocol.warm_ratings} times"
        )
    counts = {
        "interactions": len(interactions),
        "users": len(by_user),
        "users_taking_part": len(taking_part),
        "warm_users": len(train),
        "cold_users": len(test["C-W"]),
        "warm_items": len(warm_items),
        "cold_items": len({one.item for one in interactions} - warm_items),
        "training_ratings": sum(map(len, train.values())),
    }
    return Split(train, test, counts)


def task(user: str, support: Sequence[Interaction], query: Sequence[Interaction]) -> Task:
    """A task of these interactions."""
    return Task(
        user, [one.item for one in support], [one.rating for one in support], [one.item for one in query], [one.rating for one in query]
    )


def episode(user: str, rated: Sequence[Interaction], most: int, generator: np.random.Generator) -> Task:
    """A training task: up to ``most`` of a user's interactions, but at most half of them, drawn as the query; the rest is the support."""
    drawn = set(generator.choice(len(rated), min(most, len(rated) // 2), replace=False).tolist())
    return task(
        user,
        [one for place, one in enumerate(rated) if place not in drawn],
        [one for place, one in enumerate(rated) if place in drawn],
    )


class Biases:
    """The baseline: mu + b_u + b_i, with b_u from the same support that the model gets.

    Ridge regression (Koren, 2010, Eq. 2), solved by turns: each bias is a mean of what the other leaves, pulled to 0 as by ``pull``
    ratings of the mean. ``pull`` of infinity leaves mu alone, the global mean.
    """

    def __init__(self, train: Mapping[str, Sequence[Interaction]], *, pull: float = PULL, rounds: int = 10) -> None:
        self.pull = pull
        self.mean = float(np.mean([one.rating for rated in train.values() for one in rated]))
        self.items: dict[str, float] = {}
        for _ in range(rounds):
            left: dict[str, list[float]] = defaultdict(list)
            for rated in train.values():
                user = self._of_user([one.item for one in rated], [one.rating for one in rated])
                for one in rated:
                    left[one.item].append(one.rating - self.mean - user)
            self.items = {item: sum(rest) / (len(rest) + pull) for item, rest in left.items()}

    def _of_user(self, items: Sequence[str], ratings: Sequence[float]) -> float:
        rest = [rating - self.mean - self.items.get(item, 0.0) for item, rating in zip(items, ratings, strict=True)]
        return sum(rest) / (len(rest) + self.pull)

    def ask(self, tasks: Sequence[Task]) -> list[list[float]]:
        """Scores of each task's query."""
        scores = []
        for one in tasks:
            user = self._of_user(one.support_items, one.support_ratings)
            scores.append([self.mean + user + self.items.get(item, 0.0) for item in one.query_items])
        return scores
