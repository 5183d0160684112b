"""The way of many items to their scores through one task's adapted networks, `TOGETHER` at a time: what is between stays in the caches.

As whole products of thousands of rows each of them, each bias and each activation is a pass over memory, and those take longer than the
products do. What many items have in common, as a genre or a year, is multiplied once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.compiled import borrowing, compiled
from model.lanes import LANES
from model.products import accumulate, multiply, multiply_rows, take_product, through
from model.rowkernels import activate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from model.kernels import Floats, Numbers
    from model.numbering import Flags

TOGETHER = 160
"""Rows at once: 20 KB of each thing at d_e of 32."""

SEVERAL = 4
"""Items that have a feature's value in common, on average, from which on it is held and multiplied once for all of them."""


class Common(NamedTuple):
    """A feature of items of which there are few different values."""

    of: slice
    """Which numbers of p_i it is."""
    firsts: Numbers
    """The items (s,) at which the values first come."""
    values: Numbers
    """(m,), which of them each item has."""


class Items(NamedTuple):
    """Profiles of items, p_i (m, d_i), in parts: what they have for themselves, and features whose values several have in common."""

    own: Floats  # (m, w), side by side
    columns: Flags  # (d_i,), which numbers of p_i these are
    shared: list[tuple[slice, Floats]]  # by feature, which numbers of p_i it is, and its different values (s, d_e)
    which: NDArray[np.int32]  # (m, features shared), the place of an item's value among those of all shared features
    start: Floats  # (m, d), what the first layer of the item network makes of them before adaptation; no rows where it is the last

    @classmethod
    def of(cls, p_i: Floats, start: Floats, common: Sequence[Common]) -> Items:
        """Profiles in parts, of which several items have these in ``common``."""
        columns, which, before = np.ones(p_i.shape[1], np.bool_), np.empty((len(p_i), len(common)), np.int32), 0
        for number, (of, firsts, values) in enumerate(common):
            columns[of] = False
            which[:, number] = before + values
            before += len(firsts)
        shared = [(of, p_i[firsts, of]) for of, firsts, _ in common]
        return cls(np.ascontiguousarray(p_i[:, columns]), columns, shared, which, start)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in (self.own, self.which, self.start, *(values for _, values in self.shared)))

    def times(self, matrix: Floats) -> tuple[Floats, Floats]:
        """What a product p_i ``matrix`` (d_i, k) is made of: the factor of ``own`` (w, k), and what each shared value comes to (s, k)."""
        known = [values @ matrix[of] for of, values in self.shared]
        return matrix[self.columns], np.concatenate(known) if known else np.empty((0, matrix.shape[1]), matrix.dtype)


def in_common(of: slice, encoded: Numbers | NDArray[np.int32]) -> Common | None:
    """What items have in common of a feature that is encoded to these rows (m, slots); None where most have a value of their own."""
    rows = np.ascontiguousarray(encoded)
    whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
    _, firsts, values = np.unique(whole, return_index=True, return_inverse=True)
    return Common(of, firsts, values) if SEVERAL * len(firsts) <= len(rows) else None


class Way(NamedTuple):
    """An item's way to its score, of products with an activation between each and the next.

    The first layer puts out d numbers, either ``constant`` and a product p_i ``first``, or ``constant`` and what it was before adaptation,
    less (p_i ``first``) ``learned``. The next n put out d as well, and the last one number. So that registers are full, columns of 0
    follow in ``first``, up to a multiple of `LANES`, as `filled` has them.
    """

    first: Floats  # (d_i, k)
    learned: Floats  # (k, d); no rows where nothing is
    constant: Floats  # (d,)
    weights: Floats  # (n, d, d)
    biases: Floats  # (n, d)
    last: Floats  # (1, d), transposed
    last_bias: np.floating
    activation: int


def filled(columns: int) -> int:
    """So many columns, up to full registers."""
    return -(-columns // LANES) * LANES


@compiled
def scores(way: Way, own: Floats, which: NDArray[np.int32], start: Floats, factor: Floats, known: Floats) -> Floats:
    """The scores (m, 1) of items in parts as `Items` has them, with what `Items.times` makes of ``way.first``."""
    d, k, kind = len(way.constant), factor.shape[1], own.dtype
    product, values, found = np.empty((TOGETHER, k), kind), np.empty((2, TOGETHER, d), kind), np.empty((len(own), 1), kind)
    pass_through(way, own, which, start, factor, known, product, values, found)
    return found


@borrowing
def pass_through(
    way: Way,
    own: Floats,
    which: NDArray[np.int32],
    start: Floats,
    factor: Floats,
    known: Floats,
    product: Floats,
    values: Floats,
    found: Floats,
) -> None:
    """The loop of `scores`; ``product`` (TOGETHER, k) and ``values`` (2, TOGETHER, d) are room."""
    learned, constant, one = way.learned, way.constant, own.dtype.type(1)
    for begin in range(0, len(own), TOGETHER):
        n, at = min(TOGETHER, len(own) - begin), 0
        multiply(own[begin : begin + n], factor, product[:n])
        for place in range(n):
            of, row, into = which[begin + place], product[place], values[0, place]
            for feature in range(len(of)):
                accumulate(row, one, known[of[feature]])
            before = start[begin + place] if len(learned) > 0 else row
            for k in range(len(constant)):
                into[k] = constant[k] + before[k]
        if len(learned) > 0:
            take_product(product[:n], learned, values[0, :n])
        for layer in range(len(way.weights)):
            activate(values, at, n, way.activation)
            through(values[at, :n], way.weights[layer], way.biases[layer : layer + 1], values[1 - at, :n], False)  # noqa: FBT003
            at = 1 - at
        activate(values, at, n, way.activation)
        multiply_rows(values[at, :n], way.last, found[begin : begin + n])
        for place in range(begin, begin + n):
            found[place, 0] += way.last_bias
