"""The command line `coldstream`. Each command is a file of this package; what it needs beyond typer it imports when it runs.

Here is the one place where an error becomes a message and an exit code (`consumers.exits`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from consumers.cli import (
    audit,
    backtest,
    config,
    deadletters,
    demo,
    evaluate,
    forget,
    model,
    replay,
    report,
    run,
    score,
    status,
    topics,
    trainer,
    worker,
)
from consumers.cli.options import ConfigFile, Given, Sets, Verbose

app = typer.Typer(
    name="coldstream",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage or settings, 3 log unavailable, 4 log full, 5 taken over by another instance, "
    "6 bad input file, 7 an audit found differences, 8 no worker answered in time, "
    "130 and 143 stopped by a signal before the work was done.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"coldstream {version('coldstream')}")
        raise typer.Exit


@app.callback()
def _coldstream(
    ctx: typer.Context,
    config: ConfigFile = None,
    sets: Sets = None,
    verbose: Verbose = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """A streaming, online-learning recommender for cold-start users.

    Interactions come in, each is scored from its user's own adapted model before anything is learned from it, scores go out.
    [bold]coldstream demo[/bold] shows all of it on one machine; [bold]coldstream config[/bold] lists every setting.
    """
    _ = version  # its callback has done the work
    ctx.find_root().obj.add(config, sets, verbose)


for module in (audit, run, worker, trainer, replay, backtest, report, evaluate, status, score, forget, config, demo):
    app.command(module.__name__.rpartition(".")[2], epilog=f"Examples:\n\n{module.EXAMPLES}")(module.command)
app.add_typer(topics.app)
app.add_typer(deadletters.app)
app.add_typer(model.app)


def execute(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code. Errors are told on standard error, in one line each."""
    given = Given()
    return explained(lambda: app(args=None if arguments is None else list(arguments), prog_name="coldstream", obj=given), given)


def explained(work: Callable[[], object], given: Given | None = None) -> int:
    """Do all the work of this process and return its exit code. Errors are told on standard error, in one line each."""
    try:
        work()
    except SystemExit as end:  # typer's way to finish
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost place: whatever it is, a person is told and a code returned
        return _explain(error, verbose=given is not None and given.verbose)
    return 0


def _explain(error: BaseException, *, verbose: bool) -> int:
    from consumers.exits import Exit, exit_of
    from consumers.logs import masked_text

    code = exit_of(error)
    if verbose:
        import traceback

        typer.echo(masked_text("".join(traceback.format_exception(error))), err=True, nl=False)
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename and error.strerror else str(error)
    if code is Exit.UNEXPECTED:
        text = f"unexpected {type(error).__name__}: {text}" + ("" if verbose else " (--verbose shows where)")
    for line in masked_text(text).splitlines() or [code.name.lower()]:
        typer.echo(f"coldstream: {line}", err=True)
    return code


def main() -> None:
    """Entry point of the command `coldstream`."""
    sys.exit(execute())
