"""The demo as it runs in production: a replayer, workers and a trainer as processes of their own, on any broker, watched from outside.

Versions arrive here when they arrive and partitions take turns as they come, so that two runs differ a little from each other, and from
lockstep.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, Self

import msgspec

from consumers.demo_files import COLUMNS, begin, require_data
from consumers.inspection import as_toml, effective, public
from consumers.opening import connect, topics_of
from consumers.processes import Process, ProcessEnded, Processes
from streaming.codec import decode
from streaming.errors import Refused
from streaming.events import ReplayPosition
from streaming.journal import History
from streaming.log import TopicPartition, left, present
from streaming.sources import interaction_source
from streaming.timeorder import by_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from consumers.layers import Loaded
    from consumers.stop import Stop
    from streaming.log import Log, Reader, Record, Topic
    from streaming.report import Report

LOOK_SECONDS = 0.5
LAST_RECORDS = 100
"""So far before its end the last record of a partition is looked for: behind it stand a broker's own marks, or nothing."""


class View(NamedTuple):
    """How a demo stands: its processes, how many events are in the log and in the whole file, and how many scored."""

    processes: list[Process]
    sent: int
    total: int
    scored: int
    seconds: float


def demo_live(
    loaded: Loaded,
    data: Path,
    out: Path,
    stop: Stop,
    *,
    workers: int,
    events: int | None = None,
    on_look: Callable[[View], None] = lambda _: None,
) -> Report | None:
    """Run the demo in processes of their own and report; None if stopped before the end, and then the next run starts anew.

    A worker that ends leaves its partitions to the others. Raises `ProcessEnded` if the trainer, the replayer or the last worker does,
    `SourceError` where the data is not there, and `Refused` for a log that has interactions already.
    """
    settings = loaded.settings
    require_data(data)
    begin(settings, out, anew=True)
    with ExitStack() as stack:
        log = stack.enter_context(connect(settings, create=True))
        topics = topics_of(settings)
        _require_empty(log, topics)
        log.create(topics.values())
        run = stack.enter_context(_Run(loaded, log, topics, out, workers))
        run.total = _count(data / "ml-100k.inter", events)
        if not run.through(_replays(data, out, events), stop, on_look):
            return None
        history, whole = run.history(), all(worker.code is None for worker in run.workers)
        run.processes.close()
        # Only now: the peers and the drawing of plots take long to load, and nobody waits any more.
        from streaming.report import build_report, write_report

        report = build_report(log, public(settings), history, limits=settings.event_limits(), prefix=settings.topic_prefix)
    if not whole:
        # What a killed worker had counted is not known.
        report = msgspec.structs.replace(report, events_processed=None, seconds_by_stage={})
    write_report(report, out)
    return report


def _require_empty(log: Log, topics: Mapping[str, Topic]) -> None:
    interactions = topics["interactions"]
    existing = log.topics().get(interactions.name)
    if existing is None:
        return
    bounds = log.bounds(TopicPartition(existing.name, number) for number in range(existing.partitions))
    if any(end > start for start, end in bounds.values()):
        raise Refused(f"topic {existing.name} has interactions already: the demo needs a log of its own, or --set topic_prefix=NAME")


def _count(source: Path, events: int | None) -> int:
    with source.open("rb") as lines:
        there = sum(1 for _ in lines) - 1
    return there if events is None else min(there, events)


def _replays(data: Path, out: Path, events: int | None) -> dict[str, list[str]]:
    """The arguments of `coldstream replay` by the topic that it fills, profiles first."""
    source = data / "ml-100k.inter"
    if events is not None:
        source = _first(source, events, out / "first.inter")
    return {
        "users": [str(data / "ml-100k.user"), "--into", "users", "--id-column", "user_id"],
        "items": [str(data / "ml-100k.item"), "--into", "items", "--id-column", "item_id"],
        "interactions": [str(source), "--user-column", "user_id", "--item-column", "item_id", "--timestamp-unit", "s", "--sort-by-time"],
    }


def _first(source: Path, events: int, into: Path) -> Path:
    """Write the first events by time to a file of their own."""
    interactions = interaction_source(source, columns=COLUMNS, timestamps="s")
    with source.open("rb") as lines, into.open("wb") as file:
        file.write(lines.readline())
        file.writelines(entry.line.raw + b"\n" for entry, _ in islice(by_time(interactions), events))
    return into


class _Run:
    """The processes of a demo and what they have come to. A context manager; leaving it ends them."""

    def __init__(self, loaded: Loaded, log: Log, topics: Mapping[str, Topic], out: Path, workers: int) -> None:
        self.log, self.topics, self.out, self.settings = log, topics, out, loaded.settings
        self.total = self.sent = 0
        self.config = out / "settings.toml"
        self.config.write_text(as_toml(effective(loaded)), encoding="utf-8")
        self.processes = Processes()
        self.replayer: Process | None = None
        self.workers = [self._start(f"worker-{number}", "worker") for number in range(1, workers + 1)]
        self.trainer = self._start("trainer", "trainer")
        self.attention: list[dict[str, float]] = []
        self._positions: Reader = log.reader()
        self._positions.assign({TopicPartition(topics["replays"].name, 0): 0})
        self._began = time.monotonic()

    def _start(self, name: str, command: str, *arguments: str) -> Process:
        common = ["--config", str(self.config), "--set", "log_format=json"]
        if command != "replay":
            # Each on a free port, which it tells in its log.
            common += ["--set", "metrics.enabled=true", "--set", "metrics.host=127.0.0.1", "--set", "metrics.port=0"]
        return self.processes.add(Process(name, [command, *arguments, *common], self.out / f"{name}.log"))

    def through(self, replays: Mapping[str, list[str]], stop: Stop, on_look: Callable[[View], None]) -> bool:
        """Replay one after the other, interactions once all processes are ready, until all are scored; False if stopped before."""

        def until(done: Callable[[], bool]) -> bool:
            while not stop:
                self.look()
                on_look(self.view())
                if done():
                    return True
                stop.wait(LOOK_SECONDS)
            return False

        for topic, arguments in replays.items():
            if topic == "interactions" and not until(self.ready):
                return False
            # One log for all three: the last of them is the one that can take long.
            self.replayer = self._start("replayer", "replay", *arguments)
            self.replayer.seen.state = f"sending {topic}"
            if not until(lambda: self.replayer is not None and self.replayer.code == 0):
                return False
        if not until(self.all_scored):
            return False
        # Their last step may be committed and not yet told.
        deadline = time.monotonic() + 5
        until(lambda: self.scored() >= self.sent or any(worker.code is not None for worker in self.workers) or time.monotonic() > deadline)
        return True

    def look(self) -> None:
        """See how all are. Raises `ProcessEnded` for one that cannot be done without."""
        for process in [*self.workers, self.trainer, *([self.replayer] if self.replayer else [])]:
            process.look()
        for record in self._positions.poll(100, timeout=0.05):
            position = decode(record.value or b"", ReplayPosition, what="how far the replay is")
            if position.topic == self.topics["interactions"].name:
                self.sent = position.events
        if self.replayer is not None:
            self.replayer.rate.update(self.sent)
            if self.replayer.code == 0:
                self.replayer.seen.state = "done"
            elif self.replayer.code is not None:
                raise ProcessEnded(self.replayer)
        if self.trainer.code is not None:
            raise ProcessEnded(self.trainer)
        if all(worker.code is not None for worker in self.workers):
            raise ProcessEnded(self.workers[-1])
        self._note_attention()

    def _note_attention(self) -> None:
        told = [worker.seen.attention for worker in self.workers if len(worker.seen.attention) == 2]
        told = [spread for spread in told if all(map(math.isfinite, spread.values()))]
        if told and (scored := self.scored()) > (self.attention[-1]["events"] if self.attention else 0):
            users, rows = (sum(spread[over] for spread in told) / len(told) for over in ("users", "rows"))
            self.attention.append({"events": scored, "spread_users": users, "spread_rows": rows})

    def scored(self) -> int:
        """Events that the workers have committed, by what each said last."""
        return sum(worker.seen.events for worker in self.workers)

    def ready(self) -> bool:
        """Whether the trainer and all workers that live are."""
        return all(process.seen.ready for process in [self.trainer, *self.workers] if process.code is None)

    def all_scored(self) -> bool:
        """Whether every interaction is: first by what the workers say of themselves, and then by the log."""
        lag = {number: count for worker in self.workers if worker.code is None for number, count in worker.seen.lag.items()}
        topic = self.topics["interactions"]
        if lag.keys() != set(range(topic.partitions)) or any(lag.values()):
            return False
        tps = [TopicPartition(topic.name, number) for number in range(topic.partitions)]
        committed = self.log.committed(self.settings.group_id, tps)
        return not any(left(self.log, {tp: committed.get(tp, 0) for tp in tps}).values())

    def view(self) -> View:
        """How all of it stands."""
        shown = [*([self.replayer] if self.replayer else []), *self.workers, self.trainer]
        return View(shown, self.sent, self.total, self.scored(), time.monotonic() - self._began)

    def history(self) -> History:
        """What a run journal would say: the time by the log's own clock, from the first interaction's append to the last score's."""
        first = min(record.timestamp for tp in self._of("interactions") for record in islice(present(self.log, [tp], at_once=1), 1))
        last = max(record.timestamp for record in self._last_of("scores"))
        history = History(runs=1, events_processed=self.scored(), seconds=(last - first) / 1000)
        for process in [*self.workers, self.trainer]:
            for stage, seconds in process.seen.stages.items():
                history.stages[stage] = history.stages.get(stage, 0.0) + seconds
        history.notes["attention"] = list(self.attention)
        return history

    def _of(self, topic: str) -> list[TopicPartition]:
        return [TopicPartition(self.topics[topic].name, number) for number in range(self.topics[topic].partitions)]

    def _last_of(self, topic: str) -> Iterable[Record]:
        for tp, bounds in self.log.bounds(self._of(topic)).items():
            yield from present(self.log, [tp], since=max(bounds.start, bounds.end - LAST_RECORDS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.close()
        self._positions.close()
