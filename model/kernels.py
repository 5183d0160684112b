"""The arithmetic of the closed form as loops, compiled by Numba: what a task needs stays in the processor's first cache.

Written as batched tensor operations the same is some hundred calls on arrays of a few kilobytes, each slower than the work it does. Arrays
are numpy's, of one floating type throughout. Shapes as in `model.engine`: B tasks, L interactions, q, I and J items, F.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.compiled import compiled
from model.lanes import LANES, add, condition, fill_turned, join, slopes, substitute, through_users
from model.products import accumulate, multiply, scale, turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]
    Numbers = NDArray[np.int64]


class Given(NamedTuple):
    """What a batch of tasks is adapted from."""

    known: Floats
    """(I, W): z of each item, what is predicted without x w, negated, and 0 up to a width that registers take."""
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
    e_u: Floats
    """(U, d_e), likewise ``attention`` (U, K)."""
    attention: Floats
    mixing: Floats
    """(K, 2 d_e d_e), M_UI; without task memory no rows."""
    prior: Floats
    """(U, F), w0."""
    prior_precision: Floats
    """(F,), the diagonal of Lambda."""
    query_items: Numbers
    """(B, q), into ``item_of``, of which each task has as many as ``queries`` (B,) says."""
    queries: Numbers
    noise: np.floating
    """The variance of a rating."""


class Found(NamedTuple):
    """What adapting finds; a task whose precision matrix is not positive definite has NaN.

    Tasks stand side by side, `LANES` of them in each of C blocks, but for scores and w; what has no task or no query is 0.
    """

    score: Floats
    """(B, q), likewise ``variance``."""
    variance: Floats
    mean: Floats
    """(B, F), the adapted w."""
    answers: Floats
    """(C, F, 1 + q, LANES), first the adapted w, then A^-1 x of each query."""
    told: Floats
    """(C, F, W, LANES), S = Z' N Z, what the support tells, of items as all users see them; behind it Z' N r, and 0."""
    seen: Floats
    """(C, F, 1 + q, LANES), first Z' N r of the support, then z of each query."""
    to_user: Floats
    """(C, F, F, LANES), T of each task's user."""


class Pulled(NamedTuple):
    """Gradients of a loss, summed over tasks."""

    known: Floats
    """(J, W), at what is known of items."""
    to_user: Floats
    """(U, F, F), at T."""
    prior: Floats
    """(U, F), at w0."""
    of_group: Floats
    """(G, F + 2), of each group those at log Lambda, at log precision, and at minus the exponent of recency."""


@compiled
def adapt(given: Given) -> Found:
    """Condition each task's last layer on its support, A = T' S T + Lambda, and score its queries."""
    known, item_of, items, ratings, starts, decay, user_of, e_u, attention, mixing, prior, prior_precision, query_items, queries, noise = (
        given
    )
    f, width, kind = prior.shape[1], known.shape[1], known.dtype
    tasks, most, longest = len(starts) - 1, query_items.shape[1], len(decay)
    blocks = -(-tasks // LANES)
    # A query that is none scores 0 with variance 1.
    score, variance, mean = np.zeros((tasks, most), kind), np.ones((tasks, most), kind), np.empty((tasks, f), kind)
    answers, seen = np.zeros((blocks, f, 1 + most, LANES), kind), np.zeros((blocks, f, 1 + most, LANES), kind)
    told, of_users = np.empty((blocks, f, width, LANES), kind), np.empty((blocks, f, f, LANES), kind)
    rows, weighted = np.empty((longest, width), kind), np.empty((longest, width), kind)
    # Of tasks one after the other, until they are turned to stand side by side.
    grams, of_queries = np.zeros((LANES, width, width), kind), np.zeros((LANES, width), kind)
    a, own, inverse = np.empty((f, f, LANES), kind), np.empty((f, f, LANES), kind), np.empty((f, LANES), kind)
    # The right-hand sides: t, and each query's features.
    sides = np.empty((f, 1 + most, LANES), kind)
    on_query, squared, one = np.empty((1, most, LANES), kind), np.empty(LANES, kind), kind.type(1)
    embedded, attended = np.zeros((f - 1, LANES), kind), np.zeros((len(mixing), LANES), kind)
    mixed = np.empty((mixing.shape[1], LANES), kind)
    for block in range(len(answers)):
        begin = block * LANES
        lanes, asked = min(LANES, tasks - begin), 0
        s, t, right = told[block], of_users[block], seen[block]
        sides[:] = 0
        for lane in range(lanes):
            task = begin + lane
            first, count = starts[task], starts[task + 1] - starts[task]
            user, asked = user_of[task], max(asked, queries[task])
            for place in range(count):
                scale(rows[place], one, known[item_of[items[first + place]]])
                rows[place, f] += ratings[first + place]
            # Not at once: a register that is read right after one number of it was written waits until that is in the cache.
            for place in range(count):
                scale(weighted[place], decay[count - 1 - place], rows[place])
            # With the residual beside z: Z' N Z and Z' N r at once.
            multiply(weighted[:count].T, rows[:count], grams[lane])
            for k in range(f):
                sides[k, 0, lane] = prior_precision[k] * prior[user, k]
            for k in range(f - 1):
                embedded[k, lane] = e_u[user, k]
            for row in range(len(mixing)):
                attended[row, lane] = attention[user, row]
        if lanes < LANES:
            grams[lanes:] = 0
        turn(grams.reshape(LANES, width * width)[:, : f * width], s.reshape(f * width, LANES))
        for k in range(f):
            scale(right[k, 0], one, s[k, f])
        for query in range(asked):
            for lane in range(lanes):
                if query < queries[begin + lane]:
                    scale(of_queries[lane], one, known[item_of[query_items[begin + lane, query]]])
                else:
                    of_queries[lane] = 0
            turn(of_queries[:lanes, :f], right[:, 1 + query, :lanes])

        join(mixing, attended, embedded, mixed, t)
        own_sides = sides[:, : 1 + asked]
        condition(s[:, :f], t, prior_precision, right[:, : 1 + asked], own_sides, own, a, inverse)
        fill_turned(on_query[:, :asked], own_sides[:, :1], own_sides[:, 1:])
        for query in range(asked):
            squared[:] = noise
            add(squared, sides[:, 1 + query], sides[:, 1 + query])
            for lane in range(lanes):
                if query < queries[begin + lane]:
                    score[begin + lane, query] = on_query[0, query, lane] - known[item_of[query_items[begin + lane, query]], f]
                    variance[begin + lane, query] = squared[lane]
        substitute(a, inverse, own_sides, answers[block, :, : 1 + asked])
        for lane in range(lanes):
            for k in range(f):
                mean[begin + lane, k] = answers[block, k, 0, lane]
    return Found(score, variance, mean, answers, told, seen, of_users)


@compiled
def pull(
    given: Given,
    found: Found,
    task_ends: Numbers,
    at_score: Floats,
    at_variance: Floats,
) -> Pulled:
    """The gradients of a loss with gradients ``at_score`` and ``at_variance`` (B, q), for groups whose tasks end at ``task_ends`` (G,)."""
    known, item_of, items, ratings, starts, decay, user_of, _, _, _, prior, prior_precision, query_items, queries, noise = given
    answers, told, seen, of_users = found.answers, found.told, found.seen, found.to_user
    (users, f), width, kind, group = prior.shape, known.shape[1], known.dtype, 0
    at_known, at_prior = np.zeros((len(item_of), width), kind), np.zeros((users, f), kind)
    at_to_user, of_group = np.zeros((users, f, f), kind), np.zeros((len(task_ends), f + 2), kind)
    tasks, most = len(starts) - 1, query_items.shape[1]
    at_a, through, turned = np.empty((f, f, LANES), kind), np.empty((f, f, LANES), kind), np.empty((f, f, LANES), kind)
    at_own, at_precision = np.empty((f, f, LANES), kind), np.empty(LANES, kind)
    # [[2 M, v], [v', 0]] of each task side by side; then, as at T and at each query, one after the other.
    both, forms = np.zeros((width, width, LANES), kind), np.empty((LANES, width, width), kind)
    of_users_own, of_queries = np.empty((LANES, f * f), kind), np.zeros((LANES, width), kind)
    by_score, by_variance = np.empty((most, LANES), kind), np.empty((most, LANES), kind)
    left, right = np.empty((2 + most, f, LANES), kind), np.empty((2 + most, f, LANES), kind)
    features, at_seen = np.empty((1 + most, f, LANES), kind), np.empty((1 + most, f, LANES), kind)
    longest = len(decay)
    rows, pulled = np.empty((longest, width), kind), np.empty((longest, width), kind)
    squares, waited = np.empty(width, kind), np.empty(longest, kind)
    for newer in range(longest):
        waited[newer] = math.log1p(newer)
    one, half = kind.type(1), kind.type(0.5)
    for block in range(len(answers)):
        begin = block * LANES
        lanes, asked = min(LANES, tasks - begin), 0
        by_score[:] = 0
        by_variance[:] = 0
        for lane in range(lanes):
            asked = max(asked, queries[begin + lane])
            for query in range(queries[begin + lane]):
                by_score[query, lane] = at_score[begin + lane, query]
                by_variance[query, lane] = at_variance[begin + lane, query]
        s, t, solved, of_items = told[block, :, :f], of_users[block], answers[block, :, : 1 + asked], seen[block, :, : 1 + asked]
        slopes(by_score[:asked], by_variance[:asked], solved, left[: 2 + asked], right[: 2 + asked], features[: 1 + asked], at_a)
        through_users(s, t, of_items, at_a, features[: 1 + asked], turned, through, both[:f, :f], at_own, at_seen[: 1 + asked])
        at_precision[:] = 0
        for i in range(f):
            add(at_precision, both[i, :f], s[i])
            scale(both[i, f], one, at_seen[0, i])
            scale(both[f, i], one, at_seen[0, i])
        for lane in range(LANES):
            at_precision[lane] *= half
        add(at_precision, at_seen[0], of_items[:, 0])
        for query in range(asked):
            for lane in range(LANES):
                at_precision[lane] -= by_variance[query, lane] * noise
            turn(at_seen[1 + query], of_queries[:, :f])
            for lane in range(lanes):
                if query < queries[begin + lane]:
                    of_queries[lane, f] = -by_score[query, lane]
            for lane in range(lanes):
                if query < queries[begin + lane]:
                    accumulate(at_known[query_items[begin + lane, query]], one, of_queries[lane])
        turn(both.reshape(width * width, LANES), forms.reshape(LANES, width * width))
        turn(at_own.reshape(f * f, LANES), of_users_own)

        for lane in range(lanes):
            task = begin + lane
            while task == task_ends[group]:
                group += 1
            user, of = user_of[task], of_group[group]
            for i in range(f):
                of[i] += prior_precision[i] * (at_a[i, i, lane] + features[0, i, lane] * prior[user, i])
                at_prior[user, i] += prior_precision[i] * features[0, i, lane]
            accumulate(at_to_user[user].reshape(f * f), one, of_users_own[lane])
            of[f] += at_precision[lane]

            # N (z' M z + r v' z) = N (z, r)' [[M, v/2], [v'/2, 0]] (z, r), by z and r, and by the exponent of recency in N.
            first, end = starts[task], starts[task + 1]
            for place in range(first, end):
                scale(rows[place - first], one, known[item_of[items[place]]])
                rows[place - first, f] += ratings[place]
            multiply(rows[: end - first], forms[lane], pulled[: end - first])
            squares[:] = 0
            for place in range(first, end):
                newer, by_row = end - 1 - place, pulled[place - first]
                accumulate(at_known[items[place]], decay[newer], by_row)
                scale(rows[place - first], -half * decay[newer] * waited[newer], rows[place - first])
            for begins in range(0, width, LANES):
                part = slice(begins, begins + LANES)
                add(squares[part], rows[: end - first, part], pulled[: end - first, part])
            of[f + 1] += squares.sum()
    return Pulled(at_known, at_to_user, at_prior, of_group)


@compiled
def finite(values: Floats) -> bool:
    """Whether none of values (n,) is infinite or NaN, nor so large that sums of squares in single precision are."""
    found = True
    for place in range(len(values)):
        found &= abs(values[place]) < 1e15
    return found


@compiled
def inside(scores: Floats, least: float, factor: float, low: float, high: float) -> Floats:
    """Scores (B, q), in float64, on the scale from ``low`` to ``high`` and inside it, its middle where one is no number.

    They are given on one that begins at ``least`` and of which a point is ``factor`` points of theirs.
    """
    found = np.empty(scores.shape, np.float64)
    for task in range(scores.shape[0]):
        for query in range(scores.shape[1]):
            score = low + factor * (np.float64(scores[task, query]) - least)
            found[task, query] = (low + high) / 2 if math.isnan(score) else min(max(score, low), high)
    return found


@compiled
def deviations(variances: Floats, factor: float, widest: float) -> Floats:
    """The standard deviations of variances (B, q) in points of a scale, as in `inside`; the ``widest`` where one is no finite number."""
    found = np.empty(variances.shape, np.float64)
    for task in range(variances.shape[0]):
        for query in range(variances.shape[1]):
            deviation = factor * math.sqrt(np.float64(variances[task, query]))
            found[task, query] = deviation if math.isfinite(deviation) else widest
    return found


@compiled
def slopes_of(scores: Floats, variances: Floats, ratings: Floats, mask: Floats) -> tuple[Floats, Floats]:
    """The derivatives of the Gaussian log loss (log v + (r - y)^2 / v) / 2 by score y and by variance v, all (B, q)."""
    at_score, at_variance, half = np.empty_like(scores), np.empty_like(scores), scores.dtype.type(0.5)
    for task in range(scores.shape[0]):
        for query in range(scores.shape[1]):
            precision = 1 / variances[task, query]
            slope = (scores[task, query] - ratings[task, query]) * precision
            at_score[task, query] = slope * mask[task, query]
            at_variance[task, query] = half * (precision - slope * slope) * mask[task, query]
    return at_score, at_variance
