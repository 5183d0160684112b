"""Interactions and profiles from outside: what is taken, what is refused and why, and that nothing else can happen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streaming.codec import decode
from streaming.deadletters import dead_letter_message
from streaming.errors import Malformed
from streaming.events import REASONS, DeadLetter, Interaction, Profile
from streaming.log import Record
from streaming.validation import Limits, decode_interaction, decode_profile

LIMITS = Limits()
EVENT: dict[str, Any] = {"user": "196", "item": "242", "rating": 3.0, "timestamp": 881250949000}
TAKEN = Interaction("196", "242", 3.0, 881250949000)


def record(value: bytes | None, key: bytes | None = b"196", partition: int = 0) -> Record:
    return Record("interactions", partition, 17, 0, key, value)


def pack(fields: object) -> bytes:
    return msgpack.packb(fields)


def text(fields: object) -> bytes:
    return json.dumps(fields).encode()


def taken(value: bytes | None, key: bytes | None = b"196", limits: Limits = LIMITS) -> Interaction:
    return decode_interaction(record(value, key), limits, partitions=1)


def refused(value: bytes | None, key: bytes | None = b"196", limits: Limits = LIMITS) -> Malformed:
    with pytest.raises(Malformed) as caught:
        taken(value, key, limits)
    assert caught.value.reason in REASONS
    return caught.value


Write = Callable[[object], bytes]
both = pytest.mark.parametrize("write", [pack, text])


@both
@pytest.mark.parametrize(
    "change",
    [{}, {"user": 196}, {"item": 242}, {"rating": 3}, {"timestamp": 881250949000.0}, {"new": [1, {"a": None}]}],
)
def test_an_interaction_is_taken_in_both_forms(write: Write, change: dict[str, Any]) -> None:
    assert taken(write(EVENT | change)) == TAKEN


def test_json_may_stand_in_white_space() -> None:
    assert taken(b" \r\n\t" * 30 + text(EVENT) + b"\n") == TAKEN


@both
def test_unknown_fields_are_counted_once_the_event_is_taken(write: Write) -> None:
    seen: list[int] = []
    decode_interaction(record(write(EVENT | {"a": 1, "b": 2})), LIMITS, seen.append, partitions=1)
    decode_interaction(record(write(EVENT)), LIMITS, seen.append, partitions=1)
    with pytest.raises(Malformed):
        decode_interaction(record(write(EVENT | {"a": 1, "rating": 9})), LIMITS, seen.append, partitions=1)
    assert seen == [2]


@both
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": None}, "wrong-type"),
        ({"user": True}, "wrong-type"),
        ({"user": 1.0}, "wrong-type"),
        ({"user": ["196"]}, "wrong-type"),
        ({"user": ""}, "bad-id"),
        ({"item": " 242"}, "bad-id"),
        ({"item": "242\u2003"}, "bad-id"),
        ({"item": "2\x0042"}, "bad-id"),
        ({"item": "2\x8542"}, "bad-id"),
        ({"item": "x" * 257}, "bad-id"),
        ({"item": "é" * 129}, "bad-id"),
        ({"item": "x" * 1_000_000}, "too-large"),
        ({"rating": "3"}, "wrong-type"),
        ({"rating": True}, "wrong-type"),
        ({"rating": None}, "wrong-type"),
        ({"rating": math.nan}, "rating-off-scale"),
        ({"rating": math.inf}, "rating-off-scale"),
        ({"rating": 1e308}, "rating-off-scale"),
        ({"rating": 0.999}, "rating-off-scale"),
        ({"rating": 2**64 - 1}, "rating-off-scale"),
        ({"timestamp": -62_135_596_800_000}, "timestamp-out-of-range"),  # the year 1
        ({"timestamp": 253_402_300_799_000}, "timestamp-out-of-range"),  # the year 9999
        ({"timestamp": 0}, "timestamp-out-of-range"),
        ({"timestamp": 2**64 - 1}, "timestamp-out-of-range"),
        ({"timestamp": 881250949000.5}, "wrong-type"),
        ({"timestamp": math.nan}, "wrong-type"),
        ({"timestamp": True}, "wrong-type"),
        ({"timestamp": "1997-12-04"}, "wrong-type"),
        ({str(n): 0 for n in range(7_000)}, "too-many-features"),
        ({str(n): 0 for n in range(10_000)}, "too-large"),
        ({"a": [[[[[[[[]]]]]]]]}, "too-deep"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {}}}}}}}}}, "too-deep"),
    ],
)
def test_a_wrong_field_is_refused_with_its_reason(write: Write, change: dict[str, Any], reason: str) -> None:
    error = refused(write(EVENT | change))
    if reason == "too-large" or (reason == "too-many-features" and write is text):
        assert error.reason in {"too-large", "too-many-features"}
    else:
        assert error.reason == reason
        assert reason.startswith("too-") or next(iter(change)) in error.detail


def test_the_depth_that_is_allowed_is_taken() -> None:
    for write in (pack, text):
        assert taken(write(EVENT | {"a": [[[[[[[0]]]]]]]})) == TAKEN
        assert taken(write(EVENT | {"a": ["[{" * 50] * 3, "b": '\\"[[['})) == TAKEN, "brackets in strings are no nesting"


@both
@pytest.mark.parametrize("field", EVENT)
def test_a_missing_field_is_named(write: Write, field: str) -> None:
    error = refused(write({name: value for name, value in EVENT.items() if name != field}))
    assert (error.reason, error.detail) == ("missing-field", field)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "empty"),
        (b"", "empty"),
        (b"\xc1", "not-decodable"),
        (pack(EVENT)[:-1], "not-decodable"),
        (pack(EVENT) + b"\x00", "not-decodable"),
        (text(EVENT)[:-1], "not-decodable"),
        (text(EVENT) + b"{}", "not-decodable"),
        (b'{"user": }', "not-decodable"),
        (b'{"user": "' + b'\\"' * 30_000, "not-decodable"),
        (b"\xdf\xff\xff\xff\xff", "not-decodable"),
        (b"\x81\x01\x02", "not-decodable"),
        (b"\xd4\xff\x00", "not-decodable"),
        (pack([EVENT]), "not-a-map"),
        (pack("text"), "not-a-map"),
        (pack(7), "not-a-map"),
        (pack({**EVENT, "user": b"196"}), "wrong-type"),
        (pack({**EVENT, "timestamp": msgpack.Timestamp(1)}), "wrong-type"),
        (pack(EVENT).replace(b"196", b"\xff96"), "invalid-utf8"),
        (text(EVENT).replace(b"196", b"\xff96"), "invalid-utf8"),
        (text(EVENT).replace(b"196", b"\\ud80096"), "invalid-utf8"),
        (text(EVENT).replace(b"3.0", b"1e999"), "rating-off-scale"),
        (text(EVENT).replace(b"3.0", b"1" + b"0" * 390), "rating-off-scale"),
        (text(EVENT).replace(b"3.0", b"1" + b"0" * 60_000), "wrong-type"),
        (text(EVENT).replace(b'"196"', b"1" + b"0" * 390), "bad-id"),
        (text(EVENT).replace(b"881250949000", b"1" + b"0" * 390), "timestamp-out-of-range"),
        (text(EVENT)[:-1] + b', "user": "196"}', "duplicate-field"),
        (text(EVENT)[:-1] + b', "us\\u0065r": "7"}', "duplicate-field"),
        (b"\x85" + pack(EVENT)[1:] + pack("user") + pack("7"), "duplicate-field"),
        (b"\x84" + pack("user") + pack("7") + pack({k: v for k, v in EVENT.items() if k != "item"})[1:], "duplicate-field"),
    ],
)
def test_bytes_that_are_no_event_are_refused(value: bytes | None, reason: str) -> None:
    assert refused(value).reason == reason


@pytest.mark.parametrize(
    "opening",
    [b"\x91", b"\x81\xa1a", b"\x84\xa4user\x91", b'{"a":', b"[", b'{"user":[', b"\xdd\x00\x00\x00\x01", b'{"a":[{'],
)
@pytest.mark.parametrize("depth", [100, 600, 100_000])
def test_nesting_bombs_are_refused_at_once(opening: bytes, depth: int) -> None:
    began = time.perf_counter()
    generous = Limits(max_event_bytes=10_000_000)
    for bomb in (opening * depth, b"\x81\xa1a" + opening * depth, b'{"a":' + opening * depth, opening * depth + b"]}" * depth):
        refused(bomb, limits=generous)
    assert time.perf_counter() - began < 5


def test_the_key_is_the_user() -> None:
    for key in (None, b"", b"242", b"196 "):
        assert refused(pack(EVENT), key).reason == "wrong-key"
    assert taken(pack(EVENT | {"user": "Zoë"}), "Zoë".encode()).user == "Zoë"
    assert taken(pack(EVENT | {"user": 196})) == TAKEN


def murmur2(data: bytes) -> int:
    """Austin Appleby's 32-bit MurmurHash2 with Kafka's seed, from its published description."""
    mask, magic = 0xFFFFFFFF, 0x5BD1E995
    h = 0x9747B28C ^ len(data)
    while len(data) >= 4:
        k = int.from_bytes(data[:4], "little") * magic & mask
        k = (k ^ (k >> 24)) * magic & mask
        h = (h * magic & mask) ^ k
        data = data[4:]
    if data:
        h = (h ^ int.from_bytes(data, "little")) * magic & mask
    h = (h ^ (h >> 13)) * magic & mask
    return h ^ (h >> 15)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=1000, exclude_categories=("Cc", "Zs", "Cs")), min_size=1), st.integers(2, 64))
def test_the_partition_is_that_of_murmur2(user: str, partitions: int) -> None:
    right = (murmur2(user.encode()) & 0x7FFFFFFF) % partitions
    value = pack(EVENT | {"user": user})
    assert decode_interaction(record(value, user.encode(), right), LIMITS, partitions=partitions).user == user
    with pytest.raises(Malformed, match="partitioner=murmur2_random") as caught:
        decode_interaction(record(value, user.encode(), (right + 1) % partitions), LIMITS, partitions=partitions)
    assert caught.value.reason == "wrong-partition"


def profile(value: bytes | None, key: bytes | None = b"196") -> Profile | None:
    return decode_profile(record(value, key), LIMITS, partitions=1)


@both
def test_a_profile_has_numbers_texts_and_lists(write: Write) -> None:
    features = {"age": 24, "zip": "85711", "genres": ["Action", "Drama"], "gone": None}
    assert profile(write({"features": features, "new": 1})) == Profile({"age": 24.0, "zip": "85711", "genres": ["Action", "Drama"]})


def test_a_null_profile_forgets() -> None:
    assert profile(None) is None


@both
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "missing-field"),
        ({"features": []}, "wrong-type"),
        ({"features": {"a": True}}, "wrong-type"),
        ({"features": {"a": {"b": 1}}}, "wrong-type"),
        ({"features": {"a": [1]}}, "wrong-type"),
        ({"features": {"a": math.nan}}, "bad-feature"),
        ({"features": {"a": -math.inf}}, "bad-feature"),
        ({"features": {"": 1}}, "bad-feature"),
        ({"features": {"a": "x" * 1025}}, "too-large"),
        ({"features": {"a": ["é" * 513]}}, "too-large"),
        ({"features": {"x" * 1025: 1}}, "too-large"),
        ({"features": {"a": ["x"] * 257}}, "too-many-features"),
        ({"features": {str(n): 1 for n in range(257)}}, "too-many-features"),
    ],
)
def test_a_wrong_profile_is_refused_with_its_reason(write: Write, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(Malformed) as caught:
        profile(write(fields))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("key", "reason"),
    [(None, "wrong-key"), (b"", "bad-id"), (b"\xff", "invalid-utf8"), (b"a\x00", "bad-id"), (b"x" * 257, "bad-id")],
)
def test_the_key_of_a_profile_is_an_id(key: bytes | None, reason: str) -> None:
    for value in (None, pack({"features": {}})):
        with pytest.raises(Malformed) as caught:
            profile(value, key)
        assert caught.value.reason == reason


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=12,
)
near_events = st.fixed_dictionaries(
    {},
    optional={
        "user": st.just("196") | anything,
        "item": st.text(max_size=300) | st.integers(0, 2000) | anything,
        "rating": st.floats() | st.integers(-1, 6) | anything,
        "timestamp": st.integers(-(2**62), 2**62) | st.just(881250949000) | anything,
        "features": st.dictionaries(st.text(max_size=5), anything, max_size=4) | anything,
        "other": anything,
    },
)


def as_json(fields: object) -> bytes:
    return json.dumps(fields, default=repr, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    a_profile = {"features": {"a": ["x", "y"], "b": 1.5}}
    value = bytearray(draw(st.sampled_from([pack(EVENT), text(EVENT), pack(a_profile), text(a_profile)])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(value)))
        value[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(value)


@settings(max_examples=400)
@given(
    st.binary(max_size=200) | anything.map(pack) | anything.map(as_json) | near_events.map(pack) | near_events.map(as_json) | mutated(),
    st.sampled_from([b"196", None, b"\xff", b""]),
)
@example(b"{" * 65_000, b"196")
@example(b'"' * 65_000, b"196")
@example(b'{"a":"' + b"\\" * 65_000, b"196")
@example(b'{"a":"' + b'\\"[]' * 16_000, b"196")
def test_whatever_comes_is_an_event_within_limits_or_a_dead_letter(value: bytes, key: bytes | None) -> None:
    began = time.perf_counter()
    came = record(value, key)
    for read in (decode_interaction, decode_profile):
        try:
            event = read(came, LIMITS, partitions=1)
        except Malformed as error:
            letter = decode(dead_letter_message("dead-letters", came, error).value, DeadLetter, what="a dead letter")
            assert letter.reason in REASONS
        else:
            if isinstance(event, Interaction):
                assert 1 <= len(event.item.encode()) <= 256
                assert event.user == "196"
                assert type(event.rating) is float
                assert 1 <= event.rating <= 5
                assert type(event.timestamp) is int
                assert LIMITS.earliest <= event.timestamp <= LIMITS.latest
            else:
                assert event is not None
                assert all(isinstance(v, (str, list)) or math.isfinite(v) for v in event.features.values())
    assert time.perf_counter() - began < 2, "a fraction of a second at most, on a busy machine too"
