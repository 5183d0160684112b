"""Adam (Kingma and Ba, 2015) as loops, compiled by Numba: of phi, and of the rows that a gradient touches. See `model.meta.Optimiser`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from model.compiled import borrowing, compiled

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers

    Number = np.floating


@compiled
def follow(
    value: Floats,
    moments: Floats,
    gradient: Floats,
    scale: float,
    rates: Floats,
    decays: Floats,
    b1: float,
    b2: float,
    count: int,
) -> tuple[Floats, Floats]:
    """Adam's step ``count`` of numbers (size,) with moments (2, size), each at a rate and an L2 decay of its own: both as they then are.

    The gradient counts ``scale`` times.
    """
    kind = value.dtype.type
    followed, after = np.empty_like(value), np.empty_like(moments)
    by, slower, slow = kind(scale), kind(1 - b1), kind(1 - b2)
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
    scale: float,
    rate: float,
    decay: float,
    b2: float,
    count: int,
    clock: int,
) -> None:
    """Adam's step of ``rows`` (m,), which are different, along ``gradient`` (m, width) times ``scale``: see `model.meta.Optimiser`.

    Changes ``values`` (allotted, width) and ``moments`` (allotted, width + 1), of which the last is the step when a row was last touched.
    """
    width, kind = values.shape[1], values.dtype.type
    unbiased, slowly, root, now = kind(1 / (1 - b2**count)), math.log(b2), math.sqrt(b2), count % clock
    for place in range(len(rows)):
        row = rows[place]
        touched = moments[row, width]
        # Not modulo: of numbers with a fraction, as these are to the compiler, that would take a third of the time.
        waited = now - touched + (clock if touched > now else 0)
        left = math.exp(slowly * waited)
        # The steps before the last pulled less, for the root of the second moment was larger by b2^-1/2 for each.
        pulled = rate * decay * (1 - math.sqrt(left)) / (1 - root) if touched > 0 else 0.0
        wait(values[row], moments[row, :width], kind(left), kind(pulled), kind(rate * waited), unbiased)
        move(values[row], moments[row, :width], gradient[place], kind(scale), kind(rate), kind(1 - b2), unbiased)
        moments[row, width] = now


@borrowing
def wait(value: Floats, second: Floats, left: Number, pulled: Number, most: Number, unbiased: Number) -> None:
    """What befell a row (width,) while no gradient touched it, and its second moment, of which so much is ``left`` now.

    Decay pulled by rate decay value / sqrt(second) a step; by rate at the most, as Adam's steps are bounded. What many such steps leave
    of a value is e^-p, of a p that all of them add up to.
    """
    one, least = value.dtype.type(1), value.dtype.type(1e-8)
    half, third, fourth = value.dtype.type(1 / 2), value.dtype.type(1 / 3), value.dtype.type(1 / 4)
    for k in range(len(value)):
        second[k] *= left
        far = abs(value[k])
        p = half * pulled / (math.sqrt(second[k] * unbiased) + least)
        # Of e^(p / 2) the first terms, squared: a third of the time that `exp` takes, and what is left is never off by more than .0022.
        root = one + p * (one + half * p * (one + third * p * (one + fourth * p)))
        value[k] = math.copysign(max(far / (root * root), far - most), value[k])


@borrowing
def move(value: Floats, second: Floats, gradient: Floats, scale: Number, rate: Number, part: Number, unbiased: Number) -> None:
    """One step of a row (width,) along its gradient."""
    least = value.dtype.type(1e-8)
    for k in range(len(value)):
        slope = gradient[k] * scale
        second[k] += part * slope * slope
        value[k] -= rate * slope / (math.sqrt(second[k] * unbiased) + least)
