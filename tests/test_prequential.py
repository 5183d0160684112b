"""The evaluation's reader joins scores to events and counts what does not fit; errors and standard errors against slow oracles."""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from river import metrics, optim, reco

from streaming.codec import encode
from streaming.errors import FormatMismatch, Malformed, UnknownTopic
from streaming.events import Interaction, Score
from streaming.log import Message, Topic
from streaming.partitioner import partition_of
from streaming.peers import RiverBiasedMF, RunningMean, peers, test_then_train
from streaming.prequential import Bin, clustered_se, coverage, difference, error_by_earlier, errors, evaluate, running_mae
from streaming.scored import ScoredRun, count_earlier, read_run
from streaming.validation import Limits
from tests.reading_log import ReadingLog

test_then_train.__test__ = False  # type: ignore[attr-defined]

LIMITS = Limits()
T0 = 880_000_000_000


def a_log(partitions: int = 1, *, gap: int = 0, prefix: str = "") -> ReadingLog:
    names = ("interactions", "scores")
    return ReadingLog([*(Topic(prefix + n, partitions) for n in names), Topic(prefix + "dead-letters")], gap=gap)


def put(log: ReadingLog, event: Interaction, prefix: str = "") -> tuple[str, int, int]:
    topic = f"{prefix}interactions"
    partition = partition_of(event.user.encode(), log.topics()[topic].partitions)
    return topic, partition, log.append([Message(topic, event.user.encode(), msgspec.msgpack.encode(event), partition)])[0]


def score_of(event: Interaction, source: tuple[str, int, int], score: float = 3.5, **fields: Any) -> Score:  # noqa: ANN401
    given: dict[str, Any] = {"sd": 1.0, "model_version": 7, "support_size": 0, "earlier": 0, "step": 0}
    return Score(event.user, event.item, score, source=source, timestamp=event.timestamp, **(given | fields))


def put_score(log: ReadingLog, score: Score, prefix: str = "") -> None:
    log.append(
        [Message(f"{prefix}scores", score.user.encode(), encode(score), score.source[1] % log.topics()[f"{prefix}scores"].partitions)]
    )


def a_run(rating: Sequence[float], score: Sequence[float], user: Sequence[int], sd: Sequence[float] | None = None) -> ScoredRun:
    n = len(rating)
    users = np.asarray(user, np.int64)
    return ScoredRun(
        partition=np.zeros(n, np.int64),
        offset=np.arange(n),
        user=users,
        item=np.zeros(n, np.int64),
        rating=np.asarray(rating, np.float64),
        timestamp=np.arange(n),
        earlier=count_earlier(users),
        scored=~np.isnan(np.asarray(score, np.float64)),
        score=np.asarray(score, np.float64),
        sd=np.full(n, np.nan) if sd is None else np.asarray(sd, np.float64),
        users=[],
        items=[],
        scores=n,
        duplicate_scores=0,
        orphan_scores=0,
        earlier_disagreements=0,
        unscored=0,
        refused=0,
        dead_letters=0,
        scores_sha256="",
    )


# The reader.


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
    answer = {"request": "r", "user": "a", "items": ["i1"], "scores": [4.0], "sds": [1.0], "model_version": 1, "format": 1}
    log.append([Message("scores", b"a", msgspec.msgpack.encode(answer), 0)])
    run = read_run(log, LIMITS)
    assert len(run) == 6
    assert run.refused == 2
    assert run.dead_letters == 2
    assert run.scored.tolist() == [True, True, False, False, False, False]
    assert run.score[:2].tolist() == [1.5, 3.5], "of several scores the first one counts"
    assert (run.scores, run.duplicate_scores, run.orphan_scores, run.unscored, run.earlier_disagreements) == (8, 1, 5, 4, 1)


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


@pytest.mark.parametrize("prefix", ["", "trial."])
def test_reads_the_topics_of_a_prefix(prefix: str) -> None:
    log = a_log(prefix=prefix)
    event = Interaction("a", "x", 4.0, T0)
    put_score(log, score_of(event, put(log, event, prefix)), prefix)
    assert read_run(log, LIMITS, prefix).scored.all()
    with pytest.raises(UnknownTopic, match=r"absent\.scores"):
        read_run(log, LIMITS, "absent.")


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


# Errors and standard errors.


def explicit_se(loss: list[float], user: list[int]) -> float | None:
    mean = sum(loss) / len(loss)
    groups = sorted(set(user))
    if len(groups) < 2:
        return None
    total = 0.0
    for group in groups:
        deviation = 0.0
        for value, of in zip(loss, user, strict=True):
            if of == group:
                deviation += value - mean
        total += deviation**2
    return math.sqrt(len(groups) / (len(groups) - 1) * total) / len(loss)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(1, 5), st.integers(0, 4)), min_size=1, max_size=60))
def test_errors_against_numpy_and_explicit_sums(rows: list[tuple[int, float, int]]) -> None:
    rating, score, user = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows]), np.array([r[2] for r in rows])
    found = errors(rating, score, user)
    loss = np.abs(score - rating)
    assert found.n == len(rows)
    assert found.mae == pytest.approx(loss.mean(), abs=1e-6)
    assert found.rmse == pytest.approx(math.sqrt((loss**2).mean()), abs=1e-6)
    assert found.mae_se == (
        None if explicit_se(loss.tolist(), user.tolist()) is None else pytest.approx(explicit_se(loss.tolist(), user.tolist()), abs=1e-6)
    )
    square = explicit_se((loss**2).tolist(), user.tolist())
    if square is None:
        assert found.rmse_se is None
    elif found.rmse is not None and found.rmse > 1e-3:
        assert found.rmse_se == pytest.approx(square / (2 * found.rmse), rel=1e-3, abs=1e-6)


def test_errors_are_rivers_fed_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rating, score = rng.integers(1, 6, 500).astype(float), rng.uniform(1, 5, 500)
    mae, rmse = metrics.MAE(), metrics.RMSE()
    for truth, guess in zip(rating, score, strict=True):
        mae.update(truth, guess)
        rmse.update(truth, guess)
    found = errors(rating, score, np.arange(500) % 9)
    assert found.mae == pytest.approx(mae.get(), abs=1e-7)
    assert found.rmse == pytest.approx(rmse.get(), abs=1e-7)


def clustered_losses(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    sizes = rng.integers(1, 30, 120)
    user = np.repeat(np.arange(120), sizes)
    return np.abs(rng.normal(0, 1, 120)[user] + rng.normal(0, 1, len(user))), user


def test_the_standard_error_is_that_of_repeated_draws_and_of_a_bootstrap_over_users() -> None:
    rng = np.random.default_rng(1)
    draws = [clustered_losses(rng) for _ in range(400)]
    spread = float(np.std([loss.mean() for loss, _ in draws]))
    stated = [clustered_se(loss, user) for loss, user in draws]
    assert np.mean([se for se in stated if se is not None]) == pytest.approx(spread, rel=0.12)
    naive = np.mean([loss.std() / math.sqrt(len(loss)) for loss, _ in draws])
    assert spread > 1.5 * naive, "else the clusters of this test would not matter"

    loss, user = draws[0]
    sums, sizes = np.bincount(user, loss), np.bincount(user)
    picked = rng.integers(0, 120, (2000, 120))
    assert clustered_se(loss, user) == pytest.approx(float(np.std(sums[picked].sum(1) / sizes[picked].sum(1))), rel=0.1)


def test_the_rmse_standard_error_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        loss, user = clustered_losses(rng)
        found.append(errors(np.zeros(len(loss)), loss, user))
    spread = float(np.std([f.rmse for f in found if f.rmse is not None]))
    assert np.mean([f.rmse_se for f in found if f.rmse_se is not None]) == pytest.approx(spread, rel=0.12)


def test_perfect_scores_and_single_users() -> None:
    assert errors(np.ones(3), np.ones(3), np.array([0, 1, 1])) == errors(np.ones(3), np.ones(3), np.array([0, 1, 1]))
    perfect = errors(np.ones(3), np.ones(3), np.array([0, 1, 1]))
    assert (perfect.mae, perfect.rmse, perfect.mae_se, perfect.rmse_se) == (0.0, 0.0, 0.0, 0.0)
    alone = errors(np.ones(3), np.full(3, 2.0), np.zeros(3, np.int64))
    assert (alone.mae, alone.mae_se, alone.rmse_se) == (1.0, None, None)


def test_groups_windows_and_the_first_20000() -> None:
    n = 20_050
    user = np.r_[np.zeros(30, int), np.arange(1, n - 29)]
    rating, score = np.full(n, 3.0), np.full(n, 4.0)
    score[:30] = 3.0 + np.arange(30)  # user 0: an error equal to the number of earlier events
    score[20_000:] = 5.0
    score[100] = np.nan  # not scored yet
    result = evaluate(a_run(rating.tolist(), score.tolist(), user.tolist()), score, window=20)
    groups = result.by_earlier_events
    assert list(groups) == ["0", "1-5", "1-20", "21+"]
    assert [group.n for group in groups.values()] == [n - 29 - 1, 5, 20, 9]
    assert groups["1-5"].mae == 3.0
    assert groups["1-20"].mae == 10.5
    assert groups["21+"].mae == 25.0
    assert (result.after_20000.n, result.after_20000.mae) == (50, 2.0)
    assert (result.last_window.n, result.last_window.mae) == (20, 2.0)
    assert result.n == n - 1


def test_earlier_counts_against_a_loop() -> None:
    user = np.random.default_rng(3).integers(0, 20, 500)
    seen: dict[int, int] = {}
    expected = []
    for u in user.tolist():
        expected.append(seen.get(u, 0))
        seen[u] = expected[-1] + 1
    assert count_earlier(user).tolist() == expected
    assert count_earlier(np.zeros(0, np.int64)).tolist() == []


def test_coverage_counts_ratings_inside_the_interval() -> None:
    sd = [1.0, 1.0, 1.0, 1.0, np.nan]
    score = [3.0, 3.0, 3.0, 3.0, 3.0]
    run = a_run([3 + 1.2815515, 3 + 1.2815516, 1.0, 3.0, 3.0], score, [0, 1, 2, 3, 4], sd)
    assert coverage(run) == 0.5
    assert coverage(a_run([1.0], [1.0], [0])) is None
    rng = np.random.default_rng(5)
    scores = rng.uniform(1, 5, 50_000)
    normal = a_run((scores + 0.7 * rng.normal(size=50_000)).tolist(), scores.tolist(), [0] * 50_000, [0.7] * 50_000)
    assert coverage(normal) == pytest.approx(0.8, abs=0.006)


def test_the_difference_of_two_methods_is_paired() -> None:
    run = a_run([3.0, 3.0, 3.0, 3.0], [4.0, 3.5, 3.0, 5.0], [0, 0, 1, 1])
    gap = difference(run, np.array([4.5, 4.0, 3.5, 5.5]))
    assert (gap.mae, gap.mae_se) == (-0.5, 0.0)


def test_running_error_against_slices() -> None:
    rng = np.random.default_rng(6)
    rating, score = rng.integers(1, 6, 300).astype(float), rng.uniform(1, 5, 300)
    run = a_run(rating.tolist(), score.tolist(), [0] * 300)
    events, mae = running_mae(run, score, 50, points=40)
    assert (events[0], events[-1], len(events)) == (50, 300, 40)
    for end, value in zip(events, mae, strict=True):
        assert value == pytest.approx(np.abs(score - rating)[end - 50 : end].mean(), abs=1e-5)
    assert running_mae(run, score, 1000)[0] == [300]


def test_bins_of_earlier_events_double_and_those_of_few_users_are_left_out() -> None:
    run = a_run([3.0] * 100, [4.0] * 90 + [5.0] * 10, [0] * 90 + [1] * 10)
    expected = [Bin(0, 0, 2, 1.5, 0.5), Bin(1, 1, 2, 1.5, 0.5), Bin(2, 3, 4, 1.5, 0.5), Bin(4, 7, 8, 1.5, 0.5)]
    bins = error_by_earlier(run, run.score, fewest_users=2)
    assert bins[:4] == expected
    assert [(b.first, b.last, b.n) for b in bins[4:]] == [(8, 15, 10)]
    assert [b.first for b in error_by_earlier(run, run.score, fewest_users=1)] == [0, 1, 2, 4, 8, 16, 32, 64]


# The peers.


@pytest.mark.parametrize(("scale", "middle"), [((1.0, 5.0), 3.0), ((1.0, 10.0), 5.5), ((0.0, 1.0), 0.5)])
def test_the_first_score_of_a_peer_is_the_middle_of_the_scale(scale: tuple[float, float], middle: float) -> None:
    for peer in peers(scale).values():
        assert peer.score(0, 0) == middle
        peer.learn(0, 0, scale[1])
        assert scale[0] <= peer.score(0, 0) <= scale[1]
        assert peer.score(0, 0) > middle


def test_the_running_mean_is_one() -> None:
    peer = RunningMean((1.0, 5.0))
    run = a_run([5.0, 1.0, 3.0, 3.0], [3.0] * 4, [0, 1, 0, 1])
    assert test_then_train(peer, run).tolist() == [3.0, 5.0, 3.0, 3.0]


def test_biased_mf_is_rivers_with_the_stated_settings() -> None:
    rng = np.random.default_rng(8)
    user, item, rating = rng.integers(0, 9, 400), rng.integers(0, 12, 400), rng.integers(1, 6, 400).astype(float)
    model = reco.BiasedMF(
        n_factors=10,
        bias_optimizer=optim.SGD(0.04),
        latent_optimizer=optim.SGD(0.08),
        l2_latent=0.05,
        weight_initializer=optim.initializers.Normal(mu=0.0, sigma=0.1, seed=1),
        latent_initializer=optim.initializers.Normal(mu=0.0, sigma=0.1, seed=1),
        seed=1,
    )
    expected = []
    for n, (u, i, y) in enumerate(zip(user.tolist(), item.tolist(), rating.tolist(), strict=True)):
        # Ids that are texts here and integers there: what a peer is called by must not matter.
        expected.append(float(np.clip(model.predict_one(f"u{u}", f"i{i}"), 1, 5)) if n else 3.0)
        model.learn_one(f"u{u}", f"i{i}", y)
    run = a_run(rating.tolist(), [3.0] * 400, user.tolist())
    object.__setattr__(run, "item", item)
    assert test_then_train(RiverBiasedMF((1.0, 5.0)), run).tolist() == expected
