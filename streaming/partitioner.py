"""Which partition a key belongs to: murmur2, bit for bit as Java's and kafka-python's default partitioners place it."""

from __future__ import annotations

from functools import lru_cache

_SEED = 0x9747B28C
_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """The 32-bit MurmurHash2 of ``data`` with Kafka's seed, as an unsigned number."""
    h = _SEED ^ len(data)
    whole = len(data) & ~3
    for start in range(0, whole, 4):
        k = int.from_bytes(data[start : start + 4], "little") * _M & _MASK
        k = (k ^ k >> 24) * _M & _MASK
        h = h * _M & _MASK ^ k
    if tail := data[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * _M & _MASK
    h = (h ^ h >> 13) * _M & _MASK
    return h ^ h >> 15


@lru_cache(maxsize=65_536)
def _partition_of(key: bytes, partitions: int) -> int:
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def partition_of(key: bytes | None, partitions: int) -> int:
    """The partition, of ``partitions``, that holds ``key``. A message without a key goes to partition 0: runs stay reproducible."""
    if key is None or partitions == 1:
        return 0
    if len(key) > 256:  # A long key is no user; the cache stays small in bytes too.
        return (murmur2(key) & 0x7FFFFFFF) % partitions
    return _partition_of(key, partitions)
