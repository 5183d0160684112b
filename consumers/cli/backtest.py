"""`coldstream backtest`: a candidate configuration against the live one, on past events."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from consumers.cli.options import ConfigFile, Sets, Verbose, configured, console
from consumers.cli.replay import FromBroker, FromTopic, Last, Since, Until, file_source, shown_range, time_range, topic_source

if TYPE_CHECKING:
    from streaming.sources import Source
    from streaming.topicsource import TopicSource

EXAMPLES = (
    "[bold]coldstream backtest --try worker.support_size=20[/bold]\n\n"
    "[bold]coldstream backtest --candidate next.toml --last 30d --out runs/backtest/next[/bold]\n\n"
    "[bold]coldstream backtest ratings.csv --no-profiles --try preset=paper --events 20000[/bold]"
)


def command(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="CSV, TSV or JSONL, also gzipped, read as replay.* says; default: the live topic.")
    ] = None,
    candidate: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="The candidate's settings file, in place of the live one (--config).")
    ] = None,
    tries: Annotated[
        list[str] | None, typer.Option("--try", metavar="NAME=VALUE", help="One setting of the candidate's; may be repeated.")
    ] = None,
    from_topic: FromTopic = None,
    from_broker: FromBroker = None,
    since: Since = None,
    until: Until = None,
    last: Last = None,
    events: Annotated[int | None, typer.Option(min=1, help="Only the first so many events of these.")] = None,
    profiles: Annotated[
        bool, typer.Option("--profiles/--no-profiles", help="Copy users and items from the live log, as they are now.")
    ] = True,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the runs and backtest.json go.")] = Path("runs/backtest"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the logs of both runs there.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Run past events through a candidate configuration and through the live one, and compare the two.

    Both start from an untrained model and run in lockstep over copies of the same events, in the order of their times. The live log is
    opened for reading only. Stopped and run again, it goes on where it was; finished, or with other settings, it starts anew.

    --set and the environment hold for both.
    """
    from consumers.backtest import backtest
    from consumers.backtest_report import render_changes, render_table
    from consumers.layers import load
    from consumers.opening import connect, topics_of
    from consumers.progress import RunBars
    from consumers.stop import Stop

    live = configured(ctx, config, sets, verbose).settings
    if candidate is None and not tries:
        raise typer.BadParameter("there is nothing to try: give at least one of them", param_hint="--candidate, --try")
    if file is not None and from_topic is not None:
        raise typer.BadParameter("name either a file or a topic", param_hint="FILE, --from-topic")
    given = ctx.find_root().obj
    tried = load(candidate or given.config, [*given.sets, *(tries or ())]).settings
    within = time_range(since, until, last)
    shown = console()
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        log = stack.enter_context(connect(live, read_only=True)) if profiles else None
        if file is not None:
            source: Source | TopicSource = file_source(file, live)
        else:
            source = topic_source(stack, live, log, from_topic or topics_of(live)["interactions"].name, from_broker)
        with RunBars(shown) as bars:
            result = backtest(
                live,
                tried,
                source,
                out,
                stop,
                profiles=log,
                within=within,
                events=events,
                keep=keep,
                on_fill=bars.fill,
                on_step=bars.step,
            )
        if result is None:
            stop.unfinished()
            return
    if result.changed:
        shown.print(render_changes(result))
    else:
        shown.print("the candidate's settings are the live ones")
    shown.print(render_table(result))
    left_out = f"; {result.outside:,} outside {shown_range(result.since, result.until)}" if not within.whole else ""
    typer.echo(f"{result.source}: {result.refused:,} records are no valid events{left_out}; {out / 'backtest.json'}")
