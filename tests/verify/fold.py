"""The pure fold of a partition's valid events: what every user's support set must be, before and after each event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tests.verify.reading import Event


@dataclass
class Held:
    """What a user has: every interaction since the user came (or came back after being forgotten or evicted), and the user's ordinal.

    ``since`` bounds the offset at which the user was last forgotten.
    """

    events: list[Event]
    ordinal: int
    since: tuple[int, int] = (0, 0)


class Fold:
    """Users in the order of their last event. ``users`` and ``ordinals`` are the state after all events given to `take` so far."""

    def __init__(self, size: int, max_users: int = 0) -> None:
        self.size = size
        self.max_users = max_users
        self.users: dict[str, Held] = {}
        self.forgotten: dict[str, tuple[int, int]] = {}
        self.ordinals = 0

    def forget(self, user: str, since: tuple[int, int]) -> None:
        """Nothing before the offset within these bounds is the user's any more."""
        self.users.pop(user, None)
        self.forgotten[user] = since

    def take(self, event: Event) -> list[Event]:
        """The user's interactions before the event, which is then appended."""
        held = self.users.pop(event.user, None)
        if held is None:
            if self.max_users and len(self.users) == self.max_users:
                del self.users[next(iter(self.users))]
            held = Held([], self.ordinals, self.forgotten.pop(event.user, (0, 0)))
            self.ordinals += 1
        before = list(held.events)
        held.events.append(event)
        self.users[event.user] = held
        return before

    def count(self, user: str) -> int:
        """How many interactions the user has."""
        return len(self.users[user].events) if user in self.users else 0

    def all(self, events: Iterable[Event]) -> list[list[Event]]:
        """`take` of each."""
        return [self.take(event) for event in events]

    def support(self, user: str) -> list[tuple[str, float, int]]:
        """The user's last interactions, oldest first."""
        return [(event.item, event.rating, event.timestamp) for event in self.users[user].events[-self.size :]]
