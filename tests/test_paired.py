"""Two runs compared event by event, against the plain definition and a bootstrap over users."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from streaming.paired import ALL, paired
from streaming.prequential import EARLIER_GROUPS
from streaming.scored import ScoredRun
from tests.scored_runs import run_of

N = 600


def two_runs(seed: int = 1) -> tuple[ScoredRun, ScoredRun]:
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 40, N)
    rating = rng.integers(1, 6, N).astype(np.float64)
    taste = rng.normal(0, 0.5, 40)[user]  # what both runs miss of a user
    control = rating + taste + rng.normal(0, 1, N)
    candidate = control + rng.normal(0.05, 0.2, 40)[user] + rng.normal(0, 0.2, N)
    return run_of(rating, control, user, np.ones(N)), run_of(rating, candidate, user, np.ones(N))


def test_the_differences_are_those_of_the_errors_and_groups_are_by_earlier_events() -> None:
    control, candidate = two_runs()
    found = paired(control, candidate)
    assert list(found) == [ALL, *EARLIER_GROUPS]
    for name, (first, last) in {ALL: (0, None), **EARLIER_GROUPS}.items():
        mask = (control.earlier >= first) & (control.earlier <= (N if last is None else last))
        group = found[name]
        errors = [np.abs(run.score - run.rating)[mask] for run in (control, candidate)]
        assert group.control.n == group.candidate.n == mask.sum()
        if not mask.any():
            assert group.mae is None
            continue
        assert group.mae == pytest.approx(errors[1].mean() - errors[0].mean(), abs=1e-6)
        assert group.rmse == pytest.approx(np.sqrt((errors[1] ** 2).mean()) - np.sqrt((errors[0] ** 2).mean()), abs=1e-6)


def test_the_standard_errors_are_those_of_a_bootstrap_over_users_and_smaller_than_without_pairing() -> None:
    control, candidate = two_runs()
    found = paired(control, candidate)[ALL]
    rng = np.random.default_rng(2)
    places = [np.flatnonzero(control.user == user) for user in range(40)]
    draws = []
    for _ in range(2000):
        chosen = np.concatenate([places[user] for user in rng.integers(0, 40, 40)])
        errors = [np.abs(run.score - run.rating)[chosen] for run in (control, candidate)]
        draws.append((errors[1].mean() - errors[0].mean(), np.sqrt((errors[1] ** 2).mean()) - np.sqrt((errors[0] ** 2).mean())))
    spread = np.std(draws, axis=0)
    assert found.mae_se == pytest.approx(spread[0], rel=0.1)
    assert found.rmse_se == pytest.approx(spread[1], rel=0.1)
    assert found.control.mae_se is not None
    assert found.mae_se is not None
    assert found.mae_se < found.control.mae_se / 2


def test_only_events_that_both_scored_count() -> None:
    control, candidate = two_runs()
    scored = np.arange(N) % 3 > 0
    half = dataclasses.replace(candidate, scored=scored, score=np.where(scored, candidate.score, np.nan))
    found = paired(control, half)[ALL]
    assert found.control.n == found.candidate.n == scored.sum()
    assert found.mae == pytest.approx(
        (np.abs(candidate.score - candidate.rating) - np.abs(control.score - control.rating))[scored].mean(), abs=1e-6
    )


def test_a_run_differs_from_itself_by_nothing() -> None:
    control, _ = two_runs()
    found = paired(control, control)[ALL]
    assert (found.mae, found.mae_se, found.rmse, found.rmse_se) == (0, 0, 0, 0)


def test_runs_without_errors_or_events_have_no_difference_to_tell() -> None:
    control, _ = two_runs()
    perfect = dataclasses.replace(control, score=control.rating)
    assert paired(control, perfect)[ALL].rmse_se is None
    nothing = dataclasses.replace(control, scored=np.zeros(N, np.bool_))
    assert paired(control, nothing)[ALL].mae is None


def test_runs_over_other_events_are_refused() -> None:
    control, candidate = two_runs()
    with pytest.raises(ValueError, match="timestamp differs"):
        paired(control, dataclasses.replace(candidate, timestamp=candidate.timestamp + 1))
