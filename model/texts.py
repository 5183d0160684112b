"""Many short texts that lie in one buffer, as records hold them, and their numbers, found without making a Python object of each.

A rehearsed user's support set is a hundred ids, an update names a thousand rows: made into texts, and these looked up in a dictionary, they
take longer than what is computed from them.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from model.compiled import borrowing, compiled
from model.numbering import packed
from model.packing import array_of, rows_of
from model.registers import ask_for
from model.words import loaded, mixed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Hashes = NDArray[np.uint64]
    Numbers = NDArray[np.int64]
    Ratings = NDArray[np.float64]

EMPTY = 0
REMOVED = 1
FIRST = 2
"""What stands in the lower half of a slot: nothing, that a key was here, or the number of one, from `FIRST` on."""

WHOLE, ODD = np.uint64(2**64 - 1), np.uint64(0x9E3779B97F4A7C15)
"""All bits of a word; what hashes multiply by, whose bits look like chance."""

TOGETHER = 256
"""Texts that are looked up side by side, few enough for what is asked for to stay in the nearest cache."""

LOOSE = 64
"""Bytes of a buffer for each of its texts, up to which it is read as a whole."""

SECRET = np.uint64(secrets.randbits(64))
"""Where hashes begin in this process: nobody can send ids that all fall on the same slots."""


class Texts(Sequence[str]):
    """Texts in UTF-8: ``spans`` (n, 2) says where in ``buffer`` each begins and ends. One is made only when it is asked for."""

    __slots__ = ("bounds", "buffer")

    def __init__(self, buffer: bytes | Bytes, spans: Numbers | array[int]) -> None:
        self.buffer = buffer
        self.bounds = spans if isinstance(spans, array) else spans.ravel()
        """The spans, one number after the other: as an array of Python's where texts are few, of which many are `joined` sooner."""

    def __len__(self) -> int:
        return len(self.bounds) // 2

    @property
    def spans(self) -> Numbers:
        """Where each begins and ends, (n, 2)."""
        return np.frombuffer(self.bounds, np.int64).reshape(-1, 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            spans = self.spans[place].tolist()
            # Where the whole buffer is not much more than its texts, one text of it all, cut, if all are ASCII: three fifths of the time.
            if isinstance(self.buffer, bytes) and len(self.buffer) <= LOOSE * len(spans):
                whole = self.buffer.decode("latin-1")
                cut = [whole[start:end] for start, end in spans]
                if "".join(cut).isascii():
                    return cut
            return [bytes(self.buffer[start:end]).decode() for start, end in spans]
        start, end = self.spans[place].tolist()
        return bytes(self.buffer[start:end]).decode()

    def packed(self) -> bytes:
        """The texts as an array of MessagePack's."""
        return bytes(array_of(self.bytes, self.spans))

    @property
    def bytes(self) -> Bytes:
        """The buffer as an array, always one that cannot be written: loops are compiled for each of the two kinds."""
        found = np.frombuffer(self.buffer, np.uint8)
        found.flags.writeable = False
        return found


def joined(parts: Sequence[Texts]) -> Texts:
    """The texts of all parts, in one buffer. What else lies in theirs is copied with them."""
    # Arrays are as good as bytes here, but for their types.
    buffers, bounds = cast("list[bytes]", [part.buffer for part in parts]), cast("list[bytes]", [part.bounds for part in parts])
    sizes, counts = (packed(map(len, each), len(parts), np.int64) for each in (buffers, bounds))
    # Of arrays that small, half the time that numpy takes to put them together.
    together = np.frombuffer(bytearray().join(bounds), np.int64)
    shift(together, sizes, counts)
    return Texts(b"".join(buffers), together)


@compiled
def shift(bounds: Numbers, sizes: Numbers, counts: Numbers) -> None:
    """Move bounds (n,), so many of each part, by the sizes (parts,) of all parts before."""
    place = start = 0
    for part in range(len(sizes)):
        for _ in range(counts[part]):
            bounds[place] += start
            place += 1
        start += sizes[part]


class Index:
    """Numbers of keys, as a dictionary holds them, for keys that come as `Texts`. Numbers are small: there is room for each.

    Open addressing: the search for a key begins at its hash and ends at an empty slot. A slot has the upper half of a key's hash, and its
    number, so that most other keys are passed over without a look at their bytes. Slots and bytes of removed keys are given back when half
    of the slots are used. Numbers are below 2^32 - 2.
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
        if 2 * (self._used + 1) > len(self._slots):
            left = numbers_in(self._slots)
            self._keys, self._end = repacked(self._keys, self._spans, left)
            self._fill(left)
        while self._end + len(encoded) > len(self._keys):
            self._keys = np.concatenate([self._keys, np.empty_like(self._keys)])
        while number >= len(self._spans):
            self._spans = np.concatenate([self._spans, np.zeros_like(self._spans)])
        self._keys[self._end : self._end + len(encoded)] = encoded
        self._spans[number] = self._end, self._end + len(encoded)
        self._end += len(encoded)
        insert(SECRET, self._keys, self._spans, np.array([number]), self._slots)
        self._used += 1

    def _fill(self, given: Numbers) -> None:
        """Slots anew, four to eight for each key."""
        self._slots, self._used = np.zeros(1 << max(6, (4 * len(given)).bit_length()), np.uint64), len(given)
        insert(SECRET, self._keys, self._spans, given, self._slots)

    def remove(self, key: str) -> None:
        """Drop a key."""
        encoded = np.frombuffer(key.encode(), np.uint8)
        wanted = np.uint64(hashed(encoded, 0, len(encoded), SECRET))
        slot = find(encoded, 0, len(encoded), wanted, self._keys, self._spans, self._slots)
        if slot >= 0:
            self._slots[slot] = REMOVED

    def of(self, texts: Texts) -> tuple[Numbers, int]:
        """The number of each text, (n,), -1 for one that is no key; and how many are none."""
        return numbers_of(texts.bytes, texts.spans, SECRET, self._keys, self._spans, self._slots)

    def texts(self, numbers: Numbers) -> Texts:
        """The keys with these numbers, (n,). They stay what they are: nothing is ever written over the bytes of a key."""
        return Texts(self._keys, self._spans.take(numbers, 0))


@borrowing
def word(buffer: Bytes, at: int, end: int) -> np.uint64:
    """The bytes of a text from ``at`` to its ``end``, eight at most, as a number, the first lowest; nothing outside the buffer is read."""
    size = min(8, end - at)
    if at + 8 <= len(buffer):
        return loaded(buffer, at) & (WHOLE >> np.uint64(64 - 8 * size))
    if at + size >= 8:
        return loaded(buffer, at + size - 8) >> np.uint64(64 - 8 * size)
    found = np.uint64(0)
    for k in range(size):
        found |= np.uint64(buffer[at + k]) << np.uint64(8 * k)
    return found


@borrowing
def hashed(buffer: Bytes, start: int, end: int, secret: np.uint64) -> np.uint64:
    """From a secret on, of each eight bytes: xor, times an odd number, the halves of the product xor each other (as wyhash mixes)."""
    found = secret ^ np.uint64(end - start)
    for at in range(start, end, 8):
        found = mixed(found ^ word(buffer, at, end), ODD)
    return found


@borrowing
def same(buffer: Bytes, start: int, end: int, others: Bytes, other_start: int, other_end: int) -> bool:
    """Whether two texts are the same bytes."""
    size = end - start
    if size != other_end - other_start:
        return False
    # Most are short, and apart from the rest this becomes part of whoever asks: a third of the time.
    if 0 < size <= 8 and start + 8 <= len(buffer) and other_start + 8 <= len(others):
        return bool((loaded(buffer, start) ^ loaded(others, other_start)) & (WHOLE >> np.uint64(64 - 8 * size)) == 0)
    return same_words(buffer, start, end, others, other_start)


@borrowing
def same_words(buffer: Bytes, start: int, end: int, others: Bytes, other_start: int) -> bool:
    """As `same`, of texts of one length, any, anywhere."""
    at, beside = start, other_start - start
    while at < end and word(buffer, at, end) == word(others, at + beside, end + beside):
        at += 8
    return at >= end


@borrowing
def same_half(word: np.uint64, wanted: np.uint64) -> bool:
    """Whether a slot is of a key, with the upper half of this hash."""
    return bool((word ^ wanted) >> np.uint64(32) == 0 and word & np.uint64(0xFFFFFFFF) >= np.uint64(FIRST))


@borrowing
def number_in(word: np.uint64) -> int:
    """The number of the key in a slot."""
    return int(np.int64(word & np.uint64(0xFFFFFFFF))) - FIRST


@borrowing
def find(buffer: Bytes, start: int, end: int, wanted: np.uint64, keys: Bytes, spans: Numbers, slots: Hashes) -> int:
    """The slot of a text with this hash that is a key, else -1."""
    mask = len(slots) - 1
    slot = np.int64(wanted & np.uint64(mask))
    while slots[slot] != EMPTY:
        word = slots[slot]
        if same_half(word, wanted):
            number = number_in(word)
            if same(buffer, start, end, keys, spans[number, 0], spans[number, 1]):
                return int(slot)
        slot = (slot + 1) & mask
    return -1


@borrowing
def insert(secret: np.uint64, keys: Bytes, spans: Numbers, added: Numbers, slots: Hashes) -> None:
    """Give the keys with the numbers ``added`` (m,), none of which is there, a slot each."""
    mask = len(slots) - 1
    for number in added:
        wanted = hashed(keys, spans[number, 0], spans[number, 1], secret)
        slot = np.int64(wanted & np.uint64(mask))
        while slots[slot] != EMPTY:
            slot = (slot + 1) & mask
        slots[slot] = (wanted >> np.uint64(32) << np.uint64(32)) | np.uint64(number + FIRST)


@compiled
def numbers_in(slots: Hashes) -> Numbers:
    """The numbers of all keys."""
    found, count = np.empty(len(slots), np.int64), 0
    for word in slots:
        if word & np.uint64(0xFFFFFFFF) >= np.uint64(FIRST):
            found[count] = number_in(word)
            count += 1
    return found[:count]


@compiled
def repacked(keys: Bytes, spans: Numbers, left: Numbers) -> tuple[Bytes, int]:
    """The bytes of the keys that are ``left`` (m,), one after the other, with as much room behind them; changes their ``spans``."""
    end = 0
    for number in left:
        end += spans[number, 1] - spans[number, 0]
    packed = np.empty(2 * end + 1024, np.uint8)
    end = 0
    for number in left:
        start, stop = spans[number, 0], spans[number, 1]
        for k in range(stop - start):
            packed[end + k] = keys[start + k]
        spans[number, 0] = end
        end += stop - start
        spans[number, 1] = end
    return packed, end


@compiled
def numbers_of(buffer: Bytes, texts: Numbers, secret: np.uint64, keys: Bytes, spans: Numbers, slots: Hashes) -> tuple[Numbers, int]:
    """As `Index.of`, of texts (n, 2) in ``buffer``.

    In passes, each of which asks for what the next reads: of a million keys nothing is in the processor's caches, and what is asked for at
    the same time is waited for once.
    """
    count, mask = len(texts), np.uint64(len(slots) - 1)
    wanted, found, unknown = np.empty(TOGETHER, np.uint64), np.empty(count, np.int64), 0
    for begin in range(0, count, TOGETHER):
        several = range(begin, min(begin + TOGETHER, count))
        for place in several:
            wanted[place - begin] = hashed(buffer, texts[place, 0], texts[place, 1], secret)
            ask_for(slots, int(np.int64(wanted[place - begin] & mask)))
        for place in several:
            hashes = wanted[place - begin]
            word = slots[np.int64(hashes & mask)]
            found[place] = number_in(word) if same_half(word, hashes) else -1
            ask_for(spans, max(0, found[place]))
        for place in several:
            ask_for(keys, spans[max(0, found[place]), 0])
        for place in several:
            start, end, number = texts[place, 0], texts[place, 1], found[place]
            if number < 0 or not same(buffer, start, end, keys, spans[number, 0], spans[number, 1]):
                # The slot is another key's, or empty.
                slot = find(buffer, start, end, wanted[place - begin], keys, spans, slots)
                found[place] = number_in(slots[slot]) if slot >= 0 else -1
                unknown += slot < 0
    return found, unknown


@compiled
def last_of_each(buffer: Bytes, texts: Numbers, secret: np.uint64) -> Numbers:
    """The places of those of the texts (n, 2) in ``buffer`` that do not come again, in order."""
    slots = 16
    while slots < 2 * len(texts):
        slots *= 2
    seen, hashes, last = np.full(slots, -1, np.int64), np.zeros(slots, np.uint64), np.zeros(len(texts), np.bool_)
    for place in range(len(texts) - 1, -1, -1):
        start, end = texts[place, 0], texts[place, 1]
        wanted = hashed(buffer, start, end, secret)
        slot, mask = np.int64(wanted & np.uint64(slots - 1)), slots - 1
        known = False
        while seen[slot] >= 0 and not known:
            other = seen[slot]
            known = hashes[slot] == wanted and same(buffer, start, end, buffer, texts[other, 0], texts[other, 1])
            slot = (slot + 1) & mask
        if not known:
            seen[slot], hashes[slot], last[place] = place, wanted, True
    return last.nonzero()[0]


@compiled
def last_rows_of(buffer: Bytes, at: int, secret: np.uint64) -> tuple[Numbers, Ratings, Numbers, int]:
    """As `rows_of`, of rows with the same text the last; and which of the rows these are."""
    texts, floats, end = rows_of(buffer, at)
    last = last_of_each(buffer, texts, secret) if end >= 0 else np.arange(0)
    if len(last) < len(texts):
        texts, floats = texts[last], floats[last]
    return texts, floats, last, end
