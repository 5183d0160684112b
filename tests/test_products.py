"""Products in compiled loops: those of numpy, of views too; nothing beside is touched, and a row's bits do not depend on its neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba.core.errors import TypingError

from model import products

if TYPE_CHECKING:
    from collections.abc import Callable

    from model.kernels import Floats

EDGE = 7.0

sizes = st.integers(0, 40)


class Drawn(NamedTuple):
    """Matrices (m, k) and (k, n), and one (m, n) that is a view into ``whole``, which has an edge around it."""

    left: Floats
    right: Floats
    into: Floats
    whole: Floats

    @classmethod
    def of(cls, m: int, k: int, n: int, kind: type[np.floating], seed: int) -> Drawn:
        rng = np.random.default_rng(seed)

        def view(rows: int, columns: int) -> tuple[Floats, Floats]:
            whole = np.full((rows + 2, columns + 3), EDGE, kind)
            whole[1:-1, 1:-2] = rng.standard_normal((rows, columns))
            return whole, whole[1:-1, 1:-2]

        whole, into = view(m, n)
        return cls(view(m, k)[1], view(k, n)[1], into, whole)

    def check(self, wanted: Floats) -> None:
        """That ``into`` is as wanted, of products summed in double precision, and its edge as it was."""
        self.check_other(self.into, wanted)
        self.whole[1:-1, 1:-2] = EDGE
        assert (self.whole == EDGE).all()

    def check_other(self, found: Floats, wanted: Floats) -> None:
        few = 1e-12 if found.dtype == np.float64 else 1e-5
        np.testing.assert_allclose(found, wanted, rtol=0, atol=few * (1 + self.left.shape[1]))


def double(values: Floats) -> Floats:
    return values.astype(np.float64)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(m=sizes, k=sizes, n=sizes, seed=st.integers(0, 2**32 - 1))
def test_products_are_those_of_numpy(kind: type[np.floating], m: int, k: int, n: int, seed: int) -> None:
    drawn = Drawn.of(m, k, n, kind, seed)
    wanted, before = double(drawn.left) @ double(drawn.right), double(drawn.into)
    products.take_product(drawn.left, drawn.right, drawn.into)
    drawn.check(before - wanted)
    products.multiply(drawn.left, drawn.right, drawn.into)
    drawn.check(wanted)
    # And of matrices that stand transposed, in an array of their own or in another; and of such as are whole arrays.
    for left in (np.asfortranarray(drawn.left), np.pad(drawn.left.T, ((0, 0), (0, 1)))[:, :m].T):
        products.multiply(left, drawn.right, drawn.into)
        drawn.check(wanted)
    whole = np.ascontiguousarray(drawn.into)
    products.multiply(np.ascontiguousarray(drawn.left), np.ascontiguousarray(drawn.right), whole)
    drawn.check_other(whole, wanted)
    products.multiply_rows(drawn.left, np.ascontiguousarray(drawn.right.T), drawn.into)
    drawn.check(wanted)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(m=sizes, k=sizes, n=sizes, seed=st.integers(0, 2**32 - 1))
def test_a_layer_is_product_bias_and_activation(kind: type[np.floating], m: int, k: int, n: int, seed: int, *, relu: bool) -> None:
    drawn = Drawn.of(m, k, n, kind, seed)
    row = np.random.default_rng(seed).standard_normal((1, n)).astype(kind)
    wanted = double(drawn.left) @ double(drawn.right) + double(row)
    products.through(drawn.left, drawn.right, row, drawn.into, relu)
    drawn.check(np.maximum(wanted, 0) if relu else wanted)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@given(m=sizes, n=sizes, seed=st.integers(0, 2**32 - 1))
def test_a_matrix_is_turned(kind: type[np.floating], m: int, n: int, seed: int) -> None:
    drawn = Drawn.of(m, 0, n, kind, seed)
    values = np.random.default_rng(seed).standard_normal((n, m)).astype(kind)
    products.turn(values, drawn.into)
    drawn.check(values.T)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_rows_bits_are_its_own(kind: type[np.floating]) -> None:
    drawn = Drawn.of(23, 37, 41, kind, seed=1)
    products.multiply(drawn.left, drawn.right, drawn.into)
    together, taken = drawn.into.copy(), drawn.into.copy()
    products.take_product(drawn.left, drawn.right, taken)
    for row in range(23):
        alone = together[row : row + 1].copy()
        products.take_product(drawn.left[row : row + 1], drawn.right, alone)
        np.testing.assert_array_equal(alone, taken[row : row + 1])
        products.multiply(drawn.left[row : row + 1], drawn.right, alone)
        np.testing.assert_array_equal(alone, together[row : row + 1])


def test_what_is_no_number_stays_where_it_is() -> None:
    drawn = Drawn.of(20, 20, 20, np.float32, seed=2)
    drawn.left[3, 4] = np.nan
    products.multiply(drawn.left, drawn.right, drawn.into)
    assert np.isnan(drawn.into[3]).all()
    assert np.isfinite(np.delete(drawn.into, 3, 0)).all()
    products.through(drawn.left, drawn.right, np.zeros((1, 20), np.float32), drawn.into, True)
    assert np.isnan(drawn.into[3]).all()
    assert np.isfinite(np.delete(drawn.into, 3, 0)).all()


@pytest.mark.parametrize("call", [products.multiply, products.take_product, products.multiply_rows])
def test_what_it_would_misread_is_refused(call: Callable[[Floats, Floats, Floats], None]) -> None:
    left, right, into = np.ones((3, 3), np.float32), np.ones((3, 3), np.float32), np.ones((3, 3), np.float32)
    for wrong in (
        (left.astype(np.float64), right, into),
        (left, right.astype(np.float64), into),
        (left, np.ones((3, 4), np.float32).T, into),
        (left, right, np.ones((3, 4), np.float32).T),
        (left[0], right, into),
    ):
        with pytest.raises(TypingError, match="contiguous rows"):
            call(*wrong)
