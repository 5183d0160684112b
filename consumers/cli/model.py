"""`coldstream model`: the versions of the model; going back to one, and taking one from deployment to deployment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from consumers.lineage import Lineage
    from streaming.headers import VersionHeader

app = typer.Typer(name="model", no_args_is_help=True, help="List the model's versions, go back to one, export and import.")

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Number = Annotated[int, typer.Argument(metavar="N", min=0, help="The version's number; 0 is the untrained model.")]


@app.command("list", epilog="[bold]coldstream model list[/bold]\n\n[bold]coldstream model list --last 20 --json[/bold]")
def list_versions(
    ctx: typer.Context,
    as_json: AsJson = False,
    last: Annotated[int, typer.Option(min=0, help="Only so many, the last ones; 0 is all.")] = 0,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """List the versions in the log: where each came from, what it folded, and whether it can be made again."""
    lineage = _lineage(ctx, config, sets, verbose)
    restorable = set(lineage.restorable())
    rows = [_row(lineage, number, restorable) for number in sorted({*lineage.kept, *lineage.snapshots})[-last:]]
    if as_json:
        _print_json(rows)
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("version", "parent", "made at", "events", "updates folded up to", "dropped", "snapshot", "can be made again"):
        table.add_column(column, justify="right" if column in ("version", "events", "dropped") else "left")
    for row in rows:
        table.add_row(
            str(row["version"]),
            _parent(row),
            _time(row["made_at"]),
            f"{row['events']:,}",
            _offsets(row["folded"]),
            str(len(row["dropped"])),
            "yes" if row["snapshot"] else "",
            "yes" if row["restorable"] else "no",
        )
    console().print(table)


@app.command("show", epilog="[bold]coldstream model show 400[/bold]")
def show(
    ctx: typer.Context,
    number: Annotated[int, typer.Argument(metavar="N", min=1, help="The version's number.")],
    as_json: AsJson = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Show one version: its parent, what it folded, dropped and skipped, and from which versions it is made again."""
    from streaming.errors import VersionLost

    lineage = _lineage(ctx, config, sets, verbose)
    row = _row(lineage, number, set(lineage.restorable()))
    try:
        row["made_from"] = lineage.path(number)
    except VersionLost as error:
        row["made_from"], row["lost"] = [], str(error)
    if as_json:
        _print_json(row)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    path = row["made_from"]
    of_path = f"version {path[0]} and {len(path) - 1} after it" if path else row["lost"]
    for name, value in {
        "version": str(number),
        "parent": _parent(row),
        "made at": _time(row["made_at"]),
        "settings": row["settings"],
        "events": f"{row['events']:,}",
        "updates folded up to": _offsets(row["folded"]),
        "dropped": ", ".join(f"{partition}: the one before {after}" for partition, after in row["dropped"]) or "none",
        "skipped": ", ".join(f"{partition}: {start} to {end}" for partition, start, end in row["skipped"]) or "none",
        "snapshot": "yes" if row["snapshot"] else "no",
        "made again from": of_path,
    }.items():
        table.add_row(name, Text(value))
    console().print(table)


@app.command("rollback", epilog="[bold]coldstream model rollback 400[/bold]")
def rollback(
    ctx: typer.Context,
    number: Number,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Go back to version N: its values become those of the next version.

    What was folded since is skipped for good, and named in the new version. Workers and trainers may run: they go on from the new version.
    """
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.opening import connect, topics_of
    from consumers.replacing import rollback

    with connect(settings) as log:
        made = rollback(log, settings, topics_of(settings), number)
    skipped = ", ".join(f"updates[{partition}] {start} to {end}" for partition, start, end in made.skipped) or "nothing"
    typer.echo(f"version {made.version} is version {number} again, in place of {made.replaces}; skipped: {skipped}")


@app.command("export", epilog="[bold]coldstream model export last model.safetensors[/bold]")
def export(
    ctx: typer.Context,
    number: Annotated[str, typer.Argument(metavar="N", help="The version's number, or last.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Written whole or not at all; one that exists is replaced.")],
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Write version N, with the settings that it depends on, to a file in the safetensors format."""
    if number != "last" and not number.isdecimal():
        raise typer.BadParameter(f"{number} is neither a version's number nor last", param_hint="N")
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.opening import connect, topics_of
    from consumers.replacing import export

    with connect(settings) as log:
        version = export(log, settings, topics_of(settings), None if number == "last" else int(number), file)
    typer.echo(f"version {version}: {file}, {file.stat().st_size:,} bytes")


@app.command("import", epilog="[bold]coldstream model import model.safetensors[/bold]")
def import_file(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `coldstream model export` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the last version of a log that has versions.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Start a fresh deployment from an exported model: it becomes version 1.

    Model, schema, rating and seed must be set as where it was exported.
    """
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.opening import connect, topics_of
    from consumers.replacing import import_model

    topics = topics_of(settings)
    with connect(settings, create=True) as log:
        log.create(topics.values())
        made = import_model(log, settings, topics, file, force=force)
    typer.echo(f"version {made.version} is the model of {file}")


def _lineage(ctx: typer.Context, config: Path | None, sets: list[str] | None, verbose: bool) -> Lineage:
    settings = configured(ctx, config, sets, verbose).settings
    from consumers.lineage import Lineage
    from consumers.opening import connect, topics_of

    with connect(settings) as log:
        return Lineage(log, topics_of(settings))


def _row(lineage: Lineage, number: int, restorable: set[int]) -> dict[str, Any]:
    import msgspec

    header: VersionHeader = lineage.header(number)
    row: dict[str, Any] = msgspec.to_builtins(header)
    return row | {"snapshot": number in lineage.snapshots, "restorable": number in restorable}


def _parent(row: dict[str, Any]) -> str:
    if row["replaces"] is None:
        return "" if row["parent"] is None else str(row["parent"])
    return "imported" if row["parent"] is None else f"{row['parent']}, in place of {row['replaces']}"


def _offsets(folded: dict[int, int]) -> str:
    return ", ".join(f"{partition}: {offset}" for partition, offset in sorted(folded.items())) or "none"


def _time(made_at: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(made_at / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _print_json(value: object) -> None:
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))
