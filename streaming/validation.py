"""What people write, checked before it is believed: interactions, profiles and requests, as MessagePack or JSON.

Every path ends in a valid event or in `Malformed` with one of `streaming.events.REASONS`; nothing else is raised, whatever the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from streaming.errors import Malformed
from streaming.events import Feature, Interaction, Profile, Request
from streaming.partitioner import partition_of
from streaming.untrusted import read_map, shown

if TYPE_CHECKING:
    from streaming.log import Record

Count = Callable[[int], object]
"""Called with the number of unknown fields of an event that was accepted."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an event may be. Sizes are in bytes of UTF-8, times in milliseconds since the epoch, all bounds inclusive.

    max_event_bytes: the whole value. max_depth: maps and lists within one another, the event itself being the first.
    max_id_bytes: a user's or item's id. max_features: features of a profile, and fields of any event. max_values: values of a
    multi-valued feature. max_text_bytes: one text value, and the name of a feature. earliest, latest: an event's timestamp (default
    1970-01-02 to 2200-01-01). rating_min, rating_max: the rating scale. max_candidates: items that one request names. max_n: how many of
    the best it asks for.
    """

    max_event_bytes: int = 65_536
    max_depth: int = 8
    max_id_bytes: int = 256
    max_features: int = 256
    max_values: int = 256
    max_text_bytes: int = 1_024
    earliest: int = 86_400_000
    latest: int = 7_258_118_400_000
    rating_min: float = 1.0
    rating_max: float = 5.0
    max_candidates: int = 1_000
    max_n: int = 100


_exact = msgspec.msgpack.Decoder(Interaction)
_MAP_OF_FOUR = 0x84
_INTERACTION_FIELDS = ("user", "item", "rating", "timestamp")
_REQUEST_FIELDS = ("request", "user", "timestamp", "items", "n", "exclude_rated")


def decode_interaction(record: Record, limits: Limits, unknown: Count | None = None, *, partitions: int) -> Interaction:
    """Return the interaction in ``record``, read from a topic of ``partitions`` partitions. Raises `Malformed`."""
    value = _sized(record, limits)
    event = _common_case(value)
    if event is None:
        fields = read_map(value, limits.max_depth)
        event = interaction_of(fields, limits)
        extra = len(fields) - len(_INTERACTION_FIELDS)
        if extra and unknown is not None:
            unknown(extra)
    else:
        check_interaction(event, limits)
    _check_place(record, event.user.encode(), "user", partitions)
    return event


def decode_profile(record: Record, limits: Limits, unknown: Count | None = None, *, partitions: int) -> Profile | None:
    """Return the profile in ``record``, None for a null value: forget this user, drop this item's profile. Raises `Malformed`.

    The key is the user's or item's id.
    """
    if record.key is None:
        raise Malformed("wrong-key", "no key; the key of a profile is the user's or item's id")
    try:
        checked_id(record.key.decode(), "key", limits)
    except UnicodeDecodeError:
        raise Malformed("invalid-utf8", f"the key {shown(record.key)} is not UTF-8") from None
    profile = None
    if record.value is not None:
        fields = read_map(_sized(record, limits), limits.max_depth)
        profile = profile_of(fields, limits)
        if len(fields) > 1 and unknown is not None:
            unknown(len(fields) - 1)
    _check_place(record, record.key, "id", partitions)
    return profile


def decode_request(record: Record, limits: Limits, unknown: Count | None = None, *, partitions: int) -> Request:
    """Return the request in ``record``, read from a topic of ``partitions`` partitions. Raises `Malformed`."""
    fields = read_map(_sized(record, limits), limits.max_depth)
    request = request_of(fields, limits)
    extra = len(fields.keys() - set(_REQUEST_FIELDS))
    if extra and unknown is not None:
        unknown(extra)
    _check_place(record, request.user.encode(), "user", partitions)
    return request


def request_of(fields: Mapping[str, object], limits: Limits) -> Request:
    """Return the request that ``fields`` describe; ``items``, ``n`` and ``exclude_rated`` may be missing or null. Raises `Malformed`."""
    _check_fields(fields, _REQUEST_FIELDS[:3], limits)
    items, n, exclude = (fields.get(name) for name in _REQUEST_FIELDS[3:])
    if items is not None and (not isinstance(items, list) or not items):
        raise Malformed("wrong-type", f"items: a list of ids, or no such field for the whole catalogue; found {shown(items)}")
    if items is not None and len(items) > limits.max_candidates:
        raise Malformed("too-many-items", f"items: {len(items)} of them, at most {limits.max_candidates}")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise Malformed("wrong-type", f"n: a whole number from 1 on is needed, found {shown(n)}")
    if n is not None and n > limits.max_n:
        raise Malformed("too-many-items", f"n: {shown(n)}, at most {limits.max_n}")
    if exclude is not None and not isinstance(exclude, bool):
        raise Malformed("wrong-type", f"exclude_rated: true or false is needed, found {shown(exclude)}")
    return Request(
        request=checked_id(fields["request"], "request", limits),
        user=checked_id(fields["user"], "user", limits),
        timestamp=_timestamp(fields["timestamp"], limits),
        items=None if items is None else list(dict.fromkeys(checked_id(item, "items", limits) for item in items)),
        n=n,
        exclude_rated=bool(exclude),
    )


def interaction_of(fields: Mapping[str, object], limits: Limits) -> Interaction:
    """Return the interaction that ``fields`` describe. Raises `Malformed`."""
    _check_fields(fields, _INTERACTION_FIELDS, limits)
    return Interaction(
        user=checked_id(fields["user"], "user", limits),
        item=checked_id(fields["item"], "item", limits),
        rating=_rating(fields["rating"], limits),
        timestamp=_timestamp(fields["timestamp"], limits),
    )


def check_interaction(event: Interaction, limits: Limits) -> None:
    """Raise `Malformed` unless the values of ``event``, whose types are right, are within ``limits``."""
    checked_id(event.user, "user", limits)
    checked_id(event.item, "item", limits)
    _rating(event.rating, limits)
    _timestamp(event.timestamp, limits)


def profile_of(fields: Mapping[str, object], limits: Limits) -> Profile:
    """Return the profile that ``fields`` describe by its ``features``. A feature that is null is left out. Raises `Malformed`."""
    _check_fields(fields, ("features",), limits)
    features = fields["features"]
    if not isinstance(features, dict):
        raise Malformed("wrong-type", f"features: a map is needed, found {shown(features)}")
    if len(features) > limits.max_features:
        raise Malformed("too-many-features", f"features: {len(features)} of them, at most {limits.max_features}")
    checked: dict[str, Feature] = {}
    for name, value in features.items():
        if not isinstance(name, str) or not name:
            raise Malformed("bad-feature", "features: a name is empty or no text")
        _text(name, "the name of a feature", limits)
        if value is not None:
            checked[name] = _feature(name, value, limits)
    return Profile(features=checked)


def _sized(record: Record, limits: Limits) -> bytes:
    if not record.value:
        raise Malformed("empty", "no value")
    if len(record.value) > limits.max_event_bytes:
        raise Malformed("too-large", f"{len(record.value)} bytes, at most {limits.max_event_bytes}")
    return record.value


def _common_case(value: bytes) -> Interaction | None:
    """Decode a MessagePack map of exactly the four fields with exactly their types; None for all else.

    A struct of scalars that forbids unknown fields gives nesting no place to recurse, and four fields in a map of four leave no room for
    duplicates.
    """
    if value[0] != _MAP_OF_FOUR:
        return None
    try:
        return _exact.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _check_fields(fields: Mapping[str, object], required: tuple[str, ...], limits: Limits) -> None:
    if len(fields) > limits.max_features:
        raise Malformed("too-many-features", f"{len(fields)} fields, at most {limits.max_features}")
    for name in required:
        if name not in fields:
            raise Malformed("missing-field", name)


def checked_id(value: object, field: str, limits: Limits) -> str:
    """Return ``value`` as the id that it is, an integer as its decimal text. ``field`` names it in the `Malformed` that is raised else."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = _decimal(value, field)
    if not isinstance(value, str):
        raise Malformed("wrong-type", f"{field}: an id is text or an integer, found {shown(value)}")
    if not value:
        raise Malformed("bad-id", f"{field}: empty")
    if len(value) > limits.max_id_bytes or (not value.isascii() and len(_utf8(value, field)) > limits.max_id_bytes):
        raise Malformed("bad-id", f"{field}: longer than {limits.max_id_bytes} bytes")
    if value[0].isspace() or value[-1].isspace():
        raise Malformed("bad-id", f"{field}: white space at an end of {shown(value)}")
    if not value.isprintable() and any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in value):
        raise Malformed("bad-id", f"{field}: a control character in {shown(value)}")
    return value


def _decimal(value: int, field: str) -> str:
    # Python refuses to print integers of thousands of digits; 256 bits are more than any id has.
    if value.bit_length() > 256:
        raise Malformed("bad-id", f"{field}: an integer of {value.bit_length()} bits")
    return str(value)


def _utf8(value: str, field: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise Malformed("invalid-utf8", f"{field}: half of a surrogate pair in {shown(value)}") from None


def _text(value: str, field: str, limits: Limits) -> None:
    if len(value) > limits.max_text_bytes or (not value.isascii() and len(_utf8(value, field)) > limits.max_text_bytes):
        raise Malformed("too-large", f"{field}: longer than {limits.max_text_bytes} bytes")


def _rating(value: object, limits: Limits) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Malformed("wrong-type", f"rating: a number is needed, found {shown(value)}")
    if not limits.rating_min <= value <= limits.rating_max:  # also false for NaN
        raise Malformed("rating-off-scale", f"rating: {shown(value)} is not within {limits.rating_min:g} to {limits.rating_max:g}")
    return float(value)


def _timestamp(value: object, limits: Limits) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Malformed("wrong-type", f"timestamp: whole milliseconds are needed, found {shown(value)}")
    if not limits.earliest <= value <= limits.latest:
        raise Malformed("timestamp-out-of-range", f"timestamp: {shown(value)} is not within {limits.earliest} to {limits.latest}")
    return value


def _feature(name: str, value: object, limits: Limits) -> Feature:
    field = f"feature {shown(name)}"
    if isinstance(value, str):
        _text(value, field, limits)
        return value
    if isinstance(value, list):
        return _values(field, value, limits)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Malformed("wrong-type", f"{field}: a number, text or a list of texts is needed, found {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Malformed("bad-feature", f"{field}: {shown(value)} is no finite number")
    return number


def _values(field: str, values: list[object], limits: Limits) -> list[str]:
    if len(values) > limits.max_values:
        raise Malformed("too-many-features", f"{field}: {len(values)} values, at most {limits.max_values}")
    texts = []
    for value in values:
        if not isinstance(value, str):
            raise Malformed("wrong-type", f"{field}: a list holds texts only, found {shown(value)}")
        _text(value, field, limits)
        texts.append(value)
    return texts


def _check_place(record: Record, key: bytes, owner: str, partitions: int) -> None:
    if record.key != key:
        raise Malformed("wrong-key", f"the key is {shown(record.key)}, it must be the {owner}, {shown(key)}")
    expected = partition_of(key, partitions) if partitions > 1 else 0
    if record.partition != expected:
        raise Malformed(
            "wrong-partition",
            f"partition {record.partition}, but murmur2 of the key gives {expected} of {partitions}; "
            "with librdkafka set partitioner=murmur2_random, its default hash differs",
        )
