"""Rows through layers of one task, as loops that Numba compiles: the pieces that `model.stepkernels` is made of.

Rows stand in arrays (places, rows, d), a place for what goes into each layer in turn, and what is done to rows of one place is given the
array and the place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from model.compiled import borrowing, compiled

if TYPE_CHECKING:
    from model.kernels import Floats

RELU, TANH, SOFTPLUS = 1, 2, 3
"""The activations; 0 is none."""
CODES = {"relu": RELU, "tanh": TANH, "softplus": SOFTPLUS}
"""By their names in settings."""


@borrowing
def activate(values: Floats, place: int, n: int, kind: int) -> None:
    """Bring n rows through an activation."""
    d, zero = values.shape[2], values.dtype.type(0)
    if kind == RELU:
        for r in range(n):
            for k in range(d):
                values[place, r, k] = zero if values[place, r, k] < 0 else values[place, r, k]
    elif kind == TANH:
        for r in range(n):
            for k in range(d):
                values[place, r, k] = math.tanh(values[place, r, k])
    elif kind == SOFTPLUS:
        for r in range(n):
            for k in range(d):
                x = values[place, r, k]
                values[place, r, k] = max(x, zero) + math.log1p(math.exp(-abs(x)))


@borrowing
def before(at: Floats, values: Floats, place: int, n: int, kind: int) -> None:
    """Bring the gradient at n rows back through the activation that made ``values``."""
    d, zero, one = at.shape[2], at.dtype.type(0), at.dtype.type(1)
    if kind == RELU:
        for r in range(n):
            for k in range(d):
                at[place, r, k] = zero if values[place, r, k] <= 0 else at[place, r, k]
    elif kind == TANH:
        for r in range(n):
            for k in range(d):
                at[place, r, k] *= one - values[place, r, k] * values[place, r, k]
    elif kind == SOFTPLUS:
        for r in range(n):
            for k in range(d):
                at[place, r, k] *= -math.expm1(-values[place, r, k])


@compiled
def liken(rows: Floats, others: Floats, into: Floats) -> None:
    """Rows others' + 1, (m, k), (n, k) -> (m, n): the bias is the weight of a constant 1.

    By BLAS, since k is large; Numba counts what `np.dot` returns.
    """
    np.dot(rows, others.T, into)
    lift(into)


@borrowing
def add(values: Floats, into: Floats) -> None:
    """Add numbers (n,) to others. Rows are given as one: whether two arrays overlap is looked at once for each call."""
    for k in range(len(into)):
        into[k] += values[k]


@borrowing
def copy(values: Floats, into: Floats) -> None:
    """Copy numbers (n,)."""
    for k in range(len(into)):
        into[k] = values[k]


@borrowing
def take_sum(values: Floats, place: int, n: int, into: Floats) -> None:
    """Take n rows from one (d,)."""
    for r in range(n):
        for k in range(len(into)):
            into[k] -= values[place, r, k]


@borrowing
def lift(likeness: Floats) -> None:
    """Add 1 to each of likeness (n, r)."""
    for i in range(likeness.shape[0]):
        for j in range(likeness.shape[1]):
            likeness[i, j] += 1


@borrowing
def squared(values: Floats, place: int, n: int, at: Floats, at_place: int, bias: int) -> float:
    """The squared norm of x' at for n rows x and at, and with a bias that of the sum of at as well."""
    total = 0.0
    for i in range(n):
        for j in range(n):
            alike, along = float(bias), 0.0
            for k in range(values.shape[2]):
                alike += values[place, i, k] * values[place, j, k]
            for k in range(at.shape[2]):
                along += at[at_place, i, k] * at[at_place, j, k]
            total += alike * along
    return total


@borrowing
def shrink(values: Floats, n: int, by: float) -> None:
    """Multiply n rows of each place by a number."""
    for place in range(len(values)):
        for r in range(n):
            for k in range(values.shape[2]):
                values[place, r, k] *= by
