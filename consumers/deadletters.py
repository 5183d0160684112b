"""Dead letters: found, read whole, and sent back after a fix, each once however often that is tried.

What is sent back, and the record that says so, become visible in one transaction, under a transactional id of its own: opening it fences
whoever else sends back, and only then is read what has been sent. So a second attempt goes on where the first one ended.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import msgspec

from streaming.codec import decode, encode
from streaming.deadletters import KEPT_BYTES
from streaming.errors import Malformed, OffsetOutOfRange
from streaming.events import DeadLetter, SentBack
from streaming.log import Message, Record, TopicPartition, present
from streaming.partitioner import partition_of
from streaming.untrusted import read_map
from streaming.validation import decode_interaction, decode_profile, interaction_of

if TYPE_CHECKING:
    from types import TracebackType

    from consumers.settings import Settings
    from streaming.log import Log, Reader, Topic
    from streaming.validation import Limits

BATCH = 1000
BATCH_BYTES = 8_000_000
WAIT_SECONDS = 2.0


class Letter(NamedTuple):
    """A dead letter with its position, the offset it has in `dead-letters`, and the time of its append in ms since the epoch."""

    position: int
    at: int
    letter: DeadLetter


class Wanted(NamedTuple):
    """Which dead letters are meant; empty and None are all. ``topic`` is that of the source, as the log knows it."""

    positions: frozenset[int] = frozenset()
    reasons: frozenset[str] = frozenset()
    since: int | None = None
    topic: str | None = None
    partition: int | None = None

    def takes(self, letter: Letter) -> bool:
        """Whether this letter is meant."""
        topic, partition, _ = letter.letter.source
        return (
            (not self.positions or letter.position in self.positions)
            and (not self.reasons or letter.letter.reason in self.reasons)
            and (self.since is None or letter.at >= self.since)
            and (self.topic is None or topic == self.topic)
            and (self.partition is None or partition == self.partition)
        )


def letters(log: Log, topics: dict[str, Topic], wanted: Wanted) -> Iterator[Letter]:
    """The wanted letters that retention has kept, oldest first."""
    tp = TopicPartition(topics["dead-letters"].name, 0)
    for record in present(log, [tp], since=min(wanted.positions, default=0)):
        letter = Letter(record.offset, record.timestamp, decode(record.value, DeadLetter, what=f"{tp.topic} at offset {record.offset}"))
        if wanted.takes(letter):
            yield letter


def sent_back(log: Log, topics: dict[str, Topic]) -> dict[int, SentBack]:
    """What has been sent back, by the position of its letter."""
    tp = TopicPartition(topics["sent-back"].name, 0)
    found: dict[int, SentBack] = {}
    for record in present(log, [tp]) if tp.topic in log.topics() else ():
        position = int(record.key or b"")
        if record.value is None:
            found.pop(position, None)
        else:
            found[position] = decode(record.value, SentBack, what=f"{tp.topic} at offset {record.offset}")
    return found


class Original(NamedTuple):
    """The whole record behind a letter, None where it is gone; ``where`` is from where it was had."""

    record: Record | None
    where: Literal["source", "letter", "gone"]


class Originals:
    """Finds the records behind letters: in their topic, where the digest tells that it is the same one, or in a letter that holds all."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._topics = log.topics()
        self._reader: Reader = log.reader()

    def of(self, letter: Letter) -> Original:
        """The whole record of a letter."""
        topic, partition, offset = letter.letter.source
        if topic in self._topics and 0 <= partition < self._topics[topic].partitions:
            record = self._at(TopicPartition(topic, partition), offset)
            if record is not None and hashlib.sha256(record.value or b"").hexdigest() == letter.letter.digest:
                return Original(record, "source")
        held = letter.letter
        key_whole = held.key is None or len(held.key) < KEPT_BYTES
        if key_whole and len(held.value or b"") == held.length:
            return Original(Record(topic, partition, offset, letter.at, held.key, held.value), "letter")
        return Original(None, "gone")

    def _at(self, tp: TopicPartition, offset: int) -> Record | None:
        start, end = self._log.bounds([tp])[tp]
        if not start <= offset < end:
            return None
        self._reader.assign({tp: offset})
        try:
            for record in self._reader.poll(1, timeout=WAIT_SECONDS):
                return record if record.offset == offset else None
        except OffsetOutOfRange:
            pass  # retention came between
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.close()


class Outcome(msgspec.Struct, frozen=True):
    """What became of a letter that was to be sent back. ``detail`` says where it went, when it had gone, or why it may not."""

    position: int
    outcome: Literal["sent", "sent before", "refused"]
    detail: str


class Draft(NamedTuple):
    """A letter about to be sent: its message, with the key and partition that it should have had."""

    letter: Letter
    message: Message
    plain: str


class _Since(msgspec.Struct):
    """What tells of a user's forgetting in a record of the changelog."""

    since: int = 0
    forgotten: int | None = None


def send_back(log: Log, settings: Settings, topics: dict[str, Topic], wanted: Wanted, *, set_key: bool = False) -> Iterator[Outcome]:
    """Send the wanted letters' records back to the topics that they came from, and tell of each once it is committed.

    Each is checked by today's settings first, and refused if it is still malformed. With ``set_key`` a record whose key was not its
    user gets the user of its value as key. Raises `Fenced` once somebody else sends back, and what `Writer.commit` raises; what was told
    before is committed. A position without a letter is refused.
    """
    if topics["sent-back"].name not in log.topics():
        log.create([topics["sent-back"]])  # a log made by an earlier release
    with log.writer(f"{settings.group_id}-sent-back") as writer, Originals(log) as originals:
        before = sent_back(log, topics)
        start = log.bounds([TopicPartition(topics["dead-letters"].name, 0)])[TopicPartition(topics["dead-letters"].name, 0)].start
        # Positions are never given again, so what retention has removed needs no record any more.
        outdated = [Message(topics["sent-back"].name, b"%d" % position, None, 0) for position in before if position < start]
        missing = set(wanted.positions)
        for batch in _batches(letters(log, topics, wanted)):
            missing -= {letter.position for letter in batch}
            drafts, outcomes = list[Draft](), list[Outcome]()
            for letter in batch:
                try:
                    drafts += [] if letter.position in before else [_draft(originals, settings, topics, letter, set_key=set_key)]
                    outcomes += [_before(before[letter.position])] if letter.position in before else []
                except Malformed as error:
                    outcomes.append(Outcome(letter.position, "refused", str(error)))
            refused = _overtaken(log, topics, drafts)
            outcomes += [Outcome(position, "refused", why) for position, why in refused.items()]
            drafts = [draft for draft in drafts if draft.letter.position not in refused]
            if drafts or outdated:
                now = time.time_ns() // 1_000_000
                records = [_record(draft, topics["sent-back"].name, now) for draft in drafts]
                writer.commit([*(draft.message for draft in drafts), *records, *outdated])
                outdated = []
            outcomes += [Outcome(d.letter.position, "sent", f"to {d.message.topic}[{d.message.partition}]") for d in drafts]
            yield from sorted(outcomes, key=lambda outcome: outcome.position)
        for position in sorted(missing):
            yield Outcome(position, "refused", f"{topics['dead-letters'].name} has no letter at {position}, or retention has removed it")


def _batches(found: Iterator[Letter]) -> Iterator[list[Letter]]:
    batch, size = list[Letter](), 0
    for letter in found:
        batch.append(letter)
        size += letter.letter.length
        if len(batch) == BATCH or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _before(sent: SentBack) -> Outcome:
    return Outcome(sent.letter, "sent before", f"to {sent.topic}[{sent.partition}]")


def _record(draft: Draft, topic: str, now: int) -> Message:
    position, letter = draft.letter.position, draft.letter.letter
    partition = draft.message.partition
    assert partition is not None  # noqa: S101 - `_draft` has set it
    return Message(
        topic, b"%d" % position, encode(SentBack(position, letter.source, draft.message.topic, partition, letter.digest, now)), 0
    )


def _draft(originals: Originals, settings: Settings, topics: dict[str, Topic], letter: Letter, *, set_key: bool) -> Draft:
    """The message that sends a letter's record back. Raises `Malformed` with the reason why it may not be sent."""
    held, limits = letter.letter, settings.event_limits()
    plain = next((name for name in ("interactions", "users", "items") if topics[name].name == held.source[0]), None)
    if plain is None:
        why = (
            "a line of a file: replay it once it is mended"
            if held.source[0].startswith("file:")
            else "only events and profiles are sent back"
        )
        raise Malformed(held.reason, why)
    record = originals.of(letter).record
    if record is None:
        raise Malformed(
            held.reason, f"the whole record of {held.length} bytes is gone: retention has removed it, and the letter has its head only"
        )
    partitions = topics[plain].partitions
    if plain == "interactions":
        record = _checked(record, limits, partitions, set_key=set_key)
    else:
        record = record._replace(partition=partition_of(record.key, partitions))
        decode_profile(record, limits, partitions=partitions)
    return Draft(letter, Message(held.source[0], record.key, record.value, record.partition), plain)


def _checked(record: Record, limits: Limits, partitions: int, *, set_key: bool) -> Record:
    """The record of an interaction where its key belongs, valid today. Raises `Malformed`."""
    record = record._replace(partition=partition_of(record.key, partitions))
    try:
        decode_interaction(record, limits, partitions=partitions)
    except Malformed as error:
        if error.reason != "wrong-key":
            raise
        if not set_key:
            raise Malformed(error.reason, f"{error.detail}; --set-key takes the user of the value") from None
        # What is wrong with a record is its key only once all else is right, so the value can be read.
        user = interaction_of(read_map(record.value or b"", limits.max_depth), limits).user.encode()
        record = record._replace(key=user, partition=partition_of(user, partitions))
        decode_interaction(record, limits, partitions=partitions)
    return record


def _overtaken(log: Log, topics: dict[str, Topic], drafts: Sequence[Draft]) -> dict[int, str]:
    """Why letters may not be sent back although they are valid, by position: a newer profile came, or their user was forgotten."""
    wanted: dict[TopicPartition, dict[bytes, Record | None]] = {}
    for draft in drafts:
        for tp in (_table(topics, draft), *_users(topics, draft)):
            wanted.setdefault(tp, {})[draft.message.key or b""] = None
    for tp, newest in wanted.items():
        for found in present(log, [tp]):
            if found.key in newest:
                newest[found.key] = found
    refused = {}
    profiles: set[tuple[TopicPartition, bytes]] = set()
    # The newest of several letters of one profile counts.
    for draft in reversed(drafts):
        tp, key = _table(topics, draft), draft.message.key or b""
        record, profiles_of = wanted[tp][key], [wanted[users][key] for users in _users(topics, draft)]
        if draft.plain != "interactions" and (tp, key) in profiles:
            refused[draft.letter.position] = "a later letter of the same profile is sent"
        elif record is not None and (why := _later(draft, record)):
            refused[draft.letter.position] = why
        elif any(profile is not None and profile.value is None and profile.timestamp >= draft.letter.at for profile in profiles_of):
            # A step may not have read it yet, or the trace it left be gone with an eviction.
            refused[draft.letter.position] = "its user was forgotten since, or is about to be"
        elif draft.plain != "interactions":
            profiles.add((tp, key))
    return refused


def _table(topics: dict[str, Topic], draft: Draft) -> TopicPartition:
    """Where something newer than the draft would stand."""
    return TopicPartition(topics["support" if draft.plain == "interactions" else draft.plain].name, draft.message.partition or 0)


def _users(topics: dict[str, Topic], draft: Draft) -> list[TopicPartition]:
    """Where it would stand that the user of an event is to be forgotten."""
    return [TopicPartition(topics["users"].name, draft.message.partition or 0)] if draft.plain == "interactions" else []


def _later(draft: Draft, record: Record) -> str | None:
    _, partition, offset = draft.letter.letter.source
    same = partition == draft.message.partition
    if draft.plain != "interactions":
        newer = record.offset > offset if same else record.timestamp >= draft.letter.at
        return f"a newer record of this key stands in {record.topic}[{record.partition}] at {record.offset}" if newer else None
    if record.value is None:
        return None
    held = decode(record.value, _Since, what=f"{record.topic}[{record.partition}] at offset {record.offset}")
    since = held.since if held.forgotten is None else held.forgotten
    # In another partition offsets do not tell what came first: then nothing of a user once forgotten is sent.
    return "its user was forgotten since" if since and (not same or offset < since) else None
