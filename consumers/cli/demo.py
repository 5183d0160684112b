"""`coldstream demo`: the whole system on MovieLens-100K."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

EXAMPLES = "[bold]coldstream demo[/bold]\n\n[bold]coldstream demo --events 20000 --out runs/first[/bold]"


def command(
    ctx: typer.Context,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="preset: default, or paper for MAMO as printed.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="worker.micro_batch: events scored at one version.")] = None,
    meta_update: Annotated[int | None, typer.Option(help="trainer.meta_update: events in one update.")] = None,
    port: Annotated[int | None, typer.Option(help="metrics.port: 0 takes any free one.")] = None,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the data set lies (make data fetches it).")] = Path("data/ml-100k"),
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the log and the report go.")] = Path("runs/demo"),
    events: Annotated[int | None, typer.Option(min=1, help="Only the first so many events.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Run the whole system over MovieLens-100K and report.

    Fills the topics, scores and learns from every event in time order, and leaves report.json and report.html in --out. An interrupted
    demo continues where it was; a finished one, or one with other settings, starts anew. Its settings come with the package
    (consumers/demo.toml); --config names others.
    """
    from consumers.demo import SETTINGS, begin, demo
    from consumers.stop import Stop
    from streaming.report import render_table

    settings = configured(
        ctx,
        config or ctx.find_root().obj.config or SETTINGS,
        sets,
        verbose,
        {
            "preset": preset,
            "broker": f"embedded:{out / 'log.db'}",
            "worker.micro_batch": micro_batch,
            "trainer.meta_update": meta_update,
            "metrics.port": port,
        },
    ).settings
    if begin(settings, out):
        typer.echo(f"going on with the run in {out}")
    from consumers.progress import StepBar

    with Stop() as stop, StepBar(console()) as bar:
        report = demo(settings, data, out, stop, events=events, on_step=bar.step)
        if report is None:
            stop.unfinished()
            return
    console().print(render_table(report))
    typer.echo(f"{report.events_per_second:,.0f} events/s; report: {out / 'report.html'}, {out / 'report.json'}")
