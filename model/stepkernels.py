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

from model.compiled import borrowing
from model.products import multiply, multiply_rows, take_product, through, turn
from model.rowkernels import RELU, activate, before, copy, lift, liken, shrink, squared, take_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from model.kernels import Floats, Numbers

    Flags = NDArray[np.bool_]

BLOCK = 16
"""Tasks for which what the memories hold is read at once: they are read from memory, and once is as good as sixteen times."""


class Layers(NamedTuple):
    """What adaptation starts from, as far as it is the same for all tasks, and what the memories add to it (Eq. 7, 9, 10)."""

    weights: Floats  # (N, d_e, d_e)
    biases: Floats  # (N, d_e)
    biased: Flags  # (N,)
    follows: Numbers  # (N,), the activation after each
    user: Numbers  # (layers of the user network,), the numbers of those that make e_u and mix it
    item: Numbers  # (M,), of those between an item's first layer and its last
    joint: int
    """Where in ``item`` e_u comes in."""
    first: int
    """The activation after the first layers."""
    last: Floats  # (d_e + 1,), with its bias
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


class Room(NamedTuple):
    """What tasks are worked on in, one after the other: n and q are the most that there are. What it held before does not matter."""

    own: Floats  # (BLOCK, as `Layers.blended`), what the memories add for the tasks of a block
    attended: Floats  # (BLOCK, K), their attention
    scaled: Floats  # (BLOCK, d_u)
    begun_user: Floats  # (BLOCK, d_e), what is made of their users' p_u before any step
    weights: Floats  # (N, d_e, d_e), a task's own, likewise ``biases`` (N, d_e)
    biases: Floats
    last: Floats  # (d_e + 1,), of the last layer the bias as well
    p_i: Floats  # (n, d_i), of the support
    begun: Floats  # (n, d_e), what is made of it before any step
    learned: Floats  # (1, n, d_e), d of the first layer
    values: Floats  # (M + 1, n, d_e), what goes into the layers between and into the last
    at: Floats  # (M + 1, n, d_e), the gradient there, or where an activation is just before, before it
    slopes: Floats  # (n,), the gradient at the scores
    user_learned: Floats  # (1, 1, d_e), and so for the user's one row
    user_values: Floats
    at_user: Floats
    asked_p_i: Floats  # (q, d_i), and so for the query
    asked: Floats
    at_asked: Floats
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
        copy(given.of_user[given.user_of[first + r]], room.begun_user[r])
        copy(given.attention[given.user_of[first + r]], attended[r])
    if len(layers.blended):
        multiply(attended, layers.blended, room.own[:m])
    for k in range(len(layers.first_blended)):
        for r in range(m):
            by = given.p_u.dtype.type(layers.tau) * attended[r, k]
            for i in range(d_u):
                scaled[r, i] = by * given.p_u[given.user_of[first + r], i]
        take_product(scaled, layers.first_blended[k, : d_u * d].reshape((d_u, d)), room.begun_user[:m])


@borrowing
def begin(layers: Layers, given: Given, room: Room, task: int) -> None:
    """Fill the room with what a task starts from (Eq. 9, 10)."""
    d, n, q = given.of_user.shape[1], given.starts[task + 1] - given.starts[task], given.queries[task]
    weights, biases, own = room.weights.reshape(room.weights.size), room.biases.reshape(room.biases.size), room.own[task % BLOCK]
    shared, shared_biases = layers.weights.reshape(weights.size), layers.biases.reshape(biases.size)
    blended = len(own) // (d * (d + 1)) if len(layers.blended) else 0
    copy(shared[blended * d * d :], weights[blended * d * d :])
    copy(shared_biases[blended * d :], biases[blended * d :])
    for k in range(blended * d * d):
        weights[k] = shared[k] + own[k]
    for k in range(blended * d):
        biases[k] = shared_biases[k] + own[blended * d * d + k]
    copy(layers.last, room.last)
    for r in range(n):
        item = given.items[given.starts[task] + r]
        copy(given.p_i[item], room.p_i[r])
        copy(given.of_item[item], room.begun[r])
        for k in range(d):
            room.learned[0, r, k] = 0
    for r in range(q):
        copy(given.p_i[given.query_items[task, r]], room.asked_p_i[r])
        copy(given.of_item[given.query_items[task, r]], room.asked[0, r])
    for k in range(d):
        room.user_learned[0, 0, k] = 0
    x = room.p_i[:n]
    if n:
        liken(x, x, room.alike[0, : n * n].reshape((n, n)))
        liken(room.asked_p_i[:q], x, room.alike[1, : q * n].reshape((q, n)))


@borrowing
def user_pass(layers: Layers, room: Room, row: int, likeness: float) -> None:
    """The user's row through its network and M_uI; ``row`` is that of the block, ``likeness`` is p_u p_u' + 1."""
    values = room.user_values
    for k in range(values.shape[2]):
        values[0, 0, k] = room.begun_user[row, k] - values.dtype.type(likeness) * room.user_learned[0, 0, k]
    activate(values, 0, 1, layers.first)
    for place in range(len(layers.user)):
        layer = layers.user[place]
        kind = layers.follows[layer]
        through(values[place], room.weights[layer], room.biases[layer : layer + 1], values[place + 1], kind == RELU)
        if kind != RELU:
            activate(values, place + 1, 1, kind)


@borrowing
def user_back(layers: Layers, room: Room) -> None:
    """From the gradient at what M_uI makes of e_u, the last of ``at_user``, to all before it."""
    for place in range(len(layers.user) - 1, -1, -1):
        multiply_rows(room.at_user[place + 1], room.weights[layers.user[place]], room.at_user[place])
        before(room.at_user, room.user_values, place, 1, layers.follows[layers.user[place - 1]] if place else layers.first)


@borrowing
def item_pass(layers: Layers, room: Room, values: Floats, n: int, learned: int) -> None:
    """From what first layers make of n items through all layers but the last.

    ``learned`` rows of the support were seen by a last step that is not written into the weights.
    """
    activate(values, 0, n, layers.first)
    for place in range(len(layers.item)):
        layer = layers.item[place]
        kind, row = layers.follows[layer], room.biases[layer : layer + 1]
        if place == layers.joint:
            row = room.joined
            for k in range(len(row[0])):
                row[0, k] = room.biases[layer, k] + room.user_values[len(layers.user), 0, k]
        through(values[place, :n], room.weights[layer], row, values[place + 1, :n], kind == RELU and not learned)
        if learned:
            alike = room.alike[1, : n * learned].reshape((n, learned))
            multiply_rows(values[place, :n], room.values[place, :learned], alike)
            if layers.biased[layer]:
                lift(alike)
            take_product(alike, room.at[place + 1, :learned], values[place + 1, :n])
        if learned or kind != RELU:
            activate(values, place + 1, n, kind)


@borrowing
def item_back(layers: Layers, room: Room, values: Floats, at: Floats, n: int) -> None:
    """From the gradient at n scores, ``slopes``, to that at what came out of each layer but the last.

    A product wants rows of what stands on its right. So W is turned; or at, which has fewer rows, for W at'.
    """
    d, depth = values.shape[2], len(layers.item)
    here, there = room.turned[0, : n * d].reshape((d, n)), room.turned[1, : n * d].reshape((d, n))
    turned = False
    for r in range(n):
        for k in range(d):
            at[depth, r, k] = room.slopes[r] * room.last[k]
    for place in range(depth, 0, -1):
        weight, kind = room.weights[layers.item[place - 1]], layers.follows[layers.item[place - 1]]
        before(at, values, place, n, kind)
        if d < 2 * n:
            turn(weight, room.product)
            multiply(at[place, :n], room.product, at[place - 1, :n])
            continue
        # Where no activation is in between, what was found for the layer above can go on as it is.
        if kind or not turned:
            turn(at[place, :n], here)
        multiply(weight, here, there)
        turn(there, at[place - 1, :n])
        here, there, turned = there, here, True
    before(at, values, 0, n, layers.first)


@borrowing
def fold(layers: Layers, room: Room, n: int) -> None:
    """Write a step into the layers that see every item."""
    for place in range(len(layers.item)):
        layer = layers.item[place]
        take_product(room.values[place, :n].T, room.at[place + 1, :n], room.weights[layer])
        if layers.biased[layer]:
            take_sum(room.at, place + 1, n, room.biases[layer])


@borrowing
def clip(layers: Layers, given: Given, room: Room, n: int, likeness: float) -> None:
    """Bound the norm of the whole task's gradient. Gradients here are ``rate`` times their size."""
    depth, users = len(layers.item), len(layers.user)
    norm = given.rate**2 * 1e-12 + likeness * np.dot(room.at_user[0, 0], room.at_user[0, 0])
    for i in range(n):
        for j in range(n):
            first = np.dot(room.at[0, i], room.at[0, j])
            last = (np.dot(room.values[depth, i], room.values[depth, j]) + 1) * room.slopes[i] * room.slopes[j]
            norm += room.alike[0, i * n + j] * first + last
    for place in range(depth):
        norm += squared(room.values, place, n, room.at, place + 1, int(layers.biased[layers.item[place]]))
    for place in range(users):
        norm += squared(room.user_values, place, 1, room.at_user, place + 1, int(layers.biased[layers.user[place]]))
    by = min(1.0, given.rate * given.clip / math.sqrt(norm))
    shrink(room.at, n, by)
    shrink(room.at_user, 1, by)
    for r in range(n):
        room.slopes[r] *= by


@borrowing
def step(layers: Layers, given: Given, room: Room, task: int, likeness: float, number: int) -> None:
    """The step of Eq. 11 after ``number`` others; the last one is left to be read from ``values`` and ``at`` by what sees all items."""
    d, depth, users, begins = room.values.shape[2], len(layers.item), len(layers.user), given.starts[task]
    n = given.starts[task + 1] - begins
    user_pass(layers, room, task % BLOCK, likeness)
    for r in range(n):
        copy(room.begun[r], room.values[0, r])
    if number:
        take_product(room.alike[0, : n * n].reshape((n, n)), room.learned[0, :n], room.values[0, :n])
    item_pass(layers, room, room.values, n, 0)
    multiply_rows(room.last[:d].reshape((1, d)), room.values[depth, :n], room.slopes[:n].reshape((1, n)))
    by = room.values.dtype.type(2 * given.rate / n)
    for r in range(n):
        room.slopes[r] = (room.slopes[r] + room.last[d] - given.ratings[begins + r]) * by
    item_back(layers, room, room.values, room.at, n)
    for k in range(d):
        room.at_user[users, 0, k] = 0
    for r in range(n):
        for k in range(d):
            room.at_user[users, 0, k] += room.at[layers.joint + 1, r, k]
    user_back(layers, room)
    if given.clip:
        clip(layers, given, room, n, likeness)
    for r in range(n):
        for k in range(d):
            room.learned[0, r, k] += room.at[0, r, k]
    for r in range(n):
        slope = room.slopes[r]
        for k in range(d):
            room.last[k] -= slope * room.values[depth, r, k]
        room.last[d] -= slope
    for k in range(d):
        room.user_learned[0, 0, k] += room.at_user[0, 0, k]
    for place in range(users):
        layer = layers.user[place]
        take_product(room.user_values[place].T, room.at_user[place + 1], room.weights[layer])
        if layers.biased[layer]:
            take_sum(room.at_user, place + 1, 1, room.biases[layer])
    if number < given.steps - 1:
        fold(layers, room, n)


@borrowing
def ask(layers: Layers, given: Given, found: Found, room: Room, task: int, likeness: float) -> None:
    """Score a task's query after its last step."""
    d, q, n = room.values.shape[2], given.queries[task], given.starts[task + 1] - given.starts[task]
    user_pass(layers, room, task % BLOCK, likeness)
    if n:
        take_product(room.alike[1, : q * n].reshape((q, n)), room.learned[0, :n], room.asked[0, :q])
    item_pass(layers, room, room.asked, q, n)
    multiply_rows(room.last[:d].reshape((1, d)), room.asked[len(layers.item), :q], room.slopes[:q].reshape((1, q)))
    for r in range(q):
        found.score[task, r] = room.slopes[r] + room.last[d]


@borrowing
def pull(layers: Layers, given: Given, found: Found, room: Room, task: int) -> None:
    """From a gradient of 1 at each score of a task's query back, at the adapted parameters."""
    depth, users, count = len(layers.item), len(layers.user), len(layers.weights)
    n, q = given.starts[task + 1] - given.starts[task], given.queries[task]
    if n:
        fold(layers, room, n)
    for r in range(q):
        room.slopes[r] = 1
    item_back(layers, room, room.asked, room.at_asked, q)
    for r in range(q):
        copy(room.asked[depth, r], found.into[task, count, r])
        copy(room.at_asked[0, r], found.at[task, count + 1, r])
        for place in range(depth):
            copy(room.asked[place, r], found.into[task, layers.item[place], r])
            copy(room.at_asked[place + 1, r], found.at[task, layers.item[place], r])
        copy(room.at_asked[layers.joint + 1, r], room.at_user[users, 0])
        user_back(layers, room)
        copy(room.at_user[0, 0], found.at[task, count, r])
        for place in range(users):
            copy(room.at_user[place + 1, 0], found.at[task, layers.user[place], r])
    for place in range(users):
        copy(room.user_values[place, 0], found.into[task, layers.user[place], 0])
    if n:
        alike = room.alike[1, : q * n].reshape((q, n))
        multiply_rows(room.at_asked[0, :q], room.learned[0, :n], alike)
        multiply(alike, room.p_i[:n], found.at_p_i[task, :q])
    copy(room.user_learned[0, 0], found.user_learned[task])
    for half in range(2):
        weight = room.weights[layers.item[layers.joint] if half else layers.user[users - 1]]
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
            for number in range(given.steps):
                step(layers, given, room, task, likeness, number)
        ask(layers, given, found, room, task, likeness)
        if given.learning:
            pull(layers, given, found, room, task)
