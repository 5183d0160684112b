"""Lockstep: worker and trainer by turns in one process, so that a run is a function of log, settings and seed.

Micro-batches are the next ``worker.micro_batch`` offsets of a partition, never cut by time. The trainer folds all of a step's updates
before the next step, which is made at the version that comes of it: the two share one model. Killed anywhere and started again, the run
goes on where its last commit ended: the trainer first folds what a killed run left, and then the same steps follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from consumers.requests import Requests
from streaming.log import TopicPartition, catch_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumers.stop import Stop
    from consumers.system import System
    from consumers.worker import Worker
    from streaming.journal import Journal
    from streaming.log import Log, Reader, Record
    from streaming.metrics import StepReport

JOURNAL_EVERY = 64
"""Steps between two notes of times and attention in the run journal."""
WAIT_SECONDS = 0.5


class Progress(NamedTuple):
    """How far a run is: offsets done and to do at present, and the step just made."""

    done: int
    total: int
    step: StepReport


def run(
    system: System,
    stop: Stop,
    *,
    until_end: bool,
    limit: int | None = None,
    journal: Journal | None = None,
    on_step: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Run in lockstep until stopped, or with ``until_end`` until every interaction now in the log is scored.

    Without ``until_end`` a micro-batch that is not full is waited for; at the end it is taken as it is. ``limit`` ends every partition
    at this offset, as if no more were there.

    Of the partitions that have a micro-batch the one that is least far is next, which a run that was killed finds as it was.
    """
    trainer = system.trainer()
    worker = system.worker(trainer.versions)
    topic = system.topics["interactions"]
    partitions = [TopicPartition(topic.name, number) for number in range(topic.partitions)]
    trainer.catch_up(system.health.beat)
    worker.tables.assign(range(topic.partitions))
    worker.tables.advance(system.health.beat)
    reader = system.log.reader()
    reader.assign({tp: worker.open(tp.partition, system.health.beat) for tp in partitions})
    requests = Requests(worker, system.topics["scores"].max_record_bytes)
    system.health.assigned(topic.partitions)
    system.health.restored()
    size, steps = system.settings.worker.micro_batch, 0
    least = 1 if until_end else size
    short = dict[TopicPartition, int]()
    """Where partitions ended that seemed to have a micro-batch: some of what they had were marks of the broker's own."""
    with reader:
        while not stop:
            system.health.beat()
            ends = {tp: min(bound.end, limit or bound.end) for tp, bound in system.log.bounds(partitions).items()}
            left = {tp: ends[tp] - reader.position(tp) for tp in partitions}
            ready = [tp for tp in partitions if left[tp] >= least and short.get(tp) != ends[tp]]
            system.metrics.observe_lag({tp.partition: count for tp, count in left.items()})
            system.health.waiting(sum(left[tp] for tp in ready))
            for partition in worker.held.values():
                partition.settle()
            system.metrics.observe_stores(partition.support.held for partition in worker.held.values())
            if not ready:
                worker.tables.advance(system.health.beat)
            for tp in partitions:
                # Where no interaction comes, whoever is to be forgotten is forgotten all the same.
                if tp not in ready and worker.tables.waiting(tp.partition):
                    worker.step(tp.partition, [], system.settings.group_id)
            if not ready:
                answer(system, requests, {tp.partition: reader.position(tp) for tp in partitions})
                if until_end:
                    break
                stop.wait(WAIT_SECONDS)
                continue
            for _ in range(len(ready)):
                if stop or not ready:
                    break
                tp = min(ready, key=lambda tp: (worker.held[tp.partition].offset, tp.partition))
                with system.metrics.stage("poll"):
                    records = read(system.log, reader, min(size, ends[tp] - reader.position(tp)), tp)
                if len(records) < least:
                    if records:
                        reader.assign({each: reader.position(each) for each in partitions} | {tp: records[0].offset})
                    short[tp] = ends[tp]
                    ready.remove(tp)
                    continue
                worker.tables.advance(system.health.beat)
                if journal is not None:
                    journal.step(tp.partition, records[0].offset, records[-1].offset + 1, len(records))
                report = worker.step(tp.partition, records, system.settings.group_id)
                trainer.catch_up(system.health.beat)
                system.health.committed()
                system.health.beat()
                if ends[tp] - reader.position(tp) < least:
                    ready.remove(tp)
                steps += 1
                done = sum(reader.position(each) for each in partitions)
                if journal is not None and steps % JOURNAL_EVERY == 0:
                    note(journal, system, worker, done)
                on_step(Progress(done, sum(ends.values()), report))
        if journal is not None:
            note(journal, system, worker, sum(reader.position(tp) for tp in partitions))


def answer(system: System, requests: Requests, positions: dict[int, int]) -> None:
    """Answer every request that is in the log, once all steps that can be made are made: no clock decides, and no step is cut for it.

    So an answer is stale only where interactions before it do not fill a micro-batch, which is waited for.
    """
    with system.log.reader() as reader:
        # Anew each time: while a long history is stepped through, retention may have passed over requests.
        asked = requests.start(positions)
        reader.assign(asked)
        for tp in asked:
            while records := reader.poll(requests.at_once, only=[tp]):
                requests.take(records)
                while requests.answer(tp.partition, positions[tp.partition], system.settings.group_id, wait=False):
                    system.health.committed()
                    system.health.beat()


def read(log: Log, reader: Reader, size: int, tp: TopicPartition) -> list[Record]:
    """The next ``size`` records of a partition, or all that are left now. Raises as `catch_up` does."""
    # As a rule all of them are at hand, and where the partition ends need not be asked.
    records = reader.poll(size, only=[tp])
    while len(records) < size and (more := next(catch_up(log, reader, [tp], at_once=size - len(records)), None)):
        records += more
    return records


def note(journal: Journal, system: System, worker: Worker, done: int) -> None:
    """Write times and attention down in the run journal."""
    journal.stages({str(stage): seconds for stage, seconds in system.metrics.stage_seconds.items()})
    users, rows = worker.attention()
    if not math.isnan(users):
        journal.note("attention", {"events": done, "spread_users": users, "spread_rows": rows})
