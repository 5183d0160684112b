"""A candidate configuration against the live one, on the same past events, without touching what is live.

The events are copied into logs of the backtest's own, in the order of their times, and each configuration runs over its copy in lockstep
from version 0 on. So the result is a function of the events, the profiles, both settings and their seeds. The live log is read and
nothing else: it is opened so that nothing can be written to it (`streaming.readonly`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from consumers import lockstep
from consumers.backtest_report import Backtest, Side, changed
from consumers.inspection import public
from consumers.layers import SettingsError
from consumers.opening import connect, topics_of
from consumers.replayer import ReplayResult, replay
from consumers.settings import Settings
from consumers.system import System
from streaming.errors import SourceError
from streaming.journal import Journal, read_journal
from streaming.paired import paired
from streaming.prequential import coverage
from streaming.scored import ScoredRun, read_run
from streaming.timerange import TimeRange
from streaming.topicsource import TopicSource

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from consumers.replayer import Progress
    from consumers.stop import Stop
    from streaming.log import Log
    from streaming.sources import Source

SAME = ("rating", "limits")
"""Sections in which both settings must agree: they decide which events there are."""

UPDATES_BYTES = 128 << 20
MODEL_BYTES = 256 << 20
"""What the runs keep of updates and versions, at most: nobody reads them afterwards."""

FINISHED = "finished"
SIDES = ("control", "candidate")


class Files(NamedTuple):
    """What a backtest has in its folder. Only ``result`` stays, unless all is to be kept."""

    folder: Path

    @property
    def plan(self) -> Path:
        """What is run on what: a backtest that was stopped goes on only with the same."""
        return self.folder / "plan.json"

    @property
    def filled(self) -> Path:
        """What the events are, once all of them are copied."""
        return self.folder / "filled.json"

    @property
    def result(self) -> Path:
        """The comparison."""
        return self.folder / "backtest.json"

    def log(self, side: str) -> Path:
        """The log of a side."""
        return self.folder / f"{side}.db"

    def journal(self, side: str) -> Path:
        """The run journal of a side."""
        return self.folder / f"{side}.jsonl"

    def clear(self) -> None:
        """Remove everything but the result."""
        for side in SIDES:
            log = self.log(side)
            for path in (log, *(log.with_name(log.name + end) for end in ("-wal", "-shm", "-journal")), self.journal(side)):
                path.unlink(missing_ok=True)
        self.filled.unlink(missing_ok=True)
        self.plan.unlink(missing_ok=True)


def check_comparable(control: Settings, candidate: Settings) -> None:
    """Raise `SettingsError`, which names each setting that must be the same for both and is not."""
    found = changed(control, candidate)
    wrong = [name for name in found if name.partition(".")[0] in SAME]
    if wrong:
        raise SettingsError(
            f"{name} = {found[name][1]} for the candidate and {found[name][0]} for the live settings: "
            "it must be the same for both, or they would not score the same events"
            for name in wrong
        )


def own(settings: Settings, log: Path) -> Settings:
    """``settings`` for a run over the log at ``log``: in lockstep on one partition, with nothing of the live topics, groups or ports."""
    given: dict[str, Any] = settings.model_dump(by_alias=True)
    topics = given["topics"]
    topics |= {"partitions": 1, "retention_ms": dict.fromkeys(topics["retention_ms"], 0)}
    topics |= {"updates_bytes": min(topics["updates_bytes"], UPDATES_BYTES), "model_bytes": min(topics["model_bytes"], MODEL_BYTES)}
    given |= {"broker": f"embedded:{log}", "topic_prefix": "", "group": "backtest"}
    given["metrics"] |= {"enabled": False}
    # A local store of the live worker's is not to be taken for one of this log.
    given["worker"] |= {"state_dir": "", "standby": False}
    return Settings.model_validate(given)


def begin(files: Files, plan: dict[str, Any], brokers: Collection[str]) -> bool:
    """Make the folder ready; say whether a backtest that was stopped goes on there. A finished one, and one of another plan, starts anew.

    Raises `SourceError` for a folder with a log in it that no backtest left, or that is one of the logs that are read, ``brokers``.
    """
    read = [Path(place).resolve() for kind, _, place in (broker.partition(":") for broker in brokers) if kind == "embedded"]
    for side in SIDES:
        log = files.log(side)
        if log.resolve() in read:
            raise SourceError(f"{log} is a log that the backtest reads; name another folder with --out")
        if log.exists() and not files.plan.exists():
            raise SourceError(f"{log} is a log, but not one that a backtest left; name another folder with --out")
    files.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan, indent=1, sort_keys=True)
    goes_on = not files.result.exists() and files.plan.exists() and files.plan.read_text() == text
    if not goes_on:
        files.result.unlink(missing_ok=True)
        files.clear()
        files.plan.write_text(text)
    return goes_on


def backtest(
    live: Settings,
    candidate: Settings,
    source: Source | TopicSource,
    out: Path,
    stop: Stop,
    *,
    profiles: Log | None = None,
    within: TimeRange = TimeRange(),  # noqa: B008 - immutable
    events: int | None = None,
    keep: bool = False,
    on_fill: Callable[[Progress], None] = lambda _: None,
    on_step: Callable[[str, lockstep.Progress], None] = lambda _side, _progress: None,
) -> Backtest | None:
    """Run ``source`` through both settings and compare them; None if stopped before the end, from where the next call goes on.

    ``profiles`` is the log whose users and items are copied, as they are now. ``within`` and ``events`` (the first so many) bound what is
    run. The result is written to ``out``, and with ``keep`` the logs of both runs stay there.

    Raises `SettingsError` for settings that cannot be compared, `SourceError` as `begin` and `consumers.replayer.replay` do, and what a run
    raises.
    """
    check_comparable(live, candidate)
    files = Files(out)
    name = source.name if isinstance(source, TopicSource) else str(source.file.path)
    plan = {"control": public(live), "candidate": public(candidate), "source": name, "within": str(within), "events": events}
    begin(files, plan, {live.broker, source.place} if isinstance(source, TopicSource) else {live.broker})
    both = {side: own(settings, files.log(side)) for side, settings in zip(SIDES, (live, candidate), strict=True)}
    if not files.filled.exists():
        filled = _fill(both["control"], live, source, profiles, within, stop, on_fill)
        if not filled.done:
            return None
        files.filled.write_bytes(msgspec.json.encode(filled))
    if not _copy(both["control"], both["candidate"], stop):
        return None
    for side, settings in both.items():
        if not _run(side, settings, files.journal(side), stop, events, on_step):
            return None
    result = _compare(both, files, name)
    unfinished = files.result.with_suffix(".new")
    unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    unfinished.replace(files.result)
    if not keep:
        files.clear()
    return result


def _fill(
    control: Settings,
    live: Settings,
    source: Source | TopicSource,
    profiles: Log | None,
    within: TimeRange,
    stop: Stop,
    on_fill: Callable[[Progress], None],
) -> ReplayResult:
    """Copy profiles and events into the control's log, the events in the order of their times."""
    topics = topics_of(control)
    with connect(control, create=True) as log:
        log.create(topics.values())
        for table in ("users", "items") if profiles is not None else ():
            assert profiles is not None  # noqa: S101 - the line above
            records = TopicSource(profiles, topics_of(live)[table].name, place=live.broker, timed=False)
            copied = replay(log, records, topics, into=table, stop=stop.__bool__)
            if not copied.done:
                return copied
        by_time = not isinstance(source, TopicSource)
        return replay(log, source, topics, batch=5000, sort_by_time=by_time, within=within, on_progress=on_fill, stop=stop.__bool__)


def _copy(control: Settings, candidate: Settings, stop: Stop) -> bool:
    """Copy what the control has to the candidate's log, record by record; whether all is there."""
    topics = topics_of(candidate)
    with connect(control, read_only=True) as source, connect(candidate, create=True) as log:
        log.create(topics.values())
        for name in ("users", "items", "interactions"):
            records = TopicSource(source, topics_of(control)[name].name, place="control", timed=False)
            if not replay(log, records, topics, into=name, batch=5000, stop=stop.__bool__).done:
                return False
    return True


def _run(
    side: str, settings: Settings, path: Path, stop: Stop, events: int | None, on_step: Callable[[str, lockstep.Progress], None]
) -> bool:
    """Run one side in lockstep from where it was; whether it is finished."""
    if path.exists() and FINISHED in read_journal(path).notes:
        return True
    with System(settings) as system, Journal(path) as journal:
        lockstep.run(system, stop, until_end=True, limit=events, journal=journal, on_step=lambda progress: on_step(side, progress))
        if stop:
            return False
        journal.note(FINISHED, {})
    return True


def _compare(both: dict[str, Settings], files: Files, source: str) -> Backtest:
    runs, sides = dict[str, ScoredRun](), dict[str, Side]()
    for side, settings in both.items():
        with connect(settings, read_only=True) as log:
            run = runs[side] = read_run(log, settings.event_limits())
        journal = read_journal(files.journal(side))
        scored = int(run.scored.sum())
        sides[side] = Side(
            settings=public(settings),
            scores_sha256=run.scores_sha256,
            coverage_80=coverage(run),
            seconds=round(journal.seconds, 3),
            events_per_second=round(scored / journal.seconds, 2) if journal.seconds else None,
            nonfinite_scores=run.nonfinite_scores,
        )
    control, candidate = runs["control"], runs["candidate"]
    filled = msgspec.json.decode(files.filled.read_bytes(), type=ReplayResult)
    users = control.user[control.scored & candidate.scored]
    return Backtest(
        source=source,
        since=filled.since,
        until=filled.until,
        events=len(users),
        users=len(set(users.tolist())),
        outside=filled.outside,
        refused=control.refused + sum(filled.dead_letters.values()),
        changed=changed(both["control"], both["candidate"]),
        control=sides["control"],
        candidate=sides["candidate"],
        groups=paired(control, candidate),
    )
