"""Bytes eight at a time, for loops that Numba compiles: short texts are hashed and compared as one or two numbers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from llvmlite import ir
from numba import types
from numba.core import cgutils as code
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

_NUMBER, _PRODUCT = ir.IntType(64), ir.IntType(128)


@intrinsic
def _loaded(_: object, buffer: types.Array, at: types.Integer) -> tuple[Any, Any]:  # noqa: ARG001  a type
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(builder.bitcast(array.data, code.voidptr_t), [arguments[1]])
        found = builder.load(builder.bitcast(place, _NUMBER.as_pointer()), align=1)
        return builder.bswap(found) if sys.byteorder == "big" else found

    return types.uint64(buffer, types.int64), generate


@intrinsic
def _mixed(_: object, left: types.Integer, right: types.Integer) -> tuple[Any, Any]:  # noqa: ARG001  types
    def generate(_: object, builder: ir.IRBuilder, __: object, arguments: list[ir.Value]) -> ir.Value:
        product = builder.mul(*(builder.zext(argument, _PRODUCT) for argument in arguments))
        upper = builder.lshr(product, ir.Constant(_PRODUCT, 64))
        return builder.xor(*(builder.trunc(half, _NUMBER) for half in (product, upper)))

    return types.uint64(types.uint64, types.uint64), generate


loaded = cast("Callable[[Bytes, int], np.uint64]", _loaded)
"""The eight bytes of a buffer (n,) from a place on, the first lowest. Whether they are all there is the caller's to know."""

mixed = cast("Callable[[np.uint64, np.uint64], np.uint64]", _mixed)
"""The halves of the product of two numbers, one xor the other: each bit depends on all below it and above it."""
