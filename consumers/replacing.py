"""Going back to an older version, and taking the model from one deployment to another by a file.

Either writes a version that holds every value and replaces the last one. It is written under the trainer's own transactional id, so a
trainer that is at work is fenced, and goes on from the new version.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import structlog

from consumers.lineage import Lineage
from consumers.system import new_model
from consumers.trainer import trainer_id
from consumers.versions import slot_of, snapshot_messages, version_messages
from consumers.wire import rows_to_wire, to_wire
from model import checkpoint
from model.meta import Optimiser
from streaming.chunks import last_value
from streaming.codec import decode
from streaming.errors import Fenced, OtherSettings, Refused, SourceError
from streaming.events import Version
from streaming.headers import VersionHeader
from streaming.log import TopicPartition

if TYPE_CHECKING:
    from pathlib import Path

    from consumers.settings import Settings
    from streaming.log import Log, Topic, Writer

ATTEMPTS = 5
"""A trainer that is fenced keeps still for a second; only one that starts at this very moment can come in between."""

logger = structlog.get_logger()


class Origin(NamedTuple):
    """Where a version's values come from: a version of this log and what it had folded, or None and nothing."""

    state: checkpoint.State
    parent: int | None
    folded: dict[int, int]


def rollback(log: Log, settings: Settings, topics: Mapping[str, Topic], number: int) -> Version:
    """Make the values of version ``number`` those of the next version.

    The updates that were folded since are skipped for good, and named in it; those that nobody has folded yet are folded into it.
    Raises `VersionLost` for a version that cannot be made again, `Refused` for the last one, `OtherSettings`, and `Fenced` where another
    trainer comes in between again and again.
    """
    lineage = Lineage(log, topics)
    if number == lineage.last:
        raise Refused(f"version {number} is the last, so there is nothing to go back from")
    origin = Origin(lineage.state(settings, number), number, lineage.folded(number))
    return _replace(log, settings, topics, origin, over_others=True)


def export(log: Log, settings: Settings, topics: Mapping[str, Topic], number: int | None, path: Path) -> int:
    """Write version ``number`` (None: the last) to a safetensors file, with the settings that it depends on; returns its number.

    Raises `VersionLost`, `OtherSettings`, OSError.
    """
    lineage = Lineage(log, topics)
    number = lineage.last if number is None else number
    checkpoint.save(path, checkpoint.Saved(number, lineage.state(settings, number), settings.digest(), settings.decisive()))
    return number


def import_model(log: Log, settings: Settings, topics: Mapping[str, Topic], path: Path, *, force: bool = False) -> Version:
    """Make the values in a file those of the next version: the first of a fresh log, or with ``force`` one that replaces the last.

    Raises `SourceError` for a file that `export` did not write, `OtherSettings` where it was written under others, naming those that
    differ, `Refused` for a log that has versions without ``force``, and `Fenced` as `rollback` does.
    """
    try:
        saved = checkpoint.read(path)
        if saved.digest != settings.digest():
            differ = "; ".join(differences(saved.settings, settings.decisive())) or "only their digests do, the file was changed"
            raise OtherSettings(f"{path}: made with other settings: {differ}")
        # A file may say what it likes; only what this model takes gets into the log.
        model = new_model(settings)
        optimiser = Optimiser(model)
        checkpoint.load(saved.state, model, optimiser)
    except checkpoint.CheckpointError as error:
        text = str(error)
        raise SourceError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    return _replace(log, settings, topics, Origin(checkpoint.export(model, optimiser), None, {}), over_others=force)


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Every setting in which two tables differ, in words."""
    flat_theirs, flat_ours = dict(_flat(theirs)), dict(_flat(ours))
    for name in sorted(flat_theirs.keys() | flat_ours.keys()):
        there, here = flat_theirs.get(name, "absent"), flat_ours.get(name, "absent")
        if there != here:
            yield f"{name} is {there} there and {here} here"


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _replace(log: Log, settings: Settings, topics: Mapping[str, Topic], origin: Origin, *, over_others: bool) -> Version:
    for attempt in range(ATTEMPTS):
        try:
            # The writer first: from here on no trainer can add a version to the last one read next.
            with log.writer(trainer_id(settings)) as writer:
                return _commit(log, settings, topics, origin, writer, over_others=over_others)
        except Fenced:
            logger.warning("a trainer came in between", attempt=attempt + 1)
    raise Fenced(f"{ATTEMPTS} times another trainer came in between; stop it, or try again")


def _commit(log: Log, settings: Settings, topics: Mapping[str, Topic], origin: Origin, writer: Writer, *, over_others: bool) -> Version:
    model, snapshots = TopicPartition(topics["model"].name, 0), TopicPartition(topics["snapshots"].name, 0)
    ends = {tp: found for tp in (model, snapshots) if (found := last_value(log, tp)) is not None}
    headers = [decode(value, VersionHeader, what=tp.topic) for tp, (_, value) in ends.items()]
    last = max(headers, key=lambda header: header.version, default=None)
    if last is not None and not over_others:
        raise Refused(f"{model.topic} has versions, the last is {last.version}: a model is imported into a fresh log, or with --force")
    if last is not None and last.settings != settings.digest():
        raise OtherSettings(f"version {last.version} in {model.topic} was made with other settings than those in force")
    made = _version(settings, origin, last)
    # A snapshot too, so that whoever starts needs none of the versions before it.
    end = log.bounds([model])[model].end
    whole = msgspec.structs.replace(made, parent=None, replaces=None, skipped=[], position=end)
    slot = slot_of(ends[snapshots][0]) if snapshots in ends else None
    writer.commit(version_messages(topics["model"], made) + snapshot_messages(topics["snapshots"], whole, slot))
    return made


def _version(settings: Settings, origin: Origin, last: VersionHeader | None) -> Version:
    folded = dict(last.folded) if last is not None else {}
    return Version(
        version=(last.version if last is not None else 0) + 1,
        parent=origin.parent,
        folded=folded,
        settings=settings.digest(),
        tensors={name: to_wire(tensor) for name, tensor in origin.state.tensors.items()},
        rows=rows_to_wire(origin.state.rows),
        events=0,
        made_at=time.time_ns() // 1_000_000,
        replaces=last.version if last is not None else 0,
        skipped=[(number, start, end) for number, end in sorted(folded.items()) if (start := origin.folded.get(number, 0)) < end],
    )
