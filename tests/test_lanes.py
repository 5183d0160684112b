"""Products of matrices side by side: those of numpy for each of them, of views too; nothing beside is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import lanes, products
from model.compiled import compiled
from model.lanes import LANES

if TYPE_CHECKING:
    from collections.abc import Callable

    from model.kernels import Floats

EDGE = 7.0
sizes = st.integers(0, 23)


@compiled
def plain(into: Floats, left: Floats, right: Floats) -> None:
    """What is to be filled, added to and taken from, (3, m, n, LANES)."""
    lanes.fill(into[0], left, right)
    lanes.add_product(into[1], left, right)
    lanes.take_product(into[2], left, right)


@compiled
def turned(into: Floats, left: Floats, right: Floats) -> None:
    """Likewise, of a left that stands transposed."""
    lanes.fill_turned(into[0], left, right)
    lanes.add_turned(into[1], left, right)
    lanes.take_turned(into[2], left, right)


@compiled
def rows(into: Floats, row: Floats, by: np.floating) -> None:
    """What is to be written and added to, (2, n)."""
    products.scale(into[0], by, row)
    products.accumulate(into[1], by, row)


def within(shape: tuple[int, ...], kind: type[np.floating], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """An array whose matrices have an edge around them, and these."""
    whole = np.full((*shape[:-3], shape[-3] + 2, shape[-2] + 3, LANES), EDGE, kind)
    inner = whole[..., 1:-1, 1:-2, :]
    inner[:] = rng.standard_normal(shape)
    return whole, inner


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(("multiply", "axes"), [(plain, "ikl,kjl->ijl"), (turned, "kil,kjl->ijl")])
@given(m=sizes, k=sizes, n=sizes, seed=st.integers(0, 2**32 - 1))
def test_matrices_side_by_side_are_multiplied_as_each_alone(
    multiply: Callable[..., None], axes: str, kind: type[np.floating], m: int, k: int, n: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    (whole, into), (_, right) = within((3, m, n, LANES), kind, rng), within((k, n, LANES), kind, rng)
    _, left = within((m, k, LANES) if multiply is plain else (k, m, LANES), kind, rng)
    before, wanted = into.astype(np.float64), np.einsum(axes, left.astype(np.float64), right.astype(np.float64))
    multiply(into, left, right)
    for found, expected in zip(into, (wanted, before[1] + wanted, before[2] - wanted), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-12 if kind is np.float64 else 1e-5) * (1 + k))
    into[:] = EDGE
    assert (whole == EDGE).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(n=st.integers(0, 40), seed=st.integers(0, 2**32 - 1))
def test_a_row_is_scaled_and_added_up_to_its_end_and_no_further(kind: type[np.floating], n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    whole, row, by = np.full((2, n + 3), EDGE, kind), rng.standard_normal(n + 1).astype(kind)[1:], kind(rng.standard_normal())
    into = whole[:, 1 : n + 1]
    into[:] = rng.standard_normal((2, n))
    expected = np.stack([by * row, into[1] + by * row])
    rows(into, row, by)
    np.testing.assert_allclose(into, expected, rtol=0, atol=1e-6 if kind is np.float32 else 1e-14)
    into[:] = EDGE
    assert (whole == EDGE).all()
