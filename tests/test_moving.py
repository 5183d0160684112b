"""Partitions that move between workers with their users' state, turn by turn: what stays goes on, what comes is restored beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from consumers.opening import connect
from consumers.settings import Settings
from consumers.system import System
from streaming.log import Assignment, TopicPartition
from streaming.store.stored import Stored
from tests.live_hand import PARTITIONS, Hand, broken, settings_of
from tests.small_runs import Stream, fill


@pytest.fixture
def hands() -> Iterator[list[Hand]]:
    """Those that are still there are ended with the test."""
    working: list[Hand] = []
    yield working
    for hand in working:
        hand.leave()


@pytest.fixture(autouse=True)
def _in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.store.restoration.AT_ONCE", 5)
    monkeypatch.setattr("consumers.moving.SLICE_SECONDS", 0.0)
    monkeypatch.setattr("consumers.moving.ALONE_SECONDS", 0.0)
    monkeypatch.setattr("consumers.moving.PAUSE_SECONDS", 0.0)


def changelogs(settings: Settings) -> list[int]:
    """The ends of all changelogs."""
    with connect(settings) as log:
        return [bounds.end for _, bounds in sorted(log.bounds(TopicPartition("support", number) for number in range(PARTITIONS)).items())]


STREAM = Stream(600, seed=2, users=80, partitions=PARTITIONS)


def test_what_stays_goes_on_while_what_comes_is_restored(tmp_path: Path, hands: list[Hand]) -> None:
    settings = settings_of(tmp_path)
    fill(settings, STREAM.messages[:300])
    hands.append(first := Hand(settings))
    first.until_idle()
    assert set(first.worker.held) == {0, 1, 2, 3}
    before = dict(first.worker.held)
    fill(settings, STREAM.messages[300:])

    hands.append(second := Hand(settings))
    first.share()
    kept = first.worker.held
    assert len(kept) == 2
    assert all(kept[number] is before[number] for number in kept), "neither writer nor state was opened anew"
    assert not first.moving.busy
    assert first.system.health.ready()["state"].ok

    second.turn()
    ok, detail = second.system.health.ready()["state"]
    assert not ok
    assert detail.startswith("being restored: 2 partitions, the first of them ")
    while len(second.worker.held) < 1:
        second.turn()
    (early,) = second.worker.held
    at = second.worker.held[early].offset
    while second.moving.busy:
        second.turn()
    assert second.worker.held[early].offset > at, "the first was scored while the other was restored"
    assert second.system.health.ready()["state"].ok
    for hand in (first, second):
        hand.until_idle()
    assert broken(settings) == []


def test_a_step_in_hand_when_partitions_move_is_given_up_and_done_again(tmp_path: Path, hands: list[Hand]) -> None:
    settings = settings_of(tmp_path)
    fill(settings, STREAM.messages[:300])
    hands.append(first := Hand(settings))
    first.until_idle()
    fill(settings, STREAM.messages[300:])
    assignment = first.share()
    first.gather = lambda: False
    hands.append(second := Hand(settings))
    assert first.score(assignment, most=64) == 64, "read, but not committed"
    assert first.system.metrics.registry.get_sample_value("coldstream_fenced_total") == 1
    first.restored.clear()
    for hand in (first, second, first, second):
        hand.until_idle()
    assert first.restored.keys() <= set(first.worker.held)
    assert set(first.restored.values()) <= {0}, "what was held is as the changelog has it: nothing is read again"
    assert len(first.worker.held) == len(second.worker.held) == 2
    assert broken(settings) == []


@pytest.mark.parametrize("told", [True, False])
def test_a_worker_that_was_paused_takes_back_only_what_it_missed(tmp_path: Path, hands: list[Hand], told: bool) -> None:
    """Another had its partitions meanwhile: it hears that it was evicted, or, where it rejoins at once, only that its steps are void."""
    settings = settings_of(tmp_path, "one", paused=True)
    fill(settings, STREAM.messages[:300])
    hands.append(paused := Hand(settings))
    paused.until_idle()
    fill(settings, STREAM.messages[300:340])
    time.sleep(1.1)
    other = Hand(settings_of(tmp_path, "two", paused=True))
    other.until_idle()
    assert len(other.restored) == PARTITIONS
    other.leave()
    fill(settings, STREAM.messages[340:])
    paused.restored.clear()
    if not told:
        paused.member.close()
        paused.member = paused.system.log.member(settings.group_id, "interactions")
    paused.turn()
    paused.until_idle()
    paused.member.close()
    assert paused.restored.keys() == set(range(PARTITIONS))
    assert 0 < sum(paused.restored.values()) <= 40 + 5 * PARTITIONS
    fenced = paused.system.metrics.registry.get_sample_value("coldstream_fenced_total")
    assert fenced == (0 if told else PARTITIONS)
    assert broken(settings) == []


def test_a_partition_that_another_takes_over_from_a_takeover_is_taken_back_anew(tmp_path: Path, hands: list[Hand]) -> None:
    """What the one read of the committed offset does not fit what the changelog says once the other's steps are in it."""
    settings = settings_of(tmp_path)
    fill(settings, STREAM.messages[:300])
    hands.append(first := Hand(settings))
    first.until_idle()
    hands.append(second := Hand(settings))
    assignment = second.member.assignment()
    while not assignment.partitions:
        first.share()
        assignment = second.member.assignment()
    second.moving.follow(assignment, lambda: None)
    taken = sorted(second.moving._takeovers)
    assert taken
    fill(settings, STREAM.messages[300:])
    with System(settings) as system:
        other = system.worker()
        other.tables.assign(taken)
        for number in taken:
            tp = TopicPartition("interactions", number)
            with system.log.reader() as reader:
                reader.assign({tp: other.open(number)})
                other.step(number, reader.poll(16), assignment)
    second.moving.advance(lambda: None)
    assert sorted(second.moving._void) == taken
    first.until_idle()
    second.until_idle()
    assert sorted(second.worker.held) == taken
    assert broken(settings) == []


def test_after_the_broker_was_gone_nothing_is_read_again(tmp_path: Path, hands: list[Hand]) -> None:
    settings = settings_of(tmp_path)
    fill(settings, STREAM.messages[:300])
    hands.append(hand := Hand(settings))
    hand.turn(2)
    half = dict(hand.worker.held)
    assert len(half) == PARTITIONS
    hand.moving.start_over()
    assert (hand.worker.held, hand.restored) == ({}, dict.fromkeys(range(PARTITIONS), 0))
    hand.until_idle()
    assert hand.restored == dict.fromkeys(range(PARTITIONS), 0)
    assert all(hand.worker.held[number].support is half[number].support for number in half)
    hand.moving.start_over()
    hand.share()
    hand.moving.start_over()
    fill(settings, STREAM.messages[300:])
    hand.until_idle()
    assert broken(settings) == []


def test_an_evicted_worker_lets_go_of_everything_and_comes_back(tmp_path: Path, hands: list[Hand], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path, "state")
    fill(settings, STREAM.messages[:300])
    hands.append(hand := Hand(settings))
    hand.until_idle()
    with monkeypatch.context() as patch:
        patch.setattr(hand.member, "assignment", lambda: Assignment("coldstream", "interactions", "", -1, frozenset()))
        hand.turn()
        assert hand.worker.held == {}
        assert not hand.system.health.ready()["assignment"].ok
    fill(settings, STREAM.messages[300:])
    hand.restored.clear()
    hand.until_idle()
    assert hand.restored == dict.fromkeys(range(PARTITIONS), 0), "the local stores have it all"
    assert broken(settings) == []


def test_a_partition_moves_with_its_store_between_workers_of_one_machine(tmp_path: Path, hands: list[Hand]) -> None:
    settings = settings_of(tmp_path, "state")
    fill(settings, STREAM.messages[:300])
    hands.append(first := Hand(settings))
    first.until_idle()
    hands.append(second := Hand(settings))
    second.turn()
    assert second.restored == {}, "the store is waited for"
    assert second.moving.busy
    first.turn()
    second.until_idle()
    assert set(second.restored.values()) == {0}
    assert len(second.restored) == 2
    fill(settings, STREAM.messages[300:])
    for hand in (first, second):
        hand.until_idle()
    assert broken(settings) == []


def test_a_stand_by_that_takes_over_reads_only_the_rest(tmp_path: Path, hands: list[Hand]) -> None:
    settings = settings_of(tmp_path, "one")
    fill(settings, STREAM.messages[:300])
    first = Hand(settings)
    first.until_idle()
    hands.append(second := Hand(settings_of(tmp_path, "two", standby=True)))
    second.until_idle()
    first.turn()
    first.until_idle()
    second.until_idle()
    mine = set(second.worker.held)
    assert len(mine) == 2
    ends = changelogs(settings)
    standby = second.moving._standby
    assert standby is not None
    assert standby._sets.keys() == set(range(PARTITIONS)) - mine
    while any(sets.covered.offset < ends[number] for number, sets in standby._sets.items()):
        second.turn()
    fill(settings, STREAM.messages[300:340])
    first.until_idle()
    second.restored.clear()
    first.leave()
    second.until_idle()
    assert second.restored.keys() == set(range(PARTITIONS)) - mine
    after = changelogs(settings)
    for number, records in second.restored.items():
        assert 0 < records <= after[number] - ends[number]
    fill(settings, STREAM.messages[340:])
    second.until_idle()
    assert broken(settings) == []


def test_a_partition_that_goes_is_followed_on(tmp_path: Path, hands: list[Hand]) -> None:
    settings = settings_of(tmp_path, "one", standby=True)
    fill(settings, STREAM.messages[:300])
    hands.append(first := Hand(settings))
    first.until_idle()
    second = Hand(settings_of(tmp_path))
    first.turn()
    second.until_idle()
    fill(settings, STREAM.messages[300:])
    for hand in (second, first):
        hand.until_idle()
    for _ in range(200):
        first.turn()
    first.restored.clear()
    second.leave()
    first.until_idle()
    assert set(first.restored.values()) == {0}
    assert broken(settings) == []


def test_a_store_without_room_is_said_once_and_scoring_goes_on(tmp_path: Path, hands: list[Hand], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.store.stored._AGAIN_SECONDS", 0.0)
    settings = settings_of(tmp_path, "state")
    hands.append(hand := Hand(settings))
    fill(settings, STREAM.messages[:300])
    hand.until_idle()
    stores = [held for number in hand.worker.held if isinstance(held := hand.worker.held[number].support.held, Stored)]
    assert len(stores) == PARTITIONS
    for store in stores:
        (pages,) = store._file.db.execute("PRAGMA page_count").fetchone()
        store._file.db.execute(f"PRAGMA max_page_count = {pages}")
    fill(settings, Stream(1200, seed=9, users=900, partitions=PARTITIONS).messages)
    with structlog.testing.capture_logs() as said:
        hand.until_idle()
        for number in [*hand.worker.held, *hand.worker.held]:
            hand.worker.held[number].support.held.settle()
            hand.worker.held[number].settle()
        full = [line for line in said if "no room" in line["event"]]
        assert sorted(line["partition"] for line in full) == list(range(PARTITIONS))
        assert all(line["reason"].startswith("worker.state_dir: no room for ") for line in full)
        for store in stores:
            store._file.db.execute("PRAGMA max_page_count = 1000000")
        for number in hand.worker.held:
            hand.worker.held[number].support.held.settle()
            hand.worker.held[number].settle()
    assert sorted(line["partition"] for line in said if "room again" in line["event"]) == list(range(PARTITIONS))
    assert [store.behind for store in stores] == [0] * PARTITIONS
    assert broken(settings) == []


def test_a_store_that_turns_out_to_be_damaged_is_rebuilt_while_the_others_go_on(
    tmp_path: Path, hands: list[Hand], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, "state")
    fill(settings, STREAM.messages[:300])
    hands.append(hand := Hand(settings))
    hand.until_idle()
    before = dict(hand.worker.held)
    fill(settings, STREAM.messages[300:])
    store = before[2].support.held
    assert isinstance(store, Stored)

    def damaged(user: str) -> bytes | None:
        raise store._file.put_aside("it is damaged, for a test")

    monkeypatch.setattr(store, "value", damaged)
    hand.restored.clear()
    hand.until_idle()
    assert hand.restored.keys() == {2}
    assert hand.restored[2] > 5
    assert all(hand.worker.held[number] is before[number] for number in (0, 1, 3))
    assert (tmp_path / "state" / "coldstream-2.db.set-aside").exists()
    assert hand.system.metrics.registry.get_sample_value("coldstream_stores_set_aside_total") == 1
    assert broken(settings) == []


@pytest.mark.parametrize("comes", [True, False], ids=["it comes", "it was lost"])
def test_no_step_is_made_at_an_older_version_than_the_last_owners(
    tmp_path: Path, hands: list[Hand], monkeypatch: pytest.MonkeyPatch, *, comes: bool
) -> None:
    settings = settings_of(tmp_path)
    fill(settings, STREAM.messages[:300])
    first = Hand(settings)
    first.worker.versions.version = 7  # as a worker that reads the model faster than others
    first.until_idle()
    first.leave()
    fill(settings, STREAM.messages[300:])
    hands.append(second := Hand(settings))
    if not comes:
        monkeypatch.setattr("consumers.moving.VERSION_SECONDS", 0.3)
    began = time.monotonic()
    second.turn(20)
    assert (second.worker.held, second.moving.busy) == ({}, True)
    if comes:
        second.worker.versions.version = 7
    second.until_idle()
    assert sorted(second.worker.held) == list(range(PARTITIONS))
    assert comes or time.monotonic() - began >= 0.3
    assert any("names version 0, after 7" in finding.text for finding in broken(settings)) == (not comes)
