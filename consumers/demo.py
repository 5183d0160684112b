"""The main job on real input: MovieLens-100K through the whole system, and the report of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from consumers import lockstep
from consumers.inspection import public
from consumers.replayer import replay
from consumers.system import System
from streaming.errors import SourceError
from streaming.journal import Journal, read_journal
from streaming.report import build_report, write_report
from streaming.sources import Mapped, interaction_source, profile_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumers.settings import Settings
    from consumers.stop import Stop
    from streaming.report import Report
    from streaming.sources import Source

SETTINGS = Path(__file__).with_name("demo.toml")
COLUMNS = Mapped("user_id", "item_id", "rating", "timestamp")


class Files(NamedTuple):
    """What a demo leaves in its folder."""

    log: Path
    journal: Path
    settings: Path
    report: Path

    @classmethod
    def under(cls, out: Path) -> Files:
        """The files of the demo in folder ``out``."""
        return cls(out / "log.db", out / "journal.jsonl", out / "settings.json", out / "report.json")


def begin(settings: Settings, out: Path, *, anew: bool = False) -> bool:
    """Make the folder ready; say whether an interrupted run goes on there.

    A finished demo, and one begun with other settings, starts anew, and with ``anew`` every one does. Raises `SourceError` for a folder
    with a log that is no demo's, which would be lost.
    """
    files = Files.under(out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps(public(settings), indent=1, sort_keys=True)
    if files.log.exists() and not files.settings.exists():
        raise SourceError(f"{files.log} is a log, but not one that a demo left; name another folder with --out")
    goes_on = not anew and files.log.exists() and not files.report.exists() and files.settings.read_text() == wanted
    if not goes_on:
        for path in (files.report, files.journal, *out.glob(files.log.name + "*"), out / "report.html"):
            path.unlink(missing_ok=True)
        files.settings.write_text(wanted)
    return goes_on


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
    if not (data / "ml-100k.inter").exists():
        raise SourceError(f"{data}: MovieLens-100K is not there; `make data` fetches it")
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
