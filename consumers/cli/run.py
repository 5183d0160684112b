"""`coldstream run`: worker and trainer in one process, in lockstep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

EXAMPLES = "[bold]coldstream run[/bold]\n\n[bold]coldstream run --until-end --preset paper[/bold]"


def command(
    ctx: typer.Context,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="preset: default, or paper for MAMO as printed.")] = None,
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="worker.micro_batch: events scored at one version.")] = None,
    meta_update: Annotated[int | None, typer.Option(help="trainer.meta_update: events in one update.")] = None,
    port: Annotated[int | None, typer.Option(help="metrics.port: 0 takes any free one.")] = None,
    journal: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a run journal there, for `coldstream report --journal`.")
    ] = None,
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop at the end of the log instead of waiting for more.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Run worker and trainer in one process, by turns.

    This is the whole system on one machine: interactions that are in the log are scored, learned from, and their scores written; new ones
    are waited for, until they fill a micro-batch. The same log, settings and seed give the same scores bit for bit. Ctrl-C finishes the
    step in hand. Where somebody goes back to an older model meanwhile, it ends with 5 and is to be started again.
    """
    settings = configured(
        ctx,
        config,
        sets,
        verbose,
        {"preset": preset, "broker": broker, "worker.micro_batch": micro_batch, "trainer.meta_update": meta_update, "metrics.port": port},
    ).settings
    from contextlib import ExitStack

    from rich.console import Console

    from consumers.lockstep import run
    from consumers.progress import StepBar
    from consumers.stop import Stop
    from consumers.system import System
    from streaming.journal import Journal

    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        bar = stack.enter_context(StepBar(Console(stderr=True)))
        system = stack.enter_context(System(settings))
        kept = None if journal is None else stack.enter_context(Journal(journal))
        run(system, stop, until_end=until_end, journal=kept, on_step=bar.step)
        if until_end:
            stop.unfinished()
