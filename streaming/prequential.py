"""Prequential (test-then-train) evaluation: the error of scores that were made before their event was learned from.

MAE and RMSE are river's. Their standard errors are clustered by user, since a user's errors are not independent of each other: with
r_i the deviation of an event's loss from the mean loss and n events of G users,

    se = sqrt(G / (G - 1) * sum over users of (sum over the user's events of r_i)^2) / n

(Liang and Zeger 1986, with the usual correction for few clusters), carried from the mean square to its root by the delta method,
se(rmse) = se(mse) / (2 rmse). A standard error is None for fewer than two users.
"""

from __future__ import annotations

import math
import statistics

import msgspec
import numpy as np
from numpy.typing import NDArray

from streaming.scored import ScoredRun

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

FIRST = 20_000
"""Events left out of ``after_20000``: the ones on which settings were chosen."""

EARLIER_GROUPS: dict[str, tuple[int, int | None]] = {"0": (0, 0), "1-5": (1, 5), "1-20": (1, 20), "21+": (21, None)}
"""Groups of events by how many earlier events their user had, as first and last number."""

Z_80 = 1.2815515655446004
"""Half the width of a normal distribution's central 80 % interval, in standard deviations."""


class Errors(msgspec.Struct, frozen=True):
    """Errors over ``n`` events. Without events there are none; the standard errors need two users."""

    n: int
    mae: float | None
    rmse: float | None
    mae_se: float | None
    rmse_se: float | None


class Difference(msgspec.Struct, frozen=True):
    """Coldstream's MAE minus this one's on the same events, with the standard error of the difference. Below 0, Coldstream is better."""

    mae: float | None
    mae_se: float | None


class Result(Errors, frozen=True):
    """The errors of one method.

    ``coverage_80`` is given for Coldstream, None if its scores have no standard deviation; ``difference`` is given for its peers.
    """

    by_earlier_events: dict[str, Errors]
    after_20000: Errors
    last_window: Errors
    coverage_80: float | msgspec.UnsetType | None = msgspec.UNSET
    difference: Difference | msgspec.UnsetType = msgspec.UNSET


def clustered_se(loss: Floats, user: NDArray[np.int64]) -> float | None:
    """The standard error of the mean of ``loss`` (n,), clustered by ``user`` (n,)."""
    if len(loss) == 0:
        return None
    _, cluster = np.unique(user, return_inverse=True)
    sums = np.bincount(cluster, weights=loss - loss.mean())
    if len(sums) < 2:
        return None
    return math.sqrt(len(sums) / (len(sums) - 1) * float(sums @ sums)) / len(loss)


def errors(rating: Floats, score: Floats, user: NDArray[np.int64]) -> Errors:
    """MAE and RMSE of ``score`` against ``rating``, with standard errors. All three are of shape (n,)."""
    n = len(rating)
    if n == 0:
        return Errors(0, None, None, None, None)
    loss = np.abs(score - rating)
    mean, root = float(loss.mean()), math.sqrt(float((loss**2).mean()))
    square_se = clustered_se(loss**2, user)
    root_se = None if square_se is None else square_se / (2 * root) if root > 0 else 0.0
    return Errors(n, _rounded(mean), _rounded(root), _rounded(clustered_se(loss, user)), _rounded(root_se))


def evaluate(run: ScoredRun, score: Floats, window: int) -> Result:
    """The result of one method's ``score`` (n,), over the events that Coldstream scored, so that all methods are compared on the same ones.

    ``window`` is the number of events of ``last_window``.
    """

    def over(mask: Mask) -> Errors:
        mask = mask & run.scored
        return errors(run.rating[mask], score[mask], run.user[mask])

    place = np.arange(len(run))
    whole = over(np.ones(len(run), np.bool_))
    return Result(
        n=whole.n,
        mae=whole.mae,
        rmse=whole.rmse,
        mae_se=whole.mae_se,
        rmse_se=whole.rmse_se,
        by_earlier_events={
            name: over((run.earlier >= first) & (run.earlier <= (last if last is not None else run.earlier)))
            for name, (first, last) in EARLIER_GROUPS.items()
        },
        after_20000=over(place >= FIRST),
        last_window=over(place >= len(run) - window),
    )


def difference(run: ScoredRun, score: Floats) -> Difference:
    """How Coldstream's MAE differs from that of a peer's ``score`` (n,), event by event."""
    s = run.scored
    gap = np.abs(run.score[s] - run.rating[s]) - np.abs(score[s] - run.rating[s])
    return Difference(_rounded(float(gap.mean())) if len(gap) else None, _rounded(clustered_se(gap, run.user[s])))


def coverage(run: ScoredRun, z: float = Z_80) -> float | None:
    """The share of ratings inside score ± ``z`` sd, bounds included, among the scores that have an sd. None where no score has one."""
    has_sd = run.scored & ~np.isnan(run.sd)
    if not has_sd.any():
        return None
    return _rounded(float((np.abs(run.rating - run.score)[has_sd] <= z * run.sd[has_sd]).mean()))


def normal_quantile(share: float) -> float:
    """Half the width of a normal distribution's central interval of the given share, in standard deviations."""
    return statistics.NormalDist().inv_cdf((1 + share) / 2)


def running_mae(run: ScoredRun, score: Floats, width: int, points: int = 400) -> tuple[list[int], list[float]]:
    """MAE over the last ``width`` scored events, at up to ``points`` places: events so far, and the error there."""
    total = np.r_[0.0, np.cumsum(np.abs(score - run.rating)[run.scored])]
    n = len(total) - 1
    if n == 0:
        return [], []
    ends = np.unique(np.linspace(min(width, n), n, points).astype(np.int64))
    starts = np.maximum(ends - width, 0)
    return ends.tolist(), np.round((total[ends] - total[starts]) / (ends - starts), 5).tolist()


class Bin(msgspec.Struct, frozen=True):
    """The MAE of events whose user had ``first`` to ``last`` earlier events."""

    first: int
    last: int
    n: int
    mae: float
    mae_se: float | None


def error_by_earlier(run: ScoredRun, score: Floats, fewest_users: int = 20) -> list[Bin]:
    """MAE in bins of earlier events that double in width: 0, 1, 2-3, 4-7 and so on.

    Bins of fewer than ``fewest_users`` users are left out: their error says more about those users than about the method.
    """
    loss = np.abs(score - run.rating)
    bins = []
    first, last = 0, 0
    longest = int(run.earlier.max(initial=0))
    while first <= longest:
        mask = run.scored & (run.earlier >= first) & (run.earlier <= last)
        if len(np.unique(run.user[mask])) >= fewest_users:
            se = clustered_se(loss[mask], run.user[mask])
            bins.append(Bin(first, last, int(mask.sum()), round(float(loss[mask].mean()), 5), _rounded(se)))
        first, last = last + 1, 2 * last + 1
    return bins


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 7)
