"""Support sets: the last interactions of every user of one partition, kept as the changelog keeps them.

A step stages what it changes, and commits it here only after the log has committed the same changes to the topic `support`; so what is
held is never ahead of the log, and a restart restores it from there. It is in memory or in a file: see `streaming.store`. While the log
commits the changes of some steps, others are staged on top of them.
"""

from __future__ import annotations

import time
import uuid
from collections import ChainMap
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from streaming.codec import decode, encode, packed
from streaming.events import FORMAT, Forgotten, Position, Source, Support
from streaming.store.held import Covered, Head, Held, InMemory
from streaming.topics import POSITION_KEY

if TYPE_CHECKING:
    from streaming.events import Interaction
    from streaming.log import Record

SETTLE_USERS = 2_000
SETTLE_SECONDS = 1.0

MOST_DRAWS = 16
"""As many times as usual may ordinals be drawn, to find users among the holes that forgotten ones leave."""


class Appended(msgspec.Struct):
    """A `Support` with its fields, each interaction left as it is encoded: to append one takes a sixth of the time."""

    interactions: list[msgspec.Raw]
    source: Source
    earlier: int
    ordinal: int
    since: int = 0
    format: int = FORMAT


@dataclass(slots=True)
class Layer:
    """What one step changes: users in the order of their last changes, and by how much ordinals and users grow."""

    users: dict[str, Appended | Forgotten | None] = field(default_factory=dict)
    ordinals: int = 0
    growth: int = 0
    encoded: dict[str, bytes | None] = field(default_factory=dict)
    """As the changelog takes them, once they are on the way there."""


class SupportSets:
    """The support sets of one partition, ``size`` interactions each, for ``max_users`` users at most (0: without bound).

    Values are held encoded, about 25 bytes an interaction, in the order of their last change. When a user comes beyond the bound, the
    user whose last interaction is oldest is dropped: the rule depends on the log alone, so that every reader of it agrees.
    Of a user who asked to be forgotten there is left, until the next interaction, as of which offset.
    """

    def __init__(self, size: int, *, max_users: int = 0, held: Held | None = None) -> None:
        self.size = size
        self.max_users = max_users
        self.held = InMemory(ordered=max_users > 0) if held is None else held
        position = self.position
        self.ordinals_given = position.users if position else 0
        self._staged = Layer()
        self._under_way = list[Layer]()
        self._known_as_of = 0
        """Milliseconds since the epoch: all removals from then on are in the changelog that is being read, however old its records."""
        self.evicted = 0
        """Users dropped because of the bound, since this process started."""

    def __len__(self) -> int:
        return len(self.held)

    @property
    def covered(self) -> Covered:
        """How far of the changelog they go."""
        return self.held.covered

    @property
    def position(self) -> Position | None:
        """The last position record among what they cover."""
        value = self.held.covered.position
        return None if value is None else decode(value, Position, what="position record of a partition")

    @property
    def changelog(self) -> str:
        """The name that tells this changelog from any other of the same topic; a new one for a changelog that has none yet."""
        if not self.held.covered.changelog:
            self.held.covered = self.held.covered._replace(changelog=uuid.uuid4().hex)
        return self.held.covered.changelog

    def get(self, user: str) -> Support | None:
        """The user's support set as it stands, staged changes included; None if the user has none."""
        value = self._appended(user)
        return None if value is None else decode(encode(value), Support, what="support set")

    def _appended(self, user: str) -> Appended | None:
        """As `get`, with interactions as they are encoded."""
        layer = self._staged if user in self._staged.users else self._layer(user)
        if layer is not None:
            value = layer.users[user]
            return value if isinstance(value, Appended) else None
        encoded = self.held.value(user)
        return None if encoded is None else decode(encoded, Appended, what="support set")

    def _layer(self, user: str) -> Layer | None:
        """The last of the steps on their way that changes this user."""
        return next((layer for layer in reversed(self._under_way) if user in layer.users), None)

    def encoded(self, user: str) -> bytes | None:
        """The user's support set as the changelog has it or is about to; None for a user without one, or with changes that are staged."""
        if user in self._staged.users:
            return None
        if (layer := self._layer(user)) is not None:
            return layer.encoded[user] if isinstance(layer.users[user], Appended) else None
        return self.held.value(user)

    def append(self, user: str, interaction: Interaction, source: Source) -> int:
        """Stage that ``interaction`` happened; the oldest beyond ``size`` goes. Returns how many the user had before, of all time."""
        before, staged = self._appended(user), self._staged
        entry = msgspec.Raw(packed((interaction.item, interaction.rating, interaction.timestamp)))
        if before is None:
            # While a user dropped in this very step is still staged as such, so that it is not forgotten once more to make room.
            since = self._since(user)
            self._make_room()
            staged.growth += 1
        # Taken out first, so that the order of staging is the order of last changes.
        staged.users.pop(user, None)
        if before is None:
            staged.users[user] = Appended([entry], source, 1, self.ordinals_after, since)
            staged.ordinals += 1
            return 0
        kept = before.interactions[-self.size + 1 :] if self.size > 1 else []
        staged.users[user] = Appended([*kept, entry], source, before.earlier + 1, before.ordinal, before.since)
        return before.earlier

    def forget(self, user: str, offset: int) -> None:
        """Stage that nothing of ``user`` before this offset counts any more, and that nothing but this is kept."""
        self._staged.growth -= self._appended(user) is not None
        self._staged.users.pop(user, None)
        self._staged.users[user] = Forgotten(offset)

    def _since(self, user: str) -> int:
        """The first offset that counts for a user without a support set."""
        if isinstance(staged := self._staged.users.get(user), Forgotten):
            return staged.forgotten
        if (layer := self._layer(user)) is not None:
            value = layer.users[user]
            return value.forgotten if isinstance(value, Forgotten) else 0
        return self.held.since(user)

    def _make_room(self) -> None:
        staged, layers = self._staged, [*self._under_way, self._staged]
        # Two for each that comes where the bound was lowered since, so that no step is held up by all of them.
        for _ in range(2):
            if not self.max_users or len(self.held) + sum(layer.growth for layer in layers) < self.max_users:
                return
            oldest = self.held.oldest(but=ChainMap(*(layer.users for layer in reversed(layers))))
            if oldest is None:
                changed = dict[str, Appended | Forgotten | None]()
                for user, value in chain.from_iterable(layer.users.items() for layer in layers):
                    changed.pop(user, None)
                    changed[user] = value
                oldest = next(user for user, value in changed.items() if isinstance(value, Appended))
            staged.users.pop(oldest, None)
            staged.users[oldest] = None
            staged.growth -= 1

    @property
    def ordinals_after(self) -> int:
        """How many ordinals are given once all that is staged is committed."""
        return self.ordinals_given + sum(layer.ordinals for layer in self._under_way) + self._staged.ordinals

    def changes(self) -> list[tuple[bytes, bytes | None]]:
        """Key and value of the changelog records of what is staged, in the order of last changes; None removes the user."""
        return [(user.encode(), None if value is None else encode(value)) for user, value in self._staged.users.items()]

    def begin(self, changes: list[tuple[bytes, bytes | None]]) -> None:
        """What a step staged is on its way to the log as these ``changes``: from now on, what is staged stands on top of it."""
        self._staged.encoded = {key.decode(): value for key, value in changes}
        self._under_way.append(self._staged)
        self._staged = Layer()

    def commit(self, position: bytes = b"", offset: int = 0, steps: int = 1) -> None:
        """Take over the first ``steps`` of those that are on their way: the log has committed them.

        ``position`` is the position record that was committed behind it, and ``offset`` its offset in the changelog. Raises `StoreError`
        where a local store cannot take any more: the log has all of it, and it is restored from there.
        """
        done, self._under_way = self._under_way[:steps], self._under_way[steps:]
        for layer in done:
            for user, value in layer.encoded.items():
                change = layer.users.get(user)
                self.held.put(user, value, Head(change.ordinal) if isinstance(change, Appended) else None)
            self.held.grew(layer.growth)
            self.ordinals_given += layer.ordinals
            self.evicted += sum(value is None for value in layer.encoded.values())
        if position:
            self.held.covered = Covered(offset + 1, time.time_ns() // 1_000_000, self.changelog, position)
        self.settle()

    def discard(self) -> None:
        """Forget what is staged."""
        self._staged = Layer()

    def discard_all(self) -> None:
        """Forget what is staged and what is on its way: the log has not committed it, or nobody knows."""
        self._staged, self._under_way = Layer(), []

    def restore(self, record: Record) -> None:
        """Take a record of the changelog, in the order of its offsets; after the last of them, `restored`.

        Raises `Malformed` or `FormatMismatch` for one that is none.
        """
        assert record.key is not None, "the changelog is compacted, so every record has a key"  # noqa: S101
        _, _, changelog, last = self.held.covered
        if record.key == POSITION_KEY:
            position = decode(record.value, Position, what=f"position record of {record.topic}[{record.partition}]")
            self.ordinals_given = position.users
            changelog, last = position.changelog, record.value
        else:
            self.held.put(record.key.decode(), record.value)
        self.held.covered = Covered(record.offset + 1, max(record.timestamp, self._known_as_of), changelog, last)

    def begin_restoring(self, newest: Position | None) -> None:
        """What is held was found to fit the changelog whose newest position record this is, and what `restore` is given is of it.

        Said before any record comes, so that a restoration that is broken off is gone on with: its last position record may be the last
        of all. As old as its last record is what was held before, as to the removals that the changelog remembers; what is read
        from nothing has missed none of before it began.
        """
        covered, now = self.held.covered, time.time_ns() // 1_000_000
        self._known_as_of = min(covered.timestamp, now) if covered.offset else now
        if newest is not None:
            held = msgspec.structs.replace(self.position or Position(0, 0, 0, {}), changelog=newest.changelog, owners=newest.owners)
            self.held.covered = covered._replace(changelog=newest.changelog, position=encode(held))

    def restored(self) -> None:
        """The records of the changelog given to `restore` are all there are for now."""
        self.settle()
        self.held.grew(None)

    def settle(self, users: int = SETTLE_USERS, seconds: float = SETTLE_SECONDS) -> None:
        """Let a local store write down what only memory has, once so many users changed, or so long after the first of them did.

        Raises `StoreError` where it cannot take any more.
        """
        self.held.settle(users, seconds)

    def begin_anew(self, reason: str) -> str:
        """Forget everything, since it does not fit the changelog, and set a local store aside; returns the reason, and where."""
        self.ordinals_given = 0
        self.discard_all()
        return self.held.begin_anew(reason)

    def close(self) -> None:
        """Write down what only memory has, and release the local store."""
        self.held.close()

    def draw(self, count: int, generator: np.random.Generator) -> list[str]:
        """Draw up to ``count`` different users, all alike likely; the same for the same log and generator, restarted or not.

        Users first seen in the step in hand are not drawn, nor are those that it forgets. Ordinals of forgotten users are holes, so a
        draw may come out short where most users were forgotten, although more are tried then, up to `MOST_DRAWS` times as many.
        """
        under_way, staged = dict[str, Appended | Forgotten | None](), self._staged.users
        ordinals, there = self.ordinals_given, len(self.held)
        # What is on its way counts, so that the draw does not depend on how far the log is with it.
        for layer in self._under_way:
            under_way |= layer.users
            ordinals, there = ordinals + layer.ordinals, there + layer.growth
        if not there:
            return []
        # Twice as many as would find so many users on average, and as many as ever where nobody was forgotten.
        draws = min(MOST_DRAWS, -(-ordinals // (2 * there)))
        tried = dict.fromkeys(generator.integers(0, ordinals, 4 * count * draws).tolist())
        places = {value.ordinal: user for user, value in under_way.items() if isinstance(value, Appended)}

        def user_of(ordinal: int) -> str | None:
            user = places.get(ordinal) or self.held.user_of(ordinal)
            return None if user in under_way and ordinal not in places else user

        users = (user for ordinal in tried if (user := user_of(ordinal)) is not None)
        kept = (user for user in users if user not in staged or isinstance(staged[user], Appended))
        return list(islice(kept, count))
