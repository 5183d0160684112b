"""Sums of products for several tasks side by side: in an array whose last axis counts `LANES` tasks, a row is a vector register.

The matrices of one task are too small to be worth a call of BLAS each, and Numba makes no registers of such short rows by itself: checking
that arrays do not overlap costs it more than the work. So the one operation that all is made of is spelled out here for LLVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils as code  # its builders of loops and variables
from numba.extending import intrinsic

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
