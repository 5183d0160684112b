"""The way of many items to their scores through one task's adapted networks, `TOGETHER` at a time: what is between stays in the caches.

As whole products of thousands of rows each of them, each bias and each activation is a pass over memory, and those take longer than the
products do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.compiled import borrowing, compiled
from model.products import multiply, take_product, through
from model.rowkernels import activate, copy, lift

if TYPE_CHECKING:
    from model.kernels import Floats

TOGETHER = 160
"""Rows at once: 20 KB of each thing at d_e of 32."""


class Way(NamedTuple):
    """An item's way to its score, of products with an activation between each and the next.

    The first layer puts out d numbers, either as a product with ``first``, or as what it was before adaptation less (p_i rows' + 1)
    learned, of r factors. The next n put out d as well, and the last one number.
    """

    first: Floats  # (d_i, d)
    first_bias: Floats  # (1, d)
    rows: Floats  # (d_i, r), transposed; r is 0 where there are no factors
    learned: Floats  # (r, d)
    weights: Floats  # (n, d, d)
    biases: Floats  # (n, d)
    last: Floats  # (d, 1)
    last_bias: Floats  # (1, 1)
    activation: int


@compiled
def scores(way: Way, p_i: Floats, start: Floats) -> Floats:
    """The scores (m, 1) of items with profiles (m, d_i), and with factors what the first layer made of them before, (m, d)."""
    d, r, kind = way.first_bias.shape[1], way.rows.shape[1], p_i.dtype
    likeness, values, found = np.empty((TOGETHER, r), kind), np.empty((2, TOGETHER, d), kind), np.empty((len(p_i), 1), kind)
    pass_through(way, p_i, start, likeness, values, found)
    return found


@borrowing
def pass_through(way: Way, p_i: Floats, start: Floats, likeness: Floats, values: Floats, found: Floats) -> None:
    """The loop of `scores`; ``likeness`` (TOGETHER, r) and ``values`` (2, TOGETHER, d) are room."""
    for begin in range(0, len(p_i), TOGETHER):
        n = min(TOGETHER, len(p_i) - begin)
        rows, at = p_i[begin : begin + n], 0
        if way.rows.shape[1] > 0:
            alike, into = likeness[:n], values[0, :n]
            multiply(rows, way.rows, alike)
            lift(alike)
            for place in range(n):
                copy(start[begin + place], into[place])
            take_product(alike, way.learned, into)
        else:
            through(rows, way.first, way.first_bias, values[0, :n], False)  # noqa: FBT003  what is compiled has no names
        for layer in range(len(way.weights)):
            activate(values, at, n, way.activation)
            through(values[at, :n], way.weights[layer], way.biases[layer : layer + 1], values[1 - at, :n], False)  # noqa: FBT003
            at = 1 - at
        activate(values, at, n, way.activation)
        through(values[at, :n], way.last, way.last_bias, found[begin : begin + n], False)  # noqa: FBT003
