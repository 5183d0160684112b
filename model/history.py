"""From what a user did to tasks."""

from __future__ import annotations

import numpy as np

from model.tasks import History, Task


def latest(items: list[str], ratings: list[float]) -> tuple[list[str], list[float]]:
    """A history, oldest first, with each item once: of an item rated again the latest rating counts, in its place."""
    last = {item: place for place, item in enumerate(items)}
    if len(last) == len(items):
        return items, ratings
    kept = sorted(last.values())
    return [items[place] for place in kept], [ratings[place] for place in kept]


def history_of(items: list[str], ratings: list[float]) -> History:
    """The history of interactions, oldest first."""
    kept, latest_ratings = latest(items, ratings)
    return History(kept, latest_ratings, whole=len(kept) == len(items))


def cut_task(user: str, history: History, query: int, generator: np.random.Generator) -> Task:
    """The task of a rehearsed user: the history, of one interaction at least, is cut at random; what stands before the cut is support.

    The query is what follows, ``query`` interactions at most. Every place is as likely a cut, the first too, where a new user stands.
    """
    items, ratings = history.items, history.ratings
    cut = int(generator.integers(len(items)))
    end = cut + query
    return Task(user, items[:cut], ratings[:cut], items[cut:end], ratings[cut:end], history)
