"""The arithmetic of the closed form as loops, compiled by Numba: what a task needs stays in the processor's first cache.

Written as batched tensor operations the same is some hundred calls on arrays of a few kilobytes, each slower than the work it does. Arrays
are numpy's, of one floating type throughout. Shapes as in `model.engine`: B tasks, L interactions, q, I and J items, F and E = F + 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Numbers = NDArray[np.int64]


@compiled
def outer(known: Floats) -> Floats:
    """The products of each row (I, E) with itself, upper triangle row by row but for the last one: (I, E (E + 1) / 2 - 1)."""
    items, size = known.shape
    packed = np.empty((items, size * (size + 1) // 2 - 1), known.dtype)
    for item in range(items):
        at = 0
        for i in range(size - 1):
            for j in range(i, size):
                packed[item, at] = known[item, i] * known[item, j]
                at += 1
    return packed


class Given(NamedTuple):
    """What a batch of tasks is adapted from."""

    known: Floats
    """(I, E): z of each item, and what is predicted without x w, negated."""
    item_of: Numbers
    """(J,), into ``known``."""
    items: Numbers
    """(L,), into ``item_of``: the interactions of all supports, task after task; their ``ratings`` (L,)."""
    ratings: Floats
    starts: Numbers
    """(B + 1,), where those of each task begin, and the last end."""
    decay: Floats
    """(n,), N of an interaction by how many are newer."""
    user_of: Numbers
    """(B,)."""
    to_user: Floats
    """(U, F, F), T."""
    prior: Floats
    """(U, F), w0."""
    prior_precision: Floats
    """(F,), the diagonal of Lambda."""
    query_items: Numbers
    """(B, q), into ``item_of``, of which each task has as many as ``queries`` (B,) says."""
    queries: Numbers
    noise: float
    """The variance of a rating."""


class Found(NamedTuple):
    """What adapting finds; a task whose precision matrix is not positive definite has NaN."""

    score: Floats
    """(B, q), likewise ``variance``."""
    variance: Floats
    mean: Floats
    """(B, F), the adapted w."""
    spread: Floats
    """(B, q, F), A^-1 x of each query."""
    told: Floats
    """(B, F, F), Z' N Z, and (B, F), Z' N r: what the support tells, of items as all users see them."""
    told_rating: Floats


@compiled
def adapt(given: Given, found: Found) -> None:
    """Condition each task's last layer on its support, A = T' S T + Lambda, score its queries, and fill what is ``found``."""
    known, item_of, items, ratings, starts, decay, user_of, to_user, prior, prior_precision, query_items, queries, noise = given
    score, variance, mean, spread, told, told_rating = found
    size = known.shape[1]
    f = size - 1
    packed = outer(known)
    width = packed.shape[1]
    most = query_items.shape[1]
    row = np.empty(width, known.dtype)
    rated = np.empty(f, known.dtype)
    a = np.empty((f, f), known.dtype)
    own = np.empty((f, f), known.dtype)
    # The right-hand sides: t, and each query's features.
    of_items, sides = np.empty((1 + most, f), known.dtype), np.empty((1 + most, f), known.dtype)
    for task in range(len(starts) - 1):
        user = user_of[task]
        row[:] = 0
        rated[:] = 0
        for place in range(starts[task], starts[task + 1]):
            item = item_of[items[place]]
            weight = decay[starts[task + 1] - 1 - place]
            by_rating = weight * ratings[place]
            products, z = packed[item], known[item]
            for k in range(width):
                row[k] += weight * products[k]
            for k in range(f):
                rated[k] += by_rating * z[k]
        s, at = told[task], 0
        for i in range(f):
            for j in range(i, f):
                s[i, j] = row[at]
                s[j, i] = row[at]
                at += 1
            rated[i] += row[at]
            told_rating[task, i] = rated[i]
            at += 1

        asked = queries[task]
        for k in range(f):
            of_items[0, k] = rated[k]
        for query in range(asked):
            z = known[item_of[query_items[task, query]]]
            for k in range(f):
                of_items[1 + query, k] = z[k]
        t = to_user[user]
        np.dot(s, t, own)
        np.dot(t.T, own, a)
        np.dot(of_items[: 1 + asked], t, sides[: 1 + asked])
        for i in range(f):
            a[i, i] += prior_precision[i]
            sides[0, i] += prior_precision[i] * prior[user, i]

        # A = R' R, and R'^-1 of the right-hand sides on the way.
        fine = True
        for k in range(f):
            if not a[k, k] > 0:
                fine = False
                break
            inverse = known.dtype.type(1) / math.sqrt(a[k, k])
            for j in range(k, f):
                a[k, j] *= inverse
            for side in range(1 + asked):
                sides[side, k] *= inverse
            for i in range(k + 1, f):
                by = a[k, i]
                for j in range(i, f):
                    a[i, j] -= by * a[k, j]
            for side in range(1 + asked):
                by = sides[side, k]
                for j in range(k + 1, f):
                    sides[side, j] -= by * a[k, j]
        if not fine:
            score[task] = np.nan
            variance[task] = np.nan
            mean[task] = np.nan
            spread[task] = np.nan
            continue
        for query in range(asked):
            on_query, squared = known.dtype.type(0), known.dtype.type(0)
            for k in range(f):
                on_query += sides[0, k] * sides[1 + query, k]
                squared += sides[1 + query, k] * sides[1 + query, k]
            score[task, query] = on_query - known[item_of[query_items[task, query]], f]
            variance[task, query] = squared + noise
        # R^-1 of what has come of them.
        for k in range(f - 1, -1, -1):
            inverse = known.dtype.type(1) / a[k, k]
            for side in range(1 + asked):
                by = sides[side, k]
                for j in range(k + 1, f):
                    by -= a[k, j] * sides[side, j]
                sides[side, k] = by * inverse
        for k in range(f):
            mean[task, k] = sides[0, k]
        for query in range(asked):
            for k in range(f):
                spread[task, query, k] = sides[1 + query, k]


@compiled
def pull(
    given: Given,
    found: Found,
    group_of: Numbers,
    at_score: Floats,
    at_variance: Floats,
    at_known: Floats,
    at_to_user: Floats,
    at_prior: Floats,
    of_group: Floats,
) -> None:
    """Add up the gradients of a loss with gradients ``at_score`` and ``at_variance`` (B, q), for tasks of groups ``group_of`` (B,).

    Into ``at_known`` (J, E), ``at_to_user`` (U, F, F), ``at_prior`` (U, F) and, for each group (G, F + 2), those at log Lambda, at log
    precision, and at minus the exponent of recency.
    """
    known, item_of, items, ratings, starts, decay, user_of, to_user, prior, prior_precision, query_items, queries, noise = given
    _, _, mean, spread, told, told_rating = found
    size = known.shape[1]
    f = size - 1
    at_a = np.empty((f, f), known.dtype)
    through = np.empty((f, f), known.dtype)
    at_own = np.empty((f, f), known.dtype)
    matrix = np.empty((f, f), known.dtype)
    target = np.empty(f, known.dtype)
    vector = np.empty(f, known.dtype)
    features = np.empty(f, known.dtype)
    of_features = np.empty(f, known.dtype)
    longest = len(decay)
    rows, pulled = np.empty((longest, size), known.dtype), np.empty((longest, size), known.dtype)
    form, squares, waited = np.zeros((size, size), known.dtype), np.empty(size, known.dtype), np.empty(longest, known.dtype)
    for newer in range(longest):
        waited[newer] = math.log1p(newer)
    two = known.dtype.type(2)
    half = known.dtype.type(0.5)
    for task in range(len(starts) - 1):
        user, group, s, w = user_of[task], group_of[task], told[task], mean[task]
        asked = queries[task]
        target[:] = 0
        for query in range(asked):
            by = at_score[task, query]
            for k in range(f):
                target[k] += by * spread[task, query, k]
        for i in range(f):
            for j in range(f):
                at_a[i, j] = -half * (target[i] * w[j] + w[i] * target[j])
        at_precision = known.dtype.type(0)
        for query in range(asked):
            by = at_variance[task, query]
            at_precision -= by * noise
            v = spread[task, query]
            for i in range(f):
                scaled = by * v[i]
                for j in range(f):
                    at_a[i, j] -= scaled * v[j]
        for k in range(f):
            of_group[group, k] += prior_precision[k] * (at_a[k, k] + target[k] * prior[user, k])
            at_prior[user, k] += prior_precision[k] * target[k]

        # From here on of items as all users see them: through T.
        t = to_user[user]
        np.dot(t, at_a, through)
        np.dot(through, t.T, matrix)
        np.dot(t, target, vector)
        np.dot(s, through, at_own)
        for i in range(f):
            for j in range(f):
                at_own[i, j] = two * at_own[i, j] + told_rating[task, i] * target[j]
        for i in range(f):
            at_precision += vector[i] * told_rating[task, i]
            for j in range(f):
                at_precision += matrix[i, j] * s[i, j]
        of_group[group, f] += at_precision

        for query in range(asked):
            item = query_items[task, query]
            z = known[item_of[item]]
            for k in range(f):
                features[k] = at_score[task, query] * w[k] + two * at_variance[task, query] * spread[task, query, k]
            into = at_known[item]
            np.dot(t, features, of_features)
            for i in range(f):
                by = z[i]
                for j in range(f):
                    at_own[i, j] += by * features[j]
            for k in range(f):
                into[k] += of_features[k]
            into[f] -= at_score[task, query]
        for i in range(f):
            for j in range(f):
                at_to_user[user, i, j] += at_own[i, j]

        # N (z' M z + r v' z) = N (z, r)' [[M, v/2], [v'/2, 0]] (z, r), by z and r, and by the exponent of recency in N.
        begin, end = starts[task], starts[task + 1]
        for i in range(f):
            for j in range(f):
                form[i, j] = two * matrix[i, j]
            form[i, f] = vector[i]
            form[f, i] = vector[i]
        for place in range(begin, end):
            z = known[item_of[items[place]]]
            for k in range(size):
                rows[place - begin, k] = z[k]
            rows[place - begin, f] += ratings[place]
        np.dot(rows[: end - begin], form, pulled[: end - begin])
        squares[:] = 0
        for place in range(begin, end):
            newer = end - 1 - place
            weight, into, row, by_row = decay[newer], at_known[items[place]], rows[place - begin], pulled[place - begin]
            slower = half * weight * waited[newer]
            for k in range(size):
                into[k] += weight * by_row[k]
                squares[k] -= slower * row[k] * by_row[k]
        of_group[group, f + 1] += squares.sum()


@compiled
def follow(
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
    width = values.shape[1]
    unbiased = 1 - b2**count
    for place in range(len(rows)):
        row = rows[place]
        touched = moments[row, width]
        waited = (count - touched) % clock
        left = b2**waited
        for k in range(width):
            value, second = values[row, k], moments[row, k] * left
            if touched > 0:
                # While it waited, decay pulled by rate decay value / sqrt(second) a step; by rate at the most, as Adam's steps are bounded.
                part = min(rate * decay * waited / (math.sqrt(second / unbiased) + 1e-8), 1.0)
                pull = min(part * abs(value), rate * waited)
                value -= math.copysign(pull, value)
            slope = gradient[place, k] * scale
            second += (1 - b2) * slope * slope
            values[row, k] = value - rate * slope / (math.sqrt(second / unbiased) + 1e-8)
            moments[row, k] = second
        moments[row, width] = count % clock
