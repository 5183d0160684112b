"""What a partition's support sets are held in: in memory here, in a file in `streaming.store.stored`."""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Container
from typing import NamedTuple

import msgspec

from streaming.codec import decode
from streaming.errors import Malformed


class Covered(NamedTuple):
    """How far of its changelog a state goes.

    ``offset`` is the next offset of the changelog to read, ``timestamp`` when the last record before it was appended, in milliseconds
    since the epoch. ``changelog`` is the name that the changelog was given with its first position record, empty before there is one:
    a log that was made anew under the same name has another. ``position`` is the last position record, encoded.
    """

    offset: int = 0
    timestamp: int = 0
    changelog: str = ""
    position: bytes | None = None


class Head(msgspec.Struct):
    """What tells a support set from a marker: the one has an ordinal, the other an offset as of which the user is forgotten."""

    ordinal: int | None = None
    forgotten: int | None = None


def head(value: bytes, user: str) -> Head:
    """Read the head of a value of the changelog. Raises `Malformed` or `FormatMismatch` for one that is neither."""
    found = decode(value, Head, what=f"support set of {user!r}")
    if (found.ordinal is None) == (found.forgotten is None):
        raise Malformed("missing-field", f"support set of {user!r}: neither a support set nor the marker of a forgotten user")
    return found


class Held(abc.ABC):
    """Values of the changelog by user, in the order of their last change; ``len`` counts the users with a support set."""

    covered: Covered
    """How far of the changelog they go. Who puts a value says so here, once all that belongs together is put."""

    full: str = ""
    """Why the last write to a local store failed for want of room; empty if it did not."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def value(self, user: str) -> bytes | None:
        """The user's support set, encoded; None without one."""

    @abc.abstractmethod
    def since(self, user: str) -> int:
        """The offset as of which a user without a support set was forgotten; 0 for one who never was."""

    @abc.abstractmethod
    def put(self, user: str, value: bytes | None, known: Head | None = None) -> None:
        """Take a value of the changelog: a support set, a marker, or None, which removes the user. ``known`` is its head, if it is."""

    @abc.abstractmethod
    def grew(self, users: int | None) -> None:
        """By how many users ``len`` grew with what was put since the last call; None where nobody knows, so that they are counted."""

    @abc.abstractmethod
    def user_of(self, ordinal: int) -> str | None:
        """The user whose support set has this ordinal; None where there is none, or not any more."""

    @abc.abstractmethod
    def oldest(self, but: Container[str]) -> str | None:
        """The user, none of ``but``, whose support set changed longest ago."""

    @property
    @abc.abstractmethod
    def behind(self) -> int:
        """How many users' last changes wait to be written to a local store."""

    @abc.abstractmethod
    def begin_anew(self, reason: str) -> str:
        """Forget everything, since it does not fit the changelog; returns the reason, with where a file was set aside."""

    @abc.abstractmethod
    def settle(self, users: int = 1, seconds: float = 0.0) -> None:
        """Write down what waits, once it is so many users or this old. Raises `StoreError` where no more may wait."""

    @abc.abstractmethod
    def close(self) -> None:
        """Write down what waits, and release what is held. Closing twice does nothing."""


class InMemory(Held):
    """Values in memory, about 300 bytes a user beside the value itself; some more with ``ordered``, for who asks for the `oldest` often."""

    def __init__(self, *, ordered: bool = False) -> None:
        self.covered = Covered()
        # A dictionary that is emptied at its front takes longer and longer to tell what is first.
        self._values: dict[str, bytes] = OrderedDict() if ordered else {}
        self._users: dict[int, str] = {}
        self._forgotten: dict[str, int] = {}

    def begin_anew(self, reason: str) -> str:
        """As `Held.begin_anew`."""
        self.covered = Covered()
        self._values, self._users, self._forgotten = type(self._values)(), {}, {}
        return reason

    def __len__(self) -> int:
        return len(self._values)

    def value(self, user: str) -> bytes | None:
        """As `Held.value`."""
        return self._values.get(user)

    def since(self, user: str) -> int:
        """As `Held.since`."""
        return self._forgotten.get(user, 0)

    def put(self, user: str, value: bytes | None, known: Head | None = None) -> None:
        """As `Held.put`."""
        found = None if value is None else known or head(value, user)
        before = self._values.pop(user, None)
        self._forgotten.pop(user, None)
        if before is not None and (found is None or found.ordinal is None or self._users.get(found.ordinal) != user):
            self._users.pop(head(before, user).ordinal or 0, None)
        if found is None:
            return
        if found.forgotten is not None:
            self._forgotten[user] = found.forgotten
        elif found.ordinal is not None and value is not None:
            self._values[user] = value
            self._users[found.ordinal] = user

    def grew(self, users: int | None) -> None:
        """Nothing to do: they are counted at any time."""

    def user_of(self, ordinal: int) -> str | None:
        """As `Held.user_of`."""
        return self._users.get(ordinal)

    def oldest(self, but: Container[str]) -> str | None:
        """As `Held.oldest`."""
        return next((user for user in self._values if user not in but), None)

    @property
    def behind(self) -> int:
        """None: there is no local store."""
        return 0

    def settle(self, users: int = 1, seconds: float = 0.0) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is held but memory."""
