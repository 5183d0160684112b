"""What a trainer does where the log has lost something or says nothing: no start is barred, nothing is lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import consumers.trainer
from consumers import lockstep
from consumers.opening import connect
from consumers.stop import Stop
from consumers.system import System
from consumers.trainer import Trainer
from streaming.codec import decode
from streaming.embedded.reader import EmbeddedReader
from streaming.errors import BrokerUnreachable, OffsetOutOfRange, OtherSettings
from streaming.headers import VersionHeader
from streaming.log import TopicPartition, present
from tests.small_runs import SMALL, Stream, fill, run, small
from tests.test_promises import findings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streaming.events import Version
    from streaming.log import Message, Record

UPDATES = TopicPartition("updates", 0)


def worked(system: System, batches: int, size: int = 16) -> None:
    """Steps of a worker without a trainer, from where the last ones ended."""
    worker, tp = system.worker(), TopicPartition("interactions", 0)
    worker.tables.assign([0])
    worker.tables.advance()
    with system.log.reader() as reader:
        reader.assign({tp: worker.open(0)})
        for _ in range(batches):
            worker.step(0, lockstep.read(system.log, reader, size, tp), system.settings.group_id)
    worker.close()


def test_versions_too_large_for_what_is_kept_are_caught_by_snapshots_in_time(tmp_path: Path) -> None:
    """Without them retention takes versions that nothing else has, and nobody can start any more."""
    settings = small(
        tmp_path / "log.db",
        topics={"partitions": 1, "model_bytes": 1 << 20},
        trainer=SMALL["trainer"] | {"snapshot_every": 1_000_000},
        model={"embedding_size": 32, "memory_rows": 8},
    )
    fill(settings, Stream(600, garbage=0.0).messages)
    run(settings)
    with connect(settings) as log:
        assert log.bounds([TopicPartition("model", 0)])[TopicPartition("model", 0)].start > 0, "nothing was removed: the test shows nothing"
    with System(settings) as system:
        assert system.trainer().version == system.worker().versions.version > 60


def test_a_snapshot_is_due_once_versions_fill_a_part_of_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db", trainer=SMALL["trainer"] | {"snapshot_every": 1_000_000})
    fill(settings, Stream(640, garbage=0.0).messages)
    # So that ten versions or so fill a quarter.
    monkeypatch.setattr(consumers.trainer, "SNAPSHOT_SHARE", settings.topics.model_bytes // 30_000)
    sizes, made = list[int](), list[bool]()
    due = Trainer._snapshot_if_due

    def watched(trainer: Trainer, version: Version, size: int) -> list[Message]:
        messages = due(trainer, version, size)
        sizes.append(size)
        made.append(bool(messages))
        return messages

    monkeypatch.setattr(Trainer, "_snapshot_if_due", watched)
    run(settings)
    assert 2 < sum(made) < len(made) / 2
    since = 0
    for size, snapshot in zip(sizes, made, strict=True):
        assert snapshot == (since + size > 30_000)
        since = size if snapshot else since + size


def test_one_that_stood_by_knows_the_newest_snapshot(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(640, garbage=0.0).messages)
    with System(settings) as system:
        standing_by = system.learner()
        run(settings)
        assert standing_by.snapshot == 0
        trainer = Trainer(system.log, settings, system.topics, standing_by, system.metrics)
        assert (trainer._snapshot, trainer._slot) == (system.learner().snapshot, system.learner().slot)
        assert trainer._snapshot > 40


def test_updates_that_end_before_what_was_folded_are_an_error_and_no_silence(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(64, garbage=0.0).messages)
    run(settings)
    with System(settings) as system:
        trainer = system.trainer()
        trainer.catch_up()
        with pytest.raises(OffsetOutOfRange, match="folded up to offset 999, but it ends at"):
            trainer._begin({UPDATES: 999})


@pytest.mark.parametrize("running", [False, True])
def test_updates_that_retention_took_are_said_and_counted_and_the_others_folded(tmp_path: Path, *, running: bool) -> None:
    settings = small(
        tmp_path / "log.db", topics={"partitions": 1, "updates_bytes": 1 << 20}, model={"embedding_size": 64, "memory_rows": 8}
    )
    fill(settings, Stream(1600, garbage=0.0).messages)
    with System(settings) as system:
        trainer = system.trainer() if running else None
        worked(system, 100)
        start, end = system.log.bounds([UPDATES])[UPDATES]
        assert start > 0, "nothing was removed: the test shows nothing"
        trainer = trainer or system.trainer()
        assert trainer.step() == 0 if running else trainer.step() > 0
        trainer.catch_up()
        assert system.metrics.registry.get_sample_value("coldstream_updates_lost_total") == start
        assert trainer.folded == {0: end}
    with connect(settings) as log:
        versions = [decode(record.value, VersionHeader, what="version") for record in present(log, [TopicPartition("model", 0)])]
    stated = [version.skipped for version in versions if version.skipped]
    assert stated == [[(0, 0, start)]], "the first version that lacks them says so, and no other"
    with System(settings) as system:
        # The next trainer does not count them again, and the version says what it lacks.
        again = system.trainer()
        again.catch_up()
        assert again.version == trainer.version
        assert system.metrics.registry.get_sample_value("coldstream_updates_lost_total") == 0


def test_an_update_made_with_other_settings_is_refused_before_there_is_a_version(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(64, garbage=0.0).messages)
    with System(settings) as system:
        worked(system, 2)
    for other in ({"model": {"embedding_size": 8}}, {"seed": 2}):
        with System(small(tmp_path / "log.db", **other)) as system, pytest.raises(OtherSettings, match=r"updates.*an update was made with"):
            system.trainer().step()


class InPieces(EmbeddedReader):
    """A reader that answers as a broker far away does: a few records at a time, and now and then none yet."""

    calls = 0

    def poll(self, max_records: int, timeout: float = 0.0, only: Iterable[TopicPartition] | None = None) -> list[Record]:
        """As `Reader.poll`."""
        InPieces.calls += 1
        return super().poll(min(max_records, 1 + InPieces.calls % 3), timeout, only) if InPieces.calls % 4 else []


def test_rounds_in_lockstep_do_not_depend_on_the_pieces_a_broker_answers_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for name in ("whole", "pieces"):
        settings = small(tmp_path / f"{name}.db", trainer=SMALL["trainer"] | {"round_updates": 3, "meta_update": 2})
        fill(settings, Stream(320).messages)
        with System(settings) as system, Stop() as stop:
            if name == "pieces":
                made = system.log.reader
                monkeypatch.setattr(system.log, "reader", lambda made=made: in_pieces(made()))
            lockstep.run(system, stop, until_end=True)
            ends.append(system.trainer().model.vector.tolist())
        assert findings(settings) == []
    assert ends[0] == ends[1]


def in_pieces(reader: EmbeddedReader) -> EmbeddedReader:
    """A reader turned into one that answers in pieces."""
    reader.__class__ = InPieces
    return reader


def test_a_broker_that_falls_silent_is_said_to_lockstep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(64, garbage=0.0).messages)
    with System(settings) as system:
        worked(system, 2)
        trainer, beats = system.trainer(), list[None]()
        monkeypatch.setattr(consumers.trainer, "SILENT_SECONDS", 0.2)
        monkeypatch.setattr(trainer._reader, "poll", lambda *_, **__: [])
        with pytest.raises(BrokerUnreachable, match="although there are more"):
            trainer.catch_up(lambda: beats.append(None))
        assert len(beats) > 2


def test_a_backlog_without_a_complete_meta_update_is_read_a_bounded_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path / "log.db", trainer=SMALL["trainer"] | {"meta_update": 65_536})
    fill(settings, Stream(3200, garbage=0.0).messages)
    monkeypatch.setattr(consumers.trainer, "FOLD_BYTES", 10_000)
    with System(settings) as system:
        worked(system, 200)
        trainer, beats = system.trainer(), list[None]()
        assert trainer.step(beat=lambda: beats.append(None)) == 0
        assert trainer.behind
        assert 0 < len(trainer._parts[0]) < 200
        assert beats
        trainer.catch_up()
        assert len(trainer._parts[0]) == 200
