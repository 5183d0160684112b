"""What a user did, as tasks are made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from model.profiles import Profiles

NOTHING = np.empty((0, 2))


class History:
    """What a user rated, oldest first and each item once, which remembers where its items stand among a model's profiles.

    ``whole`` says that nothing was left out for being rated again: only then `and_then` can tell what comes next.
    """

    __slots__ = ("_before", "at_hand", "epoch", "items", "ratings", "whole")

    def __init__(self, items: Sequence[str], ratings: list[float], *, whole: bool = False, before: History | None = None) -> None:
        self.items = items
        self.ratings = ratings
        self.whole = whole
        self._before = before
        self.at_hand = NOTHING
        self.epoch: object = None
        """What `rated` found last, and the `Profiles.epoch` for which it holds."""

    @classmethod
    def of(cls, items: list[str], ratings: list[float]) -> History:
        """The history of interactions, oldest first: of an item rated again the latest rating counts, in its place."""
        last = {item: place for place, item in enumerate(items)}
        if len(last) == len(items):
            return cls(items, ratings, whole=True)
        kept = sorted(last.values())
        return cls([items[place] for place in kept], [ratings[place] for place in kept])

    def rated(self, profiles: Profiles) -> np.ndarray:
        """`Profiles.places` of the items, looked up once for as long as they hold, and the ratings: (n, 2).

        Both as float64, which holds every place exactly, so that a part of a history is one slice.
        """
        if self.epoch is not profiles.epoch:
            before, self._before = self._before, None
            if before is not None and before.epoch is profiles.epoch:
                # Events come in bursts of one user, whose histories differ by one interaction each.
                last = (profiles.places(self.items[-1:])[0], self.ratings[-1])
                self.at_hand = np.concatenate([before.rated(profiles)[len(before.items) + 1 - len(self.items) :], [last]])
            else:
                self.at_hand = np.empty((len(self.items), 2))
                self.at_hand[:, 0] = profiles.places(self.items)
                self.at_hand[:, 1] = self.ratings
            self.epoch = profiles.epoch
        return self.at_hand

    def and_then(self, item: str, rating: float, size: int) -> History | None:
        """The history after one more interaction, of which the last ``size`` are kept; None where that has to be found out anew."""
        if not self.whole or item in self.items:
            return None
        first = max(0, len(self.items) + 1 - size)
        return History([*self.items[first:], item], [*self.ratings[first:], rating], whole=True, before=self)


def rated(histories: Iterable[History], profiles: Profiles) -> list[np.ndarray]:
    """`History.rated` of each; most are at hand, and a call for each would take longer than all else that is done with them."""
    epoch = profiles.epoch
    return [history.at_hand if history.epoch is epoch else history.rated(profiles) for history in histories]
