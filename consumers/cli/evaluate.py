"""`coldstream evaluate`: the paper's own task protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

EXAMPLES = "[bold]coldstream evaluate[/bold]\n\n[bold]coldstream evaluate --data ../ml-1m --seeds 5[/bold]"


def command(
    ctx: typer.Context,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="preset: default, or paper for MAMO as printed.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The data set; default: the demo's.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs, each with its own seed.")] = 3,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Train on users' tasks and report the paper's four scenarios: warm or cold user, warm or cold item.

    The memories are read-only at test. This is the paper's protocol, not the stream's: see [bold]coldstream report[/bold] for that.
    """
    settings = configured(ctx, config, sets, verbose, {"preset": preset}).settings
    raise NotImplementedError(f"evaluate on {settings.broker}")
