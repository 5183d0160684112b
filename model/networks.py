"""What tasks share, as compiled loops: from profiles to what each user and each item is to the closed form, and the way back.

Written with numpy these are some eighty calls on arrays of a few kilobytes, each slower than the work it does. Layers are fully connected,
and all of them put out d_e numbers. Shapes as in `model.engine`: B tasks in G groups, of U users, I items, J counted once for each group,
K memory rows, F = d_e + 1; n layers of a network.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from model.compiled import borrowing, compiled
from model.kernels import Pulled
from model.lanes import LANES
from model.memorykernels import attend
from model.numbering import Embedding, embed
from model.products import multiply, scale, take_product, through, turn
from model.rowkernels import activate, add, before, copy

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers

OTHERS = ("prior.weight", "prior.bias", "gate", "mean", "log_precision", "log_prior", "recency")
PRIOR_WEIGHT, PRIOR_BIAS, GATE, MEAN, LOG_PRECISION, LOG_PRIOR, RECENCY = range(len(OTHERS))
"""The parameters beside those of networks, and where `Phi.starts` tells of each."""


class Phi(NamedTuple):
    """The parameters of the closed form, as they stand in one vector."""

    vector: Floats  # (P,)
    user: Numbers  # (n, 2), where the weights of each layer begin, (in, d_e), which its biases (d_e,) follow, and how many numbers go in
    item: Numbers  # likewise
    starts: Numbers  # (7,), where each of `OTHERS` begins, -1 for what the settings leave out
    activation: int
    size: int
    """d_e."""


class Rows(NamedTuple):
    """What attention reads of the memories; of those that the settings leave out no rows."""

    profile: Floats  # M_P (K, d_u), and what profiles are looked at less, (d_u,)
    centre: Floats
    temperature: float
    gradient: Floats  # M_U (K, size of theta_u)
    mixing: Floats  # M_UI (K, 2 d_e d_e)
    weights: Floats  # M_w (K, F)
    tau: float


class Shared(NamedTuple):
    """What adaptation starts from."""

    p_u: Floats  # (U, d_u)
    attention: Floats  # (U, K)
    p_i: Floats  # (I, d_i)
    items: Floats  # (n, I, d_e), what comes out of each layer of the item network
    users: Floats  # (n, U, d_e), what comes out of each layer of the user network
    known: Floats  # (I, W), prior (U, F), decay and prior_precision: see `model.kernels.Given`
    prior: Floats
    profile_prior: Floats  # (U, F), what the profile alone predicts of w
    remembered: Floats  # (U, F), what M_w holds for users like these; no rows without task memory
    decay: Floats
    prior_precision: Floats
    noise: np.floating


class Back(NamedTuple):
    """Gradients of the summed query loss of each group."""

    vectors: Floats  # (G, P), at phi
    users: Floats  # (U, d_u), at p_u
    items: Floats  # (J, d_i), at p_i
    biases: Floats  # (J,), at the bias of an item
    theta_u: Floats  # (W, size of theta_u), of the W users who write
    mixing: Floats  # (W, d_e, 2 d_e), likewise; no rows without task memory


@borrowing
def forward(vector: Floats, layers: Numbers, activation: int, x: Floats, by: Floats, rows: Floats, room: Floats, values: Floats) -> None:
    """Pass ``x`` (m, in) through layers; fill ``values`` (n, m, d_e) with what comes out of each.

    From each layer there is taken what memory rows (K, size) hold of it, times ``by`` (m, K) of whoever it is. ``room`` is for m times the
    most numbers that go into a layer.
    """
    m, d, first, last = len(x), values.shape[2], layers[0, 0], len(layers) - 1
    for layer in range(len(layers)):
        start, width = layers[layer]
        end = start + width * d
        into, below = values[layer], x if layer == 0 else values[layer - 1]
        through(below, vector[start:end].reshape(width, d), vector[end : end + d].reshape(1, d), into, False)  # noqa: FBT003  no names
        for row in range(len(rows)):
            own, scaled = rows[row], room[: m * width].reshape(m, width)
            biases = own[end - first : end - first + d]
            for place in range(m):
                part = by[place, row]
                for k in range(width):
                    scaled[place, k] = part * below[place, k]
                for k in range(d):
                    into[place, k] -= part * biases[k]
            take_product(scaled, own[start - first : end - first].reshape(width, d), into)
        if layer < last:
            activate(values, layer, m, activation)


@borrowing
def backward(
    vector: Floats, layers: Numbers, activation: int, values: Floats, by: Floats, rows: Floats, room: Floats, at: Floats, at_x: Floats
) -> None:
    """The way back through `forward`: from the gradient at what came out, ``at[-1]``, to ``at`` (n, m, d_e) before each layer's activation.

    And to that at what went in, ``at_x`` (m, in). ``room`` is for a layer's weights and for m rows of d_e.
    """
    m, d, first = at.shape[1], at.shape[2], layers[0, 0]
    for layer in range(len(layers) - 1, -1, -1):
        start, width = layers[layer]
        end = start + width * d
        if layer < len(layers) - 1:
            before(at, values, layer, m, activation)
        turned, scaled = room[: width * d].reshape(d, width), room[width * d : width * d + m * d].reshape(m, d)
        turn(vector[start:end].reshape(width, d), turned)
        above, below = at[layer], at_x if layer == 0 else at[layer - 1]
        multiply(above, turned, below)
        for row in range(len(rows)):
            for place in range(m):
                for k in range(d):
                    scaled[place, k] = by[place, row] * above[place, k]
            turn(rows[row][start - first : end - first].reshape(width, d), turned)
            take_product(scaled, turned, below)


@borrowing
def learn(layers: Numbers, x: Floats, values: Floats, at: Floats, begins: int, ends: int, into: Floats) -> None:
    """Fill the gradient (P,) at the layers' parameters, summed over the rows from ``begins`` up to ``ends``; the rest as in `backward`."""
    d = at.shape[2]
    for layer in range(len(layers)):
        start, width = layers[layer]
        end = start + width * d
        of, below = at[layer][begins:ends], x if layer == 0 else values[layer - 1]
        multiply(below[begins:ends].T, of, into[start:end].reshape(width, d))
        total(of, into[end : end + d])


@borrowing
def of_theta(layers: Numbers, x: Floats, values: Floats, at: Floats, row: int, into: Floats) -> None:
    """Fill the gradient (size of the layers' parameters,) that one row has at them, the rest as in `learn`."""
    place, d = 0, at.shape[2]
    for layer in range(len(layers)):
        of, below = at[layer, row], x[row] if layer == 0 else values[layer - 1, row]
        for i in range(len(below)):
            scale(into[place : place + d], below[i], of)
            place += d
        scale(into[place : place + d], into.dtype.type(1), of)
        place += d


@borrowing
def take(values: Floats, which: Numbers, into: Floats) -> None:
    """Fill rows (m, k) with the first k numbers of those rows of values that ``which`` (m,) says."""
    for place in range(len(which)):
        copy(values[which[place]], into[place])


@borrowing
def total(values: Floats, into: Floats) -> None:
    """Into (k,) the sum of rows (m, k)."""
    into[:] = 0
    for row in range(len(values)):
        add(values[row], into)


@compiled
def embeddings(phi: Phi, p_i: Floats) -> Floats:
    """What comes out of each layer of the item network, at last e_i, of profiles (I, d_i): (n, I, d_e)."""
    nobody, items = np.zeros((0, 0), p_i.dtype), np.empty((len(phi.item), len(p_i), phi.size), p_i.dtype)
    forward(phi.vector, phi.item, phi.activation, p_i, nobody, nobody, nobody[0], items)
    return items


@compiled
def share(phi: Phi, rows: Rows, of_users: Embedding, of_items: Embedding, bounds: Numbers) -> Shared:
    """From profiles to what adaptation starts from: Eq. 1, 3, 4, 7 and 9, and the prior.

    ``bounds`` (B + 1,) says where the support of each task begins, and where the last ends.
    """
    (p_u, _), (p_i, bias), longest = embed(of_users), embed(of_items), 1
    for task in range(len(bounds) - 1):
        longest = max(longest, bounds[task + 1] - bounds[task])
    attention, items = attend(p_u, rows.profile, rows.centre, rows.temperature), embeddings(phi, p_i)
    vector, kind, starts, e_i = phi.vector, p_u.dtype, phi.starts, items[-1]
    m, count, d, f = len(p_u), len(e_i), phi.size, phi.size + 1
    users, room = np.empty((len(phi.user), m, d), kind), np.empty(m * phi.user[:, 1].max(), kind)
    forward(vector, phi.user, phi.activation, p_u, kind.type(rows.tau) * attention, rows.gradient, room, users)

    e_u, of_profile = users[-1], np.empty((m, f), kind)
    weight, of_prior = starts[PRIOR_WEIGHT], starts[PRIOR_BIAS]
    through(e_u, vector[weight : weight + d * f].reshape(d, f), vector[of_prior : of_prior + f].reshape(1, f), of_profile, False)  # noqa: FBT003
    prior = of_profile.copy()
    remembered = np.zeros((0, f), kind)
    if len(rows.mixing):
        remembered = np.empty((m, f), kind)
        multiply(attention, rows.weights, remembered)
        gate = vector[starts[GATE] : starts[GATE] + f]
        for place in range(m):
            for k in range(f):
                prior[place, k] += gate[k] * remembered[place, k]

    # What is known of items, and how much an interaction tells of them.
    known, mean = np.zeros((count, -(-(d + 2) // LANES) * LANES), kind), vector[starts[MEAN]]
    for item in range(count):
        for k in range(d):
            known[item, k] = e_i[item, k]
        known[item, d] = 1
        known[item, d + 1] = -(bias[item] + mean)
    precision, decay = math.exp(vector[starts[LOG_PRECISION]]), np.empty(longest, kind)
    slope = 0.0 if starts[RECENCY] < 0 else np.logaddexp(vector[starts[RECENCY]], 0.0)
    for newer in range(longest):
        decay[newer] = precision * math.exp(-slope * math.log1p(newer))
    prior_precision = np.exp(vector[starts[LOG_PRIOR] : starts[LOG_PRIOR] + f])
    return Shared(p_u, attention, p_i, items, users, known, prior, of_profile, remembered, decay, prior_precision, 1 / kind.type(precision))


@borrowing
def part_back(at_to_user: Floats, e_u: Floats, into: Floats) -> None:
    """The way back through `lanes.join` to M_uI (d_e, 2 d_e), for one user."""
    d = len(e_u)
    for j in range(d):
        scale(into[j, :d], at_to_user[d, j], e_u)
    turn(at_to_user[:d, :d], into[:, d:])


@compiled
def bring_back(
    phi: Phi,
    rows: Rows,
    shared: Shared,
    item_of: Numbers,
    user_ends: Numbers,
    item_ends: Numbers,
    pulled: Pulled,
    writers: Numbers,
) -> Back:
    """The way back through `share`, from what `model.kernels.pull` finds, for groups whose users and items end there.

    ``item_of`` (J,) is which of the I items each is; ``writers`` (W,) are the users who write.
    """
    at_known, at_to_user, at_prior, of_group = pulled
    p_u, attention, p_i, items = shared.p_u, shared.attention, shared.p_i, shared.items
    vector, kind, starts, groups = phi.vector, p_u.dtype, phi.starts, len(user_ends)
    m, count, d, f, nobody = len(p_u), len(item_of), phi.size, phi.size + 1, np.zeros((0, 0), p_u.dtype)
    d_u, d_i = p_u.shape[1], p_i.shape[1]
    most = max(phi.user[:, 1].max(), phi.item[:, 1].max())
    room = np.empty(most * d + max(m, count, d) * max(d, f), kind)
    vectors = np.zeros((groups, len(vector)), kind)

    # Users: the prior, the constant's row of T, and their network.
    e_u, at_users = shared.users[-1], np.empty(shared.users.shape, kind)
    turned = room[: f * d].reshape(f, d)
    turn(vector[starts[PRIOR_WEIGHT] : starts[PRIOR_WEIGHT] + d * f].reshape(d, f), turned)
    multiply(at_prior, turned, at_users[-1])
    task_memory = len(rows.mixing) > 0
    if task_memory:
        mixing = np.empty((m, 2 * d * d), kind)
        multiply(attention, rows.mixing, mixing)
        for user in range(m):
            into, constant = at_users[-1, user], at_to_user[user, d]
            for j in range(d):
                of_user = mixing[user, 2 * d * j : 2 * d * j + d]
                for i in range(d):
                    into[i] += constant[j] * of_user[i]
    at_p_u, at_p_i = np.empty((m, d_u), kind), np.empty((count, d_i), kind)
    by = kind.type(rows.tau) * attention
    backward(vector, phi.user, phi.activation, shared.users, by, rows.gradient, room, at_users, at_p_u)

    # Items, each as often as groups have it; of one group that is as they stand.
    of_items, at_items, x = items, np.empty((len(phi.item), count, d), kind), p_i
    if groups > 1:
        of_items, x = np.empty((len(phi.item), count, d), kind), np.empty((count, d_i), kind)
        take(p_i, item_of, x)
        for layer in range(len(of_items) - 1):
            take(items[layer], item_of, of_items[layer])
    for item in range(count):
        copy(at_known[item], at_items[-1, item])
    backward(vector, phi.item, phi.activation, of_items, nobody, nobody, room, at_items, at_p_i)

    user = item = 0
    for group in range(groups):
        into, user_end, item_end = vectors[group], user_ends[group], item_ends[group]
        learn(phi.user, p_u, shared.users, at_users, user, user_end, into)
        learn(phi.item, x, of_items, at_items, item, item_end, into)
        weight = into[starts[PRIOR_WEIGHT] : starts[PRIOR_WEIGHT] + d * f].reshape(d, f)
        multiply(e_u[user:user_end].T, at_prior[user:user_end], weight)
        total(at_prior[user:user_end], into[starts[PRIOR_BIAS] : starts[PRIOR_BIAS] + f])
        if task_memory:
            for place in range(user, user_end):
                for k in range(f):
                    into[starts[GATE] + k] += at_prior[place, k] * shared.remembered[place, k]
        for place in range(item, item_end):
            into[starts[MEAN]] -= at_known[place, f]
        into[starts[LOG_PRECISION]] = of_group[group, f]
        copy(of_group[group], into[starts[LOG_PRIOR] : starts[LOG_PRIOR] + f])
        if starts[RECENCY] >= 0:
            into[starts[RECENCY]] = of_group[group, f + 1] / (1 + math.exp(-vector[starts[RECENCY]]))
        user, item = user_end, item_end

    # Of users who write: theta_u, as if each had one of its own, and M_uI.
    theta = np.empty((len(writers), rows.gradient.shape[1]), kind)
    of_mixing = np.empty((len(writers) if task_memory else 0, d, 2 * d), kind)
    for place in range(len(writers)):
        user = writers[place]
        of_theta(phi.user, p_u, shared.users, at_users, user, theta[place])
        if task_memory:
            part_back(at_to_user[user], e_u[user], of_mixing[place])
    return Back(vectors, at_p_u, at_p_i, -at_known[:, f], theta, of_mixing)
