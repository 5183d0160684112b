"""The main job on real input: MovieLens-100K through the whole system, and the report of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consumers import lockstep
from consumers.demo_beside import fill, report_on
from consumers.demo_files import Files, require_data
from consumers.system import System
from streaming.journal import Journal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from consumers.demo_beside import Beside
    from consumers.settings import Settings
    from consumers.stop import Stop
    from streaming.report import Report


def demo(
    settings: Settings,
    data: Path,
    out: Path,
    stop: Stop,
    *,
    events: int | None = None,
    beside: Beside | None = None,
    on_step: Callable[[lockstep.Progress], None] = lambda _: None,
) -> Report | None:
    """Fill the topics from ``data``, run over the first ``events`` of them in lockstep, and report; None if stopped before the end.

    What needs no model is done by the process ``beside`` if there is one, else by this one, before and after the run. Raises `SourceError`
    where the data is not there, and `BesideEnded`.
    """
    require_data(data)
    with System(settings) as system:
        if beside is None:
            fill(system.log, settings, data, stop.__bool__)
        else:
            beside.filled(stop)
        stop.unfinished()
        with Journal(Files.under(out).journal) as journal:
            lockstep.run(system, stop, until_end=True, limit=events, journal=journal, on_step=on_step)
        if stop:
            return None
        if beside is None:
            return report_on(system.log, settings, out)
    return beside.report(stop)
