"""Ranges of event time: which part of a historical log is meant."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import NamedTuple

from streaming.errors import SourceError

_UNIT_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_SPAN = re.compile(r"(\d{1,9})([smhdw])")
_MS = re.compile(r"-?\d{1,15}")
_SECONDS_DIGITS = 10
"""Of seconds since the epoch as they are by now, or one less: a number with fewer is a date, or a mistake."""


class Before(NamedTuple):
    """A moment this many milliseconds before the newest event of the log that is read."""

    span: int


class TimeRange(NamedTuple):
    """Event times from ``since`` (inclusive) to ``until`` (exclusive): milliseconds since the epoch, `Before`, or None for no bound."""

    since: int | Before | None = None
    until: int | Before | None = None

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.since is None and self.until is None

    @property
    def relative(self) -> bool:
        """Whether the newest event has to be known to tell what is meant."""
        return isinstance(self.since, Before) or isinstance(self.until, Before)

    def resolved(self, newest: int | None) -> tuple[int | None, int | None]:
        """Both bounds in milliseconds since the epoch, ``newest`` being the time of the newest event, None where there is no event.

        Raises `SourceError` for a range that ends before it begins.
        """
        since, until = (newest - bound.span if isinstance(bound, Before) and newest is not None else bound for bound in self)
        bounds = tuple(None if isinstance(bound, Before) else bound for bound in (since, until))
        if bounds[0] is not None and bounds[1] is not None and bounds[1] <= bounds[0]:
            raise SourceError(f"the range of time ends ({shown_time(bounds[1])}) before it begins ({shown_time(bounds[0])})")
        return bounds[0], bounds[1]

    def __str__(self) -> str:
        names = (str(bound.span) + " before newest" if isinstance(bound, Before) else str(bound) for bound in self)
        return " to ".join(names)


def inside(timestamp: int | None, since: int | None, until: int | None) -> bool:
    """Whether an event is within the bounds. One whose time is not known is: what cannot be told is not left out in silence."""
    return timestamp is None or ((since is None or timestamp >= since) and (until is None or timestamp < until))


def parse_span(text: str) -> int:
    """``7d``, ``12h``, ``30m``, ``90s`` or ``2w`` in milliseconds. Raises ValueError."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no span of time; write a whole number and s, m, h, d or w, such as 7d")
    return int(found[1]) * _UNIT_MS[found[2]]


def parse_moment(text: str) -> int | Before:
    """An ISO 8601 date or time (UTC where it names no offset), milliseconds since the epoch, or a span before the newest event.

    Raises ValueError.
    """
    text = text.strip()
    if _SPAN.fullmatch(text.removeprefix("-")):
        return Before(parse_span(text.removeprefix("-")))
    if _MS.fullmatch(text):
        digits = len(text.lstrip("-"))
        if digits > _SECONDS_DIGITS or text == "0":
            return int(text)
        if digits >= _SECONDS_DIGITS - 1:
            raise ValueError(f"{text!r} is no time: it looks like seconds since the epoch, and milliseconds are meant; add 000")
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is no time; write ISO 8601 (1998-03-01T12:00), milliseconds since the epoch, or a span such as 7d"
        ) from None


def shown_time(milliseconds: int) -> str:
    """A time as people read it, in UTC; the number itself where no calendar has it."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms"
