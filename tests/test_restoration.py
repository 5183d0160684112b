"""Restoring from the changelog: only what the local store lacks, and never on top of what does not belong to it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from consumers import lockstep
from consumers.opening import connect, topics_of
from consumers.settings import Settings
from consumers.state import State, Takeover
from consumers.stop import Stop
from consumers.system import System
from streaming.codec import encode
from streaming.embedded import EmbeddedLog
from streaming.errors import LogError, StoreError, StoreFull
from streaming.events import Position
from streaming.log import Bounds, Message, TopicPartition
from streaming.metrics import Metrics
from streaming.store import stored
from streaming.store.file import Place
from streaming.store.held import Covered, InMemory
from streaming.store.restoration import misfit, newest_position
from streaming.store.stored import Stored
from streaming.support import SupportSets
from streaming.topics import POSITION_KEY
from tests.small_runs import Stream, fill, run, small
from tests.test_promises import findings

SUPPORT = TopicPartition("support", 0)


def settings_of(folder: Path, **worker: Any) -> Settings:  # noqa: ANN401 - whatever a setting may be
    return small(folder / "log.db", worker={"state_dir": str(folder / "state")} | worker)


def store_of(settings: Settings) -> Path:
    return Path(settings.worker.state_dir) / f"{settings.group_id}-0.db"


def taken_over(settings: Settings, look: Callable[[Takeover], None] = lambda _: None) -> int:
    """Take partition 0 over as a worker does, and let it go again; returns how many records were read."""
    with connect(settings) as log:
        state = State(log, settings, Metrics(), {name: topic.name for name, topic in topics_of(settings).items()})
        takeover = Takeover(state, 0)
        while not takeover.advance(1.0):
            time.sleep(0.01)
        read = takeover.records
        look(takeover)
        takeover.close()
        return read


def in_changelog(settings: Settings) -> int:
    """How many records a restoration from nothing reads."""
    return taken_over(settings.model_copy(update={"worker": settings.worker.model_copy(update={"state_dir": ""})}))


def rebuilt_because(settings: Settings, reason: str) -> None:
    """Taken over, everything is read, the old store is set aside for this reason, and the result is right."""
    with structlog.testing.capture_logs() as said:
        assert taken_over(settings) == in_changelog(settings) > 0
    reasons = [line["reason"] for line in said if "rebuilt from the changelog" in line["event"]]
    assert len(reasons) == 1
    assert reason in reasons[0]
    assert store_of(settings).with_name(store_of(settings).name + ".set-aside").exists()
    assert taken_over(settings) == 0, "it is whole again"


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was ended."""
    folder = tmp_path_factory.mktemp("once")
    settings = settings_of(folder)
    fill(settings, Stream(200, seed=3).messages)
    run(settings)
    return folder


@pytest.fixture
def ended(once: Path, tmp_path: Path) -> Settings:
    """A run that was ended, with its local store; each test has its own copy."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return settings_of(tmp_path)


def test_after_an_end_nothing_is_read_again(ended: Settings) -> None:
    assert taken_over(ended) == 0
    assert in_changelog(ended) > 20


def test_a_run_with_a_store_keeps_its_promises_from_start_to_start(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, max_users=9)
    stream = Stream(400, seed=5)
    fill(settings, stream.profiles)
    for start in range(0, 400, 130):
        fill(settings, stream.messages[start : start + 130])
        run(settings)
        assert findings(settings) == []


def test_killed_before_the_store_was_written_to_only_the_rest_is_read(ended: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store_of(ended).read_bytes()
    fill(ended, Stream(20, seed=9, users=2).messages)
    run(ended)
    store_of(ended).write_bytes(before)  # As a kill leaves it between the log's commit and the store's.
    assert 1 < taken_over(ended) < 6, "two users and the position record, at most a few more"
    assert findings(ended) == []


def test_whatever_is_wrong_with_the_file_it_is_rebuilt(ended: Settings) -> None:
    store_of(ended).write_bytes(b"garbage" * 999)
    rebuilt_because(ended, "it is damaged (file is not a database)")


def test_the_store_of_a_log_that_was_made_anew_is_not_used(ended: Settings, tmp_path: Path) -> None:
    (tmp_path / "log.db").unlink()
    fill(ended, Stream(300, seed=4).messages)
    run(ended.model_copy(update={"worker": ended.worker.model_copy(update={"state_dir": ""})}))
    rebuilt_because(ended, "it belongs to another changelog of the same name")
    assert findings(ended) == []


def test_the_store_of_another_group_is_not_used(ended: Settings) -> None:
    other = ended.model_copy(update={"group": "other"})
    store_of(ended).rename(store_of(other))
    with connect(other) as log:
        state = State(log, other, Metrics(), {name: topic.name for name, topic in topics_of(other).items()})
        with structlog.testing.capture_logs() as said:
            state.open(0, lambda: None).close()
    assert "it is the store of coldstream: support[0]" in said[0]["reason"]


X = Covered(90, 1000, "x", encode(Position(30, 5, 0, {}, "x")))
"""A state that is nearly as far as a changelog of offsets 10 to 100."""


@pytest.mark.parametrize(
    ("covered", "newest", "reason"),
    [
        (X, 40, ""),
        (Covered(), 40, ""),
        (Covered(), None, ""),
        (X._replace(changelog=""), 40, "another changelog"),
        (X._replace(changelog="y"), 40, "another changelog"),
        (X, None, "another changelog"),
        (X._replace(offset=101), 40, "it goes to offset 101 of the changelog, which ends at 100"),
        (X._replace(offset=9), 40, "it goes to offset 9 of the changelog, which begins at 10"),
        (X, 29, "it goes to offset 30 of interactions, the changelog only to 29"),
        (X._replace(position=None), 40, ""),
        (X._replace(timestamp=0), 40, "it is 1.0 hours old, and the changelog remembers removals for 1.0"),
        (X._replace(timestamp=0), 30, ""),
    ],
)
def test_what_cannot_be_continued(covered: Covered, newest: int | None, reason: str) -> None:
    """An hour and a half second after the epoch, of a changelog that remembers removals for an hour."""
    last = None if newest is None else Position(newest, 5, 0, {}, "x")
    found = misfit(covered, Bounds(10, 100), last, 3_600_000, 3_600_500)
    assert (reason in found) if reason else (found == "")
    if "hours old" in reason:
        assert misfit(covered, Bounds(10, 100), last, None, 3_600_500) == "", "removals are remembered for ever"


def part_of_it(settings: Settings, share: float, old_ms: int = 0) -> tuple[int, int]:
    """Restore about this share of what is left of partition 0 and stop; returns how many records were read, and how many are left.

    The changelog's records are ``old_ms`` old by then.
    """
    with connect(settings) as log:
        state = State(log, settings, Metrics(), {name: topic.name for name, topic in topics_of(settings).items()})
        sets = state.open(0, lambda: None)
        bounds, _ = state.fit(0, sets)
        with log.reader() as reader:
            reader.assign({SUPPORT: max(sets.covered.offset, bounds.start)})
            records = reader.poll(10_000)
        wanted = records[: int(share * len(records))]
        for record in wanted:
            sets.restore(record._replace(timestamp=record.timestamp - old_ms))
        sets.close()
        return len(wanted), len(records) - len(wanted)


@pytest.mark.parametrize("old_days", [0, 30])
def test_a_restoration_that_was_broken_off_is_gone_on_with(ended: Settings, old_days: int) -> None:
    """Of the position records that it has passed the changelog keeps none, and records may be older than removals are remembered."""
    store_of(ended).unlink()
    read, left = part_of_it(ended, 0.5, old_days * 86_400_000)
    with structlog.testing.capture_logs() as said:
        again, left_then = part_of_it(ended, 0.5, old_days * 86_400_000)
        assert read > 10 < again + left_then == left
        # And behind another owner's steps, who had no such store.
        fill(ended, Stream(60, seed=11).messages)
        run(ended.model_copy(update={"worker": ended.worker.model_copy(update={"state_dir": ""})}))
        part_of_it(ended, 0.5)
        assert 0 < taken_over(ended) < in_changelog(ended)
    assert [line for line in said if "rebuilt" in line["event"]] == []
    assert findings(ended) == []


def test_a_position_record_that_a_step_removes_meanwhile_is_looked_for_again(ended: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with connect(ended) as log:
        state = State(log, ended, Metrics(), {name: topic.name for name, topic in topics_of(ended).items()})
        found, bounds = state.fit(0, state.in_memory())[1], log.bounds
        assert found is not None

        def and_then_a_step(tps: list[TopicPartition]) -> dict[TopicPartition, Bounds]:
            before = bounds(tps)
            if not steps:
                steps.append(log.append([Message("support", POSITION_KEY, encode(found), 0)]))
            return before

        steps: list[object] = []
        monkeypatch.setattr(log, "bounds", and_then_a_step)
        assert state.fit(0, state.in_memory())[1] == found
        assert steps


def test_a_state_too_old_for_removals_is_rebuilt(tmp_path: Path) -> None:
    """The removal of an evicted user has gone from the changelog while the worker was away."""
    settings = settings_of(tmp_path, max_users=9)
    stream = Stream(300, seed=5)
    now = [time.time_ns() // 1_000_000]
    with EmbeddedLog(tmp_path / "log.db", clock=lambda: now[0]) as log:
        log.create(topics_of(settings).values())
        log.append(stream.messages[:150])
        lockstep_over(settings, log)
        before = store_of(settings).read_bytes()
        log.append(stream.messages[150:])
        lockstep_over(settings, log)
        store_of(settings).write_bytes(before)
        week = topics_of(settings)["support"].retention_ms
        assert week is not None
        now[0] += week + 10_000
        for _ in range(30):
            now[0] += 1001
            log.append([Message("replays", b"key", b"so that retention is looked after")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("consumers.state.time", Clock(now[0]))
        rebuilt_because(settings, "and the changelog remembers removals for 168.0")
    assert findings(settings) == []


class Clock:
    """The time module, at another time."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms
        self.monotonic = time.monotonic

    def time_ns(self) -> int:
        return self._now_ms * 1_000_000


def lockstep_over(settings: Settings, log: EmbeddedLog) -> None:
    with Stop() as stop, System(settings, log=log) as system:
        lockstep.run(system, stop, until_end=True)


def test_the_newest_position_is_found_behind_many_records(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    users = [Message("support", b"u%d" % n, b"x", 0) for n in range(1500)]
    place = Message("support", POSITION_KEY, encode(Position(7, 5, 0, {}, "x")), 0)
    with connect(settings, create=True) as log:
        log.create(topics_of(settings).values())
        assert newest_position(log, SUPPORT, log.bounds([SUPPORT])[SUPPORT]) is None
        log.append([place])
        found = newest_position(log, SUPPORT, log.bounds([SUPPORT])[SUPPORT])
        assert found == Position(7, 5, 0, {}, "x")
        log.append(users)
        assert newest_position(log, SUPPORT, log.bounds([SUPPORT])[SUPPORT]) == found
        assert newest_position(log, SUPPORT, Bounds(1, 1501)) is None


def test_restoration_goes_in_slices(ended: Settings) -> None:
    """A slice of no length reads one poll, so that the loop that calls it stays its own."""
    settings = ended.model_copy(update={"worker": ended.worker.model_copy(update={"state_dir": ""})})
    with connect(settings) as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr("streaming.store.restoration.AT_ONCE", 10)
        state = State(log, settings, Metrics(), {name: topic.name for name, topic in topics_of(settings).items()})
        takeover = Takeover(state, 0)
        shares, beats = [takeover.share], list[int]()
        while not takeover.advance(0.0, lambda: beats.append(1)):
            shares.append(takeover.share)
            gauge = state.metrics.registry.get_sample_value("coldstream_restored_share", {"partition": "0"})
            assert gauge == takeover.share
        assert len(shares) == len(beats) == takeover.records // 10 + 1
        assert shares == sorted(shares)
        assert takeover.share == 1.0
        assert state.metrics.registry.get_sample_value("coldstream_restored_share", {"partition": "0"}) is None
        takeover.close()


def test_support_sets_and_committed_offset_must_belong_together(ended: Settings) -> None:
    with connect(ended) as log:
        log.writer("any").commit([], {TopicPartition("interactions", 0): 100}, ended.group_id)
    with pytest.raises(LogError, match=r"support\[0\] holds the support sets as of offset 200, but group coldstream has committed 100"):
        taken_over(ended)


def test_a_store_that_another_process_has_is_waited_for_and_then_done_without(ended: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumers.state.LET_GO_SECONDS", 0.2)
    holder = Stored(store_of(ended), Place("coldstream", "support", 0))
    begun = time.monotonic()
    with structlog.testing.capture_logs() as said:
        read = taken_over(ended, lambda takeover: holds(takeover, InMemory))
    assert time.monotonic() - begun > 0.2
    assert read == in_changelog(ended)
    assert any("is held by another process" in str(line.get("reason")) for line in said)
    holder.close()
    assert taken_over(ended, lambda takeover: holds(takeover, Stored)) == 0


def holds(takeover: Takeover, kind: type) -> None:
    assert isinstance(takeover.sets.held, kind)


def test_a_store_without_room_from_the_start_is_done_without(ended: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Stored:
        raise StoreFull("no room")

    monkeypatch.setattr("consumers.state.Stored", full)
    assert taken_over(ended, lambda takeover: holds(takeover, InMemory)) == in_changelog(ended)


def test_a_disk_that_fills_up_under_a_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path)
    stream = Stream(400, seed=6)
    fill(settings, stream.messages[:200])
    run(settings)
    fill(settings, stream.messages[200:])
    load = Stored._load

    def cramped(store: Stored) -> None:
        load(store)
        pages = store._file.db.execute("PRAGMA page_count").fetchone()[0]
        store._file.db.execute(f"PRAGMA max_page_count = {pages}")
        monkeypatch.setattr(store, "full", "")

    with monkeypatch.context() as patch:
        patch.setattr(Stored, "_load", cramped)
        patch.setattr("streaming.support.SETTLE_USERS", 1)
        run(settings)
    assert findings(settings) == []
    assert 0 < taken_over(settings) < in_changelog(settings), "what found no room is read again"

    fill(settings, Stream(100, seed=8, users=300).messages)
    with monkeypatch.context() as patch:
        patch.setattr(Stored, "_load", cramped)
        patch.setattr(stored, "MOST_WAITING", 10)
        patch.setattr("consumers.state.SupportSets", Impatient)
        with pytest.raises(StoreFull, match="which is the most"):
            run(settings)
    run(settings)
    assert findings(settings) == []


class Impatient(SupportSets):
    """Written to after every step."""

    def settle(self, users: int = 1, seconds: float = 0.0) -> None:
        super().settle(min(users, 1), min(seconds, 0.0))


def test_a_store_damaged_under_a_run_is_rebuilt_at_the_next_start(ended: Settings) -> None:
    fill(ended, Stream(200, seed=7).messages)
    value = Stored.value

    def damaged(store: Stored, user: str) -> bytes | None:
        found = value(store, user)
        if found is not None:
            raise store._file.put_aside("it is damaged, for a test")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "value", damaged)
        with pytest.raises(StoreError, match="it is damaged, for a test"):
            run(ended)
    run(ended)
    assert findings(ended) == []
