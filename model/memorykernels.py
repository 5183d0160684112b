"""What `model.memory` does, as loops that Numba compiles: attention, the writes of users as one, and what comes of them.

All in one, of so few users and rows: each call of numpy's would take longer than what it does. K rows of each memory, U users, W of whom
write.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from model.compiled import borrowing, compiled
from model.products import accumulate, multiply, multiply_rows, scale, turn
from model.rowkernels import add

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers

SHORT = 1e-8
"""A vector that is shorter has no direction."""


@compiled
def attend(p_u: Floats, profile: Floats, centre: Floats, temperature: float) -> Floats:
    """As `Memory.attention`, of profiles (U, d_u) and rows (K, d_u), less ``centre`` (d_u,): (U, K)."""
    kind, size = p_u.dtype, profile.shape[1]
    looked, towards, turned = np.empty_like(p_u), np.empty_like(profile), np.empty((size, len(profile)), kind)
    attention, square = np.empty((len(p_u), len(profile)), kind), np.empty((1, 1), kind)
    attend_to(p_u, profile, centre, kind.type(temperature), looked, towards, turned, square, attention)
    return attention


@borrowing
def attend_to(
    p_u: Floats,
    profile: Floats,
    centre: Floats,
    temperature: np.floating,
    looked: Floats,
    towards: Floats,
    turned: Floats,
    square: Floats,
    into: Floats,
) -> None:
    """The loop of `attend`; ``looked`` (U, d_u), ``towards`` (K, d_u), ``turned`` (d_u, K) and ``square`` (1, 1) are room."""
    for row in range(len(profile)):
        by = 1 / length(profile, row, square)
        for k in range(len(centre)):
            towards[row, k] = profile[row, k] * by
    turn(towards, turned)
    for user in range(len(p_u)):
        for k in range(len(centre)):
            looked[user, k] = p_u[user, k] - centre[k]
    multiply(looked, turned, into)
    for user in range(len(p_u)):
        cosines, sharpness = into[user], temperature / length(looked, user, square)
        most, total = -np.inf, 0.0
        for row in range(len(cosines)):
            cosines[row] *= sharpness
            most = max(most, float(cosines[row]))
        for row in range(len(cosines)):
            cosines[row] = math.exp(cosines[row] - most)
            total += cosines[row]
        for row in range(len(cosines)):
            cosines[row] /= total


@borrowing
def length(values: Floats, row: int, square: Floats) -> float:
    """The length of a row, `SHORT` where it is shorter; ``square`` (1, 1) is room."""
    of = values[row : row + 1]
    multiply_rows(of, of, square)
    return max(SHORT, math.sqrt(square[0, 0]))


@compiled
def of_writers(
    users: Numbers,
    tasks: Numbers,
    user_of: Numbers,
    queries: Numbers,
    attention: Floats,
    p_u: Floats,
    theta_u: Floats,
    mixing: Floats,
    last_layer: Floats,
    last_layer_prior: Floats,
    step: float,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """What `Writes.of_users` takes, of the W ``users`` who write, from what is known of all U users and B tasks.

    ``tasks`` (W,) is the task that each is written of; ``queries`` (B,) counts those of each task. ``theta_u`` (W, size) and ``mixing``
    (W, d_e, 2 d_e) are sums of gradients over a user's queries: the first counts as their mean, the second as a step along it.
    """
    asked, kind = np.zeros(len(p_u), np.int64), p_u.dtype.type
    for task in range(len(user_of)):
        asked[user_of[task]] += queries[task]
    gradient, change, one = np.empty_like(theta_u), np.empty_like(mixing), kind(1)
    flat = (len(users), mixing.shape[1] * mixing.shape[2])
    changes, mixings = change.reshape(flat), mixing.reshape(flat)
    attended, profiles = np.empty((len(users), attention.shape[1]), p_u.dtype), np.empty((len(users), p_u.shape[1]), p_u.dtype)
    weights = np.empty((len(users), last_layer.shape[1]), p_u.dtype)
    for writer in range(len(users)):
        user, task = users[writer], tasks[writer]
        mean = kind(1 / max(1, asked[user]))
        scale(attended[writer], one, attention[user])
        scale(profiles[writer], one, p_u[user])
        scale(gradient[writer], mean, theta_u[writer])
        scale(changes[writer], kind(-step) * mean, mixings[writer])
        scale(weights[writer], one, last_layer[task])
        accumulate(weights[writer], -one, last_layer_prior[task])
    return attended, profiles, gradient, change, weights


@compiled
def write(
    attended: Floats,
    profiles: Floats,
    gradient: Floats,
    weights: Floats,
    centre: Floats,
    change: Floats,
    alpha: float,
    beta: float,
    gamma: float,
    gated: bool,  # noqa: FBT001  what is compiled has no names
    centred: bool,  # noqa: FBT001
) -> tuple[Floats, ...]:
    """What `Writes.of_users` gives, in its order, with changes of M_uI as (U, size)."""
    (users, rows), size, kind = attended.shape, profiles.shape[1], attended.dtype
    looked, of_centre, left, still = np.empty_like(profiles), np.zeros(size, kind), 1.0, 1 - alpha / rows
    for user in range(users - 1, -1, -1):
        by = kind.type(left * alpha / rows)
        for k in range(size):
            looked[user, k] = profiles[user, k] - (centre[k] if centred else kind.type(0))
            of_centre[k] += by * profiles[user, k]
        left *= still
    centre_decay = np.empty(1, kind)
    centre_decay[0] = left
    profile_decay, of_profile = np.ones(rows, kind), np.empty((rows, size), kind)
    gradient_decay, of_gradient = np.ones(rows, kind), np.empty((rows, gradient.shape[1]), kind)
    weights_decay, of_weights = np.ones(rows, kind), np.empty((rows, weights.shape[1]), kind)
    mixing_map, reached, mixing = np.eye(rows).astype(kind), np.empty_like(attended), np.empty((rows, change.shape[1]), kind)
    # Where what a user writes ends up, and then all of it at once.
    average(attended, kind.type(alpha), gated, profile_decay, reached)
    multiply(reached.T, looked, of_profile)
    average(attended, kind.type(beta), gated, gradient_decay, reached)
    multiply(reached.T, gradient, of_gradient)
    average(attended, kind.type(gamma), gated, weights_decay, reached)
    multiply(reached.T, weights, of_weights)
    move(attended, kind.type(gamma), gated, mixing_map, reached)
    multiply(reached.T, change, mixing)
    return (
        profile_decay,
        of_profile,
        centre_decay.reshape(()),
        of_centre,
        gradient_decay,
        of_gradient,
        mixing_map,
        mixing,
        weights_decay,
        of_weights,
    )


@borrowing
def average(attended: Floats, step: np.floating, gated: bool, left: Floats, reached: Floats) -> None:  # noqa: FBT001
    """Eq. 5 and 6 for users in order, as one: the decay (K,) of each row, 1 as it comes, and how much of each user's write ends up in it.

    ``attended`` (U, K) is a_u, ``reached`` is of its shape. Backwards, for of a user's write there is left what those after it leave.
    """
    one = left.dtype.type(1)
    for user in range(len(attended) - 1, -1, -1):
        for row in range(len(left)):
            reached[user, row] = left[row] * step * attended[user, row]
            left[row] *= one - step * (attended[user, row] if gated else one)


@borrowing
def move(attended: Floats, step: np.floating, gated: bool, so_far: Floats, reached: Floats) -> None:  # noqa: FBT001
    """Eq. 8 for users in order, as one: the product (K, K) of their D + g a_u a_u', the last leftmost, and where each one's change ends up.

    The first is the unit as it comes; the second (U, K) is the product of those after a user, times g a_u.
    """
    one, rows = so_far.dtype.type(1), len(so_far)
    for user in range(len(attended) - 1, -1, -1):
        a, into = attended[user], reached[user]
        for i in range(rows):
            into[i] = 0
            for j in range(rows):
                into[i] += so_far[i, j] * a[j]
            into[i] *= step
        for i in range(rows):
            for j in range(rows):
                so_far[i, j] = so_far[i, j] * (one - step * (a[j] if gated else one)) + into[i] * a[j]


@compiled
def follow(
    profile_decay: Floats,
    gradient_decay: Floats,
    mixing_map: Floats,
    weights_decay: Floats,
    centre_decay: Floats,
    of_profile: Floats,
    of_gradient: Floats,
    of_weights: Floats,
    of_centre: Floats,
    profile: Floats,
    gradient: Floats,
    weights: Floats,
    centre: Floats,
    of_mixing: Floats,
    mixing: Floats,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """What `Writes.apply` gives, with M_UI, its rows flat, at the end: memories (K, size) and the centre (d_u,), kept and added to."""
    after = np.empty_like(profile), np.empty_like(gradient), np.empty_like(weights), np.empty_like(centre), np.empty_like(mixing)
    keep(profile_decay, of_profile, profile, after[0])
    keep(gradient_decay, of_gradient, gradient, after[1])
    keep(weights_decay, of_weights, weights, after[2])
    for k in range(len(centre)):
        after[3][k] = centre_decay[()] * centre[k] + of_centre[k]
    multiply(mixing_map, mixing, after[4])
    for row in range(len(mixing)):
        add(of_mixing[row], after[4][row])
    return after


@borrowing
def keep(kept: Floats, added: Floats, rows: Floats, into: Floats) -> None:
    """Fill rows (K, size) with so much of others, (K,), and what is added to each."""
    for row in range(len(rows)):
        for k in range(rows.shape[1]):
            into[row, k] = kept[row] * rows[row, k] + added[row, k]
