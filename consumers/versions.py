"""Following the model: from the newest snapshot, then version by version, to the one in force."""

from __future__ import annotations

from typing import TYPE_CHECKING

from consumers.wire import state_from_wire
from model import checkpoint
from streaming.chunks import Joiner
from streaming.codec import decode
from streaming.errors import ChunkError, OtherSettings, VersionLost
from streaming.events import Version
from streaming.log import TopicPartition, present

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.mamo import Mamo
    from model.meta import Optimiser
    from streaming.log import Log, Record

READ_AT_ONCE = 16
"""Version records taken from the log in one go: each can be a megabyte."""


class Versions:
    """Keeps a model, and an optimiser if given, at the newest version in the log.

    Version 0 is the model as settings and seed make it and stands in no topic. ``digest`` is that of the settings: a version made
    with others is refused.
    """

    def __init__(self, log: Log, topics: dict[str, str], digest: str, model: Mamo, optimiser: Optimiser | None = None) -> None:
        self.log = log
        self.digest = digest
        self.model = model
        self.optimiser = optimiser
        self.version = 0
        self.made_at = 0
        self.folded: dict[int, int] = {}
        self._snapshots = TopicPartition(topics["snapshots"], 0)
        self._model = TopicPartition(topics["model"], 0)
        self._joiner = Joiner()
        self._reader = log.reader()
        self.snapshot = 0
        """Version of the snapshot that this started from."""
        self._start()

    def _start(self) -> None:
        newest = max(self.snapshots(), key=lambda version: version.version, default=None)
        bounds = self.log.bounds([self._model])[self._model]
        start = bounds.start
        if newest is not None:
            self._take(newest, whole=True)
            self.snapshot = newest.version
            start = max(start, newest.position)
        self._reader.assign({self._model: start})
        self.advance()

    def snapshots(self) -> Iterator[Version]:
        """Every complete snapshot in the log. Chunks left over from an older, longer one in the same slot are passed over."""
        slots: dict[bytes, list[Record]] = {}
        for record in present(self.log, [self._snapshots], at_once=READ_AT_ONCE):
            if record.key is not None and record.value is not None:
                slots.setdefault(record.key.partition(b"/")[0], []).append(record)
        for records in slots.values():
            # A snapshot's chunks were written in one transaction, so those of the slot's newest stand last and together.
            joiner, whole = Joiner(), None
            for record in sorted(records, key=lambda record: record.offset):
                try:
                    whole = joiner.feed(record) or whole
                except ChunkError:
                    continue
            if whole is not None:
                yield decode(whole, Version, what=f"snapshot in {self._snapshots.topic}")

    def advance(self) -> bool:
        """Take on every version that has come; say whether there was one."""
        before = self.version
        while records := self._reader.poll(READ_AT_ONCE):
            for record in records:
                self._feed(record)
        return self.version != before

    def _feed(self, record: Record) -> None:
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
        if version.parent != self.version:
            msg = (
                f"{record.topic} at offset {record.offset}: version {version.version} follows {version.parent}, but this process is at "
                f"{self.version}; the versions between were removed and no snapshot has them: raise topics.model_bytes or lower "
                "trainer.snapshot_every"
            )
            raise VersionLost(msg)
        self._take(version, whole=False)

    def _take(self, version: Version, *, whole: bool) -> None:
        if version.settings != self.digest:
            msg = (
                f"model version {version.version} was made with other settings (digest {version.settings[:12]}, here {self.digest[:12]}): "
                "model, schema, rating or seed differ; go back to those settings, or use another topic_prefix or log"
            )
            raise OtherSettings(msg)
        checkpoint.load(state_from_wire(version.tensors, version.rows), self.model, self.optimiser, whole=whole)
        self.version = version.version
        self.made_at = version.made_at
        self.folded = dict(version.folded)

    def close(self) -> None:
        """Release the reader."""
        self._reader.close()
