"""The highest of very many scores: which they are, without a look at most of them."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64
"""Scores of which the highest is kept: of 16 to 256 the fastest where sixty of a hundred thousand are wanted."""


class Runs:
    """Scores (N,), run after run, of which only those are looked through that hold a score as high as is asked for.

    >>> runs = Runs(torch.arange(1000.0))
    >>> runs.best(2), runs.places_from(997.0)
    (tensor([999., 998.]), tensor([997, 998, 999]))
    """

    def __init__(self, scores: Tensor) -> None:
        count = len(scores) // RUN
        self._scores = scores
        self._runs = scores[: count * RUN].view(count, RUN)
        self._rest = scores[count * RUN :]
        self._highest = self._runs.amax(1)

    def best(self, wanted: int) -> Tensor:
        """The highest scores, (wanted,), as `torch.topk` finds them: what is no number counts as the highest."""
        if wanted >= len(self._runs):
            return self._scores.topk(wanted).values
        # So many runs have a score as high as this, be they no more.
        least = self._highest.topk(wanted).values[-1]
        return torch.cat([self._runs[~(self._highest < least)].flatten(), self._rest]).topk(wanted).values

    def places_from(self, least: float) -> Tensor:
        """The places of all scores of at least so much, in order; all scores must be numbers."""
        runs = (self._highest >= least).nonzero()[:, 0]
        run, place = (self._runs[runs] >= least).nonzero().unbind(1)
        rest = (self._rest >= least).nonzero()[:, 0] + self._runs.numel()
        return torch.cat([runs[run] * RUN + place, rest])
