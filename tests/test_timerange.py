"""Ranges of event time as people write them."""

from __future__ import annotations

import pytest

from streaming.errors import SourceError
from streaming.timerange import Before, TimeRange, inside, parse_moment, parse_span, shown_time

DAY = 86_400_000


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1998-03-01", 888_710_400_000),
        ("1998-03-01T12:30", 888_755_400_000),
        ("1998-03-01T12:30:00.250Z", 888_755_400_250),
        ("1998-03-01T13:30+01:00", 888_755_400_000),
        ("888755400000", 888_755_400_000),
        ("0", 0),
        ("20240101", 1_704_067_200_000),
        ("7d", Before(7 * DAY)),
        ("-2w", Before(14 * DAY)),
        ("90s", Before(90_000)),
    ],
)
def test_moments(text: str, moment: int | Before) -> None:
    assert parse_moment(text) == moment


@pytest.mark.parametrize(
    "text", ["", "yesterday", "7 days", "1.5d", "1998-13-01", "7d7d", "9" * 16, "2024", "20241301", "-7", "1700000000", "978300760"]
)
def test_what_is_no_moment_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is no time"):
        parse_moment(text)


@pytest.mark.parametrize("text", ["7", "d", "-7d", "7y"])
def test_what_is_no_span_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is no span of time"):
        parse_span(text)


def test_a_range_holds_its_beginning_and_not_its_end_and_whatever_has_no_time() -> None:
    assert [inside(time, 10, 20) for time in (9, 10, 19, 20, None)] == [False, True, True, False, True]
    assert all(inside(time, None, None) for time in (-5, 0, None))


def test_what_is_relative_is_settled_by_the_newest_event() -> None:
    assert TimeRange(Before(7 * DAY), Before(DAY)).resolved(100 * DAY) == (93 * DAY, 99 * DAY)
    assert TimeRange(Before(7 * DAY)).resolved(None) == (None, None), "there is no event to leave out"
    assert TimeRange(5).resolved(None) == (5, None)


@pytest.mark.parametrize("bounds", [(20, 20), (20, 10), (Before(5), Before(10))])
def test_a_range_that_ends_before_it_begins_is_refused(bounds: tuple[int | Before, int | Before]) -> None:
    with pytest.raises(SourceError, match=r"ends \(1970-01-01T00:00:00\.\d+Z\) before it begins"):
        TimeRange(*bounds).resolved(100)


def test_a_time_that_no_calendar_has_is_shown_as_it_is() -> None:
    assert shown_time(888_755_400_250) == "1998-03-01T12:30:00.250Z"
    assert shown_time(10**17) == "100000000000000000 ms"
