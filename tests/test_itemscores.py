"""`model.itemscores.scores` against the same in a few lines of double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.itemscores import TOGETHER, Way, scores
from model.rowkernels import CODES

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
}


@given(
    seed=st.integers(0, 1000),
    items=st.sampled_from([1, 7, TOGETHER - 1, TOGETHER, 2 * TOGETHER + 3]),
    wide=st.sampled_from([1, 6, 36]),
    size=st.sampled_from([1, 5, 32]),
    factors=st.sampled_from([0, 1, 15]),
    between=st.integers(0, 3),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_items_pass_through_what_a_task_has_learned(
    kind: type, seed: int, items: int, wide: int, size: int, factors: int, between: int, activation: str
) -> None:
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(kind)

    way = Way(
        first=drawn(wide, size),
        first_bias=drawn(1, size),
        rows=drawn(wide, factors),
        learned=drawn(factors, size),
        weights=drawn(between, size, size),
        biases=drawn(between, size),
        last=drawn(size, 1),
        last_bias=drawn(1, 1),
        activation=CODES[activation],
    )
    p_i, start = drawn(items, wide), drawn(items, size)
    x = start - (p_i @ way.rows + 1.0) @ way.learned if factors else p_i @ way.first + way.first_bias
    for weight, bias in zip(way.weights, way.biases, strict=True):
        x = ACTIVATIONS[activation](x) @ weight + bias
    expected = ACTIVATIONS[activation](x) @ way.last + way.last_bias
    np.testing.assert_allclose(scores(way, p_i, start), expected, atol=1e-12 if kind is np.float64 else 1e-4)
