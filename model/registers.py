"""What loops are spelled out for LLVM in, where Numba would make no registers of rows that short.

Checking that arrays do not overlap costs Numba more than the work on such a row. `Code` writes loops over registers of `WIDE` numbers, of
matrices that may be views: see `model.products`, and for several tasks side by side `model.lanes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from model.kernels import Floats

code: Any = cgutils  # Its builders of loops and variables have no types.

WIDE = 16
"""Numbers in a register, as many float32 as the widest hold. Narrower ones take a row in several parts."""

MANY = 10 if binding.get_host_cpu_features().get("avx512f") else 5
"""Sums side by side: enough that none waits for itself, and in single precision no more than registers hold."""

CONTRACT = ("contract",)  # A product and a sum may be one instruction; nothing else of the order changes.
INT, _NUMBER = ir.IntType(32), ir.IntType(64)


class Matrix:
    """A matrix as LLVM sees it: one of numbers, one row of them, or one of registers, whose third axis counts `WIDE` numbers."""

    def __init__(self, of: Code, kind: types.Array, array: Any) -> None:  # noqa: ANN401  Numba's
        shape, strides = (code.unpack_tuple(of.builder, each) for each in (array.shape, array.strides))
        # A step that is known here becomes part of addresses. Another is added to them, by the units that multiply: half the speed.
        if kind.ndim == 1:
            shape, strides = [of.number(1), *shape], [of.number(0), of.number(of.size)]
        elif kind.ndim == 3:
            strides[1] = of.number(WIDE * of.size)
        elif kind.layout in ("C", "F"):
            strides[kind.layout == "C"] = of.number(of.size)
        self.rows, self.columns = shape[:2]
        self._strides = strides[:2]
        self._start = of.builder.bitcast(array.data, code.voidptr_t)
        self._of = of

    def at(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """Where a number stands."""
        builder = self._of.builder
        steps = [builder.mul(place, stride) for place, stride in zip((row, column), self._strides, strict=True)]
        return builder.gep(self._start, [builder.add(*steps)])


class Code:
    """What such loops are written in: registers of `WIDE` numbers, and loops."""

    def __init__(self, context: Any, builder: ir.IRBuilder, kinds: Any, values: list[ir.Value]) -> None:  # noqa: ANN401  Numba's
        arrays = [context.make_array(kind)(context, builder, value) for kind, value in zip(kinds, values, strict=True)]
        self.builder, self.element = builder, arrays[0].data.type.pointee
        self.size = context.get_abi_sizeof(self.element)
        self.matrices = [Matrix(self, kind, array) for kind, array in zip(kinds, arrays, strict=True)]
        self.register = ir.VectorType(self.element, WIDE)
        self.zero = ir.Constant(self.register, [0.0] * WIDE)
        self._mask = ir.VectorType(ir.IntType(1), WIDE)

    @staticmethod
    def number(value: int) -> ir.Value:
        """An integer."""
        return ir.Constant(_NUMBER, value)

    def next(self, value: ir.Value, by: int) -> ir.Value:
        """So many further on."""
        return self.builder.add(value, self.number(by))

    def spread(self, value: ir.Value, width: int = WIDE) -> ir.Value:
        """A number in all places of a register."""
        nothing, zeros = ir.Constant(ir.VectorType(value.type, width), ir.Undefined), ir.Constant(ir.VectorType(INT, width), [0] * width)
        return self.builder.shuffle_vector(self.builder.insert_element(nothing, value, ir.Constant(INT, 0)), nothing, zeros)

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
        load = self._by_mask("load", self.register, [pointer.type, INT, self._mask, self.register])
        return self.builder.call(load, [pointer, ir.Constant(INT, self.size), mask, self.zero])

    def store(self, value: ir.Value, place: ir.Value, mask: ir.Value | None) -> None:
        """Write a register; what a mask leaves out stays as it is."""
        pointer = self.builder.bitcast(place, self.register.as_pointer())
        if mask is None:
            self.builder.store(value, pointer, align=self.size)
            return
        store = self._by_mask("store", ir.VoidType(), [self.register, pointer.type, INT, self._mask])
        self.builder.call(store, [value, pointer, ir.Constant(INT, self.size), mask])

    def load_one(self, place: ir.Value) -> ir.Value:
        """A number."""
        return self.builder.load(self.builder.bitcast(place, self.element.as_pointer()))

    def store_one(self, value: ir.Value, place: ir.Value) -> None:
        """Write a number."""
        self.builder.store(value, self.builder.bitcast(place, self.element.as_pointer()))

    def sums(self, count: int) -> list[ir.Value]:
        """Room for so many sums, which LLVM keeps in registers."""
        return [code.alloca_once(self.builder, self.register) for _ in range(count)]

    def join(self, into: ir.Value, left: ir.Value, right: ir.Value, sign: Literal["fadd", "fsub"] = "fadd") -> None:
        """Add left right to what a sum holds, or take it from there."""
        product = self.builder.fmul(left, right, flags=CONTRACT)
        self.builder.store(getattr(self.builder, sign)(self.builder.load(into), product, flags=CONTRACT), into)

    def total(self, value: ir.Value) -> ir.Value:
        """The sum of a register's numbers, in halves."""
        width = WIDE
        while width > 1:
            width //= 2
            half = ir.Constant(ir.VectorType(INT, WIDE), [(place + width) % WIDE for place in range(WIDE)])
            value = self.builder.fadd(value, self.builder.shuffle_vector(value, value, half))
        return self.builder.extract_element(value, ir.Constant(INT, 0))

    @contextmanager
    def blocks(self, count: ir.Value, size: int) -> Iterator[tuple[ir.Value, ir.Value]]:
        """A loop over blocks of so many: where each begins, and how many there are from there on."""
        blocks = self.builder.udiv(self.next(count, size - 1), self.number(size))
        with code.for_range(self.builder, blocks) as loop:
            begin = self.builder.mul(loop.index, self.number(size))
            yield begin, self.builder.sub(count, begin)

    def parts(self, count: ir.Value, work: Callable[[int, ir.Value], None]) -> None:
        """Do work on parts of so many, of `MANY` at most and all of like size, for few alone would wait: the size, and where it begins."""
        builder = self.builder
        parts = builder.udiv(self.next(count, MANY - 1), self.number(MANY))
        # Of none there is no part, but nothing may be divided by 0.
        some = builder.select(builder.icmp_unsigned("==", parts, self.number(0)), self.number(1), parts)
        least, larger = builder.udiv(count, some), builder.urem(count, some)
        with code.for_range(builder, parts) as loop:
            more = builder.icmp_unsigned("<", loop.index, larger)
            first = builder.add(builder.mul(loop.index, least), builder.select(more, loop.index, larger))
            done = builder.append_basic_block()
            chosen = builder.switch(builder.add(least, builder.zext(more, _NUMBER)), done)
            for size in range(1, MANY + 1):
                case = builder.append_basic_block()
                chosen.add_case(self.number(size), case)
                builder.position_at_end(case)
                work(size, first)
                builder.branch(done)
            builder.position_at_end(done)

    def by_halves(self, count: ir.Value, work: Callable[[ir.Value, int], None]) -> None:
        """Do work on registers of so many numbers and then on what is left, each half as wide: where it begins, and how wide it is.

        A register that a mask has written is not at hand when it is read next: one that is read again and again is waited for.
        """
        builder = self.builder
        whole = builder.and_(count, self.number(-WIDE))
        with code.for_range(builder, builder.udiv(whole, self.number(WIDE))) as loop:
            work(builder.mul(loop.index, self.number(WIDE)), WIDE)
        width = WIDE // 2
        while width:
            with builder.if_then(builder.icmp_unsigned("!=", builder.and_(count, self.number(width)), self.number(0))):
                work(builder.and_(count, self.number(-2 * width)), width)
            width //= 2

    def by_mask(self, left: ir.Value, work: Callable[[ir.Value | None], None]) -> None:
        """Do work on whole registers where ``left`` numbers fill one, else with a mask."""
        with self.builder.if_else(self.builder.icmp_signed(">=", left, self.number(WIDE))) as (whole, part):
            with whole:
                work(None)
            with part:
                work(self.first(left))


def generated(write: Callable[..., None]) -> Callable[..., ir.Value]:
    """What Numba asks of an intrinsic: the code that ``write`` writes for `Code` and matrices."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
        of = Code(context, builder, signature.args, arguments)
        write(of, *of.matrices)
        return context.get_dummy_value()

    return generate


def of_three(write: Callable[..., None], signature: Callable[..., Any] = types.none) -> Callable[[Floats, Floats, Floats], None]:
    """A function (into, left, right) for loops that Numba compiles, of the code that ``write`` writes; ``signature`` may refuse types."""

    @intrinsic
    def operation(_: object, into: types.Array, left: types.Array, right: types.Array) -> tuple[Any, Any]:
        return signature(into, left, right), generated(write)

    return cast("Callable[[Floats, Floats, Floats], None]", operation)


@intrinsic
def _ask_for(_: object, rows: types.Array, row: types.Integer) -> tuple[Any, Any]:  # noqa: ARG001  types
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:  # noqa: ANN401  Numba's
        array, pointer = context.make_array(signature.args[0])(context, builder, arguments[0]), code.voidptr_t
        shape, strides = (code.unpack_tuple(builder, each) for each in (array.shape, array.strides))
        ask = code.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer, INT, INT, INT]), "llvm.prefetch.p0i8")
        places = [builder.mul(arguments[1], strides[0])]
        if len(shape) > 1:
            # The first line of memory and the last: of a row of more the processor guesses the others by then.
            size = builder.mul(shape[1], ir.Constant(_NUMBER, context.get_abi_sizeof(array.data.type.pointee)))
            places.append(builder.add(places[0], builder.sub(size, ir.Constant(_NUMBER, 1))))
        for place in places:
            where = builder.gep(builder.bitcast(array.data, pointer), [place])
            builder.call(ask, [where, *(ir.Constant(INT, value) for value in (0, 3, 1))])  # To read, into the nearest cache, as data.
        return context.get_dummy_value()

    return types.none(rows, types.int64), generate


ask_for = cast("Callable[[NDArray[np.generic], int], None]", _ask_for)
"""Ask memory for a row of an array, (n,) or (n, m) with contiguous rows, that is read soon. Any row may be named; nothing else happens."""
