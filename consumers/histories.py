"""What support sets come to as tasks, kept for users who are looked at again: most are as they were left, or were last rehearsed."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from model.history import History
from model.texts import SECRET, Texts, last_rows_of
from streaming.codec import decode
from streaming.events import Support

if TYPE_CHECKING:
    from streaming.metrics import Metrics
    from streaming.support import SupportSets

MOST = 16_384
"""Users kept, 5 to 11 KB each at 100 interactions; of more, those looked at longest ago are made anew."""

BEGINS, NONE = b"\x86\xacinteractions", b"\x90"
"""How an encoded support set begins, and an array of nothing: a MessagePack map of `Support`'s six fields in their order."""


class Histories:
    """Histories by user, each with the encoded support set that it comes of: it holds for as long as the user's is the same."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._kept: OrderedDict[str, tuple[bytes, History]] = OrderedDict()
        self._unchanged = self._read = 0

    def of(self, sets: SupportSets, user: str) -> History:
        """The history of a user as the support set stands now, staged changes included."""
        value, known = sets.encoded(user), self._kept.get(user)
        if value is None:  # What is staged may come to nothing.
            support = sets.get(user)
            self._read += support is not None
            return history_of(support)
        if known is not None and known[0] == value:
            self._unchanged += 1
            self._kept.move_to_end(user)
            return known[1]
        self._read += 1
        made = history_of_encoded(value)
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

    def clear(self) -> None:
        """Keep nothing: users who are not ours any more may be forgotten elsewhere."""
        self._kept.clear()

    def _keep(self, user: str, value: bytes, history: History) -> None:
        self._kept[user] = value, history
        self._kept.move_to_end(user)
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)


def history_of(support: Support | None) -> History:
    """The items and ratings of a support set, oldest first; of an item rated again the latest rating counts, in its place."""
    interactions = support.interactions if support else []
    return History.of([item for item, _, _ in interactions], [rating for _, rating, _ in interactions])


def history_of_encoded(value: bytes) -> History:
    """As `history_of`, of an encoded support set: its items stay where they are, and are found there.

    What does not look as it is written by us, and what stands behind the items, is left to the decoder. Raises as `decode` does.
    """
    if value.startswith(BEGINS):
        spans, ratings, numbers, end = last_rows_of(np.frombuffer(value, np.uint8), len(BEGINS), SECRET)
        if end >= 0:
            decode(BEGINS + NONE + value[end:], Support, what="support set")
            return History(Texts(value, array("q", spans.tobytes())), array("d", ratings.tobytes()), array("q", numbers.tobytes()))
    return history_of(decode(value, Support, what="support set"))
