"""What a backtest found: the result as JSON has it, and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from rich.table import Table

from consumers.inspection import public, toml
from streaming.paired import ALL, Paired
from streaming.report import with_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from consumers.settings import Settings

WHERE = frozenset({"broker", "topic_prefix", "group"})
"""Settings that say where a log is, not what is done with it."""


class Side(msgspec.Struct, frozen=True):
    """One of the two runs. ``coverage_80`` is the share of ratings inside the central 80 % interval, None for scores without an sd.

    ``nonfinite_scores`` are no numbers; their events are not compared. ``seconds`` is the time of the run alone.
    """

    settings: dict[str, Any]
    scores_sha256: str
    coverage_80: float | None
    seconds: float
    events_per_second: float | None
    nonfinite_scores: int


class Backtest(msgspec.Struct, frozen=True):
    """All that ``backtest.json`` holds.

    ``events`` were scored by both, of ``users`` users. ``outside`` events were left out by the range from ``since`` to ``until`` (ms since
    the epoch), ``refused`` records are no valid events. ``changed`` are the settings in which the two differ, by name, the control's
    value first. ``groups`` are the errors of all events and by earlier events of their user.
    """

    source: str
    since: int | None
    until: int | None
    events: int
    users: int
    outside: int
    refused: int
    changed: dict[str, tuple[Any, Any]]
    control: Side
    candidate: Side
    groups: dict[str, Paired]


def changed(control: Settings, candidate: Settings) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by their dotted names, but for where each log is."""

    def differing(one: Mapping[str, Any], other: Mapping[str, Any], above: str) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}
        for name in dict.fromkeys((*one, *other)):
            first, second = one.get(name), other.get(name)
            if first == second:
                continue
            if isinstance(first, dict) and isinstance(second, dict):
                found |= differing(first, second, f"{above}{name}.")
            else:
                found[above + name] = first, second
        return found

    return {name: pair for name, pair in differing(public(control), public(candidate), "").items() if name not in WHERE}


def render_changes(result: Backtest) -> Table:
    """What the candidate has other than the control."""
    table = Table(title="what differs", title_justify="left")
    for heading in ("setting", "control (live)", "candidate"):
        table.add_column(heading)
    for name, (control, candidate) in result.changed.items():
        table.add_row(name, toml(control), toml(candidate))
    return table


def render_table(result: Backtest) -> Table:
    """Errors of both, each with its standard error, and their paired difference."""
    table = Table(
        title=f"{result.events:,} events of {result.users:,} users, each scored by both before it was learned from; difference: candidate "
        "minus control, paired, ± its standard error by user",
        title_justify="left",
    )
    for heading in ("", "events", "control (live)", "candidate", "difference"):
        table.add_column(heading, justify="left" if not heading else "right")
    for measure in ("mae", "rmse"):
        for name, group in result.groups.items():
            value, se = getattr(group, measure), getattr(group, f"{measure}_se")
            difference = "–" if value is None else f"{value:+.4f}" if se is None else f"{value:+.4f} ± {se:.4f}"
            label = measure.upper() if name == ALL else f"{measure.upper()}, {name} earlier events"
            table.add_row(
                label, f"{group.control.n:,}", with_error(group.control, measure), with_error(group.candidate, measure), difference
            )
    sides = result.control, result.candidate
    if any(side.coverage_80 is not None for side in sides):
        table.add_row("ratings in the 80 % interval", "", *("–" if s.coverage_80 is None else f"{s.coverage_80:.1%}" for s in sides), "")
    table.add_row("events/s", "", *("–" if s.events_per_second is None else f"{s.events_per_second:,.0f}" for s in sides), "")
    return table
