"""What a user did, as tasks are made of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.profiles import Profiles

NOTHING = np.empty((0, 2))


class History:
    """What a user rated, oldest first and each item once, which remembers where its items stand among a model's profiles.

    ``whole`` says that nothing was left out for being rated again: only then `and_then` can tell what comes next.
    """

    __slots__ = ("_before", "_epoch", "_rated", "items", "ratings", "whole")

    def __init__(self, items: Sequence[str], ratings: list[float], *, whole: bool = False, before: History | None = None) -> None:
        self.items = items
        self.ratings = ratings
        self.whole = whole
        self._rated = NOTHING
        self._before = before
        self._epoch: object = None

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
        if not self.holds(profiles):
            before, self._before = self._before, None
            if before is not None and before.holds(profiles):
                # Events come in bursts of one user, whose histories differ by one interaction each.
                last = (profiles.places(self.items[-1:])[0], self.ratings[-1])
                self._rated = np.concatenate([before.rated(profiles)[len(before.items) + 1 - len(self.items) :], [last]])
            else:
                self._rated = np.empty((len(self.items), 2))
                self._rated[:, 0] = profiles.places(self.items)
                self._rated[:, 1] = self.ratings
            self._epoch = profiles.epoch
        return self._rated

    def holds(self, profiles: Profiles) -> bool:
        """Whether `rated` looks nothing up."""
        return self._epoch is profiles.epoch

    def and_then(self, item: str, rating: float, size: int) -> History | None:
        """The history after one more interaction, of which the last ``size`` are kept; None where that has to be found out anew."""
        if not self.whole or item in self.items:
            return None
        first = max(0, len(self.items) + 1 - size)
        return History([*self.items[first:], item], [*self.ratings[first:], rating], whole=True, before=self)
