"""The evaluation's reader joins scores to events, counts what does not fit, and takes a digest that others can recompute."""

import hashlib
import math
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.errors import FormatMismatch, Malformed, UnknownTopic
from streaming.events import Interaction
from streaming.log import Message
from streaming.partitioner import partition_of
from streaming.prequential import coverage, error_by_earlier, evaluate, running_mae
from streaming.scored import RunReader, count_earlier, read_run
from streaming.validation import Limits
from tests.reading_log import T0, a_log, put, put_score, score_of

LIMITS = Limits()


def test_joins_each_event_with_its_score() -> None:
    log = a_log(gap=2)
    events = [Interaction("a", "x", 4.0, T0), Interaction("b", "x", 2.0, T0 - 5), Interaction("a", "y", 5.0, T0 + 1)]
    sources = [put(log, event) for event in events]
    for place in (2, 0, 1):
        put_score(log, score_of(events[place], sources[place], 3.0 + place, sd=None if place == 1 else 0.5, earlier=(0, 0, 1)[place]))
    run = read_run(log, LIMITS)
    assert [(run.users[u], run.items[i]) for u, i in zip(run.user, run.item, strict=True)] == [("a", "x"), ("b", "x"), ("a", "y")]
    assert run.offset.tolist() == [2, 5, 8]
    assert run.rating.tolist() == [4.0, 2.0, 5.0]
    assert run.score.tolist() == [3.0, 4.0, 5.0]
    assert np.isnan(run.sd).tolist() == [False, True, False]
    assert run.earlier.tolist() == [0, 0, 1]
    assert run.timestamp.tolist() == [T0, T0 - 5, T0 + 1], "one partition is read in its own order, whatever the times in it"
    assert (run.scores, run.unscored, run.duplicate_scores, run.orphan_scores, run.earlier_disagreements) == (3, 0, 0, 0, 0)


def test_counts_what_does_not_fit() -> None:
    log = a_log()
    events = [Interaction("a", f"i{n}", 4.0, T0 + n) for n in range(6)]
    sources = [put(log, event) for event in events]
    log.append([Message("interactions", b"a", b"\xc1", 0), Message("interactions", b"other", msgspec.msgpack.encode(events[0]), 0)])
    log.append([Message("dead-letters", None, b"whatever it is"), Message("dead-letters", None, b"and another")])
    put_score(log, score_of(events[0], sources[0], 1.5))
    put_score(log, score_of(events[0], sources[0], 2.5))  # a second one
    put_score(log, score_of(events[1], sources[1], 3.5, earlier=3))  # says 3, the log says 1
    put_score(log, score_of(events[2], ("interactions", 0, 6)))  # of a refused event
    put_score(log, score_of(events[2], ("interactions", 0, 99)))  # of none
    put_score(log, score_of(events[2], ("interactions", 3, 0)))  # of no partition
    put_score(log, score_of(events[2], ("elsewhere", 0, 2)))  # of another topic
    put_score(log, score_of(events[2], sources[3]))  # of another item than it says
    put_score(log, score_of(Interaction("b", "i4", 4.0, T0), sources[4]))  # of another user than it says
    answer = {"request": "r", "user": "a", "items": ["i1"], "scores": [4.0], "sds": [1.0], "model_version": 1, "format": 1}
    log.append([Message("scores", b"a", msgspec.msgpack.encode(answer), 0)])
    run = read_run(log, LIMITS)
    assert len(run) == 6
    assert run.refused == 2
    assert run.dead_letters == 2
    assert run.scored.tolist() == [True, True, False, False, False, False]
    assert run.score[:2].tolist() == [1.5, 3.5], "of several scores the first one counts"
    assert (run.scores, run.duplicate_scores, run.orphan_scores, run.unscored, run.earlier_disagreements) == (9, 1, 6, 4, 1)


def test_merges_partitions_by_event_time_but_never_against_a_partitions_own_order() -> None:
    log = a_log(2)
    zero = next(name for name in "abcdefgh" if partition_of(name.encode(), 2) == 0)
    one = next(name for name in "abcdefgh" if partition_of(name.encode(), 2) == 1)
    for user, time in ((zero, 10), (zero, 40), (zero, 20), (one, 20), (one, 30), (one, 40)):
        put(log, Interaction(user, str(time), 3.0, T0 + time))
    run = read_run(log, LIMITS)
    assert [(int(p), run.items[i]) for p, i in zip(run.partition, run.item, strict=True)] == [
        (0, "10"),
        (1, "20"),
        (1, "30"),
        (0, "40"),
        (0, "20"),  # late in its own partition: it counts as simultaneous with the 40 before it
        (1, "40"),
    ]
    assert run.earlier.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_counted_and_spoils_no_error(bad: float) -> None:
    log = a_log()
    events = [Interaction("a", "x", 4.0, T0), Interaction("b", "x", 2.0, T0)]
    for event, score in zip(events, (3.0, bad), strict=True):
        put_score(log, score_of(event, put(log, event), score))
    run = read_run(log, LIMITS)
    assert (run.scores, run.nonfinite_scores, run.unscored, run.scored.tolist()) == (2, 1, 0, [True, False])
    assert evaluate(run, run.score, 10).mae == 1.0
    assert np.isnan(run.score[1])


@pytest.mark.parametrize("prefix", ["", "trial."])
def test_reads_the_topics_of_a_prefix(prefix: str) -> None:
    log = a_log(prefix=prefix)
    event = Interaction("a", "x", 4.0, T0)
    put_score(log, score_of(event, put(log, event, prefix)), prefix)
    assert read_run(log, LIMITS, prefix).scored.all()
    with pytest.raises(UnknownTopic, match=r"absent\.scores"):
        read_run(log, LIMITS, "absent.")


@given(st.lists(st.sampled_from(["event", "score", "letter", "refused", "look"]), max_size=30), st.integers(0, 2))
def test_what_is_read_bit_by_bit_is_what_is_read_at_once(happens: list[str], gap: int) -> None:
    log = a_log(3, gap=gap)
    reader, events, scored = RunReader(log, LIMITS), list[tuple[Interaction, tuple[str, int, int]]](), 0
    for number, what in enumerate(happens):
        if what == "event":
            event = Interaction(f"u{number % 4}", f"i{number % 3}", 3.0, T0 + number // 2)
            events.append((event, put(log, event)))
        elif what == "score" and scored < len(events):
            put_score(log, score_of(*events[scored], 2.0 + number / 10))
            scored += 1
        elif what == "letter":
            log.append([Message("dead-letters", None, b"whatever it is")])
        elif what == "refused":
            log.append([Message("interactions", b"a", b"\xc1", number % 3)])
        elif what == "look":
            reader.read_on()
    found, expected = reader.run(), read_run(log, LIMITS)
    for name in ("partition", "offset", "rating", "timestamp", "earlier", "scored", "score", "sd"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for run in (found, expected):
        pairs = [(run.users[user], run.items[item]) for user, item in zip(run.user, run.item, strict=True)]
        assert sorted(pairs) == sorted((event.user, event.item) for event, _ in events)
    assert (found.scores, found.unscored, found.refused, found.dead_letters) == (
        scored,
        len(events) - scored,
        happens.count("refused"),
        happens.count("letter"),
    )
    assert found.scores_sha256 == expected.scores_sha256
    assert [part.tolist() for part in reader.events()][2] == expected.rating.tolist()


def test_an_empty_log_is_an_empty_run() -> None:
    run = read_run(a_log(3), LIMITS)
    assert (len(run), run.scores, run.unscored, run.scores_sha256) == (0, 0, 0, hashlib.sha256().hexdigest())
    assert evaluate(run, run.score, 10).mae is None
    assert coverage(run) is None
    assert running_mae(run, run.score, 5) == ([], [])
    assert error_by_earlier(run, run.score) == []


def test_a_foreign_record_among_the_scores_is_an_error_that_names_its_place() -> None:
    log = a_log()
    log.append([Message("scores", None, b"\xc1", 0)])
    with pytest.raises(Malformed, match=r"scores\[0\] at offset 0"):
        read_run(log, LIMITS)
    log = a_log()
    event = Interaction("a", "x", 4.0, T0)
    put_score(log, score_of(event, put(log, event), format=2))
    with pytest.raises(FormatMismatch, match=r"scores\[0\] at offset 0"):
        read_run(log, LIMITS)


def packed_by_hand(topic: str, partition: int, offset: int, user: str, item: str, score: float, version: int) -> bytes:
    """A MessagePack array of seven, from its specification."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return (bytes([0xA0 | len(raw)]) if len(raw) < 32 else bytes([0xD9, len(raw)])) + raw

    def integer(value: int) -> bytes:
        if value < 128:
            return bytes([value])
        for tag, code, bound in ((0xCC, ">B", 1 << 8), (0xCD, ">H", 1 << 16), (0xCE, ">I", 1 << 32)):
            if value < bound:
                return bytes([tag]) + struct.pack(code, value)
        return b"\xcf" + struct.pack(">Q", value)

    fields = [
        text(topic),
        integer(partition),
        integer(offset),
        text(user),
        text(item),
        b"\xca" + struct.pack(">f", score),
        integer(version),
    ]
    return b"\x97" + b"".join(fields)


def test_the_digest_can_be_recomputed_from_its_description() -> None:
    log = a_log(3, gap=70)
    rows = []
    for n in range(40):
        event = Interaction(f"käufer-{n % 7}" + "x" * (40 * (n % 2)), f"i{n % 5}", 4.0, T0 + n)
        topic, partition, offset = put(log, event)
        score = 1 + 0.1 * n / 3
        put_score(log, score_of(event, (topic, partition, offset), score, model_version=90_000 * n))
        rows.append((topic, partition, offset, event.user, event.item, score, 90_000 * n))
    expected = hashlib.sha256(b"".join(packed_by_hand(*row) for row in sorted(rows, key=lambda row: row[1:3]))).hexdigest()
    assert read_run(log, LIMITS).scores_sha256 == expected


def test_the_digest_sees_order_version_and_score_but_not_what_float32_drops() -> None:
    def digest(score: float = 3.3, version: int = 1) -> str:
        log = a_log()
        event = Interaction("a", "x", 4.0, T0)
        put_score(log, score_of(event, put(log, event), score, model_version=version))
        return read_run(log, LIMITS).scores_sha256

    assert digest() == digest(3.3 + 1e-12)
    assert len({digest(), digest(3.3 + 1e-6), digest(version=2)}) == 3


@settings(deadline=None, max_examples=60)
@given(
    partitions=st.integers(1, 4),
    gap=st.integers(0, 2),
    events=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9)), max_size=40),
)
def test_the_reader_against_a_join_by_dictionaries(partitions: int, gap: int, events: list[tuple[int, int, int, int, int]]) -> None:
    log = a_log(partitions, gap=gap)
    truth: dict[tuple[int, int], tuple[str, str, float, int, float | None]] = {}
    had: dict[str, int] = {}
    duplicates = 0
    for user, item, rating, copies, time in events:
        event = Interaction(f"u{user}", f"i{item}", float(rating), T0 + time)
        source = put(log, event)
        for copy in range(copies):
            put_score(log, score_of(event, source, rating + copy / 8, earlier=had.get(event.user, 0)))
        duplicates += max(copies - 1, 0)
        truth[source[1:]] = (event.user, event.item, event.rating, had.get(event.user, 0), float(rating) if copies else None)
        had[event.user] = had.get(event.user, 0) + 1
    run = read_run(log, LIMITS)
    found = {
        (int(run.partition[n]), int(run.offset[n])): (
            run.users[run.user[n]],
            run.items[run.item[n]],
            float(run.rating[n]),
            int(run.earlier[n]),
            float(run.score[n]) if run.scored[n] else None,
        )
        for n in range(len(run))
    }
    assert found == truth
    assert (run.duplicate_scores, run.orphan_scores, run.earlier_disagreements) == (duplicates, 0, 0)
    assert run.unscored == sum(row[-1] is None for row in truth.values())
    for p in range(partitions):
        assert (np.diff(run.offset[run.partition == p]) > 0).all()


def test_earlier_counts_against_a_loop() -> None:
    user = np.random.default_rng(3).integers(0, 20, 500)
    seen: dict[int, int] = {}
    expected = []
    for u in user.tolist():
        expected.append(seen.get(u, 0))
        seen[u] = expected[-1] + 1
    assert count_earlier(user).tolist() == expected
    assert count_earlier(np.zeros(0, np.int64)).tolist() == []
