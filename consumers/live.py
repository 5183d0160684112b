"""The worker as a process of its own, against a log that others write to.

Unlike in lockstep, micro-batches are cut by time as well as by size, and versions arrive when they arrive; every score says which it used.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

import structlog

from consumers.moving import Moving
from consumers.patience import Patience
from consumers.requests import Requests
from streaming.errors import BrokerUnreachable, Fenced, OffsetOutOfRange, StoreDamaged, StoreError
from streaming.log import TopicPartition

if TYPE_CHECKING:
    from consumers.stop import Stop
    from consumers.system import System
    from consumers.worker import Worker
    from streaming.log import Assignment, Member, Reader, Record

LAG_SECONDS = 1.0
"""Time between two looks at how much is waiting."""

ANSWER_SECONDS = 0.005
"""What a log takes to answer with what it has."""

logger = structlog.get_logger()


def run_worker(system: System, stop: Stop) -> None:
    """Score the partitions that the group gives this process, until stopped.

    A step that another worker's takeover made void is dropped, and the partition, if it is still ours, is taken over anew. So is one whose
    commit was not answered: opening the partition's writer settles it, and the committed offset says which way.
    """
    patience = Patience()
    with ExitStack() as stack:
        opened = patience.until(stop, lambda: open_worker(system, stack))
        while opened is not None and not stop:
            try:
                score(system, stop, *opened)
            except BrokerUnreachable as error:
                opened[-1].start_over()
                patience.wait(error, stop)


def open_worker(system: System, stack: ExitStack) -> tuple[Worker, Requests, Reader, Member, Moving]:
    """All that a worker works with, without partitions yet; ``stack`` closes it."""
    worker = system.worker()
    requests = Requests(worker, system.topics["scores"].max_record_bytes)
    reader = stack.enter_context(system.log.reader())
    moving = stack.enter_context(closing(Moving(system, worker, requests, reader)))
    member = stack.enter_context(system.log.member(system.settings.group_id, system.topics["interactions"].name))
    return worker, requests, reader, member, moving


def score(system: System, stop: Stop, worker: Worker, requests: Requests, reader: Reader, member: Member, moving: Moving) -> None:
    """Step after step, until stopped."""
    topic, looked, cut, stepped = system.topics["interactions"].name, 0.0, 0.0, False
    beat, assignment = partial(system.heard, member), member.assignment()
    while not stop:
        system.health.beat()
        assignment = member.assignment()
        moving.follow(assignment, beat)
        moving.advance(beat)
        with worker.metrics.stage("adopt"):
            if worker.versions.advance():
                system.health.loaded(worker.versions.version)
                system.metrics.observe_version(worker.versions.version, worker.versions.made_at)
        worker.tables.advance(beat)
        if time.monotonic() - looked > LAG_SECONDS:
            looked = time.monotonic()
            observe_lag(system, reader, topic, worker)
        # A commit that ends meanwhile is looked at soon, and what is there to be done at once. Not without any wait where there is nothing
        # to do: the threads of the log's client need Python's lock, and have it 5 ms late from a loop that does not let go of it.
        wait_ms = system.settings.worker.linger_ms if worker.under_way else system.settings.worker.poll_timeout_ms
        wait = 0.0 if worker.ahead else 0.001 if requests or moving.busy else wait_ms / 1000
        try:
            only, begin = requests.without_full(worker.held, topic), 0.0 if worker.ahead else cut
            batches, behind = read(system, reader, only, begin, wait, stepped=stepped and not worker.ahead)
        except OffsetOutOfRange as error:
            read_from = [TopicPartition(name, number) for name in (topic, requests.topic) for number in worker.held]
            if not overtaken(system, reader, read_from):
                raise  # The log ends before what was read of it: to take that over would be to come here again.
            # Whether it goes on behind what was lost is for those who take partitions over to say.
            logger.warning("retention was faster than this worker; its partitions are taken over anew", reason=str(error))
            commit_all(worker, assignment)
            moving.start_over()
            continue
        stepped = bool(batches)
        if batches:
            cut = time.monotonic()
        elif not worker.ahead:
            moving.idle()
        if asked := [record for (name, _), records in batches.items() if name == requests.topic for record in records]:
            requests.take(asked)
            worker.tables.advance(beat)
        for number in sorted(worker.held):
            tp = TopicPartition(topic, number)
            try:
                before = worker.finish(number, wait=False)
                if tp in batches or worker.tables.waiting(number):
                    before += worker.begin(number, batches.get(tp, []), assignment, behind=behind)
                elif not behind or not worker.held[number].under_way:
                    before += worker.commit(number, assignment)
                if before:
                    system.health.committed()
                if requests.answer(number, reader.position(tp), assignment):
                    system.health.committed()
                worker.held[number].settle()
            except (Fenced, StoreDamaged) as error:
                moving.give_up_step(number, error)
                break
    commit_all(worker, assignment)


def commit_all(worker: Worker, assignment: Assignment) -> None:
    """Commit what is computed, so that nobody has to do it again, or cannot; whoever comes next finds what it came to in the log."""
    for number in worker.held:
        with suppress(Fenced, StoreError):
            worker.complete(number, assignment)


def read(
    system: System, reader: Reader, only: list[TopicPartition] | None, cut: float, wait: float, *, stepped: bool
) -> tuple[dict[TopicPartition, list[Record]], bool]:
    """The next records of interactions and requests: as many as make a micro-batch, or what has come a linger after the last ``cut``.

    Of the partitions ``only``, None for all. The first of them is waited for ``wait`` seconds. While a step takes longer than a linger,
    the next micro-batch fills meanwhile and nobody waits for more of it than a log takes to answer: ``stepped`` says that there was a step
    since they were read last. Returns as well whether a partition is behind: whether a whole one of its events was at hand at once.
    """
    settings = system.settings.worker
    with system.metrics.stage("poll"):
        records, ends = reader.poll(settings.micro_batch, wait, only), cut + settings.linger_ms / 1000
        whole = len(records) == settings.micro_batch
        if stepped:
            # A client asks once more only when what it was answered is taken: of what came during a long step it has the first few.
            ends = max(ends, time.monotonic() + ANSWER_SECONDS)
        while records and len(records) < settings.micro_batch and (left := ends - time.monotonic()) > 0:
            records += reader.poll(settings.micro_batch - len(records), left, only)
    # A second poll may go on with a partition of the first; a partition's records then belong together again.
    records.sort(key=attrgetter("topic", "partition", "offset"))
    batches = {TopicPartition(*place): list(batch) for place, batch in groupby(records, attrgetter("topic", "partition"))}
    return batches, whole and len(batches) == 1


def overtaken(system: System, reader: Reader, partitions: list[TopicPartition]) -> bool:
    """Whether retention has removed what comes next in one of these partitions."""
    return any(reader.position(tp) < bounds.start for tp, bounds in system.log.bounds(partitions).items())


def observe_lag(system: System, reader: Reader, topic: str, worker: Worker) -> None:
    """Tell metrics and health how much waits in the partitions held, to be scored or to be written to local stores."""
    held = [TopicPartition(topic, number) for number in worker.held]
    read = {tp: reader.position(tp) - worker.held[tp.partition].events_under_way for tp in held}
    lag = {tp.partition: bounds.end - read[tp] for tp, bounds in system.log.bounds(held).items()}
    system.metrics.observe_lag(lag)
    system.metrics.observe_stores(partition.support.held for partition in worker.held.values())
    system.health.waiting(sum(lag.values()))
