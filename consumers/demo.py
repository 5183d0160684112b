"""The main job on real input: MovieLens-100K through the whole system, and the report of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consumers import lockstep
from consumers.demo_files import COLUMNS, Files, require_data
from consumers.inspection import public
from consumers.replayer import replay
from consumers.system import System
from streaming.journal import Journal, read_journal
from streaming.report import build_report, write_report
from streaming.sources import interaction_source, profile_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from consumers.settings import Settings
    from consumers.stop import Stop
    from streaming.report import Report
    from streaming.sources import Source


def fill(system: System, data: Path, stop: Stop) -> None:
    """Fill users, items and interactions, the last in order of time. What an earlier run sent is not sent again."""
    limits = system.settings.event_limits()
    sources: dict[str, Source] = {
        "users": profile_source(data / "ml-100k.user", id_column="user_id", limits=limits),
        "items": profile_source(data / "ml-100k.item", id_column="item_id", limits=limits),
        "interactions": interaction_source(data / "ml-100k.inter", columns=COLUMNS, timestamps="s", limits=limits),
    }
    for into, source in sources.items():
        result = replay(
            system.log,
            source,
            system.topics,
            into=into,  # type: ignore[arg-type]  # the keys above are the topics
            group=system.settings.group_id,
            batch=5000,
            sort_by_time=source.timed,
            stop=stop.__bool__,
        )
        if not result.done:
            stop.unfinished()


def demo(
    settings: Settings,
    data: Path,
    out: Path,
    stop: Stop,
    *,
    events: int | None = None,
    on_step: Callable[[lockstep.Progress], None] = lambda _: None,
) -> Report | None:
    """Fill the topics from ``data``, run over the first ``events`` of them in lockstep, and report; None if stopped before the end.

    Raises `SourceError` where the data is not there.
    """
    files = Files.under(out)
    require_data(data)
    with System(settings) as system:
        fill(system, data, stop)
        with Journal(files.journal) as journal:
            lockstep.run(system, stop, until_end=True, limit=events, journal=journal, on_step=on_step)
        if stop:
            return None
        report = build_report(
            system.log,
            public(settings),
            read_journal(files.journal),
            limits=settings.event_limits(),
            prefix=settings.topic_prefix,
        )
    write_report(report, out)
    return report
