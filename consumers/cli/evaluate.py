"""`coldstream evaluate`: the paper's own task protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

EXAMPLES = (
    "[bold]coldstream evaluate[/bold]\n\n[bold]coldstream evaluate --data ../ml-1m --seeds 1[/bold]\n\n"
    "[bold]coldstream evaluate --preset paper --out runs/paper.json[/bold]"
)


def command(
    ctx: typer.Context,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="preset: default, or paper for MAMO as printed.")] = None,
    data: Annotated[
        Path, typer.Option(metavar="FOLDER", help="The data set: RecBole's files (make data fetches them), or MovieLens-1M's.")
    ] = Path("data/ml-100k"),
    seeds: Annotated[int, typer.Option(min=1, help="How many runs, each with its own seed, from the setting seed on.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="How often each warm user is trained on.")] = 15,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Users in one meta-update; default: 16, and 2 where their gradients are summed (preset paper)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.json", help="Where to write the results, too.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Train on users' tasks and report the paper's four scenarios: warm or cold user, warm or cold item.

    The memories are read-only at test. This is the paper's protocol, not the stream's: see [bold]coldstream report[/bold] for that.
    docs/evaluation.md says how users and items are split. Its settings are those of the demo (consumers/demo.toml); --config names others.
    """
    from consumers.datasets import load
    from consumers.demo_files import SETTINGS
    from consumers.evaluate import evaluate
    from consumers.evaluation_report import EpochBar, results_table, write

    settings = configured(ctx, config or ctx.find_root().obj.config or SETTINGS, sets, verbose, {"preset": preset}).settings
    if out is not None:
        if out.exists() and not out.is_file():
            raise typer.BadParameter(f"{out} is no file that could be replaced", param_hint="--out")
        out.parent.mkdir(parents=True, exist_ok=True)
    # A sum grows with the batch, and with it the step: rates that bear 2 users run away with 16.
    batch = batch or (2 if settings.model.reduction == "sum" else 16)
    loaded = load(data, settings.event_limits())
    with EpochBar(console(), runs=seeds, epochs=epochs) as bar:
        report = evaluate(settings, loaded, seeds=seeds, epochs=epochs, batch=batch, on_epoch=bar.epoch)
    console().print(results_table(report))
    if out is not None:
        write(report, out)
