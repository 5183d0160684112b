"""What support sets come to as tasks, kept for users who are looked at again: most have not changed since they were last rehearsed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
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

    def of(self, sets: SupportSets, users: Sequence[str]) -> list[History]:
        """The histories of users with support sets, as they stand now, staged changes included."""
        histories, unchanged, kept = [], 0, self._kept
        for user in users:
            value = sets.encoded(user)
            known = kept.get(user)
            if known is not None and known[0] == value:
                unchanged += 1
                kept.move_to_end(user)
                histories.append(known[1])
                continue
            made = history_of(sets.get(user))
            histories.append(made)
            if value is None:  # What is staged may come to nothing.
                continue
            kept[user] = value, made
            kept.move_to_end(user)
            if len(kept) > MOST:
                kept.popitem(last=False)
        self._metrics.observe_histories(unchanged=unchanged, read=len(histories) - unchanged)
        return histories


def history_of(support: Support | None) -> History:
    """The items and ratings of a support set, oldest first; of an item rated again the latest rating counts, in its place."""
    interactions = support.interactions if support else []
    return History.of([item for item, _, _ in interactions], [rating for _, rating, _ in interactions])
