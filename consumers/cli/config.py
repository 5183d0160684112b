"""`coldstream config`: the effective settings, and where each came from."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from rich.table import Table

    from consumers.inspection import Effective

EXAMPLES = (
    "[bold]coldstream config worker[/bold]\n\n[bold]coldstream config --changed --set preset=paper[/bold]\n\n"
    "[bold]coldstream config --changed --format toml > effective.toml[/bold]"
)


class Format(enum.StrEnum):
    """How the settings are printed."""

    TABLE = "table"
    TOML = "toml"
    JSON = "json"


def command(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these settings or sections.")] = None,
    form: Annotated[
        Format, typer.Option("--format", help="toml and json can be read by programs; toml is also a settings file.")
    ] = Format.TABLE,
    changed: Annotated[bool, typer.Option("--changed", help="Only settings that differ from their default.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Print the effective settings and where each came from.

    Later sources win: defaults, preset, coldstream.toml (or --config FILE), environment (COLDSTREAM_WORKER__MICRO_BATCH=32), flags.
    Secrets are never shown.
    """
    from consumers import inspection

    chosen = inspection.select(inspection.effective(configured(ctx, config, sets, verbose)), names or [], changed=changed)
    match form:
        case Format.TOML:
            typer.echo(inspection.as_toml(chosen), nl=False)
        case Format.JSON:
            typer.echo(inspection.as_json(chosen))
        case Format.TABLE:
            console().print(_table(chosen))


def _table(chosen: list[Effective]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("setting", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("unit")
    table.add_column("from", overflow="fold")
    for item in chosen:
        default = item.origin.source == "default"
        table.add_row(
            Text(item.entry.name), Text(item.shown), Text(item.entry.unit), Text(str(item.origin)), style="" if default else "bold"
        )
    return table
