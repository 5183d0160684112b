"""Products of matrices that stay in the processor's caches, spelled out for LLVM, for loops that Numba compiles.

A call of BLAS packs what it multiplies, so that a layer of 32 takes an eighth longer, one of 100 no longer; taking from a weight is one
pass here rather than a product and a difference; and a sum has one order, whatever rows stand beside it. `WIDE` numbers of a row are
worked on together, in as many registers as they take. Matrices may be views, of one floating type; their rows must be contiguous, but
for a ``left`` of `multiply` and `take_product`, which may stand transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from model.compiled import borrowing
from model.registers import CONTRACT, INT, WIDE, Code, Matrix, code, generated, of_three

if TYPE_CHECKING:
    import numpy as np

    from model.kernels import Floats

TOGETHER = 4
"""Products of two rows that are summed side by side: one sum would wait for itself."""


def _signature(*kinds: types.Array, transposed: int | None = None) -> Any:  # noqa: ANN401  Numba's
    """That of matrices of one type with contiguous rows, as far as types tell; the one numbered ``transposed`` may stand so."""
    if any(kind.ndim != 2 or kind.dtype != kinds[0].dtype for kind in kinds) or any(
        kind.layout == "F" for number, kind in enumerate(kinds) if number != transposed
    ):
        raise TypingError(f"matrices of one type with contiguous rows are wanted, not {kinds}")
    return types.none(*kinds)


_of_any_left = partial(_signature, transposed=1)


def _of_four(write: Callable[..., None]) -> Callable[[Floats, Floats, Floats, Floats], None]:
    @intrinsic
    def operation(_: object, into: types.Array, left: types.Array, right: types.Array, added: types.Array) -> tuple[Any, Any]:
        return _signature(into, left, right, added), generated(write)

    return cast("Callable[[Floats, Floats, Floats, Floats], None]", operation)


def _of_two(write: Callable[..., None]) -> Callable[[Floats, Floats], None]:
    @intrinsic
    def operation(_: object, into: types.Array, values: types.Array) -> tuple[Any, Any]:
        return _signature(into, values), generated(write)

    return cast("Callable[[Floats, Floats], None]", operation)


def _product(
    of: Code, into: Matrix, left: Matrix, right: Matrix, added: Matrix | None = None, *, taken: bool = False, floored: bool = False
) -> None:
    """Of the sums that it fills ``into`` with, or takes from there: begun at the one row that is ``added``, and 0 where they are less."""
    builder = of.builder

    def tile(tall: int, first: ir.Value, column: ir.Value, mask: ir.Value | None) -> None:
        rows, sums = [of.next(first, row) for row in range(tall)], of.sums(tall)
        begin = of.zero if added is None else of.load(added.at(of.number(0), column), mask)
        for row, total in zip(rows, sums, strict=True):
            builder.store(of.load(into.at(row, column), mask) if taken else begin, total)
        with code.for_range(builder, left.columns) as loop:
            below = of.load(right.at(loop.index, column), mask)
            for row, total in zip(rows, sums, strict=True):
                of.join(total, of.spread(of.load_one(left.at(row, loop.index))), below, "fsub" if taken else "fadd")
        for row, total in zip(rows, sums, strict=True):
            value = builder.load(total)
            if floored:
                value = builder.select(builder.fcmp_ordered("<", value, of.zero), of.zero, value)
            of.store(value, into.at(row, column), mask)

    with of.blocks(into.columns, WIDE) as (column, rest):
        of.by_mask(rest, lambda mask: of.parts(into.rows, lambda tall, first: tile(tall, first, column, mask)))


def _rows_by_rows(of: Code, into: Matrix, left: Matrix, right: Matrix) -> None:
    builder = of.builder

    def sum_up(row: ir.Value, first: ir.Value, count: int) -> None:
        others, sums = [of.next(first, other) for other in range(count)], of.sums(count)
        for total in sums:
            builder.store(of.zero, total)
        with of.blocks(left.columns, WIDE) as (place, rest):

            def join(mask: ir.Value | None) -> None:
                own = of.load(left.at(row, place), mask)
                for other, total in zip(others, sums, strict=True):
                    of.join(total, own, of.load(right.at(other, place), mask))

            of.by_mask(rest, join)
        for other, total in zip(others, sums, strict=True):
            of.store_one(of.total(builder.load(total)), into.at(row, other))

    with code.for_range(builder, into.rows) as loop, of.blocks(into.columns, TOGETHER) as (first, rest):  # noqa: SIM117  these are loops
        with builder.if_else(builder.icmp_signed(">=", rest, of.number(TOGETHER))) as (several, single):
            with several:
                sum_up(loop.index, first, TOGETHER)
            with single, code.for_range(builder, rest) as one:
                sum_up(loop.index, builder.add(first, one.index), 1)


def _transpose(of: Code, into: Matrix, values: Matrix) -> None:
    builder, half = of.builder, WIDE // 2
    # Of two registers the first halves by turns, and the second ones.
    merged = [
        ir.Constant(ir.VectorType(INT, WIDE), [begin + place // 2 + place % 2 * WIDE for place in range(WIDE)]) for begin in (0, half)
    ]

    def block(row: ir.Value, column: ir.Value, read: list[ir.Value | None], written: list[ir.Value | None]) -> None:
        registers = [of.load(values.at(of.next(row, place), column), mask) for place, mask in enumerate(read)]
        for _ in range(WIDE.bit_length() - 1):
            pairs = zip(registers[:half], registers[half:], strict=True)
            registers = [builder.shuffle_vector(above, below, which) for above, below in pairs for which in merged]
        for place, (register, mask) in enumerate(zip(registers, written, strict=True)):
            of.store(register, into.at(of.next(column, place), row), mask)

    def masks(count: ir.Value, rows: ir.Value) -> list[ir.Value | None]:
        nothing, some = of.first(of.number(0)), of.first(count)
        return [builder.select(builder.icmp_signed(">", rows, of.number(place)), some, nothing) for place in range(WIDE)]

    with of.blocks(values.rows, WIDE) as (row, rows), of.blocks(values.columns, WIDE) as (column, columns):
        fits = builder.and_(*(builder.icmp_signed(">=", count, of.number(WIDE)) for count in (rows, columns)))
        with builder.if_else(fits) as (whole, part):
            with whole:
                block(row, column, [None] * WIDE, [None] * WIDE)
            with part:
                block(row, column, masks(columns, rows), masks(rows, columns))


def _by_number(*, onto: bool) -> Callable[[Floats, np.floating, Floats], None]:
    """A function (into, by, row) of rows (n,), that writes by row, or adds it ``onto`` what is there."""

    @intrinsic
    def operation(_: object, into: types.Array, by: types.Float, row: types.Array) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
            of = Code(context, builder, signature.args[::2], arguments[::2])
            (target, source), first = of.matrices, of.number(0)

            def work(column: ir.Value, width: int) -> None:
                register = ir.VectorType(of.element, width)
                there, here = (builder.bitcast(each.at(first, column), register.as_pointer()) for each in (target, source))
                factors = of.spread(arguments[1], width)
                value = builder.fmul(factors, builder.load(here, align=of.size), flags=CONTRACT)
                if onto:
                    value = builder.fadd(builder.load(there, align=of.size), value, flags=CONTRACT)
                builder.store(value, there, align=of.size)

            of.by_halves(target.columns, work)
            return context.get_dummy_value()

        return types.none(into, by, row), generate

    return cast("Callable[[Floats, np.floating, Floats], None]", operation)


scale = _by_number(onto=False)
"""Into = by row, all rows (n,), contiguous; by 1 it is a copy that does not look whether they overlap."""

accumulate = _by_number(onto=True)
"""Into += by row."""

_multiply = of_three(_product, _of_any_left)
_through_layer = _of_four(_product)
_through_relu = _of_four(partial(_product, floored=True))
_take_product = of_three(partial(_product, taken=True), _of_any_left)
_multiply_rows = of_three(_rows_by_rows, _signature)
_turn = _of_two(_transpose)


@borrowing
def multiply(left: Floats, right: Floats, into: Floats) -> None:
    """Into = left right: (m, k), (k, n), (m, n)."""
    _multiply(into, left, right)


@borrowing
def through(left: Floats, right: Floats, row: Floats, into: Floats, relu: bool) -> None:  # noqa: FBT001  what is compiled has no names
    """Into = left right + row, (m, k), (k, n), (1, n), (m, n), with ``relu`` 0 where that is less: a layer in one pass."""
    if relu:
        _through_relu(into, left, right, row)
    else:
        _through_layer(into, left, right, row)


@borrowing
def take_product(left: Floats, right: Floats, into: Floats) -> None:
    """Into -= left right, likewise."""
    _take_product(into, left, right)


@borrowing
def multiply_rows(left: Floats, right: Floats, into: Floats) -> None:
    """Into = left right', rows by rows: (m, k), (n, k), (m, n).

    For a few rows on the left. Where there are hundreds BLAS takes a third of the time, but sums them in another order than one alone.
    """
    _multiply_rows(into, left, right)


@borrowing
def turn(values: Floats, into: Floats) -> None:
    """The transpose of values (m, n): (n, m)."""
    _turn(into, values)
