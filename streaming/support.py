"""Support sets: the last interactions of every user of one partition, kept as the changelog keeps them.

A step stages what it changes, and commits it here only after the log has committed the same changes to the topic `support`; so this is
never ahead of the log, and a restart restores it from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from streaming.codec import decode, encode
from streaming.errors import Malformed
from streaming.events import Forgotten, Support

if TYPE_CHECKING:
    from streaming.events import Interaction, Source
    from streaming.log import Record


class _Head(msgspec.Struct):
    """What tells a support set from a marker: the one has an ordinal, the other an offset as of which the user is forgotten."""

    ordinal: int | None = None
    forgotten: int | None = None


def _head(value: bytes, user: str) -> _Head:
    head = decode(value, _Head, what=f"support set of {user!r}")
    if (head.ordinal is None) == (head.forgotten is None):
        raise Malformed("missing-field", f"support set of {user!r}: neither a support set nor the marker of a forgotten user")
    return head


class SupportSets:
    """The support sets of one partition, ``size`` interactions each, for ``max_users`` users at most (0: without bound).

    Values are held encoded, about 25 bytes an interaction, in the order of their last change. When a user comes beyond the bound, the
    user whose last interaction is oldest is dropped: the rule depends on the log alone, so that every reader of it agrees.
    Of a user who asked to be forgotten there is left, until the next interaction, as of which offset.
    """

    def __init__(self, size: int, *, max_users: int = 0) -> None:
        self.size = size
        self.max_users = max_users
        self.ordinals_given = 0
        self._values: dict[str, bytes] = {}
        self._ordinals: dict[int, str] = {}
        self._forgotten: dict[str, int] = {}
        self._staged: dict[str, Support | Forgotten | None] = {}
        self._staged_ordinals = 0
        self.evicted = 0
        """Users dropped because of the bound, since this process started."""

    def __len__(self) -> int:
        return len(self._values)

    def get(self, user: str) -> Support | None:
        """The user's support set as it stands, staged changes included; None if the user has none."""
        if user in self._staged:
            staged = self._staged[user]
            return staged if isinstance(staged, Support) else None
        value = self._values.get(user)
        return None if value is None else decode(value, Support, what="support set")

    def append(self, user: str, interaction: Interaction, source: Source) -> None:
        """Stage that ``interaction`` happened; the oldest beyond ``size`` goes."""
        before = self.get(user)
        since = self._since(user)
        entry = (interaction.item, interaction.rating, interaction.timestamp)
        if before is None:
            # While a user dropped in this very step is still staged as such, so that it is not forgotten once more to make room.
            self._make_room()
        # Taken out first, so that the order of staging is the order of last changes.
        self._staged.pop(user, None)
        if before is None:
            self._staged[user] = Support([entry], source, 1, self.ordinals_after, since)
            self._staged_ordinals += 1
            return
        kept = before.interactions[-self.size + 1 :] if self.size > 1 else []
        self._staged[user] = Support([*kept, entry], source, before.earlier + 1, before.ordinal, before.since)

    def forget(self, user: str, offset: int) -> None:
        """Stage that nothing of ``user`` before this offset counts any more, and that nothing but this is kept."""
        self._staged.pop(user, None)
        self._staged[user] = Forgotten(offset)

    def _since(self, user: str) -> int:
        """The first offset that counts for a user without a support set."""
        staged = self._staged.get(user)
        return staged.forgotten if isinstance(staged, Forgotten) else self._forgotten.get(user, 0)

    def _make_room(self) -> None:
        if not self.max_users:
            return
        held = len(self._values) + sum(isinstance(value, Support) - (user in self._values) for user, value in self._staged.items())
        if held < self.max_users:
            return
        oldest = next((user for user in self._values if user not in self._staged), None)
        if oldest is None:
            oldest = next(user for user, value in self._staged.items() if isinstance(value, Support))
        self._staged.pop(oldest, None)
        self._staged[oldest] = None

    @property
    def ordinals_after(self) -> int:
        """How many ordinals are given once what is staged is committed."""
        return self.ordinals_given + self._staged_ordinals

    def changes(self) -> list[tuple[bytes, bytes | None]]:
        """Key and value of the changelog records of what is staged, in the order of last changes; None removes the user."""
        return [(user.encode(), None if value is None else encode(value)) for user, value in self._staged.items()]

    def commit(self, changes: list[tuple[bytes, bytes | None]]) -> None:
        """Take over ``changes``, which the log has committed, and forget the staging."""
        for key, value in changes:
            self._put(key.decode(), value)
        self.ordinals_given = self.ordinals_after
        self.evicted += sum(value is None for _, value in changes)
        self.discard()

    def discard(self) -> None:
        """Forget what is staged."""
        self._staged = {}
        self._staged_ordinals = 0

    def restore(self, record: Record) -> None:
        """Take a record of the changelog, in the order of its offsets. Raises `Malformed` or `FormatMismatch` for one that is none."""
        assert record.key is not None, "the changelog is compacted, so every record has a key"  # noqa: S101
        self._put(record.key.decode(), record.value)

    def _put(self, user: str, value: bytes | None) -> None:
        before = self._values.pop(user, None)
        self._forgotten.pop(user, None)
        if before is not None and (ordinal := _head(before, user).ordinal) is not None:
            self._ordinals.pop(ordinal, None)
        if value is None:
            return
        head = _head(value, user)
        if head.forgotten is not None:
            self._forgotten[user] = head.forgotten
        elif head.ordinal is not None:
            self._values[user] = value
            self._ordinals[head.ordinal] = user

    def draw(self, count: int, generator: np.random.Generator) -> list[str]:
        """Draw up to ``count`` different users, all alike likely; the same for the same log and generator, restarted or not.

        Users first seen in the step in hand are not drawn, nor are those that it forgets. Ordinals of forgotten users are holes, so a
        draw may come out short where most users were forgotten.
        """
        if not self._ordinals:
            return []
        tried = dict.fromkeys(generator.integers(0, self.ordinals_given, 4 * count).tolist())
        users = (self._ordinals[ordinal] for ordinal in tried if ordinal in self._ordinals)
        return [user for user in users if user not in self._staged or isinstance(self._staged[user], Support)][:count]
