"""`coldstream topics`: list the topics, or make them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from streaming.log import Topic

app = typer.Typer(name="topics", no_args_is_help=True, help="List or create the topics that everything travels through.")


@app.command("list", epilog="[bold]coldstream topics list --set broker=embedded:runs/other.db[/bold]")
def list_topics(
    ctx: typer.Context,
    all_topics: Annotated[bool, typer.Option("--all", help="Also topics of the log that are not Coldstream's.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """List the topics with their settings, those that are missing too."""
    from consumers.opening import connect, topics_of

    settings = configured(ctx, config, sets, verbose).settings
    wanted = {topic.name: topic for topic in topics_of(settings).values()}
    with connect(settings) as log:
        existing = log.topics()
    names = [*wanted, *sorted(existing.keys() - wanted)] if all_topics else list(wanted)
    console().print(_table([(wanted.get(name), existing.get(name)) for name in names]))


@app.command("create", epilog="[bold]coldstream topics create --partitions 1[/bold]")
def create_topics(
    ctx: typer.Context,
    partitions: Annotated[int | None, typer.Option(help="topics.partitions: fixed once made.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Create the topics that do not exist yet. Those that do are left as they are; one that does not fit is an error.

    How many partitions there are cannot be changed later: it bounds how many workers can share the work.
    """
    from consumers.opening import connect, topics_of

    settings = configured(ctx, config, sets, verbose, {"topics.partitions": partitions}).settings
    wanted = topics_of(settings).values()
    with connect(settings, create=True) as log:
        before = log.topics()
        log.create(wanted)
    made = [topic.name for topic in wanted if topic.name not in before]
    typer.echo(f"created {len(made)} topics: {', '.join(made)}" if made else "all topics exist already")


@app.command("check", epilog="[bold]coldstream topics check --set broker=kafka:localhost:9092[/bold]")
def check_topics(ctx: typer.Context, config: ConfigFile = None, sets: Sets = None, verbose: Verbose = False) -> None:
    """Name each setting of an existing topic that would lose data; the exit code is 2 if there is any."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from consumers.opening import connect, topics_of

    settings = configured(ctx, config, sets, verbose).settings
    with connect(settings, read_only=True) as log:
        found = log.risks(topics_of(settings).values())
    if not found:
        typer.echo("no setting of any topic would lose data")
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("topic", "setting", "is", "should be", "what is lost"):
        table.add_column(column)
    for risk in found:
        table.add_row(*(Text(part) for part in risk))
    console().print(table)
    raise typer.Exit(2)


def _table(rows: list[tuple[Topic | None, Topic | None]]) -> object:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("topic", "partitions", "cleanup", "kept", "largest record", "state"):
        table.add_column(column, justify="right" if column in ("partitions", "largest record") else "left")
    for wanted, existing in rows:
        topic = existing or wanted
        if topic is not None:
            state = (
                "missing"
                if existing is None
                else "not Coldstream's"
                if wanted is None
                else ""
                if existing == wanted
                else "differs from settings"
            )
            table.add_row(Text(topic.name), str(topic.partitions), topic.cleanup, _kept(topic), f"{topic.max_record_bytes:,} B", state)
    return table


def _kept(topic: Topic) -> str:
    if topic.cleanup == "compact":
        return "the last of each key"
    parts = [
        *([f"{topic.retention_ms / 86_400_000:g} days"] if topic.retention_ms is not None else []),
        *([f"{topic.retention_bytes / 2**20:,.0f} MiB a partition"] if topic.retention_bytes is not None else []),
    ]
    return ", ".join(parts) or "for ever"
