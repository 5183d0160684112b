"""The processes of a live demo in the terminal: a table that follows them; off a terminal, lines now and then."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from consumers.progress import LINE_SECONDS

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from consumers.demo_live import View
    from consumers.processes import Process

WIDTHS = {"process": 8, "state": None, "done": 7, "per s": 5, "lag": None, "MAE": 6, "version": 7, "memory": 6}
"""The least width of each column: on a narrow terminal state and lag give way."""


class LiveView:
    """Shows how a demo's processes stand; used with ``with``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = -math.inf
        self._stack = ExitStack()
        self._live: Live | None = None

    def look(self, view: View) -> None:
        """Take in how they stand."""
        if self._live is not None:
            said = [Text(f" {process.name}: {process.said}", style="dim") for process in view.processes if process.said]
            self._live.update(Group(table(view), *said), refresh=True)
        elif time.monotonic() - self._told > LINE_SECONDS or view.scored >= view.total:
            self._told = time.monotonic()
            for line in lines(view):
                self._console.print(line, highlight=False, markup=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = self._stack.enter_context(Live(console=self._console, auto_refresh=False))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()


def heading(view: View) -> str:
    """How far the whole is."""
    minutes, seconds = divmod(int(view.seconds), 60)
    return f"{view.scored:,} of {view.total:,} events scored, {view.sent:,} sent, {minutes}:{seconds:02}"


def table(view: View) -> Table:
    """A row for each process."""
    made = Table(title=heading(view), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head, least in WIDTHS.items():
        left = head in ("process", "state", "lag")
        made.add_column(head, justify="left" if left else "right", no_wrap=True, min_width=least)
    for process in view.processes:
        state = Text(process.seen.state, style="green" if process.seen.ready or process.seen.state == "done" else "yellow")
        made.add_row(process.name, state, *(value or "–" for value in cells(process, view)))
    return made


def lines(view: View) -> list[str]:
    """The same as lines: the whole, and each process with what is known of it."""
    found = [heading(view)]
    for process in view.processes:
        done, rate, lag, mae, version, memory = cells(process, view)
        what = "updates" if process.name == "trainer" else "events"
        told = {"lag ": lag, "running MAE ": mae, "version ": version, "": memory}
        parts = [f"{name}{value}" for name, value in told.items() if value]
        found.append(f"  {process.name}: {', '.join([process.seen.state, f'{done} {what}', f'{rate} {what}/s', *parts])}")
    return found


def cells(process: Process, view: View) -> tuple[str, str, str, str, str, str]:
    """Events (of the trainer: updates), how many a second, lag by partition, running MAE, version and memory; empty where there is none."""
    seen = process.seen
    return (
        f"{view.sent if process.name == 'replayer' else seen.events or seen.updates:,}",
        f"{process.rate.per_second():,.0f}",
        " ".join(f"{number}:{behind:,}" for number, behind in sorted(seen.lag.items())),
        _number(seen.mae, ".4f"),
        _number(seen.version, ",.0f"),
        "" if math.isnan(seen.memory) else f"{seen.memory / 1e6:,.0f} MB",
    )


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)
