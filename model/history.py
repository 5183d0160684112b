"""What users did, as tasks are made of it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain
from typing import cast

import numpy as np

from model.numbering import packed
from model.profiles import Profiles
from model.texts import Texts, joined

NOTHING = np.empty((0, 2))


class History:
    """What a user rated, oldest first and each item once, which remembers where its items stand among a model's profiles.

    Of an item rated again the latest rating counts, in its place. ``numbers`` say which of the user's interactions each is, counted from
    any, for only so many of the last are kept, those that count no longer included.
    """

    __slots__ = ("at_hand", "before", "epoch", "items", "left_out", "numbers", "ratings")

    def __init__(self, items: list[str] | Texts, ratings: array[float], numbers: array[int]) -> None:
        self.items = items
        self.ratings = ratings
        self.numbers = numbers
        self.at_hand = NOTHING
        self.epoch: object = None
        """What `rated` found last, and the `Profiles.epoch` for which it holds."""
        self.before: History | None = None
        self.left_out = 0, list[int]()
        """Until then, what this one is one interaction longer than; how many of its first are left out, and which behind them."""

    @classmethod
    def of(cls, items: list[str], ratings: Sequence[float]) -> History:
        """The history of interactions, oldest first."""
        kept = sorted({item: place for place, item in enumerate(items)}.values())
        if len(kept) < len(items):
            items, ratings = [items[place] for place in kept], [ratings[place] for place in kept]
        return cls(items, array("d", ratings), array("q", kept))

    def and_then(self, item: str, rating: float, size: int) -> History:
        """The history after one more interaction, of which the last ``size`` are kept."""
        number = self.numbers[-1] + 1 if self.numbers else 0
        first = bisect_left(self.numbers, number + 1 - size)
        items, ratings, numbers = self.items[first:], self.ratings[first:], self.numbers[first:]
        again = [items.index(item)] if item in items else []
        for place in again:
            del items[place], ratings[place], numbers[place]
        items.append(item)
        ratings.append(rating)
        numbers.append(number)
        after = History(items, ratings, numbers)
        after.before, after.left_out = self, (first, again)
        return after


def rated(histories: Sequence[History], profiles: Profiles) -> list[np.ndarray]:
    """Of each history `Profiles.places` of its items, looked up once for as long as they hold, and its ratings: (n, 2).

    Both as float64, which holds every place exactly, so that a part of a history is one slice.
    """
    epoch = profiles.epoch
    anew, longer = dict[History, None](), dict[History, None]()
    # Events come in bursts of one user, whose histories differ by one interaction each.
    for history in histories:
        if history.epoch is not epoch and history not in anew:
            before = history.before
            follows = before is not None and (before.epoch is epoch or before in anew or before in longer)
            (longer if follows else anew)[history] = None
    # Those whose items lie where they were read, and those of texts: together, all would have to be made texts.
    for alike in ([one for one in anew if isinstance(one.items, Texts)], [one for one in anew if not isinstance(one.items, Texts)]):
        if not alike:
            continue
        interactions = by_text([history.items for history in alike], [history.ratings for history in alike], profiles)
        begin = 0
        for history in alike:
            end = begin + len(history.ratings)
            # A copy, or each would hold on to what all of them take.
            history.at_hand, history.epoch, history.before = interactions[begin:end].copy(), epoch, None
            begin = end
    if longer:
        last = by_text([[history.items[-1] for history in longer]], [[history.ratings[-1] for history in longer]], profiles)
        for place, history in enumerate(longer):
            assert history.before is not None  # noqa: S101
            first, again = history.left_out
            kept = history.before.at_hand[first:]
            if again:
                kept = np.delete(kept, again, 0)
            history.at_hand, history.epoch, history.before = np.concatenate([kept, last[place : place + 1]]), epoch, None
    return [history.at_hand for history in histories]


def by_text(keys: Sequence[Sequence[str]], ratings: Sequence[Sequence[float]], items: Profiles) -> np.ndarray:
    """Places of items, looked up, and their ratings, part after part: (n, 2), as `rated` has them."""
    # By type: asking each whether it is an instance of an abstract class takes as long as looking it up.
    lying = set(map(type, keys)) == {Texts}
    places = items.places(joined(cast("Sequence[Texts]", keys)) if lying else list(chain.from_iterable(keys)))
    found = np.empty((len(places), 2))
    found[:, 0] = places
    at_hand = set(map(type, ratings)) == {array}
    known = b"".join(cast("Sequence[array[float]]", ratings)) if at_hand else packed(chain.from_iterable(ratings), len(places), np.float64)
    found[:, 1] = np.frombuffer(known, np.float64)
    return found
