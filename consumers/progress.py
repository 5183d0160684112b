"""The progress bar of a run: events/s, running error, time left. Off a terminal, a line now and then."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from streaming.metrics import RunningError

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from consumers.audit import Progress as Audited
    from consumers.lockstep import Progress as Step
    from consumers.replayer import Progress as Share

LINE_SECONDS = 15.0
SHOWN_SECONDS = 0.1
"""No eye follows a bar that moves with every step, and to move it takes a tenth of a millisecond."""


class StepBar:
    """Shows the steps of a run; used with ``with``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._error = RunningError(half_life=5000)
        self._began = self._told = time.monotonic()
        self._shown = 0.0
        self._events = self._first = 0
        self._bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} events"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]:,.0f} events/s"),
            TextColumn("running MAE {task.fields[mae]:.4f}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("run", total=1, rate=0.0, mae=float("nan"))

    def step(self, progress: Step) -> None:
        """Take in a step."""
        for error in progress.step.errors:
            self._error.update(error)
        now = time.monotonic()
        if not self._events and progress.done < progress.total:
            # What went before it, the compiling of a fresh checkout above all, is none of the rate.
            self._first, self._began, self._told = progress.step.events, now, now
        self._events += progress.step.events
        if now - self._shown < SHOWN_SECONDS and progress.done < progress.total:
            return
        self._shown = now
        rate = (self._events - self._first) / max(now - self._began, 1e-9)
        self._bar.update(self._task, completed=progress.done, total=progress.total, rate=rate, mae=self._error.mae())
        if not self._console.is_terminal and (now - self._told > LINE_SECONDS or progress.done == progress.total):
            self._told = now
            self._console.print(
                f"{progress.done:,}/{progress.total:,} events, {rate:,.0f} events/s, running MAE {self._error.mae():.4f}", highlight=False
            )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


class ShareBar:
    """Shows how much of a file is done, on a terminal only; used with ``with``."""

    def __init__(self, console: Console, name: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[sent]:,} sent"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=1.0, sent=0)

    def update(self, progress: Share) -> None:
        """Take in how far it is."""
        self._bar.update(self._task, completed=progress.share, sent=progress.events)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


class AuditBar:
    """Shows how far an audit is. Off a terminal, a line now and then; used with ``with``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} offsets"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[scores]:,} scores made again"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("audit", total=1, scores=0)

    def update(self, progress: Audited) -> None:
        """Take in how far it is."""
        self._bar.update(self._task, completed=progress.done, total=progress.total, scores=progress.scores)
        if not self._console.is_terminal and time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            told = f"{progress.done:,}/{progress.total:,} offsets, {progress.scores:,} scores made again"
            self._console.print(told, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


class RunBars:
    """A progress bar for the copying and then for each of the two runs, one after the other; used with ``with``."""

    def __init__(self, shown: Console) -> None:
        self._console = shown
        self._stack = ExitStack()
        self._side = ""

    def fill(self, progress: Share) -> None:
        """Take in how much is copied."""
        if not self._side:
            self._side = "copying events"
            self._copying = self._stack.enter_context(ShareBar(self._console, self._side))
        self._copying.update(progress)

    def step(self, side: str, progress: Step) -> None:
        """Take in a step of ``side``."""
        if side != self._side:
            self._side = side
            self._stack.close()
            self._console.print(side)
            self._running = self._stack.enter_context(StepBar(self._console))
        self._running.step(progress)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
