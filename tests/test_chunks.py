"""Cutting large values and joining them again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.chunks import HEADER_BYTES, Joiner, split
from streaming.errors import ChunkError
from streaming.log import Record


def record(value: bytes | None, offset: int = 0, topic: str = "model", partition: int = 0) -> Record:
    return Record(topic, partition, offset, 0, None, value)


def join(pieces: list[bytes], joiner: Joiner | None = None) -> list[bytes | None]:
    joiner = joiner or Joiner()
    return [joiner.feed(record(piece, offset)) for offset, piece in enumerate(pieces)]


values = st.binary(max_size=400) | st.binary(max_size=200).map(lambda tail: b"\xc1" + tail)


@given(values, st.integers(HEADER_BYTES + 1, HEADER_BYTES + 80))
def test_any_value_comes_back_from_pieces_within_the_limit(value: bytes, limit: int) -> None:
    pieces = split(value, limit)
    assert all(len(piece) <= limit for piece in pieces)
    assert join(pieces) == [None] * (len(pieces) - 1) + [value]


@given(st.lists(values, min_size=1, max_size=4), st.integers(HEADER_BYTES + 1, HEADER_BYTES + 80))
def test_values_one_after_the_other_come_back_in_order(several: list[bytes], limit: int) -> None:
    joiner = Joiner()
    joined = [whole for value in several for whole in join(split(value, limit), joiner) if whole is not None]
    assert joined == several


def test_a_small_value_travels_as_it_is() -> None:
    assert split(b"\x80", 100) == [b"\x80"]
    assert split(b"", 100) == [b""]


@given(st.binary(min_size=60, max_size=300), st.data())
def test_with_a_piece_missing_nothing_is_joined(value: bytes, data: st.DataObject) -> None:
    pieces = split(value, HEADER_BYTES + 7)
    missing = data.draw(st.integers(0, len(pieces) - 1))
    joiner, joined = Joiner(), []
    for piece in [*pieces[:missing], *pieces[missing + 1 :], b"\x80"]:
        try:
            joined.append(joiner.feed(record(piece)))
        except ChunkError:
            joined.append(joiner.feed(record(b"\x80")))
    assert value not in joined
    if missing < len(pieces) - 1:
        with pytest.raises(ChunkError):
            join(pieces[missing + 1 :] if missing == 0 else [*pieces[:missing], *pieces[missing + 1 :]])


@given(st.binary(min_size=60, max_size=300), st.data())
def test_pieces_in_any_other_order_or_twice_are_refused(value: bytes, data: st.DataObject) -> None:
    pieces = split(value, HEADER_BYTES + 7)
    shuffled = st.permutations(range(len(pieces))).filter(lambda order: order != sorted(order))
    order = data.draw(shuffled | st.just([0, 0, *range(1, len(pieces))]))
    with pytest.raises(ChunkError):
        join([pieces[i] for i in order])


@given(st.binary(min_size=HEADER_BYTES + 51, max_size=300), st.data())
def test_a_flipped_bit_is_noticed(value: bytes, data: st.DataObject) -> None:
    pieces = split(value, HEADER_BYTES + 50)
    which = data.draw(st.integers(0, len(pieces) - 1))
    at = data.draw(st.integers(1, len(pieces[which]) - 1))
    damaged = bytearray(pieces[which])
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    pieces[which] = bytes(damaged)
    try:
        joined = join(pieces)
    except ChunkError:
        return
    assert value not in joined
    assert joined == [None] * len(pieces), "a damaged count leaves the value unfinished, nothing wrong is returned"


def test_another_value_between_is_refused_and_can_be_fed_again() -> None:
    first, second = split(b"a" * 100, 70), split(b"b" * 100, 70)
    joiner = Joiner()
    joiner.feed(record(first[0]))
    with pytest.raises(ChunkError, match=r"model\[0\] at offset 5: 1 of 3 chunks were here"):
        joiner.feed(record(second[0], 5))
    assert [joiner.feed(record(piece)) for piece in second] == [None, None, b"b" * 100]
    joiner.feed(record(first[0]))
    with pytest.raises(ChunkError, match="another value began"):
        joiner.feed(record(b"\x80"))
    assert joiner.feed(record(b"\x80")) == b"\x80"


def test_partitions_and_topics_do_not_disturb_each_other() -> None:
    first, second = split(b"a" * 100, 90), split(b"b" * 100, 90)
    joiner = Joiner()
    assert joiner.feed(record(first[0], partition=0)) is None
    assert joiner.feed(record(second[0], partition=1)) is None
    assert joiner.feed(record(b"\x80", topic="updates")) == b"\x80"
    assert joiner.feed(record(first[1], partition=0)) == b"a" * 100
    assert joiner.feed(record(second[1], partition=1)) == b"b" * 100


def test_what_is_joined_is_bounded_before_it_is_held() -> None:
    with pytest.raises(ChunkError, match="a value of 1000 bytes, more than the 999 allowed"):
        join(split(bytes(1000), 100), Joiner(max_bytes=999))


def test_nulls_and_headers_cut_short_are_refused() -> None:
    with pytest.raises(ChunkError, match="null"):
        Joiner().feed(record(None))
    with pytest.raises(ChunkError, match="shorter than its header"):
        Joiner().feed(record(b"\xc1\x01"))
    with pytest.raises(ChunkError, match="layout 9"):
        Joiner().feed(record(b"\xc1\x09" + bytes(100)))


def test_a_limit_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        split(bytes(100), HEADER_BYTES)
