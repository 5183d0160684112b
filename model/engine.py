"""The adaptation engine: the closed form and its gradients, for all tasks of a batch at once, with derivatives taken by hand.

`Mamo.forward` with autograd is the specification, and what tests hold this against. The same numbers come of less work here:

- The tasks of a user share one network, one matrix T and one prior, so that an item's features are x = T' z of z = [e_i, 1]. What a support
  tells of the last layer is then T' S T with S = Z' N Z, in which items are as all users see them: no task has features of its own.
- So items are embedded once, however many supports hold them, a task's rows z are gathered, and S is one product; supports need no padding.
- What is summed over a support on the way back is summed by item before anything else is done with it.
- What is done for each task is compiled (`model.kernels`). What is done once for all users or items is some forty calls, here numpy's: on
  arrays of a few kilobytes it is the calls that cost, and torch's cost three times as much.

Shapes as in `model.mamo` and `model.tasks`: B tasks in G groups, of U users, L interactions in all supports, q of a query, I different
items, J counted once for each group, F = d_e + 1, and E = F + 1 with the residual.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import kernels
from model.mamo import Mamo, Prediction
from model.numbering import slices
from model.tasks import Batch

if TYPE_CHECKING:
    from model.kernels import Floats, Numbers

ACTIVATIONS: dict[str, Callable[[Floats], Floats]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(x, 0),
}
"""Those of `model.mamo`."""

SLOPES: dict[str, Callable[[Floats], Floats]] = {
    "relu": lambda y: (y > 0).astype(y.dtype),
    "tanh": lambda y: 1 - y * y,
    "softplus": lambda y: -np.expm1(-y),
}
"""Their derivatives, from what came out of them."""


class Blend(NamedTuple):
    """What memory rows add to the layers of each of m users.

    Factors of the rows (m, K), and of each layer what the rows hold of its weights, (in, K out), and of its biases, (K, out).
    """

    factors: Floats
    weights: list[Floats]
    biases: list[Floats]

    @classmethod
    def of(cls, factors: Floats, rows: Floats, theta: list[Floats]) -> Blend:
        """From rows (K, size) that hold weights and biases by turns, shaped like ``theta``."""
        ends = list(itertools.accumulate(part.size for part in theta))
        parts = [rows[:, of].reshape(-1, *part.shape) for of, part in zip(slices(ends), theta, strict=True)]
        return cls(factors, [part.swapaxes(0, 1).reshape(part.shape[1], -1) for part in parts[::2]], parts[1::2])

    def forward(self, layer: int, x: Floats) -> Floats:
        """What is added to what comes out of a layer, (m, out): less work than weights of each user's own."""
        of_rows = (x @ self.weights[layer]).reshape(*self.factors.shape, -1)
        return kernels.combined(self.factors, of_rows, self.biases[layer])

    def back(self, layer: int, at: Floats) -> Floats:
        """What is added to the gradient at what went in, (m, in)."""
        by_rows = self.factors[..., None] * at[:, None]
        added: Floats = by_rows.reshape(len(at), -1) @ self.weights[layer].T
        return added


class Network(NamedTuple):
    """A pass through fully connected layers: weights (in, out), what users have beside them, each layer's input, and the output."""

    weights: list[Floats]
    blend: Blend | None
    values: list[Floats]
    activation: str

    def of(self, rows: Numbers) -> Network:
        """The passes of these rows, which may repeat; no row may have anything of its own."""
        return self._replace(values=[value.take(rows, 0) for value in self.values])

    @property
    def output(self) -> Floats:
        """What came out, (m, out)."""
        return self.values[-1]


class Solved(NamedTuple):
    """What gradients go back through."""

    users: Network
    items: Network
    mixing: Floats | None  # (U, d_e, 2 d_e), M_uI
    remembered: Floats | None  # (U, F), what M_w holds for users like these
    given: kernels.Given
    found: kernels.Found


class Gradients(NamedTuple):
    """Of the summed query loss of each of G groups, at phi and at the rows that the group touches, by key.

    For the W users who write to the memories, also at their theta_u and M_uI.
    """

    vectors: Tensor  # (G, size of phi), in the order of Mamo.phi
    user_rows: Sequence[tuple[Sequence[str], Tensor]]
    item_rows: Sequence[tuple[Sequence[str], Tensor]]
    theta_u: Tensor | None  # (W, size of theta_u); None without writers
    mixing: Tensor | None  # (W, d_e, 2 d_e); None without writers or task memory


@np.errstate(all="ignore")
def solve(model: Mamo, batch: Batch) -> tuple[Prediction, Solved]:
    """Adapt every task to its support and score its query, as `Mamo.forward` does.

    A task whose precision matrix is not positive definite in floating point has NaN for scores and variances.
    """
    settings, memory, phi = model.settings, model.memory, model.arrays()
    d, task = settings.embedding_size, batch.user_of.numpy()

    # Profiles, and what the memories hold for users like these (Eq. 1, 3, 4, 7, 9).
    p_u, _ = model.users.embedded(batch.user_rows.numpy(), batch.user_weights.numpy())
    p_i, bias = model.items.embedded(batch.item_rows.numpy(), batch.item_weights.numpy())
    attention = memory.attend(p_u, settings.temperature, centred=settings.centred)
    theta_u, blend = [phi[name] for name in model.user_names], None
    if settings.feature_memory:
        blend = Blend.of(-settings.tau * attention, memory.gradient.numpy(), theta_u)
    users = network(theta_u, p_u, settings.activation, blend)
    items = network([phi[name] for name in model.item_names], p_i, settings.activation)
    e_u, mixing, remembered = users.output, None, None
    to_user = np.zeros((len(p_u), d + 1, d + 1), p_u.dtype)
    profile_prior = prior = e_u @ phi["prior.weight"] + phi["prior.bias"]
    if settings.task_memory:
        remembered = attention @ memory.weights.numpy()
        prior = profile_prior + phi["gate"] * remembered
        mixing = (attention @ memory.mixing.numpy().reshape(len(memory.mixing), -1)).reshape(-1, d, 2 * d)
        kernels.join(mixing, e_u, to_user)
    else:
        to_user[:] = np.eye(d + 1)

    # What is known of items, and how much an interaction tells of them.
    known = kernels.known_of(items.output, bias, phi["mean"])
    precision = np.exp(phi["log_precision"])
    decay = np.repeat(precision, max(1, np.diff(batch.support.bounds.numpy()).max()))
    if "recency" in phi:
        decay *= np.arange(1, len(decay) + 1, dtype=decay.dtype) ** -np.logaddexp(phi["recency"], 0)

    # The last layer of each task, exactly.
    given = kernels.Given(
        known=known,
        item_of=batch.item_of.numpy(),
        items=batch.support.items.numpy(),
        ratings=batch.support.ratings.numpy(),
        starts=batch.support.bounds.numpy(),
        decay=decay,
        user_of=task,
        to_user=to_user,
        prior=prior,
        prior_precision=np.exp(phi["log_prior"]),
        query_items=batch.query_items.numpy(),
        queries=batch.query_mask.numpy().sum(1).astype(np.int64),
        noise=float(1 / precision[0]),
    )
    tasks, queries = batch.query_items.shape
    found = kernels.Found.of(tasks, queries, d + 1, p_u.dtype)
    kernels.adapt(given, found)
    written = None if mixing is None else torch.from_numpy(mixing)
    prediction = Prediction(
        score=torch.from_numpy(found.score),
        variance=torch.from_numpy(found.variance),
        attention=torch.from_numpy(attention),
        p_u=torch.from_numpy(p_u),
        theta_u=[],
        mixing=written,
        mixing_read=written,
        last_layer=torch.from_numpy(found.mean_of(np.arange(len(task)))),
        last_layer_prior=torch.from_numpy(profile_prior[task]),
    )
    return prediction, Solved(users, items, mixing, remembered, given, found)


@np.errstate(all="ignore")
def gradients(model: Mamo, batch: Batch, solved: Solved, at_score: Floats, at_variance: Floats, *, users: Numbers) -> Gradients:
    """The gradients of a loss that has gradients ``at_score`` and ``at_variance``, both (B, q), at the scores and variances.

    With A = T' S T + Lambda, t = T' s + Lambda w0, w = A^-1 t, V = A^-1 X' of queries X: score = x w + ..., variance = x A^-1 x + 1/N.
    So dw = A^-1 (dt - dA w) and d(x A^-1 x) = 2 v dx - v' dA v, of which all that follows is the transpose. ``users`` (W,) write.
    """
    phi, d, count = model.arrays(), model.settings.embedding_size, len(batch.users)
    groups, dtype, item_of = len(batch.tasks_of), solved.given.known.dtype, solved.given.item_of
    of_task, of_user, of_item = map(numbers, (batch.tasks_of, batch.users_of, batch.items_of))
    at_known, at_prior = np.zeros((len(item_of), solved.given.known.shape[1]), dtype), np.zeros((count, d + 1), dtype)
    at_to_user, of_group = np.zeros((count, d + 1, d + 1), dtype), np.zeros((groups, d + 3), dtype)
    kernels.pull(solved.given, solved.found, of_task, at_score, at_variance, at_known, at_to_user, at_prior, of_group)
    into = {
        "log_prior": of_group[:, : d + 1],
        "log_precision": of_group[:, d + 1 : d + 2],
        "mean": -sums(at_known[:, d + 1 : d + 2], batch.items_of),
    }
    if "recency" in phi:
        into["recency"] = of_group[:, d + 2 :] / (1 + np.exp(-phi["recency"]))

    # Users: the prior, the constant's row of T, and their network.
    e_u, at_mixing = solved.users.output, None
    at_e_u = at_prior @ phi["prior.weight"].T
    into["prior.bias"] = sums(at_prior, batch.users_of)
    into["prior.weight"] = products(e_u, at_prior, batch.users_of)
    if solved.mixing is not None and solved.remembered is not None:
        into["gate"] = sums(at_prior * solved.remembered, batch.users_of)
        constant = at_to_user[:, d, :d]
        at_e_u += (constant[..., None] * solved.mixing[..., :d]).sum(1)
        if len(users):
            at_of_user = constant[users, :, None] * e_u[users, None]
            at_mixing = torch.from_numpy(np.concatenate([at_of_user, at_to_user[users, :d, :d].swapaxes(1, 2)], -1))
    user_pairs, at_p_u = back(solved.users, at_e_u)
    item_pairs, at_p_i = back(solved.items.of(item_of), at_known[:, :d])
    for side, pairs, members in (("user", user_pairs, batch.users_of), ("item", item_pairs, batch.items_of)):
        for layer, (value, at) in enumerate(pairs):
            into[f"{side}.{layer}.weight"] = products(value, at, members)
            into[f"{side}.{layer}.bias"] = sums(at, members)

    # The rows that profiles are made of; an item's bias is the last number of each.
    at_item = np.empty((len(at_known), len(model.items.spans), d + 1), dtype)
    at_item[..., :d] = at_p_i.reshape(len(at_known), -1, d)
    at_item[..., d] = -at_known[:, d + 1 : d + 2]
    vectors = np.zeros((groups, len(model.vector)), dtype)
    for name, of in model.spans.items():
        if name in into:
            vectors[:, of] = into[name].reshape(groups, -1)
    theta = None
    if len(users):
        parts = [part for value, at in user_pairs for part in (value[users, :, None] * at[users, None], at[users])]
        theta = torch.from_numpy(np.concatenate([part.reshape(len(users), -1) for part in parts], 1))
    at_user = at_p_u.reshape(count, -1, d)
    return Gradients(
        vectors=torch.from_numpy(vectors),
        user_rows=model.users.embed_back(batch.user_rows, batch.user_weights, np.arange(count), of_user, at_user, groups),
        item_rows=model.items.embed_back(batch.item_rows, batch.item_weights, item_of, of_item, at_item, groups),
        theta_u=theta,
        mixing=at_mixing,
    )


def network(theta: list[Floats], x: Floats, activation: str, blend: Blend | None = None) -> Network:
    """Pass ``x`` (m, in) through layers whose weights (in, out) and biases (out,) ``theta`` holds by turns."""
    weights, biases, values = theta[::2], theta[1::2], [x]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        out = x @ weight + bias
        if blend is not None:
            out += blend.forward(layer, x)
        x = ACTIVATIONS[activation](out) if layer < len(weights) - 1 else out
        values.append(x)
    return Network(weights, blend, values, activation)


def back(passed: Network, at: Floats) -> tuple[list[tuple[Floats, Floats]], Floats]:
    """From the gradient at the output: what went into each layer and the gradient at what came out of it, and the gradient at x."""
    pairs = []
    for layer in reversed(range(len(passed.weights))):
        if layer < len(passed.weights) - 1:
            at = at * SLOPES[passed.activation](passed.values[layer + 1])
        pairs.append((passed.values[layer], at))
        below = at @ passed.weights[layer].T
        if passed.blend is not None:
            below += passed.blend.back(layer, at)
        at = below
    return pairs[::-1], at


def numbers(groups: list[slice]) -> Numbers:
    """Of members that stand group after group, the number of the group of each."""
    return np.repeat(np.arange(len(groups)), [group.stop - group.start for group in groups])


def sums(values: Floats, groups: list[slice]) -> Floats:
    """The sum of each group's values (m, a): (G, a)."""
    summed: Floats = np.add.reduceat(values, [group.start for group in groups], 0)
    return summed


def products(left: Floats, right: Floats, groups: list[slice]) -> Floats:
    """For each group left' right: (m, a), (m, b) -> (G, a, b)."""
    return np.stack([left[group].T @ right[group] for group in groups])
