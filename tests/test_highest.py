"""The highest of many scores against a look at all of them."""

from __future__ import annotations

import doctest

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import highest
from model.highest import RUN, Runs

few = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0, 7.0, np.inf])


@settings(max_examples=200)
@given(
    count=st.integers(0, 6 * RUN + 3),
    wanted=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    put=st.dictionaries(st.integers(0, 6 * RUN + 2), few),
    unknown=st.booleans(),
)
def test_they_are_those_of_all(count: int, wanted: int, seed: int, put: dict[int, float], unknown: bool) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).choice([-3.0, -2.0, -1.5, 0.0, 0.25], count))
    for place, value in put.items():
        if place < count:
            scores[place] = value
    for least in (-2.0, 0.0, 0.3, 8.0):
        assert Runs(scores).places_from(least).tolist() == (scores >= least).nonzero()[:, 0].tolist()
    if unknown and put:
        scores[min(put) : min(put) + 1] = np.nan
    if wanted <= count:
        torch.testing.assert_close(Runs(scores).best(wanted), scores.topk(wanted).values, rtol=0, atol=0, equal_nan=True)


def test_few_of_very_many_are_found() -> None:
    scores = torch.randn(50_001, generator=torch.Generator().manual_seed(1))
    runs = Runs(scores)
    assert torch.equal(runs.best(100), scores.topk(100).values)
    assert torch.equal(runs.places_from(3.0), (scores >= 3.0).nonzero()[:, 0])


def test_the_example_is_right() -> None:
    done = doctest.testmod(highest)
    assert (done.attempted, done.failed) == (2, 0)
