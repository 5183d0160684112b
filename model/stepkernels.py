"""Gradient steps (Eq. 11) one task at a time, as loops that Numba compiles: what a task adapts stays in the processor's caches.

Done for all tasks at once, each product reads and writes the fast weights of all of them, which no cache holds. Here a task's weights are
put together, learned in place, asked and forgotten before the next one's (`model.products`).

- What goes into the first layers, p_u and p_i, stays as it is from step to step: y = x W - (x x') d, of which x W and x x' are made once,
  and d of all steps adds up. So these weights, shared by all tasks, are never written.
- The last step is not written either where few rows see it: a query goes through W - x' d as x W - (x x') d.

Every layer between the first and the last is d_e by d_e. They are numbered: the user network from its second layer on, what M_uI (or
without it the first rating layer) does to e_u, what it does to e_i, the item network from its second layer on, the rating network. Shapes
as in `model.steps`: B tasks, U users, L interactions, I items, q; N such layers, K memory rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.compiled import borrowing, inlined
from model.products import multiply, multiply_rows, take_product, through, turn
from model.rowkernels import RELU, activate, add, before, copy, lift, liken, shrink, squared, take_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model.kernels import Floats, Numbers

    Flags = NDArray[np.bool_]

BLOCK = 16
"""Tasks for which what the memories hold is read at once: they are read from memory, and once is as good as sixteen times."""


class Plan(NamedTuple):
    """Which layer follows which. Handed over by itself, as `Fast` and `Rows` are: each array of a call is seven numbers and more."""

    biased: Flags  # (N,)
    follows: Numbers  # (N,), the activation after each
    user: Numbers  # (layers of the user network,), the numbers of those that make e_u and mix it
    item: Numbers  # (M,), of those between an item's first layer and its last
    joint: int
    """Where in ``item`` e_u comes in."""
    first: int
    """The activation after the first layers."""


class Fast(NamedTuple):
    """Layers that adaptation changes: those of all tasks before it, or a task's own, its fast weights."""

    weights: Floats  # (N, d_e, d_e)
    biases: Floats  # (N, d_e)
    last: Floats  # (d_e + 1,), with its bias


class Layers(NamedTuple):
    """What adaptation starts from, as far as it is the same for all tasks, and what the memories add to it (Eq. 7, 9, 10)."""

    plan: Plan
    shared: Fast
    blended: Floats  # (K, n d_e (d_e + 1)), the weights of the first n layers, then their biases; K is 0 without memories
    first_blended: Floats  # (K, d_u d_e or more), of which the first are for the weights of the user's first layer; 0 rows likewise
    tau: float


class Given(NamedTuple):
    """The tasks. What first layers make of p_u and p_i is without what memories add and adaptation learns."""

    attention: Floats  # (U, K)
    p_u: Floats  # (U, d_u)
    of_user: Floats  # (U, d_e)
    p_i: Floats  # (I, d_i)
    of_item: Floats  # (I, d_e)
    items: Numbers  # (L,), numbers of items
    ratings: Floats  # (L,)
    starts: Numbers  # (B + 1,), where the support of each task begins, and the last ends
    user_of: Numbers  # (B,)
    query_items: Numbers  # (B, q), of which each task has as many as ``queries`` (B,) says
    queries: Numbers
    steps: int
    rate: float
    clip: float
    learning: bool


class Found(NamedTuple):
    """What adapting finds. All but the scores have no rows where nothing is learned from them.

    The way back through the queries is that from a gradient of 1 at each score, row by row.
    """

    score: Floats  # (B, q)
    into: Floats  # (B, N + 1, q, d_e), what went into each layer, at last that of the scores; of the user's the first row is filled
    at: Floats  # (B, N + 2, q, d_e), the gradient at what came out of each layer, at last of the first ones of users and of items
    at_p_i: Floats  # (B, q, d_i), what the first layer's learned part adds to the gradient at p_i
    user_learned: Floats  # (B, d_e), what was learned of the user's first layer, less p_u' times this
    mixing: Floats  # (B, 2, d_e, d_e), what does M_uI's work on e_u and on e_i, adapted


class Rows(NamedTuple):
    """What goes through the layers: a support or a query, of n rows, or the user, of one."""

    values: Floats  # (M + 1, n, d_e), what goes into the layers between and into the last
    at: Floats  # (M + 1, n, d_e), the gradient there, or where an activation is just before, before it


class Room(NamedTuple):
    """What tasks are worked on in, one after the other: n and q are the most that there are. Only what ``ones`` held before matters."""

    own: Floats  # (BLOCK, as `Layers.blended`), what the memories add for the tasks of a block
    attended: Floats  # (BLOCK, K), their attention
    scaled: Floats  # (BLOCK, d_u)
    begun_user: Floats  # (BLOCK, d_e), what is made of their users' p_u before any step
    fast: Fast
    p_i: Floats  # (n, d_i), of the support
    begun: Floats  # (n, d_e), what is made of it before any step
    learned: Floats  # (n, d_e), d of the first layer
    support: Rows
    slopes: Floats  # (n,), the gradient at the scores
    ones: Floats  # (1, n), which are 1
    user_learned: Floats  # (d_e,)
    user: Rows
    asked_p_i: Floats  # (q, d_i)
    query: Rows
    alike: Floats  # (2, s max(s, q)), of the longest support s, x x' + 1 of the support with itself, and of the query with it
    joined: Floats  # (1, d_e), what is added to each row where e_u comes in
    product: Floats  # (d_e, d_e)
    turned: Floats  # (2, d_e n)


@borrowing
def read(layers: Layers, given: Given, room: Room, first: int) -> None:
    """What the memories add for the block of tasks from ``first`` on (Eq. 7, 9), and their users' first layers."""
    m, d_u, d = min(BLOCK, len(given.user_of) - first), given.p_u.shape[1], room.begun_user.shape[1]
    attended, scaled = room.attended[:m], room.scaled[:m]
    for r in range(m):
        user = given.user_of[first + r]
        copy(given.of_user[user], room.begun_user[r])
        copy(given.attention[user], attended[r])
    if len(layers.blended):
        multiply(attended, layers.blended, room.own[:m])
    for k in range(len(layers.first_blended)):
        for r in range(m):
            by, p_u, row = given.p_u.dtype.type(layers.tau) * attended[r, k], given.p_u[given.user_of[first + r]], scaled[r]
            for i in range(d_u):
                row[i] = by * p_u[i]
        take_product(scaled, layers.first_blended[k, : d_u * d].reshape((d_u, d)), room.begun_user[:m])


@borrowing
def begin(layers: Layers, given: Given, room: Room, task: int) -> None:
    """Fill the room with what a task starts from (Eq. 9, 10)."""
    n, q, d, shared = given.starts[task + 1] - given.starts[task], given.queries[task], given.of_user.shape[1], layers.shared
    fast, own = room.fast, room.own[task % BLOCK]
    weights, biases = fast.weights.reshape(fast.weights.size), fast.biases.reshape(fast.biases.size)
    shared_weights, shared_biases = shared.weights.reshape(weights.size), shared.biases.reshape(biases.size)
    blended = len(own) // (d * (d + 1)) if len(layers.blended) else 0
    copy(shared_weights[blended * d * d :], weights[blended * d * d :])
    copy(shared_biases[blended * d :], biases[blended * d :])
    for k in range(blended * d * d):
        weights[k] = shared_weights[k] + own[k]
    for k in range(blended * d):
        biases[k] = shared_biases[k] + own[blended * d * d + k]
    copy(shared.last, fast.last)
    for r in range(n):
        item = given.items[given.starts[task] + r]
        copy(given.p_i[item], room.p_i[r])
        copy(given.of_item[item], room.begun[r])
    for r in range(q):
        copy(given.p_i[given.query_items[task, r]], room.asked_p_i[r])
        copy(given.of_item[given.query_items[task, r]], room.query.values[0, r])
    room.learned[:n] = 0
    room.user_learned[:] = 0
    x = room.p_i[:n]
    if n:
        liken(x, x, room.alike[0, : n * n].reshape((n, n)))
        liken(room.asked_p_i[:q], x, room.alike[1, : q * n].reshape((q, n)))


@inlined
def user_pass(plan: Plan, fast: Fast, user: Rows, begun: Floats, learned: Floats, likeness: float, joined: Floats) -> None:
    """The user's row through its network and M_uI, from what was ``begun`` (d_e,); ``likeness`` is p_u p_u' + 1.

    With the layer's bias it is ``joined`` (1, d_e), which is added to each row where e_u comes in.
    """
    values = user.values
    for k in range(len(begun)):
        values[0, 0, k] = begun[k] - values.dtype.type(likeness) * learned[k]
    activate(values, 0, 1, plan.first)
    for place in range(len(plan.user)):
        layer = plan.user[place]
        kind = plan.follows[layer]
        through(values[place], fast.weights[layer], fast.biases[layer : layer + 1], values[place + 1], kind == RELU)
        if kind != RELU:
            activate(values, place + 1, 1, kind)
    bias, of_user = fast.biases[plan.item[plan.joint]], values[len(plan.user), 0]
    for k in range(len(bias)):
        joined[0, k] = bias[k] + of_user[k]


@inlined
def user_back(plan: Plan, fast: Fast, user: Rows) -> None:
    """From the gradient at what M_uI makes of e_u, the last of ``at``, to all before it."""
    for place in range(len(plan.user) - 1, -1, -1):
        multiply_rows(user.at[place + 1], fast.weights[plan.user[place]], user.at[place])
        before(user.at, user.values, place, 1, plan.follows[plan.user[place - 1]] if place else plan.first)


@borrowing
def item_pass(plan: Plan, fast: Fast, values: Floats, n: int, joined: Floats, support: Rows, alike: Floats) -> None:
    """From what first layers make of n items through all layers but the last, e_u ``joined``.

    Where a last step is not written into the weights, its ``support`` counts as ``alike`` (n, rows of it) to what comes in.
    """
    activate(values, 0, n, plan.first)
    learned = alike.shape[1]
    for place in range(len(plan.item)):
        layer = plan.item[place]
        kind, row = plan.follows[layer], joined if place == plan.joint else fast.biases[layer : layer + 1]
        through(values[place, :n], fast.weights[layer], row, values[place + 1, :n], kind == RELU and not learned)
        if learned:
            multiply_rows(values[place, :n], support.values[place, :learned], alike)
            if plan.biased[layer]:
                lift(alike)
            take_product(alike, support.at[place + 1, :learned], values[place + 1, :n])
        if learned or kind != RELU:
            activate(values, place + 1, n, kind)


@borrowing
def item_back(plan: Plan, fast: Fast, rows: Rows, slopes: Floats, last: Floats, product: Floats, turned: Floats) -> None:
    """From the gradient at scores, ``slopes`` (n, 1), through the ``last`` layer's weights (1, d_e) to that at what came out of each other.

    A product wants rows of what stands on its right. So W is turned, into ``product``; or at, which has fewer rows, for W at'.
    """
    n, d, depth, at, values = len(slopes), len(product), len(plan.item), rows.at, rows.values
    multiply(slopes, last, at[depth, :n])
    here, there, stands = turned[0, : n * d].reshape((d, n)), turned[1, : n * d].reshape((d, n)), False
    for place in range(depth, 0, -1):
        weight, kind = fast.weights[plan.item[place - 1]], plan.follows[plan.item[place - 1]]
        before(at, values, place, n, kind)
        if d < 2 * n:
            turn(weight, product)
            multiply(at[place, :n], product, at[place - 1, :n])
            continue
        # Where no activation is in between, what was found for the layer above can go on as it is.
        if kind or not stands:
            turn(at[place, :n], here)
        multiply(weight, here, there)
        turn(there, at[place - 1, :n])
        here, there, stands = there, here, True
    before(at, values, 0, n, plan.first)


@inlined
def fold(plan: Plan, fast: Fast, rows: Rows, n: int) -> None:
    """Write a step into the layers that see every item."""
    for place in range(len(plan.item)):
        layer = plan.item[place]
        take_product(rows.values[place, :n].T, rows.at[place + 1, :n], fast.weights[layer])
        if plan.biased[layer]:
            take_sum(rows.at, place + 1, n, fast.biases[layer])


@borrowing
def clip(layers: Layers, given: Given, room: Room, n: int, likeness: float) -> None:
    """Bound the norm of the whole task's gradient. Gradients here are ``rate`` times their size."""
    plan, values, at, user, slopes = layers.plan, room.support.values, room.support.at, room.user, room.slopes
    depth, users = len(plan.item), len(plan.user)
    norm = given.rate**2 * 1e-12 + likeness * np.dot(user.at[0, 0], user.at[0, 0])
    for i in range(n):
        for j in range(n):
            last = (np.dot(values[depth, i], values[depth, j]) + 1) * slopes[i] * slopes[j]
            norm += room.alike[0, i * n + j] * np.dot(at[0, i], at[0, j]) + last
    for place in range(depth):
        norm += squared(values, place, n, at, place + 1, int(plan.biased[plan.item[place]]))
    for place in range(users):
        norm += squared(user.values, place, 1, user.at, place + 1, int(plan.biased[plan.user[place]]))
    by = min(1.0, given.rate * given.clip / math.sqrt(norm))
    shrink(at, n, by)
    shrink(user.at, 1, by)
    for r in range(n):
        slopes[r] *= by


@borrowing
def learn(layers: Layers, given: Given, room: Room, task: int, likeness: float) -> None:
    """The steps of Eq. 11; the last one is left to be read from the support's rows by what sees all items."""
    plan, fast, support, user, learned = layers.plan, room.fast, room.support, room.user, room.learned
    d, depth, users, begins = room.learned.shape[1], len(plan.item), len(plan.user), given.starts[task]
    n = given.starts[task + 1] - begins
    alike, nothing = room.alike[0, : n * n].reshape((n, n)), room.alike[1, :0].reshape((n, 0))
    # Rows as one, and vectors as matrices: here, since each is a call.
    learned_in_all, at_first = learned[:n].reshape(n * d), support.at[0, :n].reshape(n * d)
    slopes, last, bias = room.slopes[:n].reshape((n, 1)), fast.last[:d].reshape((1, d)), fast.last[d:]
    slopes_in_a_row, last_in_a_column = slopes.reshape((1, n)), last.reshape((d, 1))
    for number in range(given.steps):
        user_pass(plan, fast, user, room.begun_user[task % BLOCK], room.user_learned, likeness, room.joined)
        for r in range(n):
            copy(room.begun[r], support.values[0, r])
        if number:
            take_product(alike, learned[:n], support.values[0, :n])
        item_pass(plan, fast, support.values, n, room.joined, support, nothing)
        multiply(support.values[depth, :n], last_in_a_column, slopes)
        by = learned.dtype.type(2 * given.rate / n)
        for r in range(n):
            slopes[r, 0] = (slopes[r, 0] + bias[0] - given.ratings[begins + r]) * by
        item_back(plan, fast, support, slopes, last, room.product, room.turned)
        multiply(room.ones[:, :n], support.at[plan.joint + 1, :n], user.at[users])
        user_back(plan, fast, user)
        if given.clip:
            clip(layers, given, room, n, likeness)
        add(at_first, learned_in_all)
        take_product(slopes_in_a_row, support.values[depth, :n], last)
        for r in range(n):
            bias[0] -= slopes[r, 0]
        add(user.at[0, 0], room.user_learned)
        for place in range(users):
            layer = plan.user[place]
            take_product(user.values[place].T, user.at[place + 1], fast.weights[layer])
            if plan.biased[layer]:
                take_sum(user.at, place + 1, 1, fast.biases[layer])
        if number < given.steps - 1:
            fold(plan, fast, support, n)


@borrowing
def ask(layers: Layers, given: Given, found: Found, room: Room, task: int, likeness: float) -> None:
    """Score a task's query after its last step."""
    plan, fast, query, user = layers.plan, room.fast, room.query, room.user
    q, n, d = given.queries[task], given.starts[task + 1] - given.starts[task], room.learned.shape[1]
    alike = room.alike[1, : q * n].reshape((q, n))
    user_pass(plan, fast, user, room.begun_user[task % BLOCK], room.user_learned, likeness, room.joined)
    if n:
        take_product(alike, room.learned[:n], query.values[0, :q])
    item_pass(plan, fast, query.values, q, room.joined, room.support, alike)
    multiply(query.values[len(plan.item), :q], fast.last[:d].reshape((d, 1)), room.slopes[:q].reshape((q, 1)))
    for r in range(q):
        found.score[task, r] = room.slopes[r] + fast.last[d]


@borrowing
def pull(layers: Layers, given: Given, found: Found, room: Room, task: int) -> None:
    """From a gradient of 1 at each score of a task's query back, at the adapted parameters."""
    plan, fast, query, user = layers.plan, room.fast, room.query, room.user
    depth, users, (count, d, _) = len(plan.item), len(plan.user), fast.weights.shape
    n, q = given.starts[task + 1] - given.starts[task], given.queries[task]
    if n:
        fold(plan, fast, room.support, n)
    item_back(plan, fast, query, room.ones[0, :q].reshape((q, 1)), fast.last[:d].reshape((1, d)), room.product, room.turned)
    for r in range(q):
        copy(query.values[depth, r], found.into[task, count, r])
        copy(query.at[0, r], found.at[task, count + 1, r])
        for place in range(depth):
            copy(query.values[place, r], found.into[task, plan.item[place], r])
            copy(query.at[place + 1, r], found.at[task, plan.item[place], r])
        copy(query.at[plan.joint + 1, r], user.at[users, 0])
        user_back(plan, fast, user)
        copy(user.at[0, 0], found.at[task, count, r])
        for place in range(users):
            copy(user.at[place + 1, 0], found.at[task, plan.user[place], r])
    for place in range(users):
        copy(user.values[place, 0], found.into[task, plan.user[place], 0])
    if n:
        alike = room.alike[1, : q * n].reshape((q, n))
        multiply_rows(query.at[0, :q], room.learned[:n], alike)
        multiply(alike, room.p_i[:n], found.at_p_i[task, :q])
    copy(room.user_learned, found.user_learned[task])
    for half in range(2):
        weight = fast.weights[plan.item[plan.joint] if half else plan.user[users - 1]]
        for i in range(len(weight)):
            copy(weight[i], found.mixing[task, half, i])


@borrowing
def adapt(layers: Layers, given: Given, found: Found, room: Room, first: int, stop: int) -> None:
    """Adapt the tasks from ``first``, a multiple of `BLOCK`, up to ``stop``, score their queries, and fill what is ``found``."""
    for task in range(first, stop):
        if task % BLOCK == 0:
            read(layers, given, room, task)
        begin(layers, given, room, task)
        p_u = given.p_u[given.user_of[task]]
        likeness = np.dot(p_u, p_u) + 1
        if given.starts[task] < given.starts[task + 1]:
            learn(layers, given, room, task, likeness)
        ask(layers, given, found, room, task, likeness)
        if given.learning:
            pull(layers, given, found, room, task)
