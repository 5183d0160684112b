"""The codec of what the system itself writes: structs of `streaming.events` to MessagePack and back, arrays to `Tensor` and back.

What people write is read by `streaming.validation`, which trusts nothing.
"""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from streaming.errors import FormatMismatch, Malformed
from streaming.events import FORMAT, Tensor

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "int64", "int32", "uint8", "bool")}
"""The element types that a `Tensor` may have, and how they travel."""
_NAMES = {np.dtype(name): name for name in DTYPES}

_MAX_DIMENSIONS = 16

_S = TypeVar("_S", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


class _Head(msgspec.Struct):
    format: int | None = None


_head = msgspec.msgpack.Decoder(_Head)
_texts = msgspec.msgpack.Decoder(list[str])


@functools.cache
def _decoder(kind: type[_S]) -> msgspec.msgpack.Decoder[_S]:
    return msgspec.msgpack.Decoder(kind)


@functools.cache
def _maps(kind: type[msgspec.Struct]) -> tuple[str, ...]:
    return tuple(name for name, hint in typing.get_type_hints(kind).items() if typing.get_origin(hint) is dict)


def encode(record: msgspec.Struct) -> bytes:
    """Return ``record`` as a MessagePack map. Equal records give equal bytes: fields stand in declared order, maps sorted by key."""
    maps = _maps(type(record))
    if maps:
        record = msgspec.structs.replace(record, **{name: dict(sorted(getattr(record, name).items())) for name in maps})
    return _encoder.encode(record)


def decode(value: bytes | None, kind: type[_S], *, what: str) -> _S:
    """Return the record of type ``kind`` that ``value`` holds; ``what`` names it in errors, such as ``"support[3] at offset 17"``.

    Unknown fields are ignored. Raises `FormatMismatch` for a layout of another version, `Malformed` for anything else.
    """
    if value is None:
        raise Malformed("empty", f"{what}: no value")
    try:
        record: _S = _decoder(kind).decode(value)
    except (RecursionError, UnicodeDecodeError, msgspec.DecodeError) as error:
        if isinstance(error, msgspec.ValidationError):
            _check_format(_format_of(value), what)
        raise _malformed(error, what) from None
    _check_format(getattr(record, "format", FORMAT), what)
    return record


def packed(values: Sequence[str | float]) -> bytes:
    """Texts and numbers as an array of MessagePack's."""
    return _encoder.encode(list(values))


def texts(value: bytes | msgspec.Raw, *, what: str) -> list[str]:
    """The texts of an array of MessagePack's. Raises `Malformed` for anything else."""
    try:
        return _texts.decode(value)
    except (UnicodeDecodeError, msgspec.DecodeError) as error:
        raise _malformed(error, what) from None


def _malformed(error: RecursionError | UnicodeDecodeError | msgspec.DecodeError, what: str) -> Malformed:
    """What an error of the decoder's means."""
    match error:
        case RecursionError():
            return Malformed("too-deep", f"{what}: nested without end")
        case UnicodeDecodeError():
            return Malformed("invalid-utf8", f"{what}: text that is not UTF-8")
        case msgspec.ValidationError():
            return Malformed("wrong-type", f"{what}: {error}")
        case _:
            return Malformed("not-decodable", f"{what}: {error}")


def _format_of(value: bytes) -> int | None:
    """The format number of a record that could not be decoded as a whole, None if it has none."""
    try:
        return _head.decode(value).format
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _check_format(found: int | None, what: str) -> None:
    if found is not None and found != FORMAT:
        raise FormatMismatch(f"{what}: found format {found}, expected {FORMAT}; it was written by another version of Coldstream")


def tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return ``array`` as raw little-endian bytes in C order. Raises TypeError for a dtype outside `DTYPES`."""
    name = _NAMES.get(array.dtype) or array.dtype.name  # A dtype's name is slow to make.
    if name not in DTYPES:
        raise TypeError(f"a tensor of {name} cannot be written; the types are {', '.join(sorted(DTYPES))}")
    return Tensor(dtype=name, shape=array.shape, data=array.astype(DTYPES[name], copy=False).tobytes())


def array(value: Tensor) -> np.ndarray[Any, Any]:
    """Return the array that ``value`` holds, read-only and without a copy.

    Raises `Malformed` ("wrong-type") for a dtype outside `DTYPES` or where shape and length disagree.
    """
    if value.dtype not in DTYPES:
        raise Malformed("wrong-type", f"tensor of dtype {value.dtype[:32]!a}; the types are {', '.join(sorted(DTYPES))}")
    if len(value.shape) > _MAX_DIMENSIONS or min(value.shape, default=0) < 0:
        raise Malformed("wrong-type", f"tensor of shape {value.shape[:_MAX_DIMENSIONS]}")
    dtype = DTYPES[value.dtype]
    length = math.prod(value.shape) * dtype.itemsize
    if length != len(value.data):
        raise Malformed("wrong-type", f"tensor of shape {value.shape} and {value.dtype} takes {length} bytes, {len(value.data)} found")
    if value.dtype == "bool" and np.frombuffer(value.data, np.uint8).max(initial=0) > 1:
        raise Malformed("wrong-type", "tensor of bool holds a byte beside 0 and 1")
    try:
        return np.frombuffer(value.data, dtype).reshape(value.shape)
    except ValueError as error:
        raise Malformed("wrong-type", f"tensor of shape {value.shape}: {error}") from None
