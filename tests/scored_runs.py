"""Scored runs made by hand, for what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streaming.scored import ScoredRun, count_earlier


def run_of(
    rating: ArrayLike,
    score: ArrayLike,
    user: Sequence[int] | NDArray[np.int64],
    sd: ArrayLike | None = None,
    scored: ArrayLike | None = None,
) -> ScoredRun:
    """One partition of events in order, each of an item of its own. An event whose score is NaN has none."""
    users, scores = np.asarray(user, np.int64), np.asarray(score, np.float64)
    n = len(users)
    return ScoredRun(
        partition=np.zeros(n, np.int64),
        offset=np.arange(n),
        user=users,
        item=np.arange(n),
        rating=np.asarray(rating, np.float64),
        timestamp=np.arange(n),
        earlier=count_earlier(users),
        scored=~np.isnan(scores),
        score=scores,
        sd=np.full(n, np.nan) if sd is None else np.asarray(sd, np.float64),
        users=[],
        items=[],
        scores=n,
        duplicate_scores=0,
        orphan_scores=0,
        nonfinite_scores=0,
        earlier_disagreements=0,
        unscored=0,
        refused=0,
        dead_letters=0,
        scores_sha256="",
    )
