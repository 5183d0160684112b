"""`coldstream demo`: the whole system on MovieLens-100K."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

if TYPE_CHECKING:
    from consumers.layers import Loaded
    from streaming.report import Report

EXAMPLES = (
    "[bold]coldstream demo[/bold]\n\n[bold]coldstream demo --events 20000 --out runs/first[/bold]\n\n"
    "[bold]coldstream demo --broker kafka:127.0.0.1:9092 --workers 2[/bold]"
)

WORKERS = 2
PARTITIONS = 4


def command(
    ctx: typer.Context,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="preset: default, or paper for MAMO as printed.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="worker.micro_batch: events scored at one version.")] = None,
    meta_update: Annotated[int | None, typer.Option(help="trainer.meta_update: events in one update.")] = None,
    port: Annotated[int | None, typer.Option(help="metrics.port: 0 takes any free one.")] = None,
    data: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the data set lies (make data fetches it).")] = Path("data/ml-100k"),
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the log and the report go; default: runs/demo, or runs/demo-live.")
    ] = None,
    events: Annotated[int | None, typer.Option(min=1, help="Only the first so many events.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="So many workers, a trainer and a replayer as processes of their own, not in lockstep.")
    ] = None,
    broker: Annotated[
        str | None, typer.Option(metavar="BROKER", help="The log of those processes (default: embedded, in --out); without --workers two.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Run the whole system over MovieLens-100K and report.

    Fills the topics, scores and learns from every event in time order, and leaves report.json and report.html in --out. An interrupted
    demo continues where it was; a finished one, or one with other settings, starts anew. Its settings come with the package
    (consumers/demo.toml); --config names others.

    With --workers or --broker it runs as in production: each process on its own, over four partitions (topics.partitions in --config
    for others). Such a run always starts anew, and the log must be empty.
    """
    from consumers.demo_files import SETTINGS, begin

    live = workers is not None or broker is not None
    out = out or Path("runs/demo-live" if live else "runs/demo")
    given = config or ctx.find_root().obj.config
    loaded = configured(
        ctx,
        given or SETTINGS,
        sets,
        verbose,
        {
            "preset": preset,
            "broker": broker or f"embedded:{out / 'log.db'}",
            "topics.partitions": PARTITIONS if live and given is None else None,
            "worker.micro_batch": micro_batch,
            "trainer.meta_update": meta_update,
            "metrics.port": port,
        },
    )
    if live:
        _live(loaded, data, out, workers or WORKERS, events)
        return
    if begin(loaded.settings, out):
        typer.echo(f"going on with the run in {out}")
    _in_lockstep(loaded, data, out, events)


def _in_lockstep(loaded: Loaded, data: Path, out: Path, events: int | None) -> None:
    """The demo in lockstep, with a process beside it where there is a core for that. One that ended too early gives its exit code."""
    from consumers.demo_beside import Beside, BesideEnded, keep_settings
    from consumers.progress import StepBar
    from consumers.stop import Stop

    try:
        with ExitStack() as stack:
            stop = stack.enter_context(Stop())
            config = keep_settings(loaded, out)
            beside = stack.enter_context(Beside(config, data, out)) if loaded.settings.cores() > 1 else None
            # Only now: it loads torch, and the process beside is at work meanwhile.
            from consumers.demo import demo

            bar = stack.enter_context(StepBar(console()))
            report = demo(loaded.settings, data, out, stop, events=events, beside=beside, on_step=bar.step)
            if report is None:
                stop.unfinished()
                return
    except BesideEnded as error:
        typer.echo(f"coldstream: {error}", err=True)
        raise typer.Exit(max(1, error.code)) from None
    _show(report, out)


def _live(loaded: Loaded, data: Path, out: Path, workers: int, events: int | None) -> None:
    """The demo in processes of their own. A process that ended too early gives its exit code."""
    from consumers.demo_live import demo_live
    from consumers.liveview import LiveView
    from consumers.processes import ProcessEnded
    from consumers.stop import Stop

    try:
        with Stop() as stop:
            with LiveView(console()) as view:
                report = demo_live(loaded, data, out, stop, workers=workers, events=events, on_look=view.look)
            if report is None:
                typer.echo("coldstream: stopped before all events were scored; run again, it starts anew", err=True)
                raise typer.Exit(128 + (stop.signal or 0))
    except ProcessEnded as error:
        typer.echo(f"coldstream: {error}", err=True)
        raise typer.Exit(max(1, error.code)) from None
    _show(report, out)


def _show(report: Report, out: Path) -> None:
    from streaming.report import render_table

    console().print(render_table(report))
    typer.echo(f"{report.events_per_second:,.0f} events/s; report: {out / 'report.html'}, {out / 'report.json'}")
