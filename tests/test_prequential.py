"""Errors and their standard errors against slow oracles and repeated draws; the groups, the peers."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from river import metrics, optim, reco

from streaming.peers import RiverBiasedMF, RunningMean, peers, prequential_scores
from streaming.prequential import Bin, clustered_se, coverage, difference, error_by_earlier, errors, evaluate, running_mae
from tests.scored_runs import run_of


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
    result = evaluate(run_of(rating.tolist(), score.tolist(), user.tolist()), score, window=20)
    groups = result.by_earlier_events
    assert list(groups) == ["0", "1-5", "1-20", "21+"]
    assert [group.n for group in groups.values()] == [n - 29 - 1, 5, 20, 9]
    assert groups["1-5"].mae == 3.0
    assert groups["1-20"].mae == 10.5
    assert groups["21+"].mae == 25.0
    assert (result.after_20000.n, result.after_20000.mae) == (50, 2.0)
    assert (result.last_window.n, result.last_window.mae) == (20, 2.0)
    assert result.n == n - 1


def test_coverage_counts_ratings_inside_the_interval() -> None:
    sd = [1.0, 1.0, 1.0, 1.0, np.nan]
    score = [3.0, 3.0, 3.0, 3.0, 3.0]
    run = run_of([3 + 1.2815515, 3 + 1.2815516, 1.0, 3.0, 3.0], score, [0, 1, 2, 3, 4], sd)
    assert coverage(run) == 0.5
    assert coverage(run_of([1.0], [1.0], [0])) is None
    rng = np.random.default_rng(5)
    scores = rng.uniform(1, 5, 50_000)
    normal = run_of((scores + 0.7 * rng.normal(size=50_000)).tolist(), scores.tolist(), [0] * 50_000, [0.7] * 50_000)
    assert coverage(normal) == pytest.approx(0.8, abs=0.006)


def test_the_difference_of_two_methods_is_paired() -> None:
    run = run_of([3.0, 3.0, 3.0, 3.0], [4.0, 3.5, 3.0, 5.0], [0, 0, 1, 1])
    gap = difference(run, np.array([4.5, 4.0, 3.5, 5.5]))
    assert (gap.mae, gap.mae_se) == (-0.5, 0.0)


def test_running_error_against_slices() -> None:
    rng = np.random.default_rng(6)
    rating, score = rng.integers(1, 6, 300).astype(float), rng.uniform(1, 5, 300)
    run = run_of(rating.tolist(), score.tolist(), [0] * 300)
    events, mae = running_mae(run, score, 50, points=40)
    assert (events[0], events[-1], len(events)) == (50, 300, 40)
    for end, value in zip(events, mae, strict=True):
        assert value == pytest.approx(np.abs(score - rating)[end - 50 : end].mean(), abs=1e-5)
    assert running_mae(run, score, 1000)[0] == [300]


def test_bins_of_earlier_events_double_and_those_of_few_users_are_left_out() -> None:
    run = run_of([3.0] * 100, [4.0] * 90 + [5.0] * 10, [0] * 90 + [1] * 10)
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
    run = run_of([5.0, 1.0, 3.0, 3.0], [3.0] * 4, [0, 1, 0, 1])
    assert prequential_scores(peer, run).tolist() == [3.0, 5.0, 3.0, 3.0]


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
    run = run_of(rating.tolist(), [3.0] * 400, user.tolist())
    object.__setattr__(run, "item", item)
    assert prequential_scores(RiverBiasedMF((1.0, 5.0)), run).tolist() == expected
    # On another scale it says the same in that scale's points, and does not diverge.
    wide = run_of((25 * (rating - 1)).tolist(), [50.0] * 400, user.tolist())
    object.__setattr__(wide, "item", item)
    assert prequential_scores(RiverBiasedMF((0.0, 100.0)), wide) == pytest.approx(25 * (np.array(expected) - 1), abs=1e-6)
