from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.ranking import ndcg


def dcg(ratings: list[float], k: int) -> float:
    return sum((2**rating - 1) / math.log2(rank + 1) for rank, rating in enumerate(ratings[:k], 1))


def by_definition(scores: list[float], ratings: list[float], k: int) -> float:
    """The mean over every order that the scores allow, divided by the best DCG of any order at all."""
    orders = list(itertools.permutations(range(len(scores))))
    allowed = [order for order in orders if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))]
    best = max(dcg([ratings[place] for place in order], k) for order in orders)
    if best == 0:
        return math.nan
    return sum(dcg([ratings[place] for place in order], k) for order in allowed) / len(allowed) / best


def one(scores: list[float], ratings: list[float], k: int) -> float:
    score, rating = (torch.tensor([values], dtype=torch.float64) for values in (scores, ratings))
    return float(ndcg(score, rating, torch.ones(1, len(scores)), k)[0])


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=5)


@given(pairs, st.integers(1, 6))
def test_it_is_the_mean_over_all_orders_that_the_scores_allow(rated: list[tuple[int, int]], k: int) -> None:
    scores, ratings = [float(score) for score, _ in rated], [float(rating) for _, rating in rated]
    assert one(scores, ratings, k) == pytest.approx(by_definition(scores, ratings, k), nan_ok=True)


@given(st.lists(pairs, min_size=1, max_size=4), st.integers(1, 4))
def test_padding_changes_nothing(batch: list[list[tuple[int, int]]], k: int) -> None:
    width = max(map(len, batch)) + 2
    # What stands in the padding must not matter, so it holds the highest score and rating of all.
    scores, ratings = (torch.full((len(batch), width), 9.0, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(len(batch), width)
    for row, rated in enumerate(batch):
        scores[row, : len(rated)] = torch.tensor([float(score) for score, _ in rated])
        ratings[row, : len(rated)] = torch.tensor([float(rating) for _, rating in rated])
        mask[row, : len(rated)] = 1
    alone = [one([float(score) for score, _ in rated], [float(rating) for _, rating in rated], k) for rated in batch]
    assert ndcg(scores, ratings, mask, k).tolist() == pytest.approx(alone, nan_ok=True)


def test_known_values() -> None:
    assert one([3, 2, 1], [5, 3, 1], 3) == 1
    assert one([1, 2], [5, 1], 1) == pytest.approx(1 / 31)
    assert one([1, 1], [5, 1], 1) == pytest.approx((31 + 1) / 2 / 31)
    assert math.isnan(one([1, 2], [0, 0], 1))
