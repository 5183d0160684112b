"""Products of matrices that stay in the processor's caches, spelled out for LLVM as `model.lanes` is, for loops that Numba compiles.

A call of BLAS packs what it multiplies, so that a layer of 32 takes an eighth longer, one of 100 no longer; taking from a weight is one
pass here rather than a product and a difference; and a sum has one order, whatever rows stand beside it. `WIDE` numbers of a row are
worked on together, in as many registers as they take. Matrices may be views, of one floating type; their rows must be contiguous, but
for a ``left`` of `multiply` and `take_product`, which may stand transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from model.compiled import borrowing

if TYPE_CHECKING:
    from model.kernels import Floats

code: Any = cgutils  # Its builders of loops and variables have no types.

WIDE = 16
"""Columns that are worked on together."""

TALL = 10 if binding.get_host_cpu_features().get("avx512f") else 5
"""Rows likewise: enough sums that none waits for itself, and in single precision no more than registers hold."""

TOGETHER = 4
"""Products of two rows that are summed side by side: one sum would wait for itself."""

_CONTRACT = ("contract",)  # A product and a sum may be one instruction; nothing else of the order changes.
_INT, _NUMBER = ir.IntType(32), ir.IntType(64)


def spread(builder: ir.IRBuilder, value: ir.Value, width: int) -> ir.Value:
    """A number in all places of a register of so many."""
    nothing, zeros = (
        ir.Constant(ir.VectorType(value.type, width), ir.Undefined),
        ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width),
    )
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0)), nothing, zeros)


class _Matrix:
    """A matrix as LLVM sees it."""

    def __init__(self, of: _Code, kind: types.Array, array: Any) -> None:  # noqa: ANN401  Numba's
        self.rows, self.columns = code.unpack_tuple(of.builder, array.shape)
        self._strides = code.unpack_tuple(of.builder, array.strides)
        # A step that is known here becomes part of addresses. Another is added to them, by the units that multiply: half the speed.
        if kind.layout in ("C", "F"):
            self._strides[kind.layout == "C"] = of.number(of.size)
        self._start = of.builder.bitcast(array.data, code.voidptr_t)
        self._of = of

    def at(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """Where a number stands."""
        builder = self._of.builder
        steps = [builder.mul(place, stride) for place, stride in zip((row, column), self._strides, strict=True)]
        return builder.gep(self._start, [builder.add(*steps)])


class _Code:
    """What the functions below are written in: registers of `WIDE` numbers, and loops."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kinds: Any, values: list[ir.Value]) -> None:  # noqa: ANN401  Numba's
        arrays = [context.make_array(kind)(context, builder, value) for kind, value in zip(kinds, values, strict=True)]
        self.builder, self.element = builder, arrays[0].data.type.pointee
        self.size = context.get_abi_sizeof(self.element)
        self.matrices = [_Matrix(self, kind, array) for kind, array in zip(kinds, arrays, strict=True)]
        self.register = ir.VectorType(self.element, WIDE)
        self.zero = ir.Constant(self.register, [0.0] * WIDE)
        self._mask = ir.VectorType(ir.IntType(1), WIDE)

    @staticmethod
    def number(value: int) -> ir.Value:
        return ir.Constant(_NUMBER, value)

    def next(self, value: ir.Value, by: int) -> ir.Value:
        return self.builder.add(value, self.number(by))

    def spread(self, value: ir.Value) -> ir.Value:
        """A number in all places of a register."""
        return spread(self.builder, value, WIDE)

    def first(self, count: ir.Value) -> ir.Value:
        """A mask of so many places, none if there are to be fewer than none."""
        places = ir.Constant(ir.VectorType(_NUMBER, WIDE), list(range(WIDE)))
        return self.builder.icmp_signed("<", places, self.spread(count))

    def _by_mask(self, name: str, returns: ir.Type, takes: list[ir.Type]) -> ir.Function:
        kind = f"v{WIDE}f{8 * self.size}"
        return code.get_or_insert_function(self.builder.module, ir.FunctionType(returns, takes), f"llvm.masked.{name}.{kind}.p0{kind}")

    def load(self, place: ir.Value, mask: ir.Value | None) -> ir.Value:
        """A register; what a mask leaves out is 0 and not read."""
        pointer = self.builder.bitcast(place, self.register.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=self.size)
        load = self._by_mask("load", self.register, [pointer.type, _INT, self._mask, self.register])
        return self.builder.call(load, [pointer, ir.Constant(_INT, self.size), mask, self.zero])

    def store(self, value: ir.Value, place: ir.Value, mask: ir.Value | None) -> None:
        """Write a register; what a mask leaves out stays as it is."""
        pointer = self.builder.bitcast(place, self.register.as_pointer())
        if mask is None:
            self.builder.store(value, pointer, align=self.size)
            return
        store = self._by_mask("store", ir.VoidType(), [self.register, pointer.type, _INT, self._mask])
        self.builder.call(store, [value, pointer, ir.Constant(_INT, self.size), mask])

    def load_one(self, place: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.bitcast(place, self.element.as_pointer()))

    def store_one(self, value: ir.Value, place: ir.Value) -> None:
        self.builder.store(value, self.builder.bitcast(place, self.element.as_pointer()))

    def sums(self, count: int) -> list[ir.Value]:
        """Room for so many sums, which LLVM keeps in registers."""
        return [code.alloca_once(self.builder, self.register) for _ in range(count)]

    def join(self, into: ir.Value, left: ir.Value, right: ir.Value, sign: Literal["fadd", "fsub"] = "fadd") -> None:
        """Add left right to what a sum holds, or take it from there."""
        product = self.builder.fmul(left, right, flags=_CONTRACT)
        self.builder.store(getattr(self.builder, sign)(self.builder.load(into), product, flags=_CONTRACT), into)

    def total(self, value: ir.Value) -> ir.Value:
        """The sum of a register's numbers, in halves."""
        width = WIDE
        while width > 1:
            width //= 2
            half = ir.Constant(ir.VectorType(_INT, WIDE), [(place + width) % WIDE for place in range(WIDE)])
            value = self.builder.fadd(value, self.builder.shuffle_vector(value, value, half))
        return self.builder.extract_element(value, ir.Constant(_INT, 0))

    @contextmanager
    def blocks(self, count: ir.Value, size: int) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over blocks of so many: where each begins, and how many there are from there on."""
        blocks = self.builder.udiv(self.next(count, size - 1), self.number(size))
        with code.for_range(self.builder, blocks) as loop:
            begin = self.builder.mul(loop.index, self.number(size))
            yield begin, self.builder.sub(count, begin)

    def by_mask(self, left: ir.Value, work: Callable[[ir.Value | None], None]) -> None:
        """Do work on whole registers where ``left`` numbers fill one, else with a mask."""
        with self.builder.if_else(self.builder.icmp_signed(">=", left, self.number(WIDE))) as (whole, part):
            with whole:
                work(None)
            with part:
                work(self.first(left))


def _generated(write: Callable[..., None]) -> Callable[..., ir.Value]:
    """What Numba asks of an intrinsic: the code that ``write`` writes for `_Code` and matrices."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
        of = _Code(context, builder, signature.args, arguments)
        write(of, *of.matrices)
        return context.get_dummy_value()

    return generate


def _signature(*kinds: types.Array, transposed: int | None = None) -> Any:  # noqa: ANN401  Numba's
    """That of matrices of one type with contiguous rows, as far as types tell; the one numbered ``transposed`` may stand so."""
    if any(kind.ndim != 2 or kind.dtype != kinds[0].dtype for kind in kinds) or any(
        kind.layout == "F" for number, kind in enumerate(kinds) if number != transposed
    ):
        raise TypingError(f"matrices of one type with contiguous rows are wanted, not {kinds}")
    return types.none(*kinds)


def _of_three(write: Callable[..., None], transposed: int | None = None) -> Callable[[Floats, Floats, Floats], None]:
    @intrinsic
    def operation(_: object, into: types.Array, left: types.Array, right: types.Array) -> tuple[Any, Any]:
        return _signature(into, left, right, transposed=transposed), _generated(write)

    return cast("Callable[[Floats, Floats, Floats], None]", operation)


def _of_four(write: Callable[..., None]) -> Callable[[Floats, Floats, Floats, Floats], None]:
    @intrinsic
    def operation(_: object, into: types.Array, left: types.Array, right: types.Array, added: types.Array) -> tuple[Any, Any]:
        return _signature(into, left, right, added), _generated(write)

    return cast("Callable[[Floats, Floats, Floats, Floats], None]", operation)


def _of_two(write: Callable[..., None]) -> Callable[[Floats, Floats], None]:
    @intrinsic
    def operation(_: object, into: types.Array, values: types.Array) -> tuple[Any, Any]:
        return _signature(into, values), _generated(write)

    return cast("Callable[[Floats, Floats], None]", operation)


def _product(
    of: _Code, into: _Matrix, left: _Matrix, right: _Matrix, added: _Matrix | None = None, *, taken: bool = False, floored: bool = False
) -> None:
    """Of the sums that it fills ``into`` with, or takes from there: begun at the one row that is ``added``, and 0 where they are less."""
    builder = of.builder
    tiles = builder.udiv(of.next(into.rows, TALL - 1), of.number(TALL))
    # Tiles of like height: one row alone would wait for its own sum. Without rows there is no tile, but nothing may be divided by 0.
    some = builder.select(builder.icmp_unsigned("==", tiles, of.number(0)), of.number(1), tiles)
    least, taller = builder.udiv(into.rows, some), builder.urem(into.rows, some)

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

    def of_columns(column: ir.Value, mask: ir.Value | None) -> None:
        with code.for_range(builder, tiles) as loop:
            more = builder.icmp_unsigned("<", loop.index, taller)
            first = builder.add(builder.mul(loop.index, least), builder.select(more, loop.index, taller))
            done = builder.append_basic_block()
            chosen = builder.switch(builder.add(least, builder.zext(more, _NUMBER)), done)
            for tall in range(1, TALL + 1):
                case = builder.append_basic_block()
                chosen.add_case(of.number(tall), case)
                builder.position_at_end(case)
                tile(tall, first, column, mask)
                builder.branch(done)
            builder.position_at_end(done)

    with of.blocks(into.columns, WIDE) as (column, rest):
        of.by_mask(rest, lambda mask: of_columns(column, mask))


def _rows_by_rows(of: _Code, into: _Matrix, left: _Matrix, right: _Matrix) -> None:
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


def _transpose(of: _Code, into: _Matrix, values: _Matrix) -> None:
    builder, half = of.builder, WIDE // 2
    # Of two registers the first halves by turns, and the second ones.
    merged = [
        ir.Constant(ir.VectorType(_INT, WIDE), [begin + place // 2 + place % 2 * WIDE for place in range(WIDE)]) for begin in (0, half)
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


_multiply = _of_three(_product, transposed=1)
_through_layer = _of_four(_product)
_through_relu = _of_four(partial(_product, floored=True))
_take_product = _of_three(partial(_product, taken=True), transposed=1)
_multiply_rows = _of_three(_rows_by_rows)
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
