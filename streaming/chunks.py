"""Values larger than a broker takes are cut into chunks, and joined again by who reads them.

A chunk is a header and a slice of the value. It starts with 0xC1, the one byte that MessagePack never uses, so a record's first byte
says whether it is a chunk; a small value travels as it is. All chunks of a value stand one after the other in one partition.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, NamedTuple

from streaming.errors import ChunkError
from streaming.log import present

if TYPE_CHECKING:
    from streaming.log import Log, Record, TopicPartition

_MARK = 0xC1
_LAYOUT = 1
_header = struct.Struct("<BBIIQ16s")  # mark, layout, number, total, length of the whole value, its digest

HEADER_BYTES = _header.size
"""What each chunk adds to its slice."""


class _Header(NamedTuple):
    mark: int
    layout: int
    number: int
    total: int
    length: int
    digest: bytes


def _digest(value: bytes | bytearray) -> bytes:
    return hashlib.blake2b(value, digest_size=16).digest()


def split(value: bytes, limit: int) -> list[bytes]:
    """Return ``value`` as pieces of at most ``limit`` bytes, to be written in this order to one partition.

    A value that fits comes back as the only piece. ``limit`` is what the topic allows less the longest key that the pieces get.
    Raises ValueError if ``limit`` leaves no room beside the header.
    """
    if limit <= HEADER_BYTES:
        raise ValueError(f"a limit of {limit} bytes leaves no room beside a chunk's header of {HEADER_BYTES}")
    if len(value) <= limit and value[:1] != bytes([_MARK]):
        return [value]
    step = limit - HEADER_BYTES
    slices = [value[start : start + step] for start in range(0, len(value), step)]
    digest = _digest(value)
    return [_header.pack(_MARK, _LAYOUT, index, len(slices), len(value), digest) + part for index, part in enumerate(slices)]


class _Open:
    """A value of which some chunks have come."""

    def __init__(self, first: _Header) -> None:
        self.first = first
        self.next = 0
        self.data = bytearray()


class Joiner:
    """Joins the chunks of values, partition by partition. ``max_bytes`` bounds one joined value (default 1 GiB)."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._open: dict[tuple[str, int], _Open] = {}

    def feed(self, record: Record) -> bytes | None:
        """Take the next record of its partition; return the whole value once its last piece is here, until then None.

        Raises `ChunkError` for a record out of turn (a chunk is missing, or another value stands between) and for a damaged value. The
        unfinished value is then forgotten, so feeding the same record again starts anew. A topic cut by retention may start in the
        middle of a value: its reader skips by this error.
        """
        where = f"{record.topic}[{record.partition}] at offset {record.offset}"
        tp = (record.topic, record.partition)
        unfinished = self._open.pop(tp, None)
        if record.value is None:
            raise ChunkError(f"{where}: a null among chunks")
        if record.value[:1] != bytes([_MARK]):
            if unfinished is not None:
                raise ChunkError(f"{where}: {_progress(unfinished)} when another value began")
            return record.value
        header = self._header(record.value, where)
        if unfinished is None:
            if header.number != 0:
                raise ChunkError(f"{where}: chunk {header.number} of {header.total} without those before it")
            unfinished = _Open(header)
        elif header != unfinished.first._replace(number=unfinished.next):
            raise ChunkError(f"{where}: {_progress(unfinished)} when chunk {header.number} of another value came, or one was missing")
        unfinished.data += memoryview(record.value)[HEADER_BYTES:]
        unfinished.next += 1
        if len(unfinished.data) > header.length:
            raise ChunkError(f"{where}: chunks hold more than the {header.length} bytes they announce")
        if unfinished.next < header.total:
            self._open[tp] = unfinished
            return None
        if len(unfinished.data) != header.length or _digest(unfinished.data) != header.digest:
            raise ChunkError(f"{where}: the joined value of {len(unfinished.data)} bytes is damaged")
        return bytes(unfinished.data)

    def forget(self, topic: str, partition: int) -> None:
        """Drop what has come of a value of this partition: its rest will not come, or nobody wants it."""
        self._open.pop((topic, partition), None)

    def _header(self, value: bytes, where: str) -> _Header:
        if len(value) < HEADER_BYTES:
            raise ChunkError(f"{where}: a chunk of {len(value)} bytes is shorter than its header")
        header = _Header(*_header.unpack_from(value))
        if header.layout != _LAYOUT:
            raise ChunkError(f"{where}: found chunks of layout {header.layout}, expected {_LAYOUT}")
        if header.number >= header.total:
            raise ChunkError(f"{where}: chunk {header.number} of {header.total}")
        if header.length > self.max_bytes:
            raise ChunkError(f"{where}: a value of {header.length} bytes, more than the {self.max_bytes} allowed")
        return header


def last_value(log: Log, tp: TopicPartition, *, at_once: int = 64) -> tuple[Record, bytes] | None:
    """The last whole value of a partition, with the record of its last piece; None where there is none.

    However long the partition is, only its end is read: it may be cut into any number of records, so the look back, ``at_once`` records
    at first, grows until a whole one is found. Raises as `streaming.log.present`.
    """
    start, end = log.bounds([tp])[tp]
    back = at_once
    while True:
        since = max(start, end - back)
        joiner, found = Joiner(), None
        for record in present(log, [tp], at_once=at_once, since=since):
            try:
                value = joiner.feed(record)
            except ChunkError:
                continue  # The tail of a value that began before the look back.
            if value is not None:
                found = record, value
        if found is not None or since == start:
            return found
        back *= 4


def _progress(unfinished: _Open) -> str:
    return f"{unfinished.next} of {unfinished.first.total} chunks were here"
