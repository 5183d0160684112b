"""The closed form for several tasks side by side: in an array whose last axis counts `LANES` tasks, a row is a vector register.

The matrices of one task are too small to be worth a call of BLAS each, and Numba makes no registers of such short rows by itself: checking
that arrays do not overlap costs it more than the work. So what all is made of is spelled out here for LLVM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from llvmlite import ir

from model.compiled import compiled
from model.products import multiply, scale
from model.registers import WIDE, Code, Matrix, code, of_three

if TYPE_CHECKING:
    from model.kernels import Floats

LANES = WIDE
"""Tasks side by side, one in each place of a register."""


def _add(of: Code, into: Matrix, left: Matrix, right: Matrix) -> None:
    first, (total,) = of.number(0), of.sums(1)
    of.builder.store(of.load(into.at(first, first), None), total)
    with code.for_range(of.builder, left.rows) as loop:
        of.join(total, *(of.load(rows.at(loop.index, first), None) for rows in (left, right)))
    of.store(of.builder.load(total), into.at(first, first), None)


def _product(*, turned: bool, sign: Literal["fadd", "fsub"] | None = None) -> Callable[[Floats, Floats, Floats], None]:
    """A function (into, left, right) of matrices of rows of `LANES`, (m, n), (m, k) and (k, n), that joins their product with ``into``.

    Where there is no sign it is filled with it. ``left`` may be given ``turned``, (k, m). Rows of all must be contiguous.
    """

    def write(of: Code, into: Matrix, left: Matrix, right: Matrix) -> None:
        builder = of.builder

        def tile(row: ir.Value, many: int, first: ir.Value) -> None:
            columns, sums = [of.next(first, column) for column in range(many)], of.sums(many)
            for column, total in zip(columns, sums, strict=True):
                builder.store(of.zero if sign is None else of.load(into.at(row, column), None), total)
            with code.for_range(builder, left.rows if turned else left.columns) as loop:
                by = of.load(left.at(loop.index, row) if turned else left.at(row, loop.index), None)
                for column, total in zip(columns, sums, strict=True):
                    of.join(total, by, of.load(right.at(loop.index, column), None), sign or "fadd")
            for column, total in zip(columns, sums, strict=True):
                of.store(builder.load(total), into.at(row, column), None)

        with code.for_range(builder, into.rows) as loop:
            of.parts(into.columns, lambda many, first: tile(loop.index, many, first))

    return of_three(write)


add = of_three(_add)
"""Into += sum_k left[k] right[k], for each of `LANES` tasks: into (LANES,), left and right (n, LANES), whose rows must be contiguous."""

fill = _product(turned=False)
"""Into = left right, matrices (m, n, LANES), (m, k, LANES) and (k, n, LANES), for each of `LANES` tasks."""

fill_turned = _product(turned=True)
"""Into = left' right, of a left (k, m, LANES), likewise."""

add_product = _product(turned=False, sign="fadd")
"""Into += left right."""

add_turned = _product(turned=True, sign="fadd")
"""Into += left' right."""

take_product = _product(turned=False, sign="fsub")
"""Into -= left right."""

take_turned = _product(turned=True, sign="fsub")
"""Into -= left' right."""


@compiled
def join(mixing: Floats, attended: Floats, embedded: Floats, mixed: Floats, t: Floats) -> None:
    """Fill T (F, F, LANES) of the users of `LANES` tasks, where [e_i, 1] T = [M_uI [e_u, e_i], 1]; without rows in M_UI it changes nothing.

    ``mixing`` (K, 2 d_e d_e) is M_UI, ``attended`` (K, LANES) a_u, ``embedded`` (d_e, LANES) e_u; ``mixed`` (2 d_e d_e, LANES) is room for
    M_uI.
    """
    d = len(embedded)
    t[:] = 0
    for k in range(d if len(mixing) else 0, d + 1):
        for lane in range(LANES):
            t[k, k, lane] = 1
    if len(mixing):
        multiply(mixing.T, attended, mixed)
        for j in range(d):
            of_user, of_item = 2 * d * j, 2 * d * j + d
            add(t[d, j], mixed[of_user:of_item], embedded)
            for i in range(d):
                scale(t[i, j], t.dtype.type(1), mixed[of_item + i])


@compiled
def condition(s: Floats, t: Floats, prior_precision: Floats, seen: Floats, sides: Floats, own: Floats, a: Floats, inverse: Floats) -> None:
    """A = T' S T + Lambda = R' R of `LANES` tasks, and R'^-1 of right-hand sides.

    ``s``, ``t`` and the room ``own`` and ``a`` are (F, F, LANES). Right-hand sides are T' ``seen`` plus what ``sides`` hold, both
    (F, m, LANES), and are left in ``sides``. R is left above the diagonal of ``a``, one over its diagonal in ``inverse`` (F, LANES).
    """
    f = len(s)
    fill(own, s, t)
    fill_turned(a, t, own)
    add_turned(sides, t, seen)
    for k in range(f):
        for lane in range(LANES):
            a[k, k, lane] += prior_precision[k]
    for k in range(f):
        above = a[:k, k : k + 1]
        take_turned(a[k : k + 1, k:], above, a[:k, k:])
        take_turned(sides[k : k + 1], above, sides[:k])
        for lane in range(LANES):
            inverse[k, lane] = 1 / math.sqrt(a[k, k, lane]) if a[k, k, lane] > 0 else np.nan
        for j in range(k + 1, f):
            for lane in range(LANES):
                a[k, j, lane] *= inverse[k, lane]
        for side in range(sides.shape[1]):
            for lane in range(LANES):
                sides[k, side, lane] *= inverse[k, lane]


@compiled
def substitute(a: Floats, inverse: Floats, sides: Floats, into: Floats) -> None:
    """R^-1 of right-hand sides (F, m, LANES), of what `condition` has left."""
    for k in range(len(sides) - 1, -1, -1):
        for side in range(sides.shape[1]):
            scale(into[k, side], into.dtype.type(1), sides[k, side])
        take_product(into[k : k + 1], a[k : k + 1, k + 1 :], into[k + 1 :])
        for side in range(sides.shape[1]):
            for lane in range(LANES):
                into[k, side, lane] *= inverse[k, lane]


@compiled
def slopes(by_score: Floats, by_variance: Floats, found: Floats, left: Floats, right: Floats, features: Floats, at_a: Floats) -> None:
    """From the gradients at scores and variances (q, LANES) to those at t, at each query's x and at A, of `LANES` tasks.

    ``found`` (F, 1 + q, LANES) is the mean found, and the spread of each query. Into ``features`` (1 + q, F, LANES), of which t is the
    first, and ``at_a`` (F, F, LANES), which is symmetric; ``left`` and ``right`` (2 + q, F, LANES) are room for the factors of its sum.
    """
    f, asked = len(found), len(by_score)
    two, half = found.dtype.type(2), found.dtype.type(0.5)
    features[0] = 0
    at_a[:] = 0
    for k in range(f):
        w = found[k, 0]
        add(features[0, k], by_score, found[k, 1:])
        for lane in range(LANES):
            left[asked, k, lane] = half * features[0, k, lane]
            right[asked, k, lane] = w[lane]
            left[asked + 1, k, lane] = half * w[lane]
            right[asked + 1, k, lane] = features[0, k, lane]
        for query in range(asked):
            v = found[k, 1 + query]
            for lane in range(LANES):
                left[query, k, lane] = by_variance[query, lane] * v[lane]
                right[query, k, lane] = v[lane]
                features[1 + query, k, lane] = by_score[query, lane] * w[lane] + two * left[query, k, lane]
    take_turned(at_a, left, right)


@compiled
def through_users(
    s: Floats,
    t: Floats,
    seen: Floats,
    at_a: Floats,
    features: Floats,
    turned: Floats,
    through: Floats,
    twice: Floats,
    at_own: Floats,
    at_seen: Floats,
) -> None:
    """From what `slopes` finds, back to items as all users see them and to T, of `LANES` tasks.

    ``twice`` (F, F, LANES) is two times the gradient at S, ``at_own`` (F, F, LANES) that at T, and ``at_seen`` (1 + q, F, LANES) are those
    at what is ``seen`` (F, 1 + q, LANES): at Z' N r, and at z of the queries. ``turned`` and ``through`` are room for T' and 2 T at_a.
    """
    one, two = t.dtype.type(1), t.dtype.type(2)
    for i in range(len(t)):
        for j in range(len(t)):
            scale(turned[j, i], one, t[i, j])
    fill(at_seen, features, turned)
    fill(through, t, at_a)
    for i in range(len(t)):
        for j in range(len(t)):
            scale(through[i, j], two, through[i, j])
    fill(twice, through, turned)
    fill(at_own, s, through)
    add_product(at_own, seen, features)
