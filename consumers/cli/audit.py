"""`coldstream audit`: recomputes scores and support sets from the topics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from consumers.audit import Report

EXAMPLES = (
    "[bold]coldstream audit[/bold]\n\n[bold]coldstream audit --partition 3 --since-offset 50000 --limit 1000[/bold]\n\n"
    "[bold]coldstream audit --json[/bold]"
)


def command(
    ctx: typer.Context,
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    partition: Annotated[list[int] | None, typer.Option("--partition", metavar="N", help="Only this one; may be repeated.")] = None,
    since_offset: Annotated[int, typer.Option(min=0, help="Make scores again from this offset of each partition on.")] = 0,
    limit: Annotated[int | None, typer.Option(min=0, help="Make this many scores again in each partition, for a quick look.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Recompute every score and support set from the topics, and report what differs and what retention has put out of reach.

    Reads the log alone, beside a running or a stopped system, and writes nothing. Ends with 7 where something differs.
    Support sets, and that each event has one score or dead letter, are checked whole, whatever --since-offset and --limit say.
    """
    settings = configured(ctx, config, sets, verbose, {"broker": broker}).settings
    from rich.console import Console

    from consumers.audit import audit
    from consumers.exits import Exit
    from consumers.opening import connect, require_topics, topics_of
    from consumers.progress import AuditBar
    from consumers.threads import limit_threads

    limit_threads(settings.cores())
    with connect(settings) as log, AuditBar(Console(stderr=True)) as bar:
        topics = topics_of(settings)
        require_topics(log, topics.values())
        report = audit(log, settings, topics, partitions=partition or (), since=since_offset, limit=limit, on_progress=bar.update)
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(report), indent=2))
    else:
        console().print(*_page(report), sep="\n")
    if report.differences:
        raise typer.Exit(Exit.DIFFERENT)


def _page(report: Report) -> list[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    looked = Table("looked at", "count", box=box.SIMPLE_HEAD)
    looked.columns[1].justify = "right"
    for what, count in (
        ("valid events", report.events),
        ("scores made again", report.scores),
        ("model versions applied", report.versions),
        ("support sets", report.support_sets),
        ("dead letters of interactions", report.dead_letters),
    ):
        looked.add_row(what, f"{count:,}")
    deviation = f"largest deviation of a score or its sd: {report.deviation:.2e} (tolerance {report.tolerance:g})"
    page: list[RenderableType] = [looked, Text(deviation)]
    if report.out_of_reach:
        beyond = Table("out of reach", "partition", "from", "to", "count", box=box.SIMPLE_HEAD)
        for reach in report.out_of_reach:
            beyond.add_row(reach.what, str(reach.partition), f"{reach.first:,}", f"{reach.last:,}", f"{reach.count:,}")
        page.append(beyond)
    if not report.differences:
        return [*page, Text("no differences" if report.scores else "no differences, but no score could be made again")]
    differences = Table("differs", "where", "how", box=box.SIMPLE_HEAD)
    for each in report.shown:
        # Text, not markup: ids are whatever people send.
        differences.add_row(each.kind, Text(each.place), Text(each.detail))
    counts = ", ".join(f"{count:,} {kind}" for kind, count in report.differences.items())
    return [*page, differences, Text(f"differences: {counts}")]
