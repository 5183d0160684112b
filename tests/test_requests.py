"""Requests: answered once, from the user as of now, with all that was in the log before; nothing else is changed by them."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers import lockstep
from consumers.asking import NoAnswer, ask
from consumers.live import run_worker
from consumers.opening import connect, topics_of
from consumers.requests import Requests
from consumers.scoring import offline
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from streaming.codec import decode
from streaming.errors import Fenced, LogError, Malformed
from streaming.events import Answer, DeadLetter, Interaction, Request
from streaming.log import Message, TopicPartition
from streaming.metrics import Metrics
from streaming.scored import read_run
from tests.nursery import Nursery
from tests.small_runs import T0, Stream, fill, message, profile, run, small
from tests.test_kill import result
from tests.test_live_kill import waiting
from tests.test_promises import findings
from tests.verify.answers import is_answer
from tests.verify.reading import read


def request(user: str, name: str = "r", **rest: Any) -> Message:  # noqa: ANN401 - whatever an asker may put there
    fields = {"request": name, "user": user, "timestamp": T0} | rest
    return Message("requests", user.encode(), msgspec.msgpack.encode(fields))


def asked(user: str, name: str = "r", **rest: Any) -> Request:  # noqa: ANN401 - as Request
    return Request(name, user, T0, **rest)


def event(user: str, item: str, rating: float, number: int = 0) -> Message:
    return message(Interaction(user, item, rating, T0 + number))


def answers(settings: Settings) -> list[Answer]:
    with connect(settings) as log:
        found = [record for number in range(settings.topics.partitions) for record in read(log, "scores", number)]
    return [decode(record.value, Answer, what="answer") for record in found if is_answer(record)]


def letters(settings: Settings) -> list[DeadLetter]:
    with connect(settings) as log:
        return [decode(record.value, DeadLetter, what="dead letter") for record in read(log, "dead-letters", 0)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(200, seed=7, garbage=0).messages)
    fill(settings, [profile("items", f"cold{n}", {"genre": ["x", "y"]}) for n in range(3)])
    return settings


def test_in_lockstep_they_are_answered_after_the_steps_that_precede(settings: Settings) -> None:
    candidates = ["i3", "never-seen", "cold1", "i3", "i5"]
    fill(
        settings,
        [
            request("u1", "some", items=candidates),
            request("u1", "best of some", items=candidates, n=2),
            request("u1", "all", n=100),
            request("u1", "unrated", n=100, exclude_rated=True),
            request("u1", "default"),
            request("nobody", "unknown user", items=["i3", "i5"]),
        ],
    )
    run(settings)
    some, two, everything, unrated, default, unknown = answers(settings)
    assert [each.request for each in (some, two, everything, unrated, default, unknown)] == [
        *("some", "best of some", "all", "unrated", "default", "unknown user")
    ]
    assert set(some.items) == set(candidates)
    assert len(some.items) == 4
    assert some.scores == sorted(some.scores, reverse=True)
    assert two.items == some.items[:2]
    assert {"cold0", "cold1", "cold2"} <= set(everything.items), "what nobody has rated is in the catalogue"
    assert "never-seen" not in everything.items, "what was merely asked for is not"
    assert len(default.items) == 10
    assert default.items == everything.items[:10]
    with connect(settings) as log:
        fold = [record for record in read(log, "interactions", 0) if record.key == b"u1"]
    rated = {msgspec.msgpack.decode(record.value or b"")["item"] for record in fold[-settings.worker.support_size :]}
    assert set(everything.items) - set(unrated.items) == rated
    assert (some.earlier, some.support_size, unknown.earlier, unknown.support_size) == (len(fold), len(rated), 0, 0)
    for each in answers(settings):
        assert (each.as_of, each.stale, each.asked[0]) == (("interactions", 0, 200), False, "requests")
        assert each.sds is not None
        assert each.model_version > 0
    assert findings(settings) == []
    run(settings)
    assert len(answers(settings)) == 6, "once, however often it is started"


def test_the_answer_is_what_the_log_alone_gives(settings: Settings) -> None:
    questions = [asked("u1", n=7), asked("u2", items=["i1", "cold2"]), asked("nobody", n=3), asked("u0", n=100, exclude_rated=True)]
    fill(settings, [Message("requests", each.user.encode(), msgspec.msgpack.encode(each)) for each in questions])
    run(settings)
    with connect(settings) as log:
        for question, answer in zip(questions, answers(settings), strict=True):
            ranking, version = offline(log, settings, topics_of(settings), question)
            assert answer.model_version == version
            assert answer.earlier == ranking.earlier
            found = dict(zip(answer.items, answer.scores, strict=True))
            assert found == pytest.approx({each.item: each.score for each in ranking.scores}, abs=1e-4)


def test_they_change_nothing_else(tmp_path: Path) -> None:
    """Not the scores, the updates, the model, nor the support sets, wherever between the steps they come."""
    stream = Stream(300, seed=9)
    plain, busy = (small(tmp_path / name / "log.db") for name in ("plain", "busy"))
    for settings in (plain, busy):
        fill(settings, stream.profiles + stream.messages[:150])
    dice = random.Random(1)

    def more(_: lockstep.Progress) -> None:
        fill(busy, [request(f"u{dice.randrange(60)}", n=5), request("u1", items=[f"x{dice.randrange(10**6)}" for _ in range(50)])])

    for part in (150, 300):
        run(plain)
        fill(busy, [request(f"u{n}", items=[f"new{n}", "i1"]) for n in range(40)])
        run(busy, on_step=more)
        if part == 150:
            for settings in (plain, busy):
                fill(settings, stream.messages[150:])
    with connect(plain) as one, connect(busy) as other:
        assert read_run(one, plain.event_limits()).scores_sha256 == read_run(other, busy.event_limits()).scores_sha256
        assert read_run(other, busy.event_limits()).orphan_scores == 0
    left, right = result(plain).topics, result(busy).topics
    assert {name: left[name] for name in left if name != "scores"} == {name: right[name] for name in right if name != "scores"}
    assert len(answers(busy)) > 100
    assert findings(busy) == []


REFUSED: dict[str, tuple[str, Message]] = {
    "no request": ("missing-field", Message("requests", b"u1", msgspec.msgpack.encode({"user": "u1", "timestamp": T0}))),
    "no timestamp": ("missing-field", Message("requests", b"u1", msgspec.msgpack.encode({"user": "u1", "request": "r"}))),
    "garbage": ("not-decodable", Message("requests", b"u1", b"\xc1")),
    "null": ("empty", Message("requests", b"u1", None)),
    "another key": ("wrong-key", request("u1")._replace(key=b"u2")),
    "too many candidates": ("too-many-items", request("u1", items=[f"i{n}" for n in range(1001)])),
    "n too large": ("too-many-items", request("u1", n=101)),
    "n of zero": ("wrong-type", request("u1", n=0)),
    "n that is true": ("wrong-type", request("u1", n=True)),
    "no candidates": ("wrong-type", request("u1", items=[])),
    "a candidate that is a list": ("wrong-type", request("u1", items=["i1", ["i2"]])),
    "an empty id": ("bad-id", request("u1", items=[""])),
    "exclude_rated that is a number": ("wrong-type", request("u1", exclude_rated=1)),
    "the year 1": ("timestamp-out-of-range", request("u1", timestamp=-62_135_596_800_000)),
}


def test_what_cannot_be_taken_is_a_dead_letter_between_others_that_are_answered(settings: Settings) -> None:
    for number, (_, bad) in enumerate(REFUSED.values()):
        fill(settings, [bad, request("u1", f"good{number}", items=[number, "i1"])])
    fill(settings, [Message("requests", b"196", b' {"request": 1, "user": 196, "timestamp": 880000000000, "items": [242], "n": null}')])
    run(settings)
    found = {name: letter.reason for name, letter in zip(REFUSED, letters(settings), strict=True)}
    assert found == {name: reason for name, (reason, _) in REFUSED.items()}
    assert [answer.request for answer in answers(settings)] == [*(f"good{n}" for n in range(len(REFUSED))), "1"]
    assert findings(settings) == []


def test_an_answer_that_fits_into_no_record_is_a_dead_letter(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"max_record_bytes": 4096})
    fill(settings, [request("u1", "large", items=[f"i{n}" for n in range(500)]), request("u1", "fits", items=["i1"])])
    run(settings)
    assert [answer.request for answer in answers(settings)] == ["fits"]
    assert [letter.reason for letter in letters(settings)] == ["too-many-items"]


def test_in_lockstep_an_answer_is_stale_where_a_micro_batch_is_not_full(settings: Settings) -> None:
    fill(settings, [event("u1", "i1", 5.0), request("u1", items=["i1"])])

    def until_answered(stop: Stop) -> None:
        deadline = time.monotonic() + 20
        while not answers(settings) and time.monotonic() < deadline:
            time.sleep(0.02)
        stop.ask()

    with Stop() as stop, System(settings) as system:
        threading.Thread(target=until_answered, args=[stop]).start()
        lockstep.run(system, stop, until_end=False)
    (answer,) = answers(settings)
    assert (answer.stale, answer.as_of[2]) == (True, 192)


@contextmanager
def working(settings: Settings) -> Iterator[Callable[[Callable[[], None]], Metrics]]:
    """A live worker in this thread, for as long as what it is given runs in another."""

    def beside(work: Callable[[], None]) -> Metrics:
        failed: list[BaseException] = []

        def guarded(stop: Stop) -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - told in the test's own thread
                failed.append(error)
            stop.ask()

        with Stop() as stop, System(settings) as system:
            thread = threading.Thread(target=guarded, args=[stop])
            thread.start()
            run_worker(system, stop)
            thread.join()
            if failed:
                raise failed[0]
            return system.metrics

    yield beside


def test_interactions_that_were_in_the_log_before_a_request_count(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"poll_timeout_ms": 20, "linger_ms": 1, "micro_batch": 4}, topics={"partitions": 2})
    topics = topics_of(settings)

    def work() -> None:
        with connect(settings) as log:
            for number in range(20):
                user = f"u{number % 3}"
                log.append([event(user, f"i{number}", 3.0, number)] + [event("other", "i1", 2.0)] * 15)
                answer = ask(log, topics, asked(user, f"r{number}", items=["i1"]), 20)
                assert (answer.earlier, answer.stale, answer.request) == (1 + number // 3, False, f"r{number}")

    with working(settings) as beside:
        metrics = beside(work)
    value = metrics.registry.get_sample_value
    assert value("coldstream_requests_total") == 20
    assert value("coldstream_requests_stale_total") == 0
    assert value("coldstream_request_to_answer_seconds_count") == 20
    assert len(answers(settings)) == 20


def test_a_profile_and_a_null_before_a_request_count_too(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"poll_timeout_ms": 200, "linger_ms": 1})
    topics = topics_of(settings)

    def work() -> None:
        with connect(settings) as log:
            log.append([event("ann", "i1", 3.0)])
            assert ask(log, topics, asked("ann"), 20).earlier == 1
            log.append([profile("items", "cold", {"genre": "x"}), profile("users", "ann", None)])
            answer = ask(log, topics, asked("ann", n=100), 20)
            assert "cold" in answer.items
            assert answer.earlier == 0
            with pytest.raises(Malformed, match="at most 100"):
                ask(log, topics, asked("ann", n=1000), 20)

    with working(settings) as beside:
        beside(work)


def held(settings: Settings, system: System) -> Requests:
    """A worker at the end of its interactions, and its requests."""
    worker = system.worker()
    worker.open(0)
    worker.tables.assign([0])
    requests = Requests(worker, system.topics["scores"].max_record_bytes)
    with system.log.reader() as reader:
        reader.assign(requests.start([0]))
        requests.take(reader.poll(1000))
    return requests


def test_a_request_waits_for_its_interactions_until_the_deadline(settings: Settings) -> None:
    fill(settings, [request("u1", "first"), request("u1", "second")])
    patient = settings.model_copy(update={"worker": settings.worker.model_copy(update={"request_deadline_ms": 200})})
    with System(patient) as system:
        requests = held(patient, system)
        assert len(requests) == 2
        assert requests.answer(0, 199, patient.group_id) == 0, "one interaction is still to come"
        time.sleep(0.21)
        assert requests.answer(0, 199, patient.group_id) == 2
        assert not requests
        assert system.metrics.registry.get_sample_value("coldstream_requests_stale_total") == 2
        assert all(answer.stale and answer.as_of[2] == 199 for answer in answers(patient))


def test_what_a_failed_commit_did_not_answer_is_answered_by_the_next(settings: Settings) -> None:
    fill(settings, [request("u1", f"r{n}", n=3) for n in range(100)])
    with System(settings) as system:
        requests = held(settings, system)
        with connect(settings) as log, log.member(settings.group_id, "interactions"), pytest.raises(Fenced):
            requests.answer(0, 200, settings.group_id)
        assert answers(settings) == []
        assert [requests.answer(0, 200, settings.group_id) for _ in range(3)] == [64, 36, 0]
        assert [answer.request for answer in answers(settings)] == [f"r{n}" for n in range(100)]
        with connect(settings) as log:
            assert log.committed(settings.group_id, [TopicPartition("requests", 0)]) == {TopicPartition("requests", 0): 100}
        with system.log.writer(f"{settings.group_id}-0"):
            fill(settings, [request("u1", "late")])
            with system.log.reader() as reader:
                reader.assign({TopicPartition("requests", 0): 100})
                requests.take(reader.poll(10))
            with pytest.raises(LogError):
                requests.answer(0, 200, settings.group_id)
    assert len(answers(settings)) == 100


def test_requests_that_retention_took_are_passed_over(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"retention_ms": {"requests": 50}})
    fill(settings, [event("u1", "i1", 3.0), request("u1", "old")])
    run(settings)
    fill(settings, [request("u1", "missed")])
    time.sleep(0.1)
    fill(settings, [request("u1", "new")] * 3)
    with System(settings) as system:
        assert len(held(settings, system)) == 3
    assert [answer.request for answer in answers(settings)] in (["old"], [])


def test_nobody_answers(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [event("u1", "i1", 3.0)])
    with connect(settings) as log, pytest.raises(NoAnswer, match=r"within 0\.2 s: no worker holds partition 0.*--offline"):
        ask(log, topics_of(settings), asked("u1"), 0.2)


def test_killed_workers_answer_each_request_once(tmp_path: Path) -> None:
    settings = small(
        tmp_path / "log.db",
        topics={"partitions": 2},
        worker={"poll_timeout_ms": 20, "linger_ms": 1, "request_deadline_ms": 30_000},
        log={"session_timeout_ms": 1000},
    )
    stream = Stream(400, seed=21, partitions=2)
    dice = random.Random(4)
    with Nursery() as nursery:
        trainer = nursery.start(settings, role="trainer")
        workers = [nursery.start(settings, role="worker") for _ in range(2)]
        total = 0
        for burst in range(4):
            messages = stream.messages[burst * 100 : burst * 100 + 100]
            questions = [request(f"u{dice.randrange(50)}", f"r{total + n}", n=5) for n in range(30)]
            fill(settings, [each for pair in zip(messages[::4], questions, strict=False) for each in pair] + messages[25:])
            total += 25
            time.sleep(dice.uniform(0.05, 0.3))
            os.kill(workers.pop(0), signal.SIGKILL)
            workers.append(nursery.start(settings, role="worker"))
        deadline = time.monotonic() + 60
        while (len(answers(settings)) < total or waiting(settings) or findings(settings)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in (*workers, trainer):
            os.kill(pid, signal.SIGTERM)
    assert len(answers(settings)) == total
    assert not any(answer.stale for answer in answers(settings))
    assert findings(settings) == []
