"""What support sets come to as tasks, kept for users who are looked at again: most are as they were left, or were last rehearsed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from model.history import History

if TYPE_CHECKING:
    from streaming.events import Support
    from streaming.metrics import Metrics
    from streaming.support import SupportSets

MOST = 8192
"""Users kept, some 10 KB each at 100 interactions; of more, those looked at longest ago are made anew."""


class Histories:
    """Histories by user, each with the encoded support set that it comes of: it holds for as long as the user's is the same."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._kept: OrderedDict[str, tuple[bytes, History]] = OrderedDict()
        self._unchanged = self._read = 0

    def of(self, sets: SupportSets, user: str) -> History:
        """The history of a user as the support set stands now, staged changes included."""
        value, known = sets.encoded(user), self._kept.get(user)
        if value is not None and known is not None and known[0] == value:
            self._unchanged += 1
            self._kept.move_to_end(user)
            return known[1]
        support = sets.get(user)
        self._read += support is not None
        made = history_of(support)
        if value is not None:  # What is staged may come to nothing.
            self._keep(user, value, made)
        return made

    def keep(self, changes: Sequence[tuple[bytes, bytes | None]], histories: Mapping[str, History]) -> None:
        """The ``changes`` of a step (see `SupportSets.changes`) led to these ``histories``, by user; its last call.

        Of all others who changed nothing is kept: they may be forgotten.
        """
        for key, value in changes:
            user = key.decode()
            history = histories.get(user)
            if value is not None and history is not None:
                self._keep(user, value, history)
            else:
                self._kept.pop(user, None)
        self._metrics.observe_histories(unchanged=self._unchanged, read=self._read)
        self._unchanged = self._read = 0

    def _keep(self, user: str, value: bytes, history: History) -> None:
        self._kept[user] = value, history
        self._kept.move_to_end(user)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)


def history_of(support: Support | None) -> History:
    """The items and ratings of a support set, oldest first; of an item rated again the latest rating counts, in its place."""
    interactions = support.interactions if support else []
    return History.of([item for item, _, _ in interactions], [rating for _, rating, _ in interactions])
