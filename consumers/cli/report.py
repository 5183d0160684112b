"""`coldstream report`: how good the scores were, from the log alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

EXAMPLES = (
    "[bold]coldstream report --out runs/report[/bold]\n\n"
    "[bold]coldstream report --config runs/demo/settings.toml --journal runs/demo/journal.jsonl --out runs/demo[/bold]"
)


def command(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Leave report.json and report.html there.")] = None,
    journal: Annotated[Path | None, typer.Option(metavar="FILE", help="The run's journal, for times and restarts.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Events of the last window.")] = 20_000,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Report the error of the scores, all of them made before their event was learned from.

    MAE and RMSE over all events, by how many earlier events the user had, and over the last window; beside it river's BiasedMF and the
    running mean on the same events. Everything is read from the log, beside a running or a stopped system.
    """
    from consumers.inspection import public
    from consumers.opening import connect

    settings = configured(ctx, config, sets, verbose).settings
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    from streaming.journal import read_journal
    from streaming.report import build_report, render_table, write_report

    with connect(settings) as log:
        report = build_report(
            log,
            public(settings),
            None if journal is None else read_journal(journal),
            limits=settings.event_limits(),
            prefix=settings.topic_prefix,
            window=window,
        )
    console().print(render_table(report))
    if out is not None:
        write_report(report, out)
        typer.echo(f"report: {out / 'report.html'}")
