"""`coldstream trainer`: the process that learns."""

from __future__ import annotations

from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

EXAMPLES = "[bold]coldstream trainer[/bold]\n\n[bold]coldstream trainer --set trainer.snapshot_every=100[/bold]"


def command(
    ctx: typer.Context,
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    meta_update: Annotated[int | None, typer.Option(help="trainer.meta_update: events in one update.")] = None,
    port: Annotated[int | None, typer.Option(help="metrics.port: 0 takes any free one.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Fold what the workers learned into the next versions of the model.

    One trainer is at work at any time; those started beside it stand by and take over. Ctrl-C or SIGTERM finishes the round in hand.
    """
    settings = configured(ctx, config, sets, verbose, {"broker": broker, "trainer.meta_update": meta_update, "metrics.port": port}).settings
    from consumers.stop import Stop
    from consumers.system import System
    from consumers.training import run_trainer

    with Stop() as stop, System(settings) as system:
        run_trainer(system, stop)
