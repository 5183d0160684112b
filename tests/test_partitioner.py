from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.partitioner import murmur2, partition_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # kafka-python 3.0.12 reads its own protocol schemas by an old name.
    from kafka.partitioner.default import murmur2 as kafka_murmur2


# From Apache Kafka's own UtilsTest.testMurmur2, there as signed 32-bit numbers.
@pytest.mark.parametrize(
    ("key", "signed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_hashes_are_those_of_java(key: bytes, signed: int) -> None:
    assert murmur2(key) == signed % 2**32


@given(st.binary(max_size=400), st.integers(1, 4096))
def test_keys_are_placed_as_kafka_python_places_them(key: bytes, partitions: int) -> None:
    assert murmur2(key) == kafka_murmur2(key)
    for _ in range(2):  # Computed and remembered.
        assert partition_of(key, partitions) == (kafka_murmur2(key) & 0x7FFFFFFF) % partitions


@pytest.mark.parametrize("partitions", [1, 7])
def test_no_key_is_partition_0(partitions: int) -> None:
    assert partition_of(None, partitions) == 0
