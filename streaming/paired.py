"""Two runs over the same events, compared event by event.

Most of what makes an event hard to predict is the same for both, so the difference of their errors is known far better than either
error. Standard errors are clustered by user as in `streaming.prequential`. That of the difference of two root mean squares comes by the
delta method: of the mean of e_1^2 / (2 rmse_1) - e_2^2 / (2 rmse_2), event by event.
"""

from __future__ import annotations

import msgspec
import numpy as np

from streaming.prequential import EARLIER_GROUPS, Errors, Floats, clustered_se, errors
from streaming.scored import ScoredRun

ALL = "all"
"""The group of all events; the others are `EARLIER_GROUPS`."""


class Paired(msgspec.Struct, frozen=True):
    """The errors of control and candidate on the same events, and the candidate's minus the control's: below 0, the candidate is better."""

    control: Errors
    candidate: Errors
    mae: float | None
    mae_se: float | None
    rmse: float | None
    rmse_se: float | None


def paired(control: ScoredRun, candidate: ScoredRun) -> dict[str, Paired]:
    """Compare two runs on the events that both scored, all of them and by how many earlier events their user had.

    Raises `ValueError` for runs over different events.
    """
    for column in ("partition", "offset", "rating", "timestamp", "earlier"):
        if not np.array_equal(getattr(control, column), getattr(candidate, column)):
            raise ValueError(f"the runs are not over the same events: {column} differs")
    both = control.scored & candidate.scored
    groups = {ALL: both}
    for name, (first, last) in EARLIER_GROUPS.items():
        groups[name] = both & (control.earlier >= first) & (control.earlier <= (last if last is not None else control.earlier))
    return {
        name: _compare(control.rating[mask], control.score[mask], candidate.score[mask], control.user[mask])
        for name, mask in groups.items()
    }


def _compare(rating: Floats, control: Floats, candidate: Floats, user: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Paired:
    first, second = errors(rating, control, user), errors(rating, candidate, user)
    if first.mae is None or second.mae is None or first.rmse is None or second.rmse is None:
        return Paired(first, second, None, None, None, None)
    gap = np.abs(candidate - rating) - np.abs(control - rating)
    mae, mae_se = float(gap.mean()), clustered_se(gap, user)
    root = [float(np.sqrt(np.mean((score - rating) ** 2))) for score in (control, candidate)]
    rmse_se = None
    if min(root) > 0:
        rmse_se = clustered_se((candidate - rating) ** 2 / (2 * root[1]) - (control - rating) ** 2 / (2 * root[0]), user)
    return Paired(first, second, _rounded(mae), _rounded(mae_se), _rounded(root[1] - root[0]), _rounded(rmse_se))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 7)
