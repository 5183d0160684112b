"""Support sets as the changelog holds them, each as a few numbers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from streaming.codec import decode
from streaming.events import FORMAT, Position, Source
from streaming.log import TopicPartition, present
from streaming.topics import POSITION_KEY

if TYPE_CHECKING:
    from streaming.log import Log, Record


class Seal(msgspec.Struct, frozen=True, array_like=True):
    """A support set as a few numbers, so that those of a million users fit in memory: ``digest`` is that of its interactions."""

    length: int
    last: int
    earlier: int
    ordinal: int
    since: int
    digest: bytes


class _Held(msgspec.Struct):
    """A record of the changelog: a support set, or the marker of a forgotten user."""

    interactions: list[tuple[str, float, int]] = []
    source: Source | None = None
    earlier: int = 0
    ordinal: int = 0
    since: int = 0
    forgotten: int | None = None
    format: int = FORMAT


def digest(interactions: list[tuple[str, float, int]]) -> bytes:
    """16 bytes that tell one list of interactions from another."""
    return hashlib.blake2b(msgspec.msgpack.encode(interactions), digest_size=16).digest()


class Changelog:
    """The support sets of a partition as the topic holds them: ``seals`` by user in the order of last changes, encoded.

    ``position`` is the position record that they belong to, ``forgotten`` the first offset that counts for each user who was forgotten.
    """

    def __init__(self, log: Log, tp: TopicPartition) -> None:
        self.position: Position | None = None
        self.seals: dict[str, bytes] = {}
        self.markers: dict[str, int] = {}
        self.forgotten: dict[str, int] = {}
        done = 0
        # Beside a running worker the topic moves on while it is read: up to where nothing is left, it is the state between two steps.
        while done < (end := log.bounds([tp])[tp].end):
            for record in present(log, [tp], since=done):
                self._take(record)
            done = end
        self.end = done

    def _take(self, record: Record) -> None:
        what = f"{record.topic}[{record.partition}] at offset {record.offset}"
        if record.key == POSITION_KEY:
            self.position = decode(record.value, Position, what=what)
            return
        user = (record.key or b"").decode()
        self.seals.pop(user, None)
        self.markers.pop(user, None)
        self.forgotten.pop(user, None)
        if record.value is None:
            return
        held = decode(record.value, _Held, what=what)
        if since := held.since if held.forgotten is None else held.forgotten:
            self.forgotten[user] = since
        if held.forgotten is not None:
            self.markers[user] = held.forgotten
            return
        last = held.source[2] if held.source else -1
        seal = Seal(len(held.interactions), last, held.earlier, held.ordinal, held.since, digest(held.interactions))
        self.seals[user] = msgspec.msgpack.encode(seal)
