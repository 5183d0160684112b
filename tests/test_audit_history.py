"""The audit of a log with a history: users forgotten and back again, versions gone back to, requests answered."""

from __future__ import annotations

from pathlib import Path

import msgspec

from consumers.audit import audit
from consumers.opening import connect, topics_of
from consumers.replacing import rollback
from consumers.settings import Settings
from streaming.codec import decode, encode
from streaming.events import Interaction, Score, Support
from streaming.log import Message, Record, TopicPartition
from tests.small_runs import T0, Stream, fill, message, packed, profile, run, small
from tests.test_audit import audited
from tests.verify.reading import read

STREAM = Stream(300, seed=12, garbage=0, users=9)


def part(settings: Settings, start: int, end: int, *first: Message) -> None:
    fill(settings, [*first, *STREAM.messages[start:end]])
    run(settings)


def scores(settings: Settings) -> list[Score]:
    with connect(settings) as log:
        return [decode(record.value, Score, what="score") for record in read(log, "scores", 0)]


def test_users_forgotten_and_back_again(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, STREAM.profiles)
    part(settings, 0, 100)
    part(settings, 100, 200, profile("users", "u0", None), profile("users", "u1", None), profile("users", "nobody", None))
    # One comes back with a new profile, which supersedes the null: the marker alone tells of it.
    part(settings, 200, 300, profile("users", "u1", {"job": "c"}))
    report = audited(settings)
    assert report.shown == []
    anew = [score.user for score in scores(settings)[100:] if score.earlier == 0]
    assert {"u0", "u1"} <= set(anew), "both came back"
    # Their profiles of before are gone, so scores made from these cannot be told from wrong ones.
    reaches = {reach.what: reach for reach in report.out_of_reach}
    assert report.scores + sum(reach.count for what, reach in reaches.items() if what.startswith("score")) == 300
    assert report.scores > 200
    assert any(what.startswith("ordinals") for what in reaches)


def test_a_user_forgotten_and_evicted_is_told_by_the_null(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", worker={"max_users": 3})

    def rated(*users: str) -> list[Message]:
        return [message(Interaction(user, f"i{n}", 1.0 + n, T0 + n)) for n, user in enumerate(users)]

    for messages in (rated("u0", "u0", "u0"), [profile("users", "u0", None), *rated("u0", "u0")], rated("a", "b", "c", "u0")):
        fill(settings, messages)
        run(settings)
    assert [score.earlier for score in scores(settings) if score.user == "u0"] == [0, 1, 2, 0, 1, 0]
    with connect(settings) as log:
        (held,) = [decode(record.value, Support, what="it") for record in read(log, "support", 0) if record.key == b"u0"]
    assert held.since == 0, "the marker is gone with the eviction"
    report = audited(settings)
    assert (report.shown, report.out_of_reach) == ([], [])
    assert report.scores == 9


def test_a_set_that_kept_what_was_to_be_forgotten_is_found(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    part(settings, 0, 100)
    with connect(settings) as log:
        before = {record.key: record for record in read(log, "support", 0)}
    part(settings, 100, 101, profile("users", "u0", None))
    with connect(settings) as log:
        now = {record.key: record for record in read(log, "support", 0)}
        assert now[b"u0"].value != before[b"u0"].value
        committed = log.committed(settings.group_id, [TopicPartition(name, 0) for name in ("interactions", "users", "items")])
        records = {name: read(log, name, 0) for name in topics_of(settings)}
    other = settings.model_copy(update={"broker": f"embedded:{tmp_path / 'copy.db'}"})
    with connect(other, create=True) as copy:
        copy.create(topics_of(settings).values())
        for name, found in records.items():
            copy.append([as_message(before[b"u0"] if name == "support" and record.key == b"u0" else record) for record in found])
        with copy.writer("copy") as writer:
            writer.commit([], committed, settings.group_id)
        report = audit(copy, other, topics_of(other))
    assert report.shown
    assert {difference.kind for difference in report.shown} <= {"support set too many", "support set", "score of another support", "score"}


def as_message(record: Record) -> Message:
    return Message(record.topic, record.key, record.value, record.partition)


def test_versions_gone_back_to(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", trainer={"snapshot_every": 7})
    part(settings, 0, 100)
    middle = scores(settings)[-1].model_version
    part(settings, 100, 200)
    with connect(settings) as log:
        rollback(log, settings, topics_of(settings), middle)
    part(settings, 200, 300)
    report = audited(settings)
    assert report.shown == []
    assert report.out_of_reach == []
    assert report.scores == 300


def test_answers_to_requests_are_passed_over(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    part(settings, 0, 50)
    with connect(settings) as log:
        score = msgspec.msgpack.decode(encode(scores(settings)[-1]))
        answer = {"request": "r1", "user": score["user"], "items": ["i1"], "scores": [3.0], "format": 1}
        log.append([Message("scores", b"ann", msgspec.msgpack.encode(answer), 0)])
    part(settings, 50, 100)
    report = audited(settings)
    assert report.shown == []
    assert report.scores == 100


def test_a_partition_without_anything_in_it_is_clean(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db", topics={"partitions": 4})
    fill(settings, [Message("interactions", b"ann", packed())])
    assert audited(settings).events == 0
    run(settings)
    report = audited(settings)
    assert (report.shown, report.out_of_reach, report.scores) == ([], [], 1)


def test_a_group_that_never_began_is_told_from_one_whose_support_is_lost(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    part(settings, 0, 50)
    with connect(settings) as log, log.writer("x") as writer:
        writer.commit([], {TopicPartition("interactions", 0): 20}, settings.group_id)
    report = audited(settings)
    assert set(report.differences) == {"position"}
    assert "committed 20" in report.shown[0].detail
