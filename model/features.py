"""From profiles to rows of an embedding table.

A profile is encoded as (key, weight) entries, a few for each feature of the schema. What a schema does not name is ignored, a value
never seen before is a new key, and a missing feature has a key of its own: so profiles may be absent, come late or change, and nothing
needs to be known in advance.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

from model.settings import Feature

Value = float | str | list[str]


class Entry(NamedTuple):
    """One row of the table and the weight it enters the profile with."""

    key: str
    weight: float


def encode(name: str, feature: Feature, value: Value | None, own_id: str) -> list[Entry]:
    """Encode one feature. A value of another type than the feature's kind counts as missing.

    The key of a value is ``name=value``, that of the direction of a number ``name#``, that of its bin ``name#k``, of missing ``name?``.

    >>> encode("genre", Feature(kind="categorical"), "drama", "42")
    [Entry(key='genre=drama', weight=1.0)]
    >>> encode("age", Feature(kind="numeric", mean=30, scale=10, bins=(18, 40)), 45.0, "42")
    [Entry(key='age#', weight=1.5), Entry(key='age#2', weight=1.0)]
    >>> encode("genre", Feature(kind="categorical"), None, "42")
    [Entry(key='genre?', weight=1.0)]
    """
    match feature.kind:
        case "id":
            return [Entry(f"{name}={own_id}", 1.0)]
        case "categorical" if isinstance(value, str):
            return [Entry(f"{name}={value}", 1.0)]
        case "categorical" if (number := as_number(value)) is not None:
            # As short as tells the number from all others, and an integer as its decimal text.
            return [Entry(f"{name}={int(number) if number.is_integer() and abs(number) < 1e21 else number!r}", 1.0)]
        case "multivalued" if isinstance(value, (str, list)):
            values = [value] if isinstance(value, str) else list(dict.fromkeys(value))[: feature.max_values]
            if values:
                # 1/sqrt(n) keeps the length of the sum, whatever the number of values.
                return [Entry(f"{name}={each}", 1 / math.sqrt(len(values))) for each in values]
        case "numeric" if (number := as_number(value)) is not None:
            # Five deviations are as far as one absurd number may carry a profile.
            scaled = max(-5.0, min(5.0, (number - feature.mean) / feature.scale))
            entries = [Entry(f"{name}#", scaled)]
            if feature.bins:
                entries.append(Entry(f"{name}#{bisect_right(feature.bins, number)}", 1.0))
            return entries
    return [Entry(f"{name}?", 1.0)]


def as_number(value: Value | None) -> float | None:
    """The number that a value is or is written as; None where it is neither, or not finite."""
    if isinstance(value, list) or value is None:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
