"""The report of a run: ``report.json`` for programs, ``report.html`` for people, a table for the terminal.

Everything in it comes from the log alone, but for what the run journal adds: seconds, runs, repeats, stages and the memory's attention.
The page is made from nothing but the report, needs no other file and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from rich.table import Table

from streaming.journal import History
from streaming.log import Log
from streaming.prequential import Bin, Errors, Result, coverage, difference, error_by_earlier, evaluate, normal_quantile, running_mae
from streaming.scored import read_run
from streaming.validation import Limits

if TYPE_CHECKING:
    from streaming.peers import Scores
    from streaming.scored import RunReader

NAMES = {"coldstream": "Coldstream", "river_biased_mf": "river BiasedMF", "running_mean": "running mean"}
"""What a method is called where people read."""

_NOMINAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Curve(msgspec.Struct, frozen=True):
    """``mae[i]`` is the MAE of the scored events before the ``events[i]``-th, as many as the series' ``width`` says."""

    events: list[int]
    mae: list[float]


class Coverage(msgspec.Struct, frozen=True):
    """``actual`` is the share of ratings inside the central interval that should hold the share ``nominal``."""

    nominal: float
    actual: float


class Attention(msgspec.Struct, frozen=True):
    """How alive the memory is after ``events`` events: the spread of attention over users, and of the rows among each other."""

    events: int
    spread_users: float
    spread_rows: float


class Series(msgspec.Struct, frozen=True):
    """What the plots show. ``running_mae`` and ``by_earlier`` are by method; ``width`` is the number of events of the running error."""

    width: int
    running_mae: dict[str, Curve]
    by_earlier: dict[str, list[Bin]]
    calibration: list[Coverage]
    attention: list[Attention]


class Report(msgspec.Struct, frozen=True):
    """All that ``report.json`` holds, under the same names. What no journal told is None.

    ``events`` are valid interactions, ``scores`` the visible scores of interactions, ``events_processed`` counts repeats after a kill.
    ``refused``, ``unscored``, ``duplicate_scores``, ``orphan_scores``, ``nonfinite_scores`` and ``earlier_disagreements`` are as in
    `streaming.scored.ScoredRun`.
    """

    events: int
    scores: int
    dead_letters: int
    seconds: float | None
    events_per_second: float | None
    runs: int | None
    events_processed: int | None
    settings: dict[str, Any]
    scores_sha256: str
    results: dict[str, Result]
    rating_scale: tuple[float, float]
    last_window_events: int
    users: int
    items: int
    partitions: int
    refused: int
    unscored: int
    duplicate_scores: int
    orphan_scores: int
    nonfinite_scores: int
    earlier_disagreements: int
    seconds_by_stage: dict[str, float]
    series: Series


def build_report(
    log: Log,
    settings: Mapping[str, Any],
    journal: History | None = None,
    *,
    limits: Limits | None = None,
    prefix: str = "",
    window: int = 20_000,
    peers: Scores | None = None,
    reader: RunReader | None = None,
) -> Report:
    """Read the run of a topic ``prefix`` from the log, run the peers over its events, and compare.

    ``settings`` are reported as they are (secrets must be gone from them). ``limits`` are the worker's; their rating scale is the
    peers' scale. ``window`` is the number of events of ``last_window``. ``peers`` are scores that `streaming.peers.peer_scores` made of
    these events before; they are made anew where events have come since. ``reader`` is one of this run, which reads on.
    Raises as `streaming.scored.read_run` does, and `ValueError` for a window below 1.
    """
    if window < 1:
        raise ValueError(f"window: {window} events, at least 1 is needed")
    limits = limits if limits is not None else Limits()
    scale = (limits.rating_min, limits.rating_max)
    run = read_run(log, limits, prefix) if reader is None else reader.run()
    if peers is None or any(len(score) != len(run) for score in peers.values()):
        # Only who needs the peers loads river.
        from streaming.peers import peer_scores

        peers = peer_scores(run, scale)
    scores = {"coldstream": run.score} | dict(peers)
    results = {name: evaluate(run, score, window) for name, score in scores.items()}
    results["coldstream"] = msgspec.structs.replace(results["coldstream"], coverage_80=coverage(run))
    for name in scores.keys() - {"coldstream"}:
        results[name] = msgspec.structs.replace(results[name], difference=difference(run, scores[name]))

    width = min(5_000, max(50, len(run) // 20))
    covered = [(p, coverage(run, normal_quantile(p))) for p in _NOMINAL]
    series = Series(
        width=width,
        running_mae={name: Curve(*running_mae(run, score, width)) for name, score in scores.items()},
        by_earlier={name: error_by_earlier(run, score) for name, score in scores.items()},
        calibration=[Coverage(p, share) for p, share in covered if share is not None],
        attention=[msgspec.convert(note, Attention) for note in journal.notes.get("attention", [])] if journal else [],
    )
    return Report(
        events=len(run),
        scores=run.scores,
        dead_letters=run.dead_letters,
        seconds=round(journal.seconds, 3) if journal else None,
        events_per_second=round((len(run) - run.unscored) / journal.seconds, 2) if journal and journal.seconds > 0 else None,
        runs=journal.runs if journal else None,
        events_processed=journal.events_processed if journal else None,
        settings=dict(settings),
        scores_sha256=run.scores_sha256,
        results=results,
        rating_scale=scale,
        last_window_events=window,
        users=len(np.unique(run.user)),
        items=len(np.unique(run.item)),
        partitions=len(np.unique(run.partition)),
        refused=run.refused,
        unscored=run.unscored,
        duplicate_scores=run.duplicate_scores,
        orphan_scores=run.orphan_scores,
        nonfinite_scores=run.nonfinite_scores,
        earlier_disagreements=run.earlier_disagreements,
        seconds_by_stage={stage: round(seconds, 3) for stage, seconds in journal.stages.items()} if journal else {},
        series=series,
    )


def to_json(report: Report) -> bytes:
    """The text of ``report.json``."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def read_report(path: Path | str) -> Report:
    """Read a ``report.json`` back. Raises `OSError`, or msgspec's errors for one that is none."""
    return msgspec.json.decode(Path(path).read_bytes(), type=Report)


def write_report(report: Report, folder: Path | str) -> None:
    """Write ``report.json`` and ``report.html`` into a folder, each at once: a reader never sees half of one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("report.json", to_json(report)), ("report.html", render_html(report).encode())):
        unfinished = folder / f".{name}.new"
        unfinished.write_bytes(content)
        unfinished.replace(folder / name)


def render_html(report: Report) -> str:
    """The page of a report. The same report gives the same page."""
    # Only who draws loads what draws: the table on the terminal needs none of it.
    import jinja2
    from markupsafe import Markup

    from streaming import plots

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("streaming"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    drawings = {
        name: Markup(svg)  # noqa: S704 - drawn by `streaming.plots`, which escapes what it is given
        for name, svg in {
            "running": plots.running_error(report.series.running_mae, NAMES),
            "earlier": plots.error_by_earlier(report.series.by_earlier, NAMES),
            "attention": plots.attention(report.series.attention),
            "stages": plots.stages(report.seconds_by_stage),
            "calibration": plots.calibration(report.series.calibration),
        }.items()
    }
    return environment.get_template("report.html.j2").render(
        report=report, names=NAMES, plots=drawings, settings=flat(report.settings), coverage_80=report.results["coldstream"].coverage_80
    )


def flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of dotted name and value."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{above}{name}.")
        else:
            rows.append((f"{above}{name}", value if isinstance(value, str) else msgspec.json.encode(value).decode()))
    return rows


def render_table(report: Report) -> Table:
    """The results as a table for the terminal: each error with its standard error."""
    of = f" of {report.events:,}" if report.unscored else ""
    scored = f"{report.events - report.unscored:,}{of} events"
    table = Table(title=f"{scored}, each scored before it was learned from", title_justify="left")
    table.add_column("")
    for name in report.results:
        table.add_column(NAMES.get(name, name), justify="right")
    results = report.results.values()
    table.add_row("MAE", *(with_error(result, "mae") for result in results))
    table.add_row("RMSE", *(with_error(result, "rmse") for result in results))
    for group in report.results["coldstream"].by_earlier_events:
        table.add_row(f"MAE, {group} earlier events", *(with_error(result.by_earlier_events[group], "mae") for result in results))
    table.add_row("MAE after the first 20,000", *(with_error(result.after_20000, "mae") for result in results))
    table.add_row(f"MAE of the last {report.last_window_events:,}", *(with_error(result.last_window, "mae") for result in results))
    covered = report.results["coldstream"].coverage_80
    if isinstance(covered, float):
        table.add_row("ratings in the 80 % interval", f"{covered:.1%}", *[""] * (len(results) - 1))
    return table


def with_error(errors: Errors, measure: str) -> str:
    """An error and its standard error as text, a dash where there is none."""
    value, se = getattr(errors, measure), getattr(errors, f"{measure}_se")
    if value is None:
        return "–"
    return f"{value:.4f}" if se is None else f"{value:.4f} ± {se:.4f}"
