"""A step is computed while the one before is on its way to the log: what becomes of both if that one fails, and what nobody may see."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consumers.opening import connect
from consumers.settings import Settings
from consumers.worker import Worker
from streaming.codec import decode
from streaming.embedded.writer import EmbeddedWriter
from streaming.errors import BrokerUnreachable, Fenced, LogError
from streaming.events import Score
from streaming.log import Assignment, Commit, TopicPartition
from streaming.metrics import StepReport
from streaming.partitioner import partition_of
from streaming.store.held import head
from streaming.topics import POSITION_KEY
from tests.live_hand import PARTITIONS, Hand, broken, settings_of
from tests.small_runs import Stream, fill, profile
from tests.test_promises import findings
from tests.test_requests import answers, request
from tests.verify.reading import read

STREAM = Stream(400, seed=4, users=30, partitions=PARTITIONS)
OF_ONE = [message for message in Stream(3000, seed=4, garbage=0.0).messages if partition_of(message.key or b"", PARTITIONS) == 0]
Outcome = str
"""What becomes of a commit: it takes place; another has fenced it; it is lost; it takes place and its answer is lost."""


class Late(Commit):
    """A commit that takes place, or fails, only when it is waited for."""

    def __init__(self, commit: Callable[[], Commit], outcome: Outcome, before: Callable[[], None]) -> None:
        self._commit, self._outcome, self._before = commit, outcome, before
        self._ended = 0.0

    @property
    def done(self) -> bool:
        return self._ended > 0

    @property
    def ended(self) -> float:
        return self._ended

    def result(self) -> list[int]:
        self._before()
        offsets = self._commit().result() if self._outcome in ("takes place", "unheard") else []
        self._ended = time.time()
        if self._outcome == "fenced":
            raise Fenced("for a test")
        if self._outcome != "takes place":
            raise BrokerUnreachable("for a test")
        return offsets


class Broker:
    """Makes the commits of steps late, with an outcome each; ``under_way`` counts how many a writer has, by its id."""

    def __init__(self, patch: pytest.MonkeyPatch, outcome: Callable[[], Outcome]) -> None:
        begin, broker = EmbeddedWriter.begin, self
        self.hand: Hand | None = None
        self.outcomes: list[Outcome] = []
        self.together = 0

        def late(writer: EmbeddedWriter, messages: Any, offsets: Any = None, owner: Any = None) -> Commit:  # noqa: ANN401 - as the method
            if not isinstance(owner, Assignment):
                return begin(writer, messages, offsets, owner)
            broker.outcomes.append(outcome())
            (support,) = {message.partition for message in messages if message.topic == "support"} or {None}
            changed = {message.key.decode(): message.value for message in messages if message.topic == "support" and message.value}

            def unseen() -> None:
                if broker.hand is None or support not in broker.hand.worker.held:
                    return
                broker.together = max(broker.together, sum(held.under_way is not None for held in broker.hand.worker.held.values()))
                held = broker.hand.worker.held[support].support.held
                seen = [user for user, value in changed.items() if held.value(user) == value]
                assert not seen, "what the log has not committed is in what is held"

            return Late(lambda: begin(writer, messages, offsets, owner), broker.outcomes[-1], unseen)

        patch.setattr(EmbeddedWriter, "begin", late)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumers.moving.PAUSE_SECONDS", 0.0)


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[Callable[..., Hand]]:
    """Makes a worker that is turned by hand; ended with the test."""
    made: list[Hand] = []

    def make(**worker: Any) -> Hand:  # noqa: ANN401 - whatever a setting may be
        made.append(Hand(settings_of(tmp_path, "state", **worker)))
        return made[-1]

    yield make
    for each in made:
        each.leave()


def work(hand: Hand) -> None:
    """Turn until nothing is left, as `run_worker` does, where the broker is gone too; last, whoever is left to be forgotten is."""
    while True:
        try:
            hand.worker.tables.advance()
            hand.until_idle()
            left = [number for number in hand.worker.held if hand.worker.tables.waiting(number)]
            assignment = hand.share()
            for number in left:
                hand.worker.begin(number, [], assignment)
            if not left:
                return
        except BrokerUnreachable:
            hand.moving.start_over()
        except Fenced as error:
            hand.moving.give_up_step(number, error)


def as_the_changelog_has_it(hand: Hand) -> None:
    """What the worker holds is what a restart would restore."""
    with connect(hand.settings) as log:
        for number, held in hand.worker.held.items():
            latest = {record.key.decode(): record.value for record in read(log, "support", number) if record.key}
            for user in {f"u{n}" for n in range(30)}:
                value = latest.get(user)
                forgotten = head(value, user).forgotten if value else None
                assert held.support.encoded(user) == (value if forgotten is None else None)
                assert held.support.held.since(user) == (forgotten or 0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("max_users", [0, 5])
def test_whatever_fails_under_way_the_support_sets_are_the_fold(
    tmp_path: Path, hand: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch, seed: int, max_users: int
) -> None:
    """Four partitions, whose commits are under way together; one in three fails, in one of three ways, with steps on top of it."""
    dice = random.Random(seed)
    broker = Broker(monkeypatch, lambda: dice.choice(["takes place"] * 6 + ["fenced", "lost", "unheard"]))
    settings = settings_of(tmp_path, "state", max_users=max_users)
    fill(settings, STREAM.profiles)
    nulls = dict[tuple[str, int, int], str]()
    broker.hand = hand(max_users=max_users)
    broker.hand.gather = lambda: dice.random() < 0.7
    for start in range(0, 400, 50):
        fill(settings, STREAM.messages[start : start + 50])
        gone = [f"u{dice.randrange(30)}" for _ in range(2)]
        placed = [profile("users", user, None) for user in gone]
        places = zip(gone, fill(settings, placed), strict=True)
        nulls |= {("users", partition_of(user.encode(), PARTITIONS), offset): user for user, offset in places}
        work(broker.hand)
    as_the_changelog_has_it(broker.hand)
    assert len(set(broker.outcomes)) > 2
    assert broker.together > 1
    assert [finding for finding in findings(settings, nulls=nulls) if finding.promise != "c"] == []
    registry = broker.hand.system.metrics.registry
    failed = sum(outcome != "takes place" for outcome in broker.outcomes)
    assert (registry.get_sample_value("coldstream_transactions_aborted_total") or 0) >= failed


def ignore_failures(patch: pytest.MonkeyPatch) -> None:
    """Go on with the second step as if the first had not failed."""
    finish = Worker.finish

    def careless(worker: Worker, number: int, *, wait: bool = True) -> list[StepReport]:
        try:
            return finish(worker, number, wait=wait)
        except LogError:
            return []

    patch.setattr(Worker, "finish", careless)


@pytest.mark.parametrize("outcome", ["fenced", "lost"])
@pytest.mark.parametrize("careless", [False, True])
def test_a_step_is_never_seen_where_the_one_before_failed(
    tmp_path: Path, hand: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch, outcome: Outcome, *, careless: bool
) -> None:
    """The verifier finds it where the worker goes on all the same, so it would find it here."""
    numbers = iter(range(10_000))
    broker = Broker(monkeypatch, lambda: outcome if next(numbers) == 9 else "takes place")
    settings = settings_of(tmp_path, "state")
    fill(settings, STREAM.messages)
    made = hand()
    made.gather = lambda: False
    if careless:
        ignore_failures(monkeypatch)
    else:
        broker.hand = made
    work(made)
    assert outcome in broker.outcomes
    told = broken(settings)
    assert any("has no score" in finding.text for finding in told) if careless else told == []


def turned_until_under_way(broker: Broker, settings: Settings, make: Callable[..., Hand], messages: int) -> tuple[Hand, Assignment]:
    fill(settings, STREAM.messages[:messages])
    broker.hand = made = make()
    work(made)
    fill(settings, STREAM.messages[messages:])
    assignment = made.share()
    made.score(assignment, most=1000)
    assert made.worker.under_way
    return made, assignment


def test_what_is_under_way_counts_as_waiting_until_it_is_committed(
    tmp_path: Path, hand: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, "state")
    made, _ = turned_until_under_way(Broker(monkeypatch, lambda: "takes place"), settings, hand, 200)
    events = {number: held.events_under_way for number, held in made.worker.held.items()}
    assert sum(events.values()) == 200
    before = made.system.metrics.registry.get_sample_value("coldstream_scores_total")
    assert all(made.worker.finish(number, wait=False) == [] for number in made.worker.held), "no answer yet"
    assert made.system.metrics.registry.get_sample_value("coldstream_scores_total") == before
    made.finish()
    assert sum(held.events_under_way for held in made.worker.held.values()) == 0
    assert made.system.metrics.registry.get_sample_value("coldstream_lag_events", {"partition": "0"}) is None
    assert broken(settings) == []


@pytest.mark.parametrize("outcome", ["takes place", "fenced"])
def test_an_answer_waits_for_the_step_that_it_counts(
    tmp_path: Path, hand: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    settings, now = settings_of(tmp_path, "state"), ["takes place"]
    made, assignment = turned_until_under_way(Broker(monkeypatch, lambda: now[0]), settings, hand, 200)
    (number,) = list(made.worker.held)[:1]
    made.finish()
    now[0] = outcome
    fill(settings, [message for message in STREAM.messages[:40] if message.partition == number])
    user = next(message.key for message in STREAM.messages if message.key and made.worker.held[number].support.get(message.key.decode()))
    fill(settings, [request(user.decode(), n=3)._replace(partition=number)])
    made.score(assignment, most=1000)
    requests = made.moving._requests
    reader = made.reader
    requests.take(reader.poll(10, timeout=1, only=[TopicPartition(requests.topic, number)]))
    assert len(requests) == 1
    position = reader.position(TopicPartition("interactions", number))
    if outcome == "fenced":
        with pytest.raises(Fenced):
            requests.answer(number, position, assignment)
        assert answers(settings) == []
        assert len(requests) == 1
    else:
        now[0] = "takes place"
        assert requests.answer(number, position, assignment) == 1
        (answer,) = answers(settings)
        assert answer.as_of == ("interactions", number, position)
        assert not answer.stale


def test_a_partition_that_goes_takes_its_step_under_way_along(
    tmp_path: Path, hand: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, "state")
    made, _ = turned_until_under_way(Broker(monkeypatch, lambda: "takes place"), settings, hand, 200)
    made.worker.close()
    with connect(settings) as log:
        tps = [TopicPartition("interactions", number) for number in range(PARTITIONS)]
        ends = {tp: bounds.end for tp, bounds in log.bounds(tps).items()}
        assert log.committed(settings.group_id, tps) == ends
    assert broken(settings) == []


@pytest.mark.parametrize("late", [False, True], ids=["answered at once", "answered late"])
def test_behind_a_backlog_several_steps_are_one_transaction(
    tmp_path: Path, hand: Callable[..., Hand], monkeypatch: pytest.MonkeyPatch, *, late: bool
) -> None:
    """Of 64 events, or of as many as are computed while the one before has no answer, up to 256; of one step where none waits behind it."""
    settings, transactions = settings_of(tmp_path, "state"), list[int]()
    if late:
        Broker(monkeypatch, lambda: "takes place")
    begin = EmbeddedWriter.begin

    def counted(writer: EmbeddedWriter, messages: Any, offsets: Any = None, owner: Any = None) -> Commit:  # noqa: ANN401 - as the method
        if owner is not None:
            steps = {decode(message.value, Score, what="score").step for message in messages if message.topic == "scores"}
            transactions.append(len(steps))
            assert sum(message.key == POSITION_KEY for message in messages) == 1
            assert messages[-1].key == POSITION_KEY
        return begin(writer, messages, offsets, owner)

    monkeypatch.setattr(EmbeddedWriter, "begin", counted)
    fill(settings, OF_ONE[:600])
    made = hand()
    work(made)
    assert transactions == ([4, 16, 16, 2] if late else [4] * 9 + [2])
    del transactions[:]
    fill(settings, OF_ONE[600:605])
    made.score(made.share())
    assert transactions == [1], "nothing is behind them"
    assert broken(settings) == []
