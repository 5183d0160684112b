"""Many short texts that lie in one buffer, as records hold them, and their numbers, found without making a Python object of each.

A rehearsed user's support set is a hundred ids: made into texts, and these looked up in a dictionary, they take longer than all that is
computed from them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from model.compiled import borrowing, compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Hashes = NDArray[np.uint64]
    Numbers = NDArray[np.int64]
    Ratings = NDArray[np.float64]

EMPTY = -1
REMOVED = -2
"""What stands in a slot in place of a number."""

SECRET = np.uint64(secrets.randbits(64))
"""Where hashes begin in this process: nobody can send ids that all fall on the same slots."""


class Texts(Sequence[str]):
    """Texts in UTF-8: ``spans`` (n, 2) says where in ``buffer`` each begins and ends. One is made only when it is asked for."""

    __slots__ = ("buffer", "spans")

    def __init__(self, buffer: bytes, spans: Numbers) -> None:
        self.buffer = buffer
        self.spans = spans

    def __len__(self) -> int:
        return len(self.spans)

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and bool(holds(self.bytes, self.spans, np.frombuffer(text.encode(), np.uint8)))

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self.buffer[start:end].decode() for start, end in self.spans[place].tolist()]
        start, end = self.spans[place].tolist()
        return self.buffer[start:end].decode()

    def last(self) -> Numbers:
        """The places of those that do not come again, in order."""
        return last_of_each(self.bytes, self.spans, SECRET)

    @property
    def bytes(self) -> Bytes:
        """The buffer as an array."""
        return np.frombuffer(self.buffer, np.uint8)


class Index:
    """Numbers of keys, as a dictionary holds them, for keys that come as `Texts`. Numbers are small: there is room for each.

    Open addressing: the search for a key begins at its hash and ends at an empty slot. Slots and bytes of removed keys are given back when
    half of the slots are used.
    """

    def __init__(self, numbers: Mapping[str, int]) -> None:
        encoded = [key.encode() for key in numbers]
        ends = np.fromiter(map(len, encoded), np.int64, len(encoded)).cumsum()
        given = np.fromiter(numbers.values(), np.int64, len(encoded))
        self._keys = np.frombuffer(bytearray(b"".join(encoded) + bytes(1024)), np.uint8)
        self._end = int(ends[-1]) if len(ends) else 0
        self._spans = np.zeros((64 + int(given.max(initial=0)), 2), np.int64)
        self._spans[given, 0], self._spans[given, 1] = ends - np.diff(ends, prepend=0), ends
        self._fill(given)

    def add(self, key: str, number: int) -> None:
        """Take in a key that is not there."""
        encoded = np.frombuffer(key.encode(), np.uint8)
        if 2 * (self._used + 1) > len(self._numbers):
            left = self._numbers[self._numbers >= 0]
            self._keys, self._end = repacked(self._keys, self._spans, left)
            self._fill(left)
        while self._end + len(encoded) > len(self._keys):
            self._keys = np.concatenate([self._keys, np.empty_like(self._keys)])
        while number >= len(self._spans):
            self._spans = np.concatenate([self._spans, np.zeros_like(self._spans)])
        self._keys[self._end : self._end + len(encoded)] = encoded
        self._spans[number] = self._end, self._end + len(encoded)
        self._end += len(encoded)
        insert(SECRET, self._keys, self._spans, np.array([number]), self._hashes, self._numbers)
        self._used += 1

    def _fill(self, given: Numbers) -> None:
        """Slots anew, four to eight for each key."""
        slots = 1 << max(6, (4 * len(given)).bit_length())
        self._hashes, self._numbers, self._used = np.zeros(slots, np.uint64), np.full(slots, EMPTY, np.int64), len(given)
        insert(SECRET, self._keys, self._spans, given, self._hashes, self._numbers)

    def remove(self, key: str) -> None:
        """Drop a key."""
        encoded = np.frombuffer(key.encode(), np.uint8)
        slot = find(encoded, 0, len(encoded), SECRET, self._keys, self._spans, self._hashes, self._numbers)
        if slot >= 0:
            self._numbers[slot] = REMOVED

    def of(self, texts: Texts) -> tuple[Numbers, int]:
        """The number of each text, (n,), -1 for one that is no key; and how many are none."""
        return numbers_of(texts.bytes, texts.spans, SECRET, self._keys, self._spans, self._hashes, self._numbers)


@borrowing
def hashed(buffer: Bytes, start: int, end: int, secret: np.uint64) -> np.uint64:
    """FNV-1a, 64 bits, from a secret on, its upper half folded into the lower."""
    found = secret
    for k in range(start, end):
        found = (found ^ np.uint64(buffer[k])) * np.uint64(1099511628211)
    return found ^ (found >> np.uint64(32))


@borrowing
def same(buffer: Bytes, start: int, end: int, others: Bytes, other_start: int, other_end: int) -> bool:
    """Whether two texts are the same bytes."""
    size, k = end - start, 0
    if size != other_end - other_start:
        return False
    while k < size and buffer[start + k] == others[other_start + k]:
        k += 1
    return k == size


@borrowing
def find(buffer: Bytes, start: int, end: int, secret: np.uint64, keys: Bytes, spans: Numbers, hashes: Hashes, numbers: Numbers) -> int:
    """The slot of a text that is a key, else -1."""
    wanted, mask = hashed(buffer, start, end, secret), len(numbers) - 1
    slot = np.int64(wanted & np.uint64(mask))
    while numbers[slot] != EMPTY:
        number = numbers[slot]
        if number >= 0 and hashes[slot] == wanted and same(buffer, start, end, keys, spans[number, 0], spans[number, 1]):
            return int(slot)
        slot = (slot + 1) & mask
    return -1


@borrowing
def insert(secret: np.uint64, keys: Bytes, spans: Numbers, added: Numbers, hashes: Hashes, numbers: Numbers) -> None:
    """Give the keys with the numbers ``added`` (m,), none of which is there, a slot each."""
    mask = len(numbers) - 1
    for number in added:
        wanted = hashed(keys, spans[number, 0], spans[number, 1], secret)
        slot = np.int64(wanted & np.uint64(mask))
        while numbers[slot] != EMPTY:
            slot = (slot + 1) & mask
        hashes[slot], numbers[slot] = wanted, number


@compiled
def repacked(keys: Bytes, spans: Numbers, left: Numbers) -> tuple[Bytes, int]:
    """The bytes of the keys that are ``left`` (m,), one after the other, with as much room behind them; changes their ``spans``."""
    end = 0
    for number in left:
        end += spans[number, 1] - spans[number, 0]
    packed = np.empty(2 * end + 1024, np.uint8)
    end = 0
    for number in left:
        start, stop = spans[number]
        for k in range(stop - start):
            packed[end + k] = keys[start + k]
        spans[number, 0] = end
        end += stop - start
        spans[number, 1] = end
    return packed, end


@compiled
def numbers_of(
    buffer: Bytes, texts: Numbers, secret: np.uint64, keys: Bytes, spans: Numbers, hashes: Hashes, numbers: Numbers
) -> tuple[Numbers, int]:
    """As `Index.of`, of texts (n, 2) in ``buffer``."""
    found, unknown = np.empty(len(texts), np.int64), 0
    for place in range(len(texts)):
        slot = find(buffer, texts[place, 0], texts[place, 1], secret, keys, spans, hashes, numbers)
        found[place] = numbers[slot] if slot >= 0 else -1
        unknown += slot < 0
    return found, unknown


@borrowing
def holds(buffer: Bytes, texts: Numbers, text: Bytes) -> bool:
    """Whether one of the texts (n, 2) in ``buffer`` is this one."""
    found = False
    for place in range(len(texts)):
        found = found or same(buffer, texts[place, 0], texts[place, 1], text, 0, len(text))
    return found


@compiled
def last_of_each(buffer: Bytes, texts: Numbers, secret: np.uint64) -> Numbers:
    """As `Texts.last`, of texts (n, 2) in ``buffer``."""
    slots = 16
    while slots < 2 * len(texts):
        slots *= 2
    seen, hashes, last = np.full(slots, EMPTY, np.int64), np.zeros(slots, np.uint64), np.zeros(len(texts), np.bool_)
    for place in range(len(texts) - 1, -1, -1):
        start, end = texts[place]
        wanted = hashed(buffer, start, end, secret)
        slot, mask = np.int64(wanted & np.uint64(slots - 1)), slots - 1
        known = False
        while seen[slot] != EMPTY and not known:
            other = seen[slot]
            known = hashes[slot] == wanted and same(buffer, start, end, buffer, texts[other, 0], texts[other, 1])
            slot = (slot + 1) & mask
        if not known:
            seen[slot], hashes[slot], last[place] = place, wanted, True
    return last.nonzero()[0]


@borrowing
def byte(buffer: Bytes, at: int) -> int:
    """A byte as an integer with a sign: of one without, added to one with, Numba makes a float."""
    return int(np.int64(buffer[at]))


@compiled
def rows_of(buffer: Bytes, at: int) -> tuple[Numbers, Ratings, int]:
    """The rows of a MessagePack array, each an array of a text, a float and an integer: where texts are (n, 2), the floats (n,), the end.

    The array begins at ``at`` and has fewer than 65,536 rows. The end is -1 where there is anything else, a text that is not ASCII, or
    too little.
    """
    left, count = len(buffer), -1
    if at < left and 0x90 <= buffer[at] <= 0x9F:
        count, at = byte(buffer, at) & 0x0F, at + 1
    elif at + 2 < left and buffer[at] == 0xDC:
        count, at = (byte(buffer, at + 1) << 8) | byte(buffer, at + 2), at + 3
    spans, floats = np.empty((max(0, count), 2), np.int64), np.empty(max(0, count), np.float64)
    bits = floats.view(np.uint64)
    if count < 0:
        return spans, floats, -1
    for place in range(count):
        if at + 2 > left or buffer[at] != 0x93:
            return spans, floats, -1
        kind, size = byte(buffer, at + 1), 0
        at += 2
        if 0xA0 <= kind <= 0xBF:
            size = kind & 0x1F
        elif kind == 0xD9 and at < left:
            size, at = byte(buffer, at), at + 1
        elif kind == 0xDA and at + 1 < left:
            size, at = (byte(buffer, at) << 8) | byte(buffer, at + 1), at + 2
        else:
            return spans, floats, -1
        spans[place] = at, at + size
        above = np.uint8(0)
        for k in range(at, min(at + size, left)):
            above |= buffer[k]
        at += size
        if above >= 0x80 or at + 10 > left or buffer[at] != 0xCB:
            return spans, floats, -1
        bits[place] = 0
        for k in range(8):
            bits[place] = (bits[place] << np.uint64(8)) | np.uint64(buffer[at + 1 + k])
        kind = byte(buffer, at + 9)
        at += 10
        if 0xCC <= kind <= 0xD3:  # 1, 2, 4 or 8 bytes, without a sign or with one
            at += 1 << ((kind - 0xCC) & 3)
        elif 0x80 <= kind < 0xE0:
            return spans, floats, -1
        if at > left:
            return spans, floats, -1
    return spans, floats, at
