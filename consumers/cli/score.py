"""`coldstream score`: what a user will rate highest, now."""

from __future__ import annotations

from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console

EXAMPLES = (
    "[bold]coldstream score 42 --item 50 --item 181[/bold]\n\n[bold]coldstream score 42 --best 10[/bold]"
    "\n\n[bold]coldstream score 42 --offline[/bold]"
)


def command(
    ctx: typer.Context,
    user: Annotated[str, typer.Argument(help="The user's id; one that nobody has seen is scored too.")],
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    item: Annotated[list[str] | None, typer.Option("--item", metavar="ID", help="An item to score; may be repeated.")] = None,
    best: Annotated[
        int | None, typer.Option(min=1, help="This many of the best; by default all that are named, or 10 of the catalogue.")
    ] = None,
    exclude_rated: Annotated[bool, typer.Option("--exclude-rated", help="Leave out what the user has rated lately.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest wait for the answer, in seconds.")] = 10.0,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no worker: read the log and the last snapshot, beside a stopped system.")
    ] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Score items for one user, or find the best of the catalogue.

    Sends a request and waits for the worker's answer, in which all interactions that were in the log before it count. Nothing is learned.
    """
    settings = configured(ctx, config, sets, verbose, {"broker": broker}).settings
    import time
    import uuid

    from rich.table import Table
    from rich.text import Text

    from consumers.asking import ask
    from consumers.opening import connect, require_topics, topics_of
    from streaming.validation import request_of

    fields = {"request": uuid.uuid4().hex, "user": user, "timestamp": time.time_ns() // 1_000_000}
    request = request_of(fields | {"items": item or None, "n": best, "exclude_rated": exclude_rated}, settings.event_limits())
    topics = topics_of(settings)
    with connect(settings) as log:
        require_topics(log, topics.values())
        if offline:
            from consumers.scoring import offline as answer

            ranking, version = answer(log, settings, topics, request)
            rows = [(each.item, each.score, each.sd) for each in ranking.scores]
            earlier, size, as_of = ranking.earlier, ranking.support_size, "from the log"
        else:
            found = ask(log, topics, request, timeout)
            sds: list[float | None] = [None] * len(found.items) if found.sds is None else [*found.sds]
            rows = list(zip(found.items, found.scores, sds, strict=True))
            version, earlier, size = found.model_version, found.earlier, found.support_size
            topic, partition, offset = found.as_of
            as_of = f"as of {topic}[{partition}] before {offset}{', stale: more had come' if found.stale else ''}"
    # Text, not markup: ids are whatever people send.
    console().print(Text(f"user {user}: {earlier} interactions, {size} of them used; model version {version}, {as_of}"))
    if not rows:
        typer.echo("no item is known to score")
        return
    table = Table()
    for heading in ("item", "score", "sd"):
        table.add_column(heading, justify="left" if heading == "item" else "right")
    for name, score, sd in rows:
        table.add_row(Text(name), f"{score:.3f}", "-" if sd is None else f"{sd:.3f}")
    console().print(table)
