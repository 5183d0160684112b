"""The replayer: every line once, whatever happens to it."""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from consumers.replayer import Progress, ReplayResult, replay
from streaming.brokers import open_log
from streaming.codec import decode
from streaming.errors import Fenced, Malformed, SourceError
from streaming.events import DeadLetter, Interaction
from streaming.log import Log, Message, Record, TopicPartition
from streaming.sources import Mapped, interaction_source, profile_source
from streaming.textfiles import Layout
from streaming.topics import topics
from streaming.validation import Limits, decode_interaction

START = 881250949000


def new_log(path: Path, partitions: int = 1) -> Log:
    log = open_log(f"embedded:{path / 'log.db'}")
    log.create(topics(partitions=partitions).values())
    return log


def records(log: Log, topic: str) -> list[Record]:
    tps = [TopicPartition(topic, partition) for partition in range(log.topics()[topic].partitions)]
    bounds = log.bounds(tps)
    found: list[Record] = []
    with log.reader() as reader:
        reader.assign({tp: bound.start for tp, bound in bounds.items()})
        while any(reader.position(tp) < bounds[tp].end for tp in tps):
            found += reader.poll(10_000, timeout=1)
    return found


def events(log: Log, topic: str = "interactions") -> list[dict[str, Any]]:
    return [msgpack.unpackb(record.value) for record in records(log, topic)]


def lines(n: int, *, bad: tuple[int, ...] = (), step: int = 1000, backwards: bool = False) -> str:
    """A file of ``n`` lines, whose items count them."""
    text = "user,item,rating,timestamp\n"
    for i in range(n):
        rating = "much" if i in bad else i % 5 + 1
        text += f"{i % 7},{i},{rating},{START + (n - i if backwards else i) * step}\n"
    return text


def write(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def run(log: Log, path: Path, partitions: int = 1, **settings: object) -> ReplayResult:
    return replay(log, interaction_source(path), topics(partitions=partitions), **settings)  # type: ignore[arg-type]


def test_all_lines_arrive_once_in_order_with_key_and_partition(tmp_path: Path) -> None:
    path = write(tmp_path, lines(100))
    with new_log(tmp_path, 4) as log:
        result = run(log, path, 4, batch=7)
        assert result == ReplayResult(events=100, dead_letters={}, sent=100, skipped=0, done=True)
        taken = [decode_interaction(record, Limits(), partitions=4) for record in records(log, "interactions")]
        assert sorted(int(event.item) for event in taken) == list(range(100))
        for user in range(7):
            assert [int(event.item) for event in taken if event.user == str(user)] == list(range(user, 100, 7))
        assert taken[0] == Interaction(taken[0].user, taken[0].item, float(int(taken[0].item) % 5 + 1), START + int(taken[0].item) * 1000)


def test_bad_lines_go_to_dead_letters_with_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, lines(20, bad=(3, 11)) + "1,x\n")
    with new_log(tmp_path) as log:
        result = run(log, path, batch=4)
        assert result.dead_letters == {"wrong-type": 2, "not-decodable": 1}
        assert (result.events, result.sent) == (18, 21)
        letters = [decode(record.value, DeadLetter, what="it") for record in records(log, "dead-letters")]
        assert [letter.source for letter in letters] == [("file:log.csv", 0, 5), ("file:log.csv", 0, 13), ("file:log.csv", 0, 22)]
        assert letters[2].value == b"1,x"
        assert len(events(log)) == 18


def test_a_finished_file_is_not_sent_again_unless_asked(tmp_path: Path) -> None:
    path = write(tmp_path, lines(10))
    with new_log(tmp_path) as log:
        run(log, path)
        assert run(log, path) == ReplayResult(events=10, dead_letters={}, sent=0, skipped=10, done=True)
        assert len(events(log)) == 10
        assert run(log, path, restart=True) == ReplayResult(events=10, dead_letters={}, sent=10, skipped=0, done=True)
        assert len(events(log)) == 20


def test_a_file_of_nothing_but_a_header_is_done(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        assert run(log, write(tmp_path, lines(0))) == ReplayResult(events=0, dead_letters={}, sent=0, skipped=0, done=True)
        assert run(log, write(tmp_path, lines(0), "other.csv"), sort_by_time=True).done


@pytest.mark.parametrize("sort_by_time", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_replay_goes_on_where_it_was(sort_by_time: bool, packed: bool, tmp_path: Path) -> None:
    path = write(tmp_path, lines(50, bad=(5, 30), backwards=True))
    if packed:
        path = tmp_path / "log.csv.gz"
        path.write_bytes(gzip.compress(lines(50, bad=(5, 30), backwards=True).encode()))
    order = [i for i in (range(49, -1, -1) if sort_by_time else range(50)) if i not in {5, 30}]
    asked = iter(range(10_000))
    with new_log(tmp_path) as log:
        runs = 0
        while not (result := run(log, path, batch=4, sort_by_time=sort_by_time, stop=lambda: next(asked) % 8 == 7)).done:
            runs += 1
            assert result.sent + result.skipped < 51
        assert runs == 7, "seven lines a run"
        assert [int(event["item"]) for event in events(log)] == order
        assert (result.events, result.dead_letters) == (48, {"wrong-type": 2})
        assert len(records(log, "dead-letters")) == 2


def test_an_error_in_the_middle_loses_and_repeats_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, lines(50))

    def fail(progress: Progress) -> None:
        if progress.events == 20:
            raise KeyboardInterrupt

    with new_log(tmp_path) as log:
        with pytest.raises(KeyboardInterrupt):
            run(log, path, batch=10, on_progress=fail)
        assert len(events(log)) == 20
        assert run(log, path).skipped == 20
        assert [int(event["item"]) for event in events(log)] == list(range(50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "1,2,3,881250949000\n", "has changed since it was last replayed .*: 50 of its entries .* with --restart"),
        (lambda text: text.replace("0,0,1", "0,0,2", 1), "has changed since"),
    ],
)
def test_a_changed_file_is_refused_with_advice(change: Callable[[str], str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, lines(50))
    with new_log(tmp_path) as log:
        run(log, path)
        write(tmp_path, change(lines(50)))
        with pytest.raises(SourceError, match=message):
            run(log, path)
        assert len(events(log)) == 50
        assert run(log, path, restart=True).done


def test_other_settings_are_refused_with_advice(tmp_path: Path) -> None:
    path = write(tmp_path, lines(5))
    with new_log(tmp_path) as log:
        run(log, path)
        for source, by_time in (
            (interaction_source(path), True),
            (interaction_source(path, timestamps="s"), False),
            (interaction_source(path, columns=Mapped(user="item")), False),
            (interaction_source(path, layout=Layout(encoding="latin-1")), False),
        ):
            with pytest.raises(SourceError, match="other columns, format, order"):
                replay(log, source, topics(partitions=1), sort_by_time=by_time)


def test_by_time_other_limits_are_refused_since_they_make_another_order(tmp_path: Path) -> None:
    path, asked = write(tmp_path, lines(20)), iter(range(100))
    with new_log(tmp_path) as log:
        narrow = interaction_source(path, limits=Limits(rating_min=2.0))
        assert not replay(log, narrow, topics(partitions=1), sort_by_time=True, stop=lambda: next(asked) == 5).done
        with pytest.raises(SourceError, match="or limits to sort by: 5 of its entries"):
            replay(log, interaction_source(path), topics(partitions=1), sort_by_time=True)
        same = interaction_source(path, limits=Limits(rating_min=2.0, max_n=7))  # That of requests has no part in it.
        assert replay(log, same, topics(partitions=1), sort_by_time=True).done
        assert len({event["item"] for event in events(log)}) == len(events(log)) == 16


def test_two_files_and_two_topics_have_positions_of_their_own(tmp_path: Path) -> None:
    first, second = write(tmp_path, lines(5)), write(tmp_path, lines(8), "second.csv")
    users = write(tmp_path, "user_id:token\tage:float\n1\t24\n2\told\n", "ml.user")
    with new_log(tmp_path) as log:
        run(log, first)
        run(log, second)
        result = replay(log, profile_source(users, id_column="user_id"), topics(partitions=1), into="users")
        assert result == ReplayResult(events=1, dead_letters={"wrong-type": 1}, sent=2, skipped=0, done=True)
        assert len(events(log)) == 13
        assert events(log, "users") == [{"features": {"age": 24.0}}]
        assert run(log, first).sent == 0
        assert len({record.key for record in records(log, "replays")}) == 3


def test_profiles_have_no_time_to_sort_by(tmp_path: Path) -> None:
    source = profile_source(write(tmp_path, "id:token\n1\n", "ml.user"), id_column="id")
    with new_log(tmp_path) as log:
        for settings in ({"sort_by_time": True}, {"rate": 2.0}):
            with pytest.raises(SourceError, match="no time to sort by or to keep pace with"):
                replay(log, source, topics(partitions=1), into="users", **settings)


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": -1.0}, {"rate": float("nan")}, {"rate": float("inf")}, {"batch": 0}])
def test_settings_without_sense_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, lines(1))
    with new_log(tmp_path) as log, pytest.raises(SourceError, match=next(iter(settings))):
        run(log, path, **settings)


def test_a_second_replay_of_the_same_file_takes_over(tmp_path: Path) -> None:
    path = write(tmp_path, lines(40))
    with new_log(tmp_path) as log:

        def take_over(progress: Progress) -> None:
            if progress.events == 20:
                assert run(log, path, batch=10).skipped == 20

        with pytest.raises(Fenced):
            run(log, path, batch=10, on_progress=take_over)
        assert [int(event["item"]) for event in events(log)] == list(range(40))


class Time:
    """A clock that only sleeping moves, and what was in the log when it moved."""

    def __init__(self, log: Log) -> None:
        self.log, self.now, self.seen = log, 100.0, [(0.0, 0)]

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 0.5, "short naps, so that a stop is heard"
        end = self.log.bounds([TopicPartition("interactions", 0)])[TopicPartition("interactions", 0)].end
        self.seen.append((self.now - 100, end))
        self.now += seconds


@pytest.mark.parametrize("rate", [1.0, 4.0, 0.5])
def test_a_pace_is_a_multiple_of_the_recorded_one(rate: float, tmp_path: Path) -> None:
    path = write(tmp_path, lines(20, bad=(4,), step=1000))
    with new_log(tmp_path) as log:
        time = Time(log)
        run(log, path, rate=rate, clock=time.clock, sleep=time.sleep)
        assert time.now - 100 == pytest.approx(19 / rate)
        for moment, sent in time.seen[1:]:
            due = sum(1 for i in range(20) if i != 4 and i / rate <= moment + 1e-6)
            assert sent == due, f"at {moment:.2f} s"


def test_at_a_high_pace_lines_of_20_milliseconds_share_a_commit(tmp_path: Path) -> None:
    path = write(tmp_path, lines(1000, step=1))
    seen: list[int] = []
    with new_log(tmp_path) as log:
        time = Time(log)
        run(log, path, rate=1.0, clock=time.clock, sleep=time.sleep, on_progress=lambda progress: seen.append(progress.events))
        assert seen[-1] == 1000
        assert 40 <= len(seen) <= 60
        assert all(late - early <= 22 for early, late in itertools.pairwise(seen))


def test_events_out_of_order_are_sent_at_once_and_a_stop_is_heard_while_waiting(tmp_path: Path) -> None:
    path = write(tmp_path, lines(5, backwards=True) + f"1,far,3,{START + 10**9}\n")
    with new_log(tmp_path) as log:
        time = Time(log)
        result = run(log, path, rate=1.0, clock=time.clock, sleep=time.sleep, stop=lambda: time.now > 200)
        assert not result.done
        assert result.events == 5
        assert [event["item"] for event in events(log)] == ["0", "1", "2", "3", "4"]


def test_progress_rises_to_one(tmp_path: Path) -> None:
    path = write(tmp_path, lines(100))
    for sort_by_time in (False, True):
        seen: list[Progress] = []
        folder = tmp_path / str(sort_by_time)
        folder.mkdir()
        with new_log(folder) as log:
            run(log, path, batch=10, sort_by_time=sort_by_time, on_progress=seen.append)
        shares = [progress.share for progress in seen]
        assert shares == sorted(shares)
        assert shares[4] == pytest.approx(0.5, abs=0.03)
        assert seen[-1] == Progress(1.0, 100, 0)


def test_lines_that_are_large_are_committed_in_small_batches(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item,rating,timestamp\n" + f"{'x' * 5_000},1,3,{START}\n" * 1200)
    commits: list[Progress] = []
    with new_log(tmp_path) as log:
        result = run(log, path, batch=10**6, on_progress=commits.append)
        assert result.dead_letters == {"bad-id": 1200}
        assert len(commits) == 2, "one at four megabytes, whatever the batch, and the rest"


def test_no_line_can_stop_it(tmp_path: Path) -> None:
    chance = random.Random(1)
    path = tmp_path / "noise.csv"
    noise = b"\n".join(bytes(chance.randrange(256) for _ in range(chance.randrange(40))).replace(b"\n", b"") for _ in range(2000))
    path.write_bytes(b"user,item,rating,timestamp\n" + noise + f"\n1,2,3,{START}\n".encode())
    with new_log(tmp_path) as log:
        result = run(log, path)
        assert result.done
        assert events(log) == [{"user": "1", "item": "2", "rating": 3.0, "timestamp": START}]
        assert sum(result.dead_letters.values()) == len(records(log, "dead-letters")) > 1900


def test_a_damaged_position_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, lines(5))
    with new_log(tmp_path) as log:
        run(log, path)
        (position,) = records(log, "replays")
        log.append([Message("replays", position.key, b"\x93", partition=0)])
        with pytest.raises(Malformed, match=r"replays\[0\] at offset 1"):
            run(log, path)
