"""`coldstream worker`: the process that scores."""

from __future__ import annotations

from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

EXAMPLES = "[bold]coldstream worker[/bold]\n\n[bold]coldstream worker --frozen --port 0[/bold]"


def command(
    ctx: typer.Context,
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="worker.micro_batch: events scored at one version.")] = None,
    frozen: Annotated[bool | None, typer.Option("--frozen/--learning", help="worker.frozen: score, but learn nothing.")] = None,
    port: Annotated[int | None, typer.Option(help="metrics.port: 0 takes any free one.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Score interactions: adapt to the user, score, and only then learn.

    Start as many as there are partitions; they share them out. Each writes what the model should learn to the trainer.
    Ctrl-C or SIGTERM finishes the step in hand and gives the partitions back.
    """
    settings = configured(
        ctx, config, sets, verbose, {"broker": broker, "worker.micro_batch": micro_batch, "worker.frozen": frozen, "metrics.port": port}
    ).settings
    from consumers.live import run_worker
    from consumers.stop import Stop
    from consumers.system import System

    with Stop() as stop, System(settings) as system:
        run_worker(system, stop)
