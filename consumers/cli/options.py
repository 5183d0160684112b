"""What every command takes: --config, --set and --verbose, before the command's name or behind it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from consumers.layers import Loaded

PANEL = "For every command"
PIPE_WIDTH = 160

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="COLDSTREAM_CONFIG",
        help="Settings file, instead of coldstream.toml in this folder.",
        rich_help_panel=PANEL,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One setting, such as worker.micro_batch=32; may be repeated.", rich_help_panel=PANEL),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log debug messages, and show where an error came from.", rich_help_panel=PANEL)
]


@dataclass
class Given:
    """The common options as given so far. A --config behind the command's name wins over one before it."""

    config: Path | None = None
    sets: list[str] = field(default_factory=list)
    verbose: bool = False

    def add(self, config: Path | None, sets: list[str] | None, verbose: bool) -> None:
        """Take in one more place where they may stand."""
        self.config = config or self.config
        self.sets += sets or []
        self.verbose = self.verbose or verbose


def console() -> Console:
    """Standard output for tables: as wide as the terminal, and wide enough for a line a row where it is piped to a program."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def configured(
    ctx: typer.Context,
    config: Path | None,
    sets: list[str] | None,
    verbose: bool,
    flags: Mapping[str, object] | None = None,
) -> Loaded:
    """Load the settings and set up the logs: the first line of every command.

    ``flags`` are the command's own flags by the name of their setting, None for one that was not given.
    Raises `consumers.layers.SettingsError`.
    """
    from consumers import logs
    from consumers.layers import load

    given: Given = ctx.find_root().obj
    given.add(config, sets, verbose)
    loaded = load(given.config, given.sets, flags)
    logs.configure("debug" if given.verbose else loaded.settings.log_level, loaded.settings.log_format)
    return loaded
