"""The model, version by version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import msgspec

from consumers.audit.places import LARGE_AT_ONCE, values
from consumers.wire import state_from_wire
from model import checkpoint
from streaming.codec import decode
from streaming.errors import OtherSettings
from streaming.events import Version
from streaming.log import TopicPartition, present

if TYPE_CHECKING:
    from model.mamo import Mamo
    from streaming.log import Log, Record


class _Number(msgspec.Struct):
    version: int


class VersionWalk:
    """A model that walks through the versions in the log, from version 0 or, where retention has cut that off, from a snapshot."""

    def __init__(self, log: Log, topics: dict[str, str], settings_digest: str, model: Mamo) -> None:
        self._log = log
        self._digest = settings_digest
        self._model = model
        tp = TopicPartition(topics["model"], 0)
        self._snapshots = TopicPartition(topics["snapshots"], 0)
        cut = log.bounds([tp])[tp].start > 0
        self.at: int | None = None if cut else 0
        """The version that the model stands at, None before the first that can be had."""
        self.applied = 0
        self._read: int | None = None if cut else 0
        self._slots = {decode(value, _Number, what="snapshot").version: slot for slot, value in self._snapshot_values()} if cut else {}
        self._versions = (decode(value, Version, what=f"{tp.topic} at offset {record.offset}") for record, value in self._values(tp))
        self._next = next(self._versions, None)
        self.first = 0 if not cut else min(self._slots, default=self._next.version if self._next else 0)

    def _values(self, tp: TopicPartition) -> Iterator[tuple[Record, bytes]]:
        return values(present(self._log, [tp], at_once=LARGE_AT_ONCE, on_lost=self._lose))

    def _lose(self) -> None:
        """Retention was faster than the audit: what comes next is as what comes first where it had cut before."""
        self.at = self._read = None
        self._slots = {decode(value, _Number, what="snapshot").version: slot for slot, value in self._snapshot_values()}

    def _snapshot_values(self) -> Iterator[tuple[bytes, bytes]]:
        """Every complete snapshot, by its slot. Chunks left over from an older, longer one in the same slot are passed over."""
        slots: dict[bytes, list[Record]] = {}
        for record in present(self._log, [self._snapshots], at_once=LARGE_AT_ONCE):
            if record.value is not None:
                slots.setdefault((record.key or b"").partition(b"/")[0], []).append(record)
        for slot, records in slots.items():
            whole = [value for _, value in values(iter(sorted(records, key=lambda record: record.offset)))]
            if whole:
                yield slot, whole[-1]

    def to(self, wanted: int) -> Literal["there", "removed", "none"]:
        """Walk on to a version, not before those wanted earlier. Says whether it was removed, or is none that the log ever held."""
        while True:
            following = self._next.version if self._next else None
            snapshot = min((number for number in self._slots if self.at is None and number <= wanted), default=None)
            if snapshot is not None and (following is None or snapshot <= following):
                self._load_snapshot(snapshot)
            elif following is not None and following <= wanted:
                assert self._next is not None  # noqa: S101 - it has the number
                self._take(self._next)
                self._read = following
                self._next = next(self._versions, None)  # which may find that what comes next is gone: `_lose`
            else:
                break
        if self.at == wanted:
            return "there"
        # Of what retention has cut only the beginning is missing, so a number between two versions was never one.
        before_all = self._read is None and (self._next is not None or self.at is None)
        return "removed" if self._read == wanted or before_all else "none"

    def _take(self, version: Version) -> None:
        whole = version.replaces is not None or version.parent is None
        if whole or (self.at is not None and version.parent == self.at):
            self._load(version, whole=whole)
        elif self.at is not None and version.version > self.at:
            self.at = None

    def _load_snapshot(self, number: int) -> None:
        wanted = self._slots.pop(number)
        for slot, value in self._snapshot_values():
            # A running trainer may have written a newer one over it meanwhile.
            if slot == wanted and (version := decode(value, Version, what="snapshot")).version == number:
                self._load(version, whole=True)

    def _load(self, version: Version, *, whole: bool) -> None:
        if version.settings != self._digest:
            msg = (
                f"model version {version.version} was made with other settings (digest {version.settings[:12]}, here {self._digest[:12]}): "
                "model, schema, rating or seed differ; audit with the settings of that time"
            )
            raise OtherSettings(msg)
        checkpoint.load(state_from_wire(version.tensors, version.rows), self._model, whole=whole)
        self.at = version.version
        self.applied += 1
