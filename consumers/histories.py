"""What support sets come to as tasks, kept for users who are looked at again: most have not changed since they were last rehearsed."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from model.history import History

if TYPE_CHECKING:
    from streaming.events import Support
    from streaming.metrics import Metrics
    from streaming.support import SupportSets

MOST = 8192
"""Users kept, some 10 KB each at 100 interactions; of more, those looked at longest ago are made anew."""


class Histories:
    """Histories by user, each with the encoded support set that it was made of: it holds for as long as the user's is the same."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._kept: OrderedDict[str, tuple[bytes, History]] = OrderedDict()

    def of(self, sets: SupportSets, user: str) -> History:
        """The history of a user with a support set, as it stands now, staged changes included."""
        value = sets.encoded(user)
        kept = self._kept.pop(user, None)
        found = kept is not None and kept[0] == value
        self._metrics.observe_history(found=found)
        if kept is None or not found:
            made = history_of(sets.get(user))
            if value is None:  # What is staged may come to nothing.
                return made
            kept = value, made
        self._kept[user] = kept
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return kept[1]


def history_of(support: Support | None) -> History:
    """The items and ratings of a support set, oldest first; of an item rated again the latest rating counts, in its place."""
    interactions = support.interactions if support else []
    return History.of([item for item, _, _ in interactions], [rating for _, rating, _ in interactions])
