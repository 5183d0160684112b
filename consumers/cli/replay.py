"""`coldstream replay`: fills a topic from a historical log."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

if TYPE_CHECKING:
    from consumers.settings import Settings
    from streaming.sources import ColumnName, Source

EXAMPLES = (
    "[bold]coldstream replay ratings.csv --user-column userId --item-column movieId[/bold]\n\n"
    "[bold]coldstream replay ratings.tsv.gz --timestamp-unit s --rate 60[/bold]\n\n"
    "[bold]coldstream replay movies.csv --into items --id-column movieId[/bold]"
)


class Into(enum.StrEnum):
    """The topic that a file fills."""

    INTERACTIONS = "interactions"
    USERS = "users"
    ITEMS = "items"


def command(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV, TSV or JSONL, also gzipped (.gz).")],
    into: Annotated[Into, typer.Option(help="The topic to fill.")] = Into.INTERACTIONS,
    rate: Annotated[str, typer.Option(metavar="RATE", help="max, or a multiple of the recorded pace: 2 is twice as fast.")] = "max",
    sort_by_time: Annotated[bool, typer.Option("--sort-by-time", help="Send lines in the order of their times.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Send every line again, also those sent by earlier runs.")] = False,
    id_column: Annotated[str, typer.Option(metavar="COLUMN", help="With --into users or items: the column of the id.")] = "id",
    user_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.user_column")] = None,
    item_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.item_column")] = None,
    rating_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.rating_column")] = None,
    timestamp_column: Annotated[str | None, typer.Option(metavar="COLUMN", help="replay.timestamp_column")] = None,
    timestamp_unit: Annotated[str | None, typer.Option(metavar="UNIT", help="replay.timestamp_unit: ms, s or iso")] = None,
    header: Annotated[
        bool | None, typer.Option("--header/--no-header", help="replay.header: whether the first line names the columns.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Fill a topic from a historical log, each line exactly once.

    Interrupted and run again, it goes on where it was. Lines that cannot be taken go to dead-letters with their reason.
    Without a header, columns are numbered from 0.
    """
    from consumers.opening import connect, topics_of
    from consumers.replayer import replay
    from consumers.stop import Stop

    flags = {
        "replay.user_column": user_column,
        "replay.item_column": item_column,
        "replay.rating_column": rating_column,
        "replay.timestamp_column": timestamp_column,
        "replay.timestamp_unit": timestamp_unit,
        "replay.header": header,
    }
    settings = configured(ctx, config, sets, verbose, flags).settings
    pace = _pace(rate)
    source = _source(file, into, id_column, settings)
    topics = topics_of(settings)
    from rich.console import Console

    from consumers.progress import ShareBar

    with Stop() as stop, connect(settings, create=True) as log:
        log.create(topics.values())
        with ShareBar(Console(stderr=True), file.name) as bar:
            result = replay(
                log,
                source,
                topics,
                into=into.value,
                group=settings.group_id,
                rate=pace,
                sort_by_time=sort_by_time,
                restart=restart,
                on_progress=bar.update,
                stop=stop.__bool__,
            )
        refused = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.dead_letters.items()))
        typer.echo(f"{into.value}: {result.events:,} sent in all, {result.sent:,} lines in this run, {result.skipped:,} before")
        if refused:
            typer.echo(f"dead letters: {refused}")
        if not result.done:
            stop.unfinished()


def _pace(rate: str) -> float | Literal["max"]:
    if rate == "max":
        return "max"
    try:
        return float(rate)
    except ValueError:
        raise typer.BadParameter(f"{rate!r} is neither max nor a number", param_hint="--rate") from None


def _column(name: str, *, header: bool) -> ColumnName:
    return int(name) if not header and name.isdecimal() else name


def _source(file: Path, into: Into, id_column: str, settings: Settings) -> Source:
    from streaming.sources import Mapped, interaction_source, profile_source
    from streaming.textfiles import Layout

    replay = settings.replay
    layout = Layout(delimiter=replay.delimiter or None, encoding=replay.encoding, header=replay.header)
    if into is not Into.INTERACTIONS:
        return profile_source(file, id_column=_column(id_column, header=replay.header), layout=layout, limits=settings.event_limits())
    columns = Mapped(
        *(
            _column(name, header=replay.header)
            for name in (replay.user_column, replay.item_column, replay.rating_column, replay.timestamp_column)
        )
    )
    return interaction_source(file, layout=layout, columns=columns, timestamps=replay.timestamp_unit, limits=settings.event_limits())
