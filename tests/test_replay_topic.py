"""Replays from topics and by range of time: every record once, whatever happens to it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest

from consumers.cli import execute
from consumers.replayer import Progress, ReplayResult, replay
from streaming.brokers import open_log
from streaming.codec import decode, encode
from streaming.errors import LogUnavailable, SourceError
from streaming.events import DeadLetter, Interaction
from streaming.log import Log, Message, Reader, Record, Topic, TopicPartition
from streaming.partitioner import partition_of
from streaming.sources import interaction_source
from streaming.timerange import Before, TimeRange
from streaming.topics import topics
from streaming.topicsource import TopicSource
from tests.cutting import cut_down
from tests.test_replayer import START, Time, events, lines, new_log, records, write

SECOND = 1000


def history(log: Log, n: int, partitions: int = 3, *, begin: int = 0, step: int = SECOND) -> None:
    """A topic `history` with ``n`` events of rising times, whose items count them, spread over its partitions."""
    log.create([Topic("history", partitions)])
    for i in range(begin, begin + n):
        event = Interaction(f"u{i % 11}", str(i), float(i % 5 + 1), START + i * step)
        log.append([Message("history", event.user.encode(), encode(event))])


def items(log: Log) -> list[int]:
    return [int(event["item"]) for event in events(log)]


def run(log: Log, *, from_log: Log | None = None, **settings: object) -> ReplayResult:
    return replay(log, TopicSource(from_log or log, "history"), topics(partitions=1), **settings)  # type: ignore[arg-type]


def test_all_records_arrive_once_in_the_order_of_time_at_the_place_of_their_key(tmp_path: Path) -> None:
    with new_log(tmp_path, 4) as log:
        history(log, 100)
        result = replay(log, TopicSource(log, "history"), topics(partitions=4), batch=7)
        assert result == ReplayResult(events=100, dead_letters={}, sent=100, skipped=0, done=True)
        found = records(log, "interactions")
        assert sorted(items(log)) == list(range(100))
        assert all(record.partition == partition_of(record.key, 4) for record in found)
        (tmp_path / "other").mkdir()
        with new_log(tmp_path / "other") as new:
            run(new, from_log=log)
            assert items(new) == list(range(100)), "into one partition: merged by time"


def test_a_stopped_replay_goes_on_where_it_was_and_a_grown_topic_at_its_old_end(tmp_path: Path) -> None:
    asked = iter(range(10_000))
    with new_log(tmp_path) as log:
        history(log, 60)
        runs = 1
        while not (result := run(log, batch=4, stop=lambda: next(asked) % 8 == 7)).done:
            runs += 1
        assert runs == 9, "seven records a run"
        assert (result.events, items(log)) == (60, list(range(60)))
        assert run(log).sent == 0
        history(log, 20, begin=60)
        assert run(log) == ReplayResult(events=80, dead_letters={}, sent=20, skipped=60, done=True)
        assert items(log) == list(range(80))
        assert run(log, restart=True).sent == 80


def test_what_is_no_event_goes_on_as_it_is_so_that_the_worker_refuses_it(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        history(log, 3, partitions=1)
        garbage = [
            Message("history", b"ann", b"\xc1"),
            Message("history", None, None),
            Message("history", b"ann", encode(Interaction("bob", "x", 3, START))),
        ]
        log.append(garbage)
        result = run(log, within=TimeRange(since=START + SECOND))
        assert (result.events, result.outside, result.dead_letters) == (5, 1, {})
        assert [(record.key, record.value) for record in records(log, "interactions")[2:]] == [(m.key, m.value) for m in garbage]


def test_what_the_new_topic_cannot_hold_is_a_dead_letter_with_its_place(tmp_path: Path) -> None:
    small = {name: topic._replace(max_record_bytes=16_384) for name, topic in topics(partitions=1).items()}
    with open_log(f"embedded:{tmp_path / 'log.db'}") as log:
        log.create([Topic("history"), *small.values()])
        log.append([Message("history", b"a", b"x" * 16_380), Message("history", b"a", b"x" * 20), Message("history", None, b"y")])
        assert replay(log, TopicSource(log, "history"), small).dead_letters == {"too-large": 1}
        letter = decode(records(log, "dead-letters")[0].value, DeadLetter, what="it")
        assert (letter.source, letter.length) == (("history", 0, 0), 16_380)
        profiles = TopicSource(log, "history", timed=False)
        assert replay(log, profiles, small, into="users").dead_letters == {"too-large": 1, "wrong-key": 1}


def test_profiles_are_copied_with_those_that_were_taken_back(tmp_path: Path) -> None:
    with new_log(tmp_path, 2) as log:
        log.create([Topic("old-users", 3, "compact")])
        log.append([Message("old-users", b"ann", b"1"), Message("old-users", b"bob", b"2"), Message("old-users", b"ann", None)])
        source = TopicSource(log, "old-users", timed=False)
        assert replay(log, source, topics(partitions=2), into="users").events == 2
        assert {record.key: record.value for record in records(log, "users")} == {b"ann": None, b"bob": b"2"}
        for settings in ({"rate": 2.0}, {"within": TimeRange(5)}):
            with pytest.raises(SourceError, match="no time"):
                replay(log, source, topics(partitions=2), into="users", **settings)


def test_another_log_under_the_name_of_the_one_before_is_not_taken_for_it(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        for name, begin in (("monday", 0), ("tuesday", 500)):
            (tmp_path / name).mkdir()
            with open_log(f"embedded:{tmp_path / name}/log.db") as source:
                history(source, 50, begin=begin)
                if name == "monday":
                    assert run(log, from_log=source).sent == 50
                    history(source, 10, begin=50)
                    assert run(log, from_log=source).sent == 10
                    continue
                history(source, 20, begin=begin + 50)
                with pytest.raises(SourceError, match=r"is not the one that was last replayed from there.*--restart"):
                    run(log, from_log=source)
                assert run(log, from_log=source, restart=True).sent == 70
        assert items(log) == [*range(60), *range(500, 570)]


def test_the_last_days_of_a_topic_without_events_are_no_days(tmp_path: Path) -> None:
    """Nothing is settled by then, or whatever came would be inside for ever."""
    with new_log(tmp_path) as log:
        log.create([Topic("history", 3)])
        with pytest.raises(SourceError, match="holds no event yet"):
            run(log, within=TimeRange(Before(5 * SECOND)))
        history(log, 50)
        assert run(log, within=TimeRange(Before(5 * SECOND))).events == 6


def test_a_topic_is_not_replayed_into_itself(tmp_path: Path) -> None:
    with new_log(tmp_path) as log, pytest.raises(SourceError, match="into itself"):
        replay(log, TopicSource(log, "interactions"), topics(partitions=1))


def test_nor_where_the_log_goes_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    with new_log(tmp_path) as log, new_log(tmp_path / "elsewhere") as other, pytest.raises(SourceError, match="into itself"):
        replay(log, TopicSource(other, "interactions"), topics(partitions=1))


@pytest.mark.parametrize("rate", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["file", "sorted file", "topic"])
def test_a_range_keeps_the_recorded_pace_from_its_first_event_on(kind: str, rate: float, tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        history(log, 60)
        clock = Time(log)
        path = write(tmp_path, lines(60))
        source = TopicSource(log, "history") if kind == "topic" else interaction_source(path)
        within = TimeRange(START + 20 * SECOND, START + 40 * SECOND)
        result = replay(
            log, source, topics(partitions=1), rate=rate, within=within, clock=clock.clock, sleep=clock.sleep, sort_by_time=kind[0] == "s"
        )
        assert items(log) == list(range(20, 40))
        assert (result.events, result.outside, result.done) == (20, 40, True)
        assert clock.now - 100 == pytest.approx(19 / rate), "no wait for what is left out"


@pytest.mark.parametrize("kind", ["file", "topic"])
def test_the_last_days_are_those_before_the_newest_event_when_it_began(kind: str, tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        history(log, 50)
        path = write(tmp_path, lines(50))

        def once(**settings: object) -> ReplayResult:
            source = TopicSource(log, "history") if kind == "topic" else interaction_source(path)
            return replay(log, source, topics(partitions=1), within=TimeRange(Before(9 * SECOND)), batch=3, **settings)  # type: ignore[arg-type]

        asked = iter(range(1000))
        result = once(stop=lambda: next(asked) == 46)
        assert not result.done
        if kind == "topic":
            history(log, 5, begin=50)
        result = once()
        end = 55 if kind == "topic" else 50
        assert items(log) == list(range(40, end)), "the range that the first run settled"
        assert (result.since, result.until) == (START + 40 * SECOND, None)


def test_the_last_days_of_a_topic_that_retention_is_at_work_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the newest event all of it is read, and meanwhile its first records go."""
    with new_log(tmp_path) as log:
        log.create([Topic("history", 3, retention_bytes=800)])
        history(log, 100)
        source = TopicSource(log, "history")
        newest = source.newest

        def while_it_grows() -> int | None:
            found = newest()
            history(log, 20, begin=100)
            return found

        monkeypatch.setattr(source, "newest", while_it_grows)
        first = log.bounds([TopicPartition("history", 0)])[TopicPartition("history", 0)].start
        assert replay(log, source, topics(partitions=1), within=TimeRange(Before(5 * SECOND))).done
        assert log.bounds([TopicPartition("history", 0)])[TopicPartition("history", 0)].start > first > 0, "it was at work"
        assert items(log) == list(range(94, 100))


def test_a_slow_replay_is_no_silence_of_the_topic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_log(tmp_path) as log:
        now = Time(log)
        monkeypatch.setattr("streaming.topicsource.time", SimpleNamespace(monotonic=now.clock))
        history(log, 200, 1)
        source, made, slow = TopicSource(log, "history"), log.reader, iter([False, True])

        def reader() -> Reader:
            found = made()
            poll = found.poll
            # The first poll after the long first batch has nothing yet.
            monkeypatch.setattr(found, "poll", lambda *a, **k: [] if next(slow, False) else poll(*a, **k))
            return found

        monkeypatch.setattr(log, "reader", reader)
        monkeypatch.setattr("streaming.topicsource.READ_AHEAD", 64)
        entries = source.entries()
        for _ in range(200):
            next(entries)
            now.now += 60


def test_a_topic_that_falls_silent_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.topicsource._PATIENCE_SECONDS", 0.8)
    with new_log(tmp_path) as log:
        history(log, 20, 1)
        source, made = TopicSource(log, "history"), log.reader

        def reader() -> Reader:
            found = made()

            def poll(*_: object, timeout: float, **__: object) -> list[Record]:
                sleep(timeout)
                return []

            monkeypatch.setattr(found, "poll", poll)
            return found

        monkeypatch.setattr(log, "reader", reader)
        with pytest.raises(LogUnavailable, match="although its end is not reached"):
            list(source.entries())


def test_what_was_there_and_has_all_been_removed_meanwhile_is_passed_over(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        log.create([Topic("history", 1, retention_bytes=300)])
        history(log, 10, 1)
        source = TopicSource(log, "history")
        history(log, 90, 1, begin=10)
        assert log.bounds([TopicPartition("history", 0)])[TopicPartition("history", 0)].start > 10
        assert list(source.entries()) == []
        with pytest.raises(SourceError, match="retention has removed them"):
            list(source.entries({0: 5}))


def test_ranges_that_follow_each_other_make_a_whole(tmp_path: Path) -> None:
    cut = START + 33 * SECOND
    with new_log(tmp_path) as log:
        history(log, 60)
        assert run(log, within=TimeRange(until=cut)).events == 33
        assert run(log, within=TimeRange(since=cut)).events == 27
        assert run(log, within=TimeRange(until=cut)).sent == 0
        assert items(log) == list(range(60))
        with pytest.raises(SourceError, match="before it begins"):
            run(log, within=TimeRange(cut, cut))


def test_a_long_way_to_the_range_is_not_gone_twice(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        history(log, 500)
        asked = iter(range(10_000))
        result = run(log, within=TimeRange(START + 499 * SECOND), batch=1, stop=lambda: next(asked) == 450)
        assert (result.sent, result.events) == (450, 0)
        assert run(log, within=TimeRange(START + 499 * SECOND)).skipped == 400
        assert items(log) == [499]


PROGRAM = """
import sys
from consumers.replayer import replay
from streaming.brokers import open_log
from streaming.timerange import TimeRange
from streaming.topics import topics
from streaming.topicsource import TopicSource
with open_log(sys.argv[1]) as log:
    within = TimeRange(int(sys.argv[2]), int(sys.argv[3]))
    tell = lambda progress: print(progress.events, flush=True)
    result = replay(log, TopicSource(log, "history"), topics(partitions=1), batch=5, within=within, on_progress=tell)
    print("sent", result.sent)
"""


def test_killed_at_random_moments_it_neither_repeats_nor_drops_a_record(tmp_path: Path) -> None:
    n, first, last = 2500, 100, 2400
    with new_log(tmp_path) as log:
        history(log, n)
    place = f"embedded:{tmp_path / 'log.db'}"
    command = [sys.executable, "-c", PROGRAM, place, str(START + first * SECOND), str(START + last * SECOND)]
    chance = random.Random(1)
    cut_down(command, chance)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0, done.stderr
    with open_log(place) as log:
        assert items(log) == list(range(first, last))


def test_progress_rises_to_one(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with new_log(tmp_path) as log:
        history(log, 100)
        run(log, batch=10, on_progress=seen.append)
        shares = [progress.share for progress in seen]
        assert shares == sorted(shares)
        assert seen[-1] == Progress(1.0, 100, 0)


def test_the_command_reads_another_log_without_changing_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new").mkdir()
    with new_log(tmp_path) as old:
        history(old, 40)
    before = (tmp_path / "log.db").read_bytes()
    broker = ["--set", f"broker=embedded:{tmp_path / 'new' / 'log.db'}", "--set", "topics.partitions=1"]
    command = ["replay", "--from-topic", "history", "--from-broker", f"embedded:{tmp_path / 'log.db'}", "--last", "9s", *broker]
    assert execute(command) == 0
    assert "10 sent in all, 40 records in this run" in capsys.readouterr().out
    assert execute(command) == 0
    assert "0 records in this run, 40 before" in capsys.readouterr().out
    with open_log(broker[1].removeprefix("broker=")) as log:
        assert items(log) == list(range(30, 40))
    assert (tmp_path / "log.db").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either a file or a topic"),
        (["log.csv", "--from-topic", "history"], "name either a file or a topic"),
        (["--from-topic", "history", "--sort-by-time"], "a topic is always merged by time"),
        (["--from-topic", "history", "--last", "7d", "--since", "8d"], "give one of them"),
        (["--from-topic", "history", "--last", "a week"], "no span of time"),
        (["--from-topic", "history", "--until", "tomorrow"], "is no time"),
        (["--from-topic", "history", "--from-broker", "nowhere"], "--from-broker nowhere: must be"),
    ],
)
def test_flags_that_do_not_fit_are_named(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["replay", *arguments, "--set", f"broker=embedded:{tmp_path / 'log.db'}"]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_topic_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["replay", "--from-topic", "history", "--set", f"broker=embedded:{tmp_path / 'log.db'}"]) == 3
    assert "there is no topic history in embedded:" in capsys.readouterr().err
