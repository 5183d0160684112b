"""`model.itemscores.scores` against the same in a few lines of double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.itemscores import TOGETHER, Items, Way, filled, in_common, scores
from model.rowkernels import CODES

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "softplus": lambda x: np.log1p(np.exp(x)),
}


@given(
    seed=st.integers(0, 1000),
    items=st.sampled_from([1, 7, TOGETHER - 1, TOGETHER, 2 * TOGETHER + 3]),
    features=st.lists(st.sampled_from([1, 5, 2000]), min_size=1, max_size=4),
    size=st.sampled_from([1, 5, 32]),
    factors=st.sampled_from([0, 1, 15]),
    between=st.integers(0, 3),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_items_pass_through_what_a_task_has_learned(
    kind: type, seed: int, items: int, features: list[int], size: int, factors: int, between: int, activation: str
) -> None:
    """Of each feature there are so many values, a few of which many items have in common."""
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.3, shape).astype(kind)

    wide, values = 3 * len(features), [rng.integers(0, count, (items, 1)) for count in features]
    p_i = np.concatenate([drawn(count, 3)[of[:, 0]] for count, of in zip(features, values, strict=True)], 1)
    found = [in_common(slice(3 * place, 3 * place + 3), of) for place, of in enumerate(values)]
    parts = Items.of(p_i, drawn(items, size), [each for each in found if each is not None])
    first, learned = drawn(wide, factors or size), drawn(factors, size)
    more = filled(first.shape[1]) - first.shape[1]
    way = Way(
        first=np.pad(first, [(0, 0), (0, more)]),
        learned=np.pad(learned, [(0, more), (0, 0)]) if factors else learned,
        constant=drawn(size),
        weights=drawn(between, size, size),
        biases=drawn(between, size),
        last=drawn(1, size),
        last_bias=drawn(1)[0],
        activation=CODES[activation],
    )
    x = way.constant + (parts.start - p_i @ first @ learned if factors else p_i @ first)
    for weight, bias in zip(way.weights, way.biases, strict=True):
        x = ACTIVATIONS[activation](x) @ weight + bias
    expected = ACTIVATIONS[activation](x) @ way.last.T + way.last_bias
    own = scores(way, parts.own, parts.which, parts.start, *parts.times(way.first))
    np.testing.assert_allclose(own, expected, atol=1e-12 if kind is np.float64 else 1e-4)


def test_only_what_several_items_have_in_common_is_held_once() -> None:
    few, many, of = np.arange(40)[:, None] % 10, np.arange(40)[:, None] % 11, slice(2, 4)
    assert in_common(of, many) is None
    found = in_common(of, few)
    assert found is not None
    assert (found.firsts.tolist(), found.values.tolist()) == (list(range(10)), few[:, 0].tolist())
    p_i = np.random.default_rng(1).normal(size=(40, 6))
    p_i[:, of] = p_i[:10, of][few[:, 0]]
    parts = Items.of(p_i, p_i[:0], [found])
    assert (parts.own.shape, [values.shape for _, values in parts.shared]) == ((40, 4), [(10, 2)])
    factor, known = parts.times(p_i[:6])
    np.testing.assert_allclose(parts.own @ factor + known[parts.which[:, 0]], p_i @ p_i[:6])
