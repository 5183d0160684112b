"""`coldstream status`: how the system stands, from the log alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from consumers.status import Status

EXAMPLES = "[bold]coldstream status[/bold]\n\n[bold]coldstream status --json[/bold]"


def command(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Show topics, how far the workers are behind, and the last model version.

    It reads the log alone, so it works beside a running system and beside a stopped one.
    """
    from consumers.opening import connect, topics_of
    from consumers.status import status_of

    settings = configured(ctx, config, sets, verbose).settings
    with connect(settings) as log:
        status = status_of(log, settings, topics_of(settings))
    if as_json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(status), indent=2))
        return
    console().print(*_page(status), sep="\n")


def _page(status: Status) -> list[RenderableType]:
    from datetime import UTC, datetime

    from rich import box
    from rich.table import Table
    from rich.text import Text

    topics = Table("topic", "partitions", "offsets held", "latest end", box=box.SIMPLE_HEAD)
    for topic in status.topics:
        topics.add_row(Text(topic.name), str(topic.partitions), f"{topic.offsets:,}", f"{topic.end:,}")
    partitions = Table("interactions", "start", "end", f"committed by {status.group}", "lag", box=box.SIMPLE_HEAD)
    for row in status.partitions:
        committed = "never" if row.committed is None else f"{row.committed:,}"
        partitions.add_row(f"partition {row.partition}", f"{row.start:,}", f"{row.end:,}", committed, f"{row.lag:,}")
    page: list[RenderableType] = [topics, partitions]
    if status.missing:
        page.append(Text(f"missing topics: {', '.join(status.missing)} (coldstream topics create)"))
    if status.model is None:
        page.append(Text("model: no version yet"))
    else:
        model = status.model
        made = datetime.fromtimestamp(model.made_at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        settings = "" if model.ours else "; made with other settings than those in force"
        page.append(Text(f"model: version {model.version:,} of {made}, {model.events:,} events, {model.waiting:,} updates wait{settings}"))
    return page
