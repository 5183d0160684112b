"""The first guard: bytes from outside to a map of plain values, within bounds of depth and without recursion or ambiguity."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import msgpack

from streaming.errors import Malformed

_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_MAX_JSON_DIGITS = 400


def read_map(value: bytes, max_depth: int) -> dict[str, object]:
    """Return the map that ``value`` holds: JSON if it starts with ``{`` (white space apart), else MessagePack.

    The caller bounds the size. A key that occurs twice in one map is refused, since readers differ in which they take. Raises `Malformed`.
    """
    start = value[:64].lstrip()[:1] or value.lstrip()[:1]
    return read_json_map(value, max_depth) if start == b"{" else _map(_read_msgpack(value, max_depth))


def read_json_map(value: bytes, max_depth: int) -> dict[str, object]:
    """Return the map that JSON ``value`` holds, as `read_map` does."""
    return _map(_read_json(value, max_depth))


def _map(decoded: object) -> dict[str, object]:
    if not isinstance(decoded, dict):
        raise Malformed("not-a-map", f"a map is needed, found {shown(decoded)}")
    return cast("dict[str, object]", decoded)


def _read_msgpack(value: bytes, max_depth: int) -> object:
    size = len(value)
    try:
        # msgpack keeps a stack of its own, of at most 512 levels, so it cannot recurse however deep the input is.
        decoded = msgpack.unpackb(
            value,
            object_pairs_hook=_unique,
            max_str_len=size,
            max_bin_len=size,
            max_ext_len=size,
            max_array_len=size,
            max_map_len=size,
        )
    except msgpack.exceptions.StackError:
        raise Malformed("too-deep", f"nested beyond 500, at most {max_depth}") from None
    except UnicodeDecodeError as error:
        raise Malformed("invalid-utf8", f"text that is not UTF-8: {error.reason}") from None
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise Malformed("not-decodable", f"no MessagePack: {str(error) or 'a byte that means nothing'}") from None
    level = [decoded]
    for _ in range(max_depth):
        level = [child for node in level for child in _children(node) if isinstance(child, (dict, list))]
        if not level:
            return decoded
    raise Malformed("too-deep", f"nested beyond {max_depth}")


def _children(node: object) -> Any:  # noqa: ANN401 - whatever the sender put there
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _read_json(value: bytes, max_depth: int) -> object:
    if value.count(b"{") + value.count(b"[") > max_depth:
        _check_json_depth(value, max_depth)
    try:
        return json.loads(value.decode(), object_pairs_hook=_unique, parse_int=_json_int)
    except UnicodeDecodeError as error:
        raise Malformed("invalid-utf8", f"text that is not UTF-8: {error.reason}") from None
    except ValueError as error:
        raise Malformed("not-decodable", f"no JSON: {error}") from None


def _check_json_depth(value: bytes, max_depth: int) -> None:
    """Count brackets outside strings before the parser, which recurses, sees them."""
    depth = 0
    for match in _JSON_TOKEN.finditer(value):
        token = match[0]
        if token in b"[{":
            depth += 1
            if depth > max_depth:
                raise Malformed("too-deep", f"nested beyond {max_depth}")
        elif token in b"]}":
            depth -= 1


def _json_int(digits: str) -> int:
    # The time to read an integer grows with the square of its digits.
    if len(digits) > _MAX_JSON_DIGITS:
        raise Malformed("wrong-type", f"an integer of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[Any, object]]) -> dict[Any, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise Malformed("duplicate-field", shown(name))
            seen.add(name)
    return fields


def shown(value: object, width: int = 64) -> str:
    """Return ``value`` fit for a message: ASCII, no control characters, at most about ``width`` characters."""
    if isinstance(value, (str, bytes)):
        return ascii(value[:width]) + ("..." if len(value) > width else "")
    if isinstance(value, (dict, list)):
        return f"a {'map' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= width else text[:width] + "..."
