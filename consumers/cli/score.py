"""`coldstream score`: scores for one user, now."""

from __future__ import annotations

from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

EXAMPLES = "[bold]coldstream score 42 --item 50 --item 181[/bold]\n\n[bold]coldstream score 42 --best 10[/bold]"


def command(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(help="The user's id; one that nobody has seen is scored too.")],
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    item: Annotated[list[str] | None, typer.Option("--item", metavar="ID", help="An item to score; may be repeated.")] = None,
    best: Annotated[int, typer.Option(min=1, help="Without --item: this many of the catalogue.")] = 10,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Score items for one user, or find the best of the catalogue.

    Reads the log and the last snapshot, beside a running or a stopped system; nothing is written and nothing is learned.
    """
    settings = configured(ctx, config, sets, verbose, {"broker": broker}).settings
    from rich.table import Table
    from rich.text import Text

    from consumers.opening import connect, topics_of
    from consumers.scoring import answer

    with connect(settings) as log:
        found = answer(log, settings, topics_of(settings), user, item, best)
    # Text, not markup: ids are whatever people send.
    title = Text(f"user {user}: {found.earlier} interactions, {found.support_size} of them used; model version {found.version}")
    table = Table(title=title)
    for heading in ("item", "score", "sd"):
        table.add_column(heading, justify="left" if heading == "item" else "right")
    for each in found.scores:
        table.add_row(Text(each.item), f"{each.score:.3f}", "-" if each.sd is None else f"{each.sd:.3f}")
    console().print(table)
