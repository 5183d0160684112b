"""The codec of system records, and of arrays, against msgpack and numpy on their own."""

from __future__ import annotations

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streaming import events
from streaming.codec import DTYPES, array, decode, encode, tensor
from streaming.errors import FormatMismatch, Malformed

SCORE = events.Score(
    user="196",
    item="242",
    score=3.5,
    sd=None,
    source=("interactions", 3, 17),
    model_version=4,
    support_size=2,
    earlier=2,
    step=16,
    timestamp=881250949000,
)


def test_a_record_is_a_map_with_the_names_of_the_contract() -> None:
    fields = msgpack.unpackb(encode(SCORE))
    assert fields == {
        "user": "196",
        "item": "242",
        "score": 3.5,
        "sd": None,
        "source": ["interactions", 3, 17],
        "model_version": 4,
        "support_size": 2,
        "earlier": 2,
        "step": 16,
        "timestamp": 881250949000,
        "format": 1,
    }
    assert decode(encode(SCORE), events.Score, what="a score") == SCORE


def test_equal_records_give_equal_bytes_whatever_the_order_of_their_maps() -> None:
    def version(folded: dict[int, int], tensors: dict[str, events.Tensor]) -> events.Version:
        return events.Version(2, 1, folded, "s", tensors, {}, 10, 5)

    a, b = tensor(np.zeros(2, np.float32)), tensor(np.ones(3, np.int64))
    one = version({0: 5, 1: 7, 10: 1}, {"a": a, "b": b})
    other = version({10: 1, 1: 7, 0: 5}, {"b": b, "a": a})
    assert encode(one) == encode(other)
    assert decode(encode(other), events.Version, what="a version") == one


int64 = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False)
sources = st.tuples(st.text(), int64, int64)
formats = st.just(1) | int64
features = st.dictionaries(st.text(), numbers | st.text() | st.lists(st.text()))


@given(
    st.builds(events.Support, st.lists(st.tuples(st.text(), numbers, int64)), sources, int64, int64, formats)
    | st.builds(
        events.Position,
        int64,
        int64,
        int64,
        st.dictionaries(st.text(), int64),
        st.text(),
        st.lists(st.tuples(st.binary(), int64)),
        formats,
    )
    | st.builds(events.Profile, features)
)
def test_records_come_back_as_they_went(record: msgspec.Struct) -> None:
    if getattr(record, "format", 1) != 1:
        with pytest.raises(FormatMismatch):
            decode(encode(record), type(record), what="it")
    else:
        assert decode(encode(record), type(record), what="it") == record


@pytest.mark.parametrize("change", [{}, {"score": "gone", "new": [1]}])
def test_another_format_is_named_even_if_its_fields_are_others(change: dict[str, object]) -> None:
    fields = msgpack.unpackb(encode(SCORE)) | {"format": 7} | change
    with pytest.raises(FormatMismatch, match=r"scores\[3\] at offset 9: found format 7, expected 1"):
        decode(msgpack.packb(fields), events.Score, what="scores[3] at offset 9")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty"),
        (b"", "not-decodable"),
        (b"\x91" * 100_000, "wrong-type"),
        (b"\x81\xa3new" + b"\x91" * 100_000, "too-deep"),
        (b"\x81\xa4user\xa1\xff", "invalid-utf8"),
        (encode(SCORE)[:-1], "not-decodable"),
        (encode(SCORE) + b"\x00", "not-decodable"),
        (msgpack.packb({"user": 3}), "wrong-type"),
    ],
)
def test_what_is_no_such_record_is_malformed(value: bytes | None, reason: str) -> None:
    with pytest.raises(Malformed, match="a score") as caught:
        decode(value, events.Score, what="a score")
    assert caught.value.reason == reason


def test_unknown_fields_are_ignored() -> None:
    fields = msgpack.unpackb(encode(SCORE)) | {"new": {"a": [1, 2]}}
    assert decode(msgpack.packb(fields), events.Score, what="a score") == SCORE


@given(
    hnp.arrays(
        st.sampled_from(sorted(DTYPES)).map(np.dtype),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_arrays_come_back_as_they_went(values: np.ndarray) -> None:
    sent = events.Tensor(**msgpack.unpackb(msgspec.msgpack.encode(tensor(values))))
    back = array(sent)
    assert back.dtype == values.dtype
    assert back.shape == values.shape
    np.testing.assert_array_equal(back, values)


def test_arrays_travel_little_endian_in_c_order() -> None:
    values = np.asfortranarray(np.array([[1, 2], [3, 4]], dtype=">i4"))
    assert tensor(values).data == bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])
    assert np.shares_memory(array(t := tensor(values)), np.frombuffer(t.data, np.uint8)), "an array is read without a copy"


def test_other_element_types_are_not_written() -> None:
    with pytest.raises(TypeError, match="complex64"):
        tensor(np.zeros(2, np.complex64))
    with pytest.raises(TypeError, match="object"):
        tensor(np.array([object()]))


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("object", (1,), bytes(8)),
        ("float32", (2,), bytes(7)),
        ("float32", (-1,), bytes(8)),
        ("float32", (-1, -2), bytes(8)),
        ("float32", (10**18, 10**18), b""),
        ("float32", (0, 10**30), b""),
        ("uint8", (1,) * 40, bytes(1)),
        ("bool", (2,), b"\x00\x02"),
    ],
)
def test_a_tensor_that_lies_about_itself_is_malformed(dtype: str, shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(Malformed, match="wrong-type"):
        array(events.Tensor(dtype, shape, data))
