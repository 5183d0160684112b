"""`coldstream forget`: users whose state, support set and profile are to go."""

from __future__ import annotations

from typing import Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured

EXAMPLES = "[bold]coldstream forget 42[/bold]\n\n[bold]coldstream forget 42 43 --yes[/bold]"


def command(
    ctx: typer.Context,
    users: Annotated[list[str], typer.Argument(metavar="USER...", help="The users' ids.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    broker: Annotated[str | None, typer.Option(metavar="BROKER", help="broker: embedded:PATH or kafka:HOST:PORT,...")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Forget users: their profiles become null in the topic users.

    The worker that holds such a user drops state, support set and profile with its next step. Topics that are kept by time lose the user
    by retention; docs/contract.md says what is left where. Whoever comes back begins anew.
    """
    settings = configured(ctx, config, sets, verbose, {"broker": broker}).settings
    from consumers.opening import connect, require_topics, topics_of
    from streaming.log import Message
    from streaming.validation import checked_id

    keys = [checked_id(user, "user", settings.event_limits()).encode() for user in users]
    topics = topics_of(settings)
    with connect(settings) as log:
        require_topics(log, [topics["users"]])
        if not yes:
            typer.confirm(f"Forget {', '.join(users)} in {settings.broker}?", abort=True, err=True)
        log.append([Message(topics["users"].name, key, None) for key in keys])
    typer.echo(f"{len(keys)} to be forgotten; a worker does it with its next step")
