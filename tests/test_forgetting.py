"""Forgetting: a null profile drops the user at the next step, once, and leaves nothing but a marker with an id and an offset."""

from __future__ import annotations

import gc
import random
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from consumers import lockstep
from consumers.live import run_worker
from consumers.opening import connect, topics_of
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System, new_model
from consumers.tables import ProfileTables
from streaming.codec import decode
from streaming.events import Forgotten, Interaction, Score, Support
from streaming.log import Message, TopicPartition
from streaming.partitioner import partition_of
from streaming.topics import topics
from tests.nursery import Nursery
from tests.small_runs import T0, Stream, fill, message, profile, run, run_and_keep, small
from tests.test_kill import cut_down, result
from tests.test_promises import findings
from tests.verify.reading import read

ANN = "ann-who-leaves"


def event(user: str, number: int) -> Message:
    return message(Interaction(user, f"i{number % 7}", float(1 + number % 5), T0 + number))


def events(n: int, start: int = 0) -> list[Message]:
    """Every third is Ann's."""
    return [event(ANN if number % 3 == 0 else f"u{number % 5}", number) for number in range(start, start + n)]


def null(user: str) -> Message:
    return profile("users", user, None)


def ask(user: str, number: int) -> Message:
    """A request for the best of the catalogue."""
    fields = {"request": f"r{number}", "user": user, "timestamp": T0, "n": 5}
    return Message("requests", user.encode(), msgspec.msgpack.encode(fields))


def scores(settings: Settings) -> list[Score]:
    with connect(settings) as log:
        return [decode(record.value, Score, what="score") for record in read(log, "scores", 0)]


def support(settings: Settings, user: str, partition: int = 0) -> bytes | None:
    """What the changelog holds of a user last."""
    with connect(settings) as log:
        return {record.key: record.value for record in read(log, "support", partition)}.get(user.encode())


def marker(settings: Settings, user: str = ANN, partition: int = 0) -> int:
    return decode(support(settings, user, partition), Forgotten, what="marker").forgotten


def test_who_is_forgotten_between_two_steps_starts_from_nothing(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [profile("users", ANN, {"job": "a"}), *events(96)])

    def leave(progress: lockstep.Progress) -> None:
        if progress.done == 48:
            fill(settings, [null(ANN), null("u1"), null("nobody")])

    run(settings, on_step=leave)
    of_ann = [score for score in scores(settings) if score.user == ANN]
    assert [score.earlier for score in of_ann] == [*range(16), *range(16)]
    assert of_ann[16].support_size == 0
    held = decode(support(settings, ANN), Support, what="it")
    assert (held.since, held.earlier, len(held.interactions)) == (48, 16, 4)
    assert marker(settings, "nobody") == 48
    assert findings(settings) == []


def test_without_interactions_it_is_done_all_the_same_and_once(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, events(20))
    run(settings)
    fill(settings, [null(ANN)])
    for _ in range(2):
        run(settings)
        assert marker(settings) == 20
        with connect(settings) as log:
            users, records = TopicPartition("users", 0), log.bounds([TopicPartition("support", 0)])
            assert log.committed(settings.group_id, [users]) == {users: 1}
        assert findings(settings) == []
    with connect(settings) as log:
        assert log.bounds([TopicPartition("support", 0)]) == records, "the second start had nothing to do"


def test_a_new_life_is_not_forgotten_when_the_table_is_read_again(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, events(20))
    run(settings)
    fill(settings, [null(ANN)])
    for _ in range(3):
        fill(settings, [event(ANN, 1)])
        run(settings)
    assert [score.earlier for score in scores(settings)][-3:] == [0, 1, 2]
    fill(settings, [profile("users", ANN, {"job": "b"}), event(ANN, 2)])
    run(settings)
    assert scores(settings)[-1].earlier == 3, "a later profile is a profile"
    assert findings(settings, nulls={("users", 0, 0): ANN}) == []


def test_forgotten_twice_and_evicted_between(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"max_users": 3, "micro_batch": 5}, topics={"partitions": 1})
    dice, nulls = random.Random(5), dict[tuple[str, int, int], str]()
    for burst in range(8):
        fill(settings, [event(f"u{dice.randrange(6)}", dice.randrange(90)) for _ in range(dice.randrange(5, 20))])
        run(settings)
        leaving = dice.sample([f"u{n}" for n in range(6)], 2)
        places = fill(settings, [null(user) for user in leaving])
        nulls |= {("users", 0, place): user for place, user in zip(places, leaving, strict=True)}
        # Some nulls are read by a step of their own, and superseded after it; others wait for the next interactions.
        if burst % 3 == 0:
            run(settings)
            fill(settings, [profile("users", leaving[0], {"job": "a"})])
        assert findings(settings, nulls=nulls) == []
    fill(settings, [event(leaving[1], 1)])
    run(settings)
    assert findings(settings, nulls=nulls) == []
    with connect(settings) as log:
        values = [record.value for record in read(log, "support", 0) if record.value]
    assert sum(b"since" in value and b"since\x00" not in value for value in values) > 0, "some came back"
    assert sum(b"forgotten" in value for value in values) > 0, "some did not"


def test_a_step_that_fails_forgets_nobody_and_the_next_one_does(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [profile("users", ANN, {"job": "a"}), *events(20)])
    run(settings)
    fill(settings, [null(ANN)])
    with System(settings) as system:
        worker = system.worker()
        worker.open(0)
        worker.tables.assign([0])
        worker.tables.advance()
        with connect(settings) as log, log.member(settings.group_id, "interactions"), pytest.raises(Exception, match="has members"):
            worker.step(0, [], settings.group_id)
        before = worker.held[0].support.get(ANN)
        assert before is not None
        assert before.earlier == 7
        worker.step(0, [], settings.group_id)
        assert worker.held[0].support.get(ANN) is None
        assert not worker.tables.waiting(0)
        assert system.metrics.registry.get_sample_value("coldstream_forgotten_total") == 1
    assert marker(settings) == 20


def test_a_live_worker_forgets_in_idle_partitions(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"partitions": 3}, worker={"poll_timeout_ms": 20})
    names = [f"u{n}" for n in range(6)]
    fill(settings, [event(name, n) for n, name in enumerate(names)])

    def done(stop: Stop) -> None:
        with connect(settings) as log:
            tps = [TopicPartition("interactions", n) for n in range(3)]
            users = [TopicPartition("users", n) for n in range(3)]
            for tables, wanted in ((tps, 6), (users, 6)):
                deadline = time.monotonic() + 20
                while sum(log.committed(settings.group_id, tables).values()) < wanted and time.monotonic() < deadline:
                    time.sleep(0.01)
                if tables is tps:
                    fill(settings, [null(name) for name in names])
        stop.ask()

    with Stop() as stop, System(settings) as system:
        beside = threading.Thread(target=done, args=[stop])
        beside.start()
        run_worker(system, stop)
        beside.join()
        assert system.metrics.registry.get_sample_value("coldstream_forgotten_total") == 6
    for name in names:
        place = partition_of(name.encode(), 3)
        assert marker(settings, name, place) == sum(partition_of(other.encode(), 3) == place for other in names)


def test_what_waits_in_the_tables_goes_with_its_partition(tmp_path: Path) -> None:
    """Through a new assignment it waits on, unless whoever held the partition meanwhile has committed it."""
    settings = small(tmp_path / "log.db", topics={"partitions": 2})
    zero, one, other = (next(f"u{n}" for n in range(k, 99) if partition_of(b"u%d" % n, 2) == side) for k, side in ((0, 0), (0, 1), (20, 1)))
    fill(settings, [null(zero), null(one), Message("users", other.encode(), b"no profile")])
    with connect(settings) as log, log.writer("other") as writer:
        model = new_model(settings)
        tables = ProfileTables(log, topics_of(settings), model, settings.event_limits(), "group")
        tables.assign({0, 1})
        tables.advance()
        assert (tables.pending(0).forgotten, tables.pending(1).forgotten, len(tables.pending(1).letters)) == ([zero], [one], 1)
        tables.assign({1})
        assert (tables.waiting(0), tables.waiting(1)) == (False, True)
        writer.commit([], {TopicPartition("users", 1): 2}, "group")
        tables.assign({0, 1})
        tables.advance()
        assert (tables.waiting(0), tables.waiting(1)) == (True, False), "partition 0 was read anew, what waited in 1 was done elsewhere"
        tables.close()


def test_profiles_of_partitions_let_go_are_dropped(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"partitions": 2})
    names = [f"u{n}" for n in range(8)]
    fill(settings, [profile("users", name, {"job": "a"}) for name in names])
    with connect(settings) as log:
        model = new_model(settings)
        tables = ProfileTables(log, topics_of(settings), model, settings.event_limits(), "group")
        for held in ({0, 1}, {1}, set[int](), {0}):
            tables.assign(held)
            tables.advance()
            assert model.users.features.keys() == {name for name in names if partition_of(name.encode(), 2) in held}
        tables.close()


def reached(root: object) -> Iterator[object]:
    """Every object that is held by ``root``, directly or through others."""
    seen, todo = set[int](), [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType)):
            continue
        seen.add(id(one))
        yield one
        # Keys of a dict that are texts are no referents of it.
        todo += [*(one if isinstance(one, dict) else ()), *gc.get_referents(one)]


def holders(root: object, user: str) -> list[str]:
    """The texts and bytes in the memory of ``root`` that name the user."""
    texts = [one if isinstance(one, str) else repr(bytes(one)) for one in reached(root) if isinstance(one, (str, bytes, bytearray))]
    return [text for text in texts if user in text]


def test_nothing_is_left_of_a_user_but_id_and_offset(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", trainer={"snapshot_every": 4})
    fill(settings, [profile("users", ANN, {"job": "a", "note": "of-ann"}), *events(96)])
    leaving = [null(ANN)]
    with run_and_keep(settings) as (system, worker):
        held: dict[str, Any] = vars(worker)
        state = [worker.held[0].support, held["model"], held["versions"], held["tables"], held["metrics"]]
        assert [any(holders(each, ANN)) for each in state] == [True, True, True, True, False], "so the search finds what is there"
        fill(settings, leaving)
        worker.tables.advance()
        worker.step(0, [], settings.group_id)
        # A step later the last batch is gone as well.
        fill(settings, [event("u1", number) for number in range(32)])
        with system.log.reader() as reader:
            reader.assign({TopicPartition("interactions", 0): 96})
            worker.step(0, lockstep.read(system.log, reader, 32, TopicPartition("interactions", 0)), settings.group_id)
        del leaving
        gc.collect()
        assert holders(worker, ANN) == [ANN], "the marker's key"
        assert vars(worker.held[0].support.held)["_forgotten"] == {ANN: 96}
    with connect(settings) as log:
        for name in (plain for plain, topic in topics(partitions=1).items() if topic.cleanup == "compact"):
            records = read(log, name, 0)
            found = [record for record in records if ANN.encode() in (record.key or b"") + (record.value or b"")]
            assert not any(b"of-ann" in (record.value or b"") for record in records)
            assert {record.key for record in found} == ({ANN.encode()} if name in {"users", "support"} else set())
            assert [record.value for record in found if name == "users"] == [None] * (name == "users")
        assert len(read(log, "snapshots", 0)) > 1
    assert marker(settings) == 96


def test_killed_at_random_moments_forgetting_ends_as_if_nobody_had_disturbed_it(tmp_path: Path) -> None:
    """And so do answers to requests, which are compared with the scores."""
    stream = Stream(360, seed=4, garbage=0.02)
    calm, killed = (small(tmp_path / name / "log.db") for name in ("calm", "killed"))
    dice = random.Random(2)
    nulls: dict[tuple[str, int, int], str] = {}
    with Nursery() as nursery:
        cut = 0
        for part in range(3):
            for settings in (calm, killed):
                leaving = [f"u{n}" for n in range(part, 30, 5)]
                places = fill(settings, [null(user) for user in leaving])
                fill(settings, [profile("users", f"u{n}", {"job": "b"}) for n in range(1, 30, 10)] if part == 2 else [])
                fill(settings, [ask(f"u{n}", part) for n in range(0, 40, 2)] + stream.messages[part * 120 : part * 120 + 120])
            nulls |= {("users", 0, place): user for place, user in zip(places, leaving, strict=True)}
            run(calm)
            for lines in (1, dice.randrange(1, 4)):
                cut += cut_down(nursery, killed, tmp_path / "journal.jsonl", lines, dice.uniform(0, 0.02))
            nursery.start(killed, tmp_path / "journal.jsonl")
            assert nursery.end() == 0
    assert cut >= 3
    assert findings(calm, nulls=nulls) == findings(killed, nulls=nulls) == []
    assert result(calm) == result(killed)
