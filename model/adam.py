"""Adam (Kingma and Ba, 2015) as loops, compiled by Numba: of phi, and of the rows that a gradient touches. See `model.meta.Optimiser`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from model.compiled import borrowing, compiled
from model.products import scale
from model.registers import WIDE, ask_for

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers

    Number = np.floating

AHEAD = 8
"""Rows between the one that moves and the one that memory is asked for."""


@compiled
def follow(
    value: Floats,
    moments: Floats,
    gradient: Floats,
    times: float,
    rates: Floats,
    decays: Floats,
    b1: float,
    b2: float,
    count: int,
) -> tuple[Floats, Floats]:
    """Adam's step ``count`` of numbers (size,) with moments (2, size), each at a rate and an L2 decay of its own: both as they then are.

    The gradient counts so many ``times``.
    """
    kind = value.dtype.type
    followed, after = np.empty_like(value), np.empty_like(moments)
    by, slower, slow = kind(times), kind(1 - b1), kind(1 - b2)
    unbiased_first, unbiased_second, least = kind(1 / (1 - b1**count)), kind(1 / (1 - b2**count)), kind(1e-8)
    for k in range(len(value)):
        slope = gradient[k] * by + decays[k] * value[k]
        first = moments[0, k] + slower * (slope - moments[0, k])
        second = moments[1, k] + slow * (slope * slope - moments[1, k])
        after[0, k], after[1, k] = first, second
        followed[k] = value[k] - rates[k] * unbiased_first * first / (math.sqrt(second * unbiased_second) + least)
    return followed, after


@compiled
def follow_rows(
    values: Floats,
    moments: Floats,
    rows: Numbers,
    gradient: Floats,
    times: float,
    rate: float,
    decay: float,
    b2: float,
    count: int,
    clock: int,
) -> None:
    """Adam's step of ``rows`` (m,), which are different, along so many ``times`` a ``gradient`` (m, width): see `model.meta.Optimiser`.

    Changes ``values`` (allotted, width) and ``moments`` (allotted, width + 1), of which the last is the step when a row was last touched.
    """
    width, kind = values.shape[1], values.dtype.type
    unbiased, slowly, root, now = kind(1 / (1 - b2**count)), math.log(b2), math.sqrt(b2), count % clock
    # In whole registers: the numbers that fill none would be worked on one by one, which takes longer than all others.
    whole, one = -(-width // WIDE) * WIDE, kind(1)
    value, second, slope = np.zeros(whole, kind), np.zeros(whole, kind), np.zeros(whole, kind)
    before, left = -1.0, 1.0
    for place in range(len(rows)):
        row, later = rows[place], rows[min(place + AHEAD, len(rows) - 1)]
        ask_for(values, later)
        ask_for(moments, later)
        touched = moments[row, width]
        # Not modulo: of numbers with a fraction, as these are to the compiler, that would take a third of the time.
        waited = now - touched + (clock if touched > now else 0)
        if waited != before:
            before, left = waited, math.exp(slowly * waited)
        # The steps before the last pulled less, for the root of the second moment was larger by b2^-1/2 for each.
        pulled = rate * decay * (1 - math.sqrt(left)) / (1 - root) if touched > 0 else 0.0
        scale(value[:width], one, values[row])
        scale(second[:width], one, moments[row, :width])
        scale(slope[:width], kind(times), gradient[place])
        move(value, second, slope, kind(left), kind(pulled), kind(rate * waited), kind(rate), kind(1 - b2), unbiased)
        scale(values[row], one, value[:width])
        scale(moments[row, :width], one, second[:width])
        moments[row, width] = now


@borrowing
def move(
    value: Floats,
    second: Floats,
    slope: Floats,
    left: Number,
    pulled: Number,
    most: Number,
    rate: Number,
    part: Number,
    unbiased: Number,
) -> None:
    """What befell a row (width,) while no gradient touched it, and then a step along its gradient, ``slope``.

    Of its second moment so much is ``left``. Decay pulled by rate decay value / sqrt(second) a step; by ``most`` at the most, as Adam's
    steps are bounded. What many such steps leave of a value is e^-p, of a p that all of them add up to.
    """
    one, least = value.dtype.type(1), value.dtype.type(1e-8)
    half, third, fourth = value.dtype.type(1 / 2), value.dtype.type(1 / 3), value.dtype.type(1 / 4)
    for k in range(len(value)):
        still = second[k] * left
        far = abs(value[k])
        p = half * pulled / (math.sqrt(still * unbiased) + least)
        # Of e^(p / 2) the first terms, squared: a third of the time that `exp` takes, and what is left is never off by more than .0022.
        root = one + p * (one + half * p * (one + third * p * (one + fourth * p)))
        waited = math.copysign(max(far / (root * root), far - most), value[k])
        after = still + part * slope[k] * slope[k]
        second[k] = after
        value[k] = waited - rate * slope[k] / (math.sqrt(after * unbiased) + least)
