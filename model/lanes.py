"""The closed form for several tasks side by side: in an array whose last axis counts `LANES` tasks, a row is a vector register.

The matrices of one task are too small to be worth a call of BLAS each, and Numba makes no registers of such short rows by itself: checking
that arrays do not overlap costs it more than the work. So the one operation that all is made of is spelled out here for LLVM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as code  # its builders of loops and variables
from numba.extending import intrinsic

from model.compiled import compiled
from model.products import multiply, spread

if TYPE_CHECKING:
    from model.kernels import Floats

LANES = 16
"""Tasks side by side: as many float32 as the widest registers hold. Narrower ones take a row in several parts."""

_CONTRACT = ("contract",)  # A product and a sum may be one instruction; nothing else of the order changes.


def _sum_of_products(join: Callable[[ir.IRBuilder, ir.Value, ir.Value], ir.Value]) -> Callable[[Floats, Floats, Floats], None]:
    """A function (out, left, right) that joins ``out`` (LANES,) with left[k] right[k] for each k, one after the other.

    ``left`` and ``right`` are (n, LANES); their rows must be contiguous.
    """

    @intrinsic
    def joined(_: object, out: types.Array, left: types.Array, right: types.Array) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
            into, *rows = (context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, arguments, strict=True))
            element = into.data.type.pointee
            register, align = ir.VectorType(element, LANES).as_pointer(), context.get_abi_sizeof(element)
            starts = [builder.bitcast(row.data, code.voidptr_t) for row in rows]
            strides = [code.unpack_tuple(builder, row.strides)[0] for row in rows]
            target = builder.bitcast(into.data, register)
            total = code.alloca_once_value(builder, builder.load(target, align=align))
            with code.for_range(builder, code.unpack_tuple(builder, rows[0].shape)[0]) as loop:
                left, right = (
                    builder.load(builder.bitcast(builder.gep(start, [builder.mul(loop.index, stride)]), register), align=align)
                    for start, stride in zip(starts, strides, strict=True)
                )
                builder.store(join(builder, builder.load(total), builder.fmul(left, right, flags=_CONTRACT)), total)
            builder.store(builder.load(total), target, align=align)
            return context.get_dummy_value()

        return types.none(out, left, right), generate

    return cast("Callable[[Floats, Floats, Floats], None]", joined)


add = _sum_of_products(lambda builder, total, product: builder.fadd(total, product, flags=_CONTRACT))
"""Out += sum_k left[k] right[k], for each of `LANES` tasks: out (LANES,), left and right (n, LANES)."""

subtract = _sum_of_products(lambda builder, total, product: builder.fsub(total, product, flags=_CONTRACT))
"""Out -= sum_k left[k] right[k], likewise."""


def _by_number(*, onto: bool) -> Callable[[Floats, np.floating, Floats], None]:
    """A function (into, by, row) of rows of a multiple of `LANES` numbers, that writes by row, or adds it ``onto`` what is there."""

    @intrinsic
    def joined(_: object, into: types.Array, by: types.Float, row: types.Array) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
            target, source = (context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2))
            element = target.data.type.pointee
            kind, align = ir.VectorType(element, LANES), context.get_abi_sizeof(element)
            factor = spread(builder, arguments[1], LANES)
            registers = builder.udiv(code.unpack_tuple(builder, target.shape)[0], ir.Constant(ir.IntType(64), LANES))
            begins = [builder.bitcast(array.data, kind.as_pointer()) for array in (target, source)]
            with code.for_range(builder, registers) as loop:
                place, of = (builder.gep(begin, [loop.index]) for begin in begins)
                value = builder.fmul(factor, builder.load(of, align=align), flags=_CONTRACT)
                if onto:
                    value = builder.fadd(builder.load(place, align=align), value, flags=_CONTRACT)
                builder.store(value, place, align=align)
            return context.get_dummy_value()

        return types.none(into, by, row), generate

    return cast("Callable[[Floats, np.floating, Floats], None]", joined)


scale = _by_number(onto=False)
"""Into = by row; by 1 it is a copy that does not look whether they overlap."""

accumulate = _by_number(onto=True)
"""Into += by row."""


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
    (m, F, LANES), and are left in ``sides``. R is left above the diagonal of ``a``, one over its diagonal in ``inverse`` (F, LANES).
    """
    f = len(s)
    own[:] = 0
    a[:] = 0
    for i in range(f):
        for j in range(f):
            add(own[i, j], s[i], t[:, j])
    for i in range(f):
        for j in range(i, f):
            add(a[i, j], t[:, i], own[:, j])
        for lane in range(LANES):
            a[i, i, lane] += prior_precision[i]
    for side in range(len(sides)):
        for j in range(f):
            add(sides[side, j], seen[side], t[:, j])
    for k in range(f):
        for j in range(k, f):
            subtract(a[k, j], a[:k, k], a[:k, j])
        for lane in range(LANES):
            inverse[k, lane] = 1 / math.sqrt(a[k, k, lane]) if a[k, k, lane] > 0 else np.nan
        for j in range(k + 1, f):
            for lane in range(LANES):
                a[k, j, lane] *= inverse[k, lane]
        for side in range(len(sides)):
            subtract(sides[side, k], a[:k, k], sides[side, :k])
            for lane in range(LANES):
                sides[side, k, lane] *= inverse[k, lane]


@compiled
def substitute(a: Floats, inverse: Floats, side: Floats, into: Floats) -> None:
    """R^-1 of a right-hand side (F, LANES), of what `condition` has left."""
    for k in range(len(side) - 1, -1, -1):
        for lane in range(LANES):
            into[k, lane] = side[k, lane]
        subtract(into[k], a[k, k + 1 :], into[k + 1 :])
        for lane in range(LANES):
            into[k, lane] *= inverse[k, lane]


@compiled
def slopes(
    by_score: Floats, by_variance: Floats, w: Floats, v: Floats, left: Floats, right: Floats, features: Floats, at_a: Floats
) -> None:
    """From the gradients at scores and variances (q, LANES) to those at t, at each query's x and at A, of `LANES` tasks.

    ``w`` (F, LANES) and ``v`` (q, F, LANES) are the means and spreads found. Into ``features`` (1 + q, F, LANES), of which t is the first,
    and ``at_a`` (F, F, LANES), which is symmetric; ``left`` and ``right`` (2 + q, F, LANES) are room for the factors of its sum.
    """
    asked, f = len(v), len(w)
    two, half = w.dtype.type(2), w.dtype.type(0.5)
    features[0] = 0
    at_a[:] = 0
    for k in range(f):
        add(features[0, k], by_score, v[:, k])
        for lane in range(LANES):
            left[asked, k, lane] = half * features[0, k, lane]
            right[asked, k, lane] = w[k, lane]
            left[asked + 1, k, lane] = half * w[k, lane]
            right[asked + 1, k, lane] = features[0, k, lane]
        for query in range(asked):
            for lane in range(LANES):
                left[query, k, lane] = by_variance[query, lane] * v[query, k, lane]
                right[query, k, lane] = v[query, k, lane]
                features[1 + query, k, lane] = by_score[query, lane] * w[k, lane] + two * left[query, k, lane]
    for i in range(f):
        for j in range(f):
            subtract(at_a[i, j], left[:, i], right[:, j])


@compiled
def through_users(
    s: Floats,
    t: Floats,
    seen: Floats,
    at_a: Floats,
    features: Floats,
    through: Floats,
    matrix: Floats,
    vector: Floats,
    at_own: Floats,
    at_asked: Floats,
) -> None:
    """From what `slopes` finds, back to items as all users see them and to T, of `LANES` tasks.

    ``matrix`` (F, F, LANES) and ``vector`` (F, LANES) are the gradients at S and at Z' N r, ``at_own`` (F, F, LANES) is that at T, and
    ``at_asked`` (q, F, LANES) those at z of the queries; ``through`` is room for T at_a.
    """
    f, two = len(t), t.dtype.type(2)
    through[:] = 0
    matrix[:] = 0
    vector[:] = 0
    at_own[:] = 0
    at_asked[:] = 0
    for i in range(f):
        add(vector[i], t[i], features[0])
        for query in range(len(at_asked)):
            add(at_asked[query, i], t[i], features[1 + query])
        for j in range(f):
            add(through[i, j], t[i], at_a[j])
    for i in range(f):
        for j in range(f):
            add(matrix[i, j], through[i], t[j])
            add(at_own[i, j], s[i], through[:, j])
            for lane in range(LANES):
                at_own[i, j, lane] *= two
            add(at_own[i, j], seen[:, i], features[:, j])
