"""The pure fold of a partition's events, by the contract alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from consumers.audit.changelog import Seal, digest

if TYPE_CHECKING:
    from streaming.events import Interaction

Entries = list[tuple[str, float, int]]
_entries = msgspec.msgpack.Decoder(Entries)


class Held(NamedTuple):
    """A user in the fold: the last interactions, encoded. ``whole`` is whether nothing before them is out of reach."""

    entries: bytes
    last: int
    earlier: int
    ordinal: int
    since: int
    whole: bool


class Before(NamedTuple):
    """What a user had before an event. ``earlier`` is None, and ``known`` False, where retention has removed what it takes to tell."""

    entries: Entries
    earlier: int | None
    known: bool


class Fold:
    """Support sets by the contract alone: a user's last ``size`` interactions, ``max_users`` users at most, the longest silent one leaves.

    ``cut`` is whether events before the first one are out of reach.
    """

    def __init__(self, size: int, max_users: int, *, cut: bool) -> None:
        self.size = size
        self.max_users = max_users
        self.cut = cut
        self.users: dict[str, Held] = {}
        self.markers: dict[str, int] = {}
        self.ordinals = 0

    def forget(self, user: str, since: int) -> None:
        """Nothing of the user before this offset counts any more."""
        self.users.pop(user, None)
        self.markers[user] = since

    def take(self, event: Interaction, offset: int) -> Before:
        """What the user had before the event, which is then appended."""
        held = self.users.pop(event.user, None)
        if held is None:
            full = bool(self.max_users) and len(self.users) == self.max_users
            whole = not self.cut or full or event.user in self.markers
            if full:
                del self.users[next(iter(self.users))]
            held = Held(b"\x90", -1, 0, self.ordinals, self.markers.pop(event.user, 0), whole)
            self.ordinals += 1
        entries = _entries.decode(held.entries)
        kept = [*entries, (event.item, event.rating, event.timestamp)][-self.size :]
        self.users[event.user] = held._replace(entries=msgspec.msgpack.encode(kept), last=offset, earlier=held.earlier + 1)
        return Before(entries, held.earlier if held.whole else None, held.whole or held.earlier >= self.size)

    def seal(self, user: str) -> tuple[Seal, bool]:
        """The user's support set as `Changelog` holds it, and whether all of it is within reach."""
        held = self.users[user]
        entries = _entries.decode(held.entries)
        return Seal(len(entries), held.last, held.earlier, held.ordinal, held.since, digest(entries)), held.whole
