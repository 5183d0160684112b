"""Following the model: from the newest snapshot, then version by version, to the one in force; and how versions are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from consumers.wire import state_from_wire
from model import checkpoint
from streaming.chunks import Joiner, last_value, split
from streaming.codec import decode, encode
from streaming.errors import ChunkError, OtherSettings, VersionLost
from streaming.events import Version
from streaming.log import Message, TopicPartition, at_hand, catch_up

if TYPE_CHECKING:
    from model.mamo import Mamo
    from model.meta import Optimiser
    from streaming.log import Log, Record, Topic

READ_AT_ONCE = 16
"""Version records taken from the log in one go: each can be a megabyte."""

SLOTS = 2
"""Snapshots kept: one is written over only once the other slot holds a complete, newer one."""


class Versions:
    """Keeps a model, and an optimiser if given, at the newest version in the log.

    Version 0 is the model as settings and seed make it and stands in no topic. ``digest`` is that of the settings: a version made
    with others is refused. ``beat`` is called while a long way is read.
    """

    def __init__(
        self,
        log: Log,
        topics: dict[str, str],
        digest: str,
        model: Mamo,
        optimiser: Optimiser | None = None,
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        self.log = log
        self.digest = digest
        self.model = model
        self.optimiser = optimiser
        self.version = 0
        self.made_at = 0
        self.folded: dict[int, int] = {}
        self.snapshot = 0
        """Version of the newest snapshot, as of the start or of `lead`."""
        self.slot: int | None = None
        """Where that snapshot is, None without one."""
        self.since_snapshot = 0
        """Bytes of ``model`` read or written behind the snapshot that this started from: at least as many as a start would read."""
        self._model, self._snapshots = TopicPartition(topics["model"], 0), TopicPartition(topics["snapshots"], 0)
        self._joiner = Joiner()
        self._beat = beat
        self._reader = log.reader()
        self._start()

    def _start(self) -> None:
        start = self.log.bounds([self._model])[self._model].start
        if (snapshot := self._newest_snapshot()) is not None:
            self._take(snapshot, whole=True)
            start = max(start, snapshot.position)
        self._reader.assign({self._model: start})
        self.catch_up()
        self._began = self.version

    def _newest_snapshot(self) -> Version | None:
        """The newest snapshot in the log, None where there is none; which it is and where is noted."""
        # Its chunks were written in one transaction, so the newest snapshot stands at the end.
        if (newest := last_value(self.log, self._snapshots)) is None:
            return None
        record, value = newest
        snapshot = decode(value, Version, what=f"snapshot in {record.topic}")
        self.snapshot, self.slot = snapshot.version, slot_of(record)
        return snapshot

    def lead(self) -> None:
        """Take on what is there, before versions and snapshots are made here: nobody else makes any from now on.

        Whoever stood by has followed versions, and not the snapshots that were made meanwhile.
        """
        self.catch_up()
        if self.version != self._began:
            self._newest_snapshot()

    def catch_up(self) -> None:
        """Take on every version that is in the log now. Raises `LogUnavailable` where nothing comes for 30 s although there is more."""
        for records in catch_up(self.log, self._reader, [self._model], at_once=READ_AT_ONCE):
            self._beat()
            for record in records:
                self._feed(record)

    def advance(self) -> bool:
        """Take on every version that has come; say whether there was one."""
        before = self.version
        for records in at_hand(self._reader, at_once=READ_AT_ONCE):
            for record in records:
                self._feed(record)
        return self.version != before

    def _feed(self, record: Record) -> None:
        self.since_snapshot += len(record.value or b"")
        try:
            value = self._joiner.feed(record)
        except ChunkError:
            # Retention, or a snapshot's position, may cut into the chunks of a version that is not needed.
            return
        if value is None:
            return
        version = decode(value, Version, what=f"{record.topic} at offset {record.offset}")
        if version.version <= self.version:
            return
        whole = version.replaces is not None
        if version.parent != self.version and not whole:
            msg = (
                f"{record.topic} at offset {record.offset}: version {version.version} follows {version.parent}, but this process is at "
                f"{self.version}; the versions between were removed and no snapshot has them: raise topics.model_bytes or lower "
                "trainer.snapshot_every"
            )
            raise VersionLost(msg)
        self._take(version, whole=whole)

    def _take(self, version: Version, *, whole: bool) -> None:
        take(version, self.digest, self.model, self.optimiser, whole=whole)
        self.made(version)

    def made(self, version: Version) -> None:
        """Note that the model is at this version: it was taken from the log, or made with this model and committed."""
        self.version = version.version
        self.made_at = version.made_at
        self.folded = dict(version.folded)

    def close(self) -> None:
        """Release the reader."""
        self._reader.close()


def take(version: Version, digest: str, model: Mamo, optimiser: Optimiser | None, *, whole: bool) -> None:
    """Set the values of a version. Raises `OtherSettings` unless it was made with the settings of this ``digest``."""
    if version.settings != digest:
        raise other_settings(f"model version {version.version}", version.settings, digest)
    checkpoint.load(state_from_wire(version.tensors, version.rows), model, optimiser, whole=whole)


def other_settings(what: str, digest: str, here: str) -> OtherSettings:
    """The error that something was made with the settings of another digest than the one here."""
    return OtherSettings(
        f"{what} was made with other settings (digest {digest[:12]}, here {here[:12]}): "
        "model, schema, rating or seed differ; go back to those settings, or use another topic_prefix or log"
    )


def version_messages(topic: Topic, version: Version) -> list[Message]:
    """A version as records of ``model``."""
    return [Message(topic.name, b"%d" % version.version, part, 0) for part in split(encode(version), _room(topic))]


def snapshot_messages(topic: Topic, version: Version, newest: int | None) -> list[Message]:
    """A whole version as records of ``snapshots``, in another slot than the ``newest`` snapshot is in."""
    slot = 0 if newest is None else (newest + 1) % SLOTS
    parts = split(encode(version), _room(topic))
    return [Message(topic.name, b"%d/%06d" % (slot, number), part, 0) for number, part in enumerate(parts)]


def slot_of(record: Record | Message) -> int:
    """The slot that a record of ``snapshots`` is in."""
    return int((record.key or b"0").partition(b"/")[0])


def _room(topic: Topic) -> int:
    """What a chunk may take beside its key."""
    return topic.max_record_bytes - 64
