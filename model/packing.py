"""MessagePack of texts, read and written where it lies, as loops that Numba compiles: what one is not sure of is left to the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from model.compiled import borrowing, compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Numbers = NDArray[np.int64]
    Ratings = NDArray[np.float64]


@borrowing
def byte(buffer: Bytes, at: int) -> int:
    """A byte as an integer with a sign: of one without, added to one with, Numba makes a float."""
    return int(np.int64(buffer[at]))


@borrowing
def begin_of(buffer: Bytes, at: int) -> tuple[int, int]:
    """How many elements, fewer than 65,536, the MessagePack array that begins at ``at`` has, -1 if none begins, and where the first is."""
    left = len(buffer)
    if at < left and 0x90 <= buffer[at] <= 0x9F:
        return byte(buffer, at) & 0x0F, at + 1
    if at + 2 < left and buffer[at] == 0xDC:
        return (byte(buffer, at + 1) << 8) | byte(buffer, at + 2), at + 3
    return -1, at


@borrowing
def text_at(buffer: Bytes, at: int) -> tuple[int, int]:
    """Where the MessagePack text whose head stands at ``at`` begins and ends; the end is -1 if it is none, not ASCII, or cut short."""
    left = len(buffer)
    if at >= left:
        return at, -1
    kind, at = byte(buffer, at), at + 1
    if 0xA0 <= kind <= 0xBF:
        end = at + (kind & 0x1F)
    elif kind == 0xD9 and at < left:
        at, end = at + 1, at + 1 + byte(buffer, at)
    elif kind == 0xDA and at + 1 < left:
        at, end = at + 2, at + 2 + ((byte(buffer, at) << 8) | byte(buffer, at + 1))
    else:
        return at, -1
    if end > left:
        return at, -1
    above = np.uint8(0)
    for k in range(at, end):
        above |= buffer[k]
    return at, end if above < 0x80 else -1


@compiled
def texts_of(buffer: Bytes, at: int) -> tuple[Numbers, int]:
    """Where the texts of a MessagePack array that begins at ``at`` are, (n, 2), and its end, -1 as in `rows_of`."""
    count, at = begin_of(buffer, at)
    spans = np.empty((max(0, count), 2), np.int64)
    if count < 0:
        return spans, -1
    for place in range(count):
        start, at = text_at(buffer, at)
        if at < 0:
            return spans, -1
        spans[place, 0], spans[place, 1] = start, at
    return spans, at


@compiled
def rows_of(buffer: Bytes, at: int) -> tuple[Numbers, Ratings, int]:
    """The rows of a MessagePack array, each an array of a text, a float and an integer: where texts are (n, 2), the floats (n,), the end.

    The array begins at ``at`` and has fewer than 65,536 rows. The end is -1 where there is anything else, a text that is not ASCII, or
    too little.
    """
    left, (count, at) = len(buffer), begin_of(buffer, at)
    spans, floats = np.empty((max(0, count), 2), np.int64), np.empty(max(0, count), np.float64)
    bits = floats.view(np.uint64)
    if count < 0:
        return spans, floats, -1
    for place in range(count):
        if at >= left or buffer[at] != 0x93:
            return spans, floats, -1
        start, at = text_at(buffer, at + 1)
        if at < 0 or at + 10 > left or buffer[at] != 0xCB:
            return spans, floats, -1
        spans[place, 0], spans[place, 1] = start, at
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


@compiled
def array_of(buffer: Bytes, texts: Numbers) -> Bytes:
    """Texts (n, 2) in ``buffer`` as an array of MessagePack's, of fewer than 2^32 of as many bytes."""
    into = np.empty(5 + (texts[:, 1] - texts[:, 0]).sum() + 5 * len(texts), np.uint8)
    at = head(into, 0, len(texts), 0x90, 16, 0xDC - 1)
    for place in range(len(texts)):
        start, end = texts[place, 0], texts[place, 1]
        at = head(into, at, end - start, 0xA0, 32, 0xD9)
        for k in range(start, end):
            into[at] = buffer[k]
            at += 1
    return into[:at]


@borrowing
def head(into: Bytes, at: int, size: int, short: int, shorter: int, long: int) -> int:
    """Write how an array or a text of this size begins; returns where it goes on.

    A size below ``shorter`` stands in the code ``short`` itself, another behind the code ``long``, in a byte, or behind one of the next
    two, in two bytes or in four. Arrays have no code for one byte.
    """
    width = 0 if size < shorter else 1 if size < 1 << 8 and long == 0xD9 else 2 if size < 1 << 16 else 4
    if not width:
        into[at] = short | size
        return at + 1
    into[at] = long + width // 2
    for k in range(width):
        into[at + width - k] = (size >> (8 * k)) & 0xFF
    return at + 1 + width
