"""How well scores order a user's items: nDCG at k."""

from __future__ import annotations

import torch
from torch import Tensor


def ndcg(scores: Tensor, ratings: Tensor, mask: Tensor, k: int) -> Tensor:
    """Normalised discounted cumulative gain of the ``k`` items that ``scores`` put first, shape (B,).

    All arguments are (B, q); where ``mask`` is 0 there is no item. The gain of an item is 2^rating - 1 and its discount 1 / log2(1 + rank),
    as in Burges et al. (ICML 2005) and MAMO. Items with the same score share the discounts of the ranks they take together (McSherry and
    Najork, ECIR 2008): a method that scores everything alike gets what a random order would get on average. NaN where no item has a gain.
    """
    gains = (ratings.exp2() - 1) * mask
    ideal = _dcg(ratings, gains, mask, k)
    return torch.where(ideal > 0, _dcg(scores, gains, mask, k) / ideal, torch.nan)


def _dcg(scores: Tensor, gains: Tensor, mask: Tensor, k: int) -> Tensor:
    """The expected DCG at ``k`` of an order by ``scores`` in which ties are broken at random."""
    rank = torch.arange(1, scores.shape[1] + 1, dtype=gains.dtype)
    discount = torch.where(rank <= k, 1 / (rank + 1).log2(), 0)
    # Element p is what the first p ranks are worth together.
    worth = torch.cat([discount.new_zeros(1), discount.cumsum(0)])
    others = mask[:, None, :] > 0
    before = ((scores[:, None, :] > scores[:, :, None]) & others).sum(2)
    # An item ties with itself; where there is none, its gain is 0 and the division must only not fail.
    tied = ((scores[:, None, :] == scores[:, :, None]) & others).sum(2).clamp(min=1)
    last = (before + tied).clamp(max=scores.shape[1])
    return (gains * (worth[last] - worth[before]) / tied).sum(1)
