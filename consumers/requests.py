"""Requests: what a user will rate highest, answered from the state that the worker holds. Nothing is learned, and no state changes.

A request is answered once the partition's steps have reached the end that its interactions had when the request was read, so all that stood
in the log before it counts. Answers and the position in `requests` are one transaction of the partition's writer: each is answered once.
"""

from __future__ import annotations

import time
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import structlog

from consumers.scoring import rank
from model.catalogue import Catalogue
from streaming.codec import encode
from streaming.deadletters import dead_letter_message
from streaming.errors import Malformed
from streaming.events import Answer, Request
from streaming.log import Message, Record, TopicPartition
from streaming.validation import decode_request

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from consumers.scoring import Ranking
    from consumers.worker import Worker
    from streaming.log import Assignment

AT_ONCE = 64
"""Requests answered in one transaction."""

SCORES_AT_ONCE = 4_000_000
"""Scores made for one transaction, beyond its first request: so that a heartbeat is never long in coming, however large the catalogue."""

logger = structlog.get_logger()


class _Waiting(NamedTuple):
    record: Record
    end: int
    """The end of the partition's interactions when the request was read."""
    deadline: float
    """When it is answered all the same, by the monotonic clock."""


class Requests:
    """The requests of the partitions that a worker holds, in order, until they are answered."""

    def __init__(self, worker: Worker, scores_bytes: int) -> None:
        self._worker = worker
        self._largest = scores_bytes
        self._waiting: dict[int, list[_Waiting]] = {}
        self._told_of: dict[TopicPartition, int] = {}
        """Up to where it was said that requests were lost."""
        self._catalogue = Catalogue(worker.model)
        self.topic = worker.topics["requests"]

    def start(self, partitions: Collection[int]) -> dict[TopicPartition, int]:
        """Begin anew with these partitions: the positions from which their requests are to be read."""
        self._waiting = {number: [] for number in partitions}
        wanted = [TopicPartition(self.topic, number) for number in sorted(partitions)]
        committed, bounds = self._worker.log.committed(self._worker.settings.group_id, wanted), self._worker.log.bounds(wanted)
        for tp, offset in committed.items():
            if offset < bounds[tp].start and self._told_of.get(tp) != bounds[tp].start:
                self._told_of[tp] = bounds[tp].start
                logger.warning("requests lost to retention", partition=tp.partition, unanswered=bounds[tp].start - offset)
        return {tp: max(committed.get(tp, 0), bounds[tp].start) for tp in wanted}

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def take(self, records: Sequence[Record]) -> None:
        """Take requests that were just read: the end that interactions have now is what each waits for."""
        interactions = self._worker.topics["interactions"]
        bounds = self._worker.log.bounds({TopicPartition(interactions, record.partition) for record in records})
        deadline = time.monotonic() + self._worker.settings.worker.request_deadline_ms / 1000
        for record in records:
            end = bounds[TopicPartition(interactions, record.partition)].end
            self._waiting[record.partition].append(_Waiting(record, end, deadline))

    def without_full(self, held: Collection[int], interactions: str) -> list[TopicPartition] | None:
        """Which partitions to read, of those held: not the requests of one of which as many wait as are answered at once. None for all."""
        full = {number for number, waiting in self._waiting.items() if len(waiting) >= self.at_once}
        if not full:
            return None
        return [TopicPartition(interactions, n) for n in held] + [TopicPartition(self.topic, n) for n in held if n not in full]

    @property
    def at_once(self) -> int:
        """How many requests go into one transaction at most, as large as the catalogue is now."""
        model = self._worker.model
        return max(1, min(AT_ONCE, SCORES_AT_ONCE // max(1, len(model.items.features), model.item_table.known)))

    def answer(self, number: int, position: int, owner: Assignment | str, *, wait: bool = True) -> int:
        """Answer the first requests of a partition that are due, in one transaction; returns how many.

        ``position`` is the one up to which interactions were stepped. Without ``wait`` all are due.
        Raises what `Writer.commit` raises; the requests then still wait.
        """
        now, waiting = time.monotonic(), self._waiting[number]
        # Ends and deadlines rise with the order of requests, so what is due stands first.
        due = list(takewhile(lambda each: not wait or each.end <= position or each.deadline <= now, waiting[: self.at_once]))
        if not due:
            return 0
        worker, stage = self._worker, self._worker.metrics.stage
        with stage("decode"):
            asked, letters, reasons = self._decode(due)
        with stage("adapt"):
            support = worker.held[number].support
            rankings = rank(worker.model, [(request, support.get(request.user)) for _, request in asked], self._catalogue)
        with stage("encode"):
            messages, stale, waits = list[Message](), 0, list[float]()
            for (each, request), ranking in zip(asked, rankings, strict=True):
                message = self._message(each, request, ranking, position)
                if len(message.key or b"") + len(message.value or b"") > self._largest:
                    error = Malformed("too-many-items", f"the answer does not fit into {self._largest} bytes")
                    letters.append(dead_letter_message(worker.topics["dead-letters"], each.record, error))
                    reasons.append(error.reason)
                    continue
                messages.append(message)
                stale += each.end > position
                waits.append(each.record.timestamp / 1000)
        # The user's last events may be in a step that is not committed: the answer counts them, and only comes if they do.
        worker.complete(number, owner)
        with stage("commit"):
            done = {TopicPartition(self.topic, number): due[-1].record.offset + 1}
            worker.held[number].writer.commit([*messages, *letters], done, owner)
        del waiting[: len(due)]
        committed = time.time()
        worker.metrics.observe_answers([max(0.0, committed - appended) for appended in waits], stale=stale, dead_letters=reasons)
        return len(due)

    def _decode(self, due: Sequence[_Waiting]) -> tuple[list[tuple[_Waiting, Request]], list[Message], list[str]]:
        """The valid requests, dead letters for the others, and the reasons of these."""
        asked, letters, reasons = list[tuple[_Waiting, Request]](), list[Message](), list[str]()
        for each in due:
            try:
                request = decode_request(each.record, self._worker.limits, self._worker.count_unknown, partitions=self._worker.partitions)
            except Malformed as error:
                letters.append(dead_letter_message(self._worker.topics["dead-letters"], each.record, error))
                reasons.append(error.reason)
            else:
                asked.append((each, request))
        return asked, letters, reasons

    def _message(self, each: _Waiting, request: Request, ranking: Ranking, position: int) -> Message:
        worker, number = self._worker, each.record.partition
        sds = [sd for _, sd, _ in ranking.scores if sd is not None]
        answer = Answer(
            request=request.request,
            user=request.user,
            items=[item for _, _, item in ranking.scores],
            scores=[score for score, _, _ in ranking.scores],
            sds=sds if len(sds) == len(ranking.scores) else None,
            model_version=worker.versions.version,
            support_size=ranking.support_size,
            earlier=ranking.earlier,
            as_of=(worker.topics["interactions"], number, position),
            stale=each.end > position,
            asked=(self.topic, number, each.record.offset),
            tables=worker.tables.positions(number),
            timestamp=request.timestamp,
        )
        return Message(worker.topics["scores"], request.user.encode(), encode(answer), number)
