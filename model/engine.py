"""The adaptation engine: the closed form and its gradients, for all tasks of a batch at once, with derivatives taken by hand.

`Mamo.forward` with autograd is the specification, and what tests hold this against. The same numbers come of less work here:

- The tasks of a user share one network, one matrix T and one prior, so that an item's features are x = T' z of z = [e_i, 1]. What a support
  tells of the last layer is then T' S T with S = Z' N Z, in which items are as all users see them: no task has features of its own.
- So S is a weighted sum of products z z' of items, each made once, however many supports hold the item; and supports need no padding.
- What is summed over a support on the way back is summed by item before anything else is done with it.
- What is done for each task is compiled (`model.kernels`); what is done once for all users or items is a few products here.

Shapes as in `model.mamo` and `model.tasks`: B tasks in G groups, of U users, L interactions in all supports, q of a query, I different
items, J counted once for each group, F = d_e + 1, and E = F + 1 with the residual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus

from model import kernels
from model.mamo import ACTIVATIONS, Mamo, Prediction
from model.tasks import Batch


class Network(NamedTuple):
    """A pass through fully connected layers: weights (in, out) or, of each user, (U, in, out); the input of each layer, and the output."""

    weights: list[Tensor]
    biases: list[Tensor]
    values: list[Tensor]
    activation: str

    def of(self, rows: Tensor) -> Network:
        """The passes of these rows, which may repeat; weights must be shared."""
        return self._replace(values=[embedding(rows, value) for value in self.values])

    @property
    def output(self) -> Tensor:
        """What came out, (m, out)."""
        return self.values[-1]


class Solved(NamedTuple):
    """What gradients go back through."""

    users: Network
    items: Network
    mixing: Tensor | None  # (U, d_e, 2 d_e), M_uI
    remembered: Tensor | None  # (U, F), what M_w holds for users like these
    given: kernels.Given
    found: kernels.Found


class Gradients(NamedTuple):
    """Of the summed query loss of each of G groups, at phi and at the rows that the group touches, by key.

    For the W users who write to the memories, also at their theta_u and M_uI.
    """

    vectors: Tensor  # (G, size of phi), in the order of Mamo.phi
    user_rows: list[tuple[list[str], Tensor]]
    item_rows: list[tuple[list[str], Tensor]]
    theta_u: Tensor | None  # (W, size of theta_u); None without writers
    mixing: Tensor | None  # (W, d_e, 2 d_e); None without writers or task memory


@torch.no_grad()
def solve(model: Mamo, batch: Batch) -> tuple[Prediction, Solved]:
    """Adapt every task to its support and score its query, as `Mamo.forward` does.

    A task whose precision matrix is not positive definite in floating point has NaN for scores and variances.
    """
    settings, phi, memory = model.settings, model.phi, model.memory
    d, task = settings.embedding_size, batch.user_of

    # Profiles, and what the memories hold for users like these (Eq. 1, 3, 4, 7, 9).
    p_u = model.users.embed(batch.user_rows, batch.user_weights, model.user_table.values).flatten(1)
    item = model.items.embed(batch.item_rows, batch.item_weights, model.item_table.values)
    attention = memory.attention(p_u, settings.temperature, centred=settings.centred)
    theta_u = [phi[name] for name in model.user_names]
    if settings.feature_memory:
        shift = torch.split(attention @ memory.gradient, [theta.numel() for theta in theta_u], 1)
        theta_u = [theta - settings.tau * b.view(-1, *theta.shape) for theta, b in zip(theta_u, shift, strict=True)]
    users = network(theta_u, p_u, settings.activation)
    items = network([phi[name] for name in phi if name.startswith("item.")], item[..., :-1].flatten(1), settings.activation)
    e_u, mixing, remembered = users.output, None, None
    to_user = torch.eye(d + 1, dtype=model.dtype).repeat(len(p_u), 1, 1)
    profile_prior = prior = torch.addmm(phi["prior.bias"], e_u, phi["prior.weight"])
    if settings.task_memory:
        remembered = attention @ memory.weights
        prior = torch.addcmul(prior, phi["gate"], remembered)
        mixing = (attention @ memory.mixing.flatten(1)).view(-1, d, 2 * d)
        to_user[:, :d, :d] = mixing[..., d:].mT
        to_user[:, d, :d] = (mixing[..., :d] @ e_u[..., None])[..., 0]

    # What is known of items, and how much an interaction tells of them.
    known = item.new_empty(len(item), d + 2)
    known[:, :d] = items.output
    known[:, d] = 1
    torch.neg(item[..., -1].sum(1) + phi["mean"], out=known[:, d + 1])
    precision, lengths = phi["log_precision"].exp(), torch.diff(batch.support.bounds)
    decay = precision.repeat(max(1, int(lengths.max())))
    if "recency" in phi:
        decay = decay * torch.arange(1, len(decay) + 1, dtype=decay.dtype) ** -softplus(phi["recency"])

    # The last layer of each task, exactly.
    given = kernels.Given(
        known=known.numpy(),
        item_of=batch.item_of.numpy(),
        items=batch.support.items.numpy(),
        ratings=batch.support.ratings.numpy(),
        starts=batch.support.bounds.numpy(),
        decay=decay.numpy(),
        user_of=task.numpy(),
        to_user=to_user.numpy(),
        prior=prior.numpy(),
        prior_precision=phi["log_prior"].exp().numpy(),
        query_items=batch.query_items.numpy(),
        queries=batch.query_mask.sum(1).to(torch.int64).numpy(),
        noise=float(1 / precision),
    )
    (count, most), f = batch.query_items.shape, d + 1
    score, variance, mean = item.new_zeros(count, most), item.new_ones(count, most), item.new_empty(count, f)
    made = [score, variance, mean, *(item.new_empty(count, *shape) for shape in ((most, f), (f, f), (f,)))]
    found = kernels.Found(*(value.numpy() for value in made))
    kernels.adapt(given, found)
    solved = Solved(users, items, mixing, remembered, given, found)
    return Prediction(score, variance, attention, p_u, [], mixing, mixing, mean, profile_prior[task]), solved


@torch.no_grad()
def gradients(model: Mamo, batch: Batch, solved: Solved, at_score: Tensor, at_variance: Tensor, *, users: Tensor) -> Gradients:
    """The gradients of a loss that has gradients ``at_score`` and ``at_variance``, both (B, q), at the scores and variances.

    With A = T' S T + Lambda, t = T' s + Lambda w0, w = A^-1 t, V = A^-1 X' of queries X: score = x w + ..., variance = x A^-1 x + 1/N.
    So dw = A^-1 (dt - dA w) and d(x A^-1 x) = 2 v dx - v' dA v, of which all that follows is the transpose. ``users`` (W,) write.
    """
    phi, d, count, groups = model.phi, model.settings.embedding_size, len(batch.users), len(batch.tasks_of)
    of_task, of_user, of_item = map(numbers, (batch.tasks_of, batch.users_of, batch.items_of))
    at_known, at_prior = at_score.new_zeros(len(batch.item_of), d + 2), at_score.new_zeros(count, d + 1)
    at_to_user, of_group = at_score.new_zeros(count, d + 1, d + 1), at_score.new_zeros(groups, d + 3)
    into_these = (value.numpy() for value in (at_known, at_to_user, at_prior, of_group))
    kernels.pull(solved.given, solved.found, of_task.numpy(), at_score.numpy(), at_variance.numpy(), *into_these)
    into = {
        "log_prior": of_group[:, : d + 1],
        "log_precision": of_group[:, d + 1 : d + 2],
        "mean": -sums(at_known[:, -1:], of_item, groups),
    }
    if "recency" in phi:
        into["recency"] = of_group[:, d + 2 :] * torch.sigmoid(phi["recency"])

    # Users: the prior, the constant's row of T, and their network.
    e_u, at_mixing = solved.users.output, None
    at_e_u = at_prior @ phi["prior.weight"].T
    into["prior.bias"] = sums(at_prior, of_user, groups)
    into["prior.weight"] = products(e_u, at_prior, batch.users_of)
    if solved.mixing is not None and solved.remembered is not None:
        into["gate"] = sums(at_prior * solved.remembered, of_user, groups)
        constant = at_to_user[:, d, :d]
        at_e_u = at_e_u + (constant[:, None] @ solved.mixing[..., :d])[:, 0]
        at_mixing = torch.cat([constant[users, :, None] * e_u[users, None], at_to_user[users, :d, :d].mT], -1) if len(users) else None
    user_pairs, at_p_u = back(solved.users, at_e_u)
    item_pairs, at_p_i = back(solved.items.of(batch.item_of), at_known[:, :d])
    for side, pairs, members, numbered in (("user", user_pairs, batch.users_of, of_user), ("item", item_pairs, batch.items_of, of_item)):
        for layer, (value, at) in enumerate(pairs):
            into[f"{side}.{layer}.weight"] = products(value, at, members)
            into[f"{side}.{layer}.bias"] = sums(at, numbered, groups)

    # The rows that profiles are made of; an item's bias is the last number of each.
    at_user = at_p_u.view(count, len(model.users.spans), d)
    at_bias = -at_known[:, -1:, None].expand(-1, len(model.items.spans), 1)
    at_item = torch.cat([at_p_i.view(len(at_known), -1, d), at_bias], -1)
    theta = [part.flatten(1) for value, at in user_pairs for part in (value[users, :, None] * at[users, None], at[users])]
    untouched = at_known.new_zeros(groups, 1)
    of_phi = [into.get(name, untouched).reshape(groups, -1).expand(-1, value.numel()) for name, value in phi.items()]
    return Gradients(
        vectors=torch.cat(of_phi, 1),
        user_rows=model.users.embed_back(batch.user_rows, batch.user_weights, torch.arange(count), of_user, at_user, groups),
        item_rows=model.items.embed_back(batch.item_rows, batch.item_weights, batch.item_of, of_item, at_item, groups),
        theta_u=torch.cat(theta, 1) if len(users) else None,
        mixing=at_mixing,
    )


def network(theta: list[Tensor], x: Tensor, activation: str) -> Network:
    """Pass ``x`` (m, in) through layers whose weights and biases ``theta`` holds by turns.

    These are shared, (in, out) and (out,), or of each row, (m, in, out) and (m, out).
    """
    weights, biases, values = theta[::2], theta[1::2], [x]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.addmm(bias, x, weight) if weight.dim() == 2 else (x[:, None] @ weight)[:, 0] + bias
        if layer < len(weights) - 1:
            x = ACTIVATIONS[activation](x)
        values.append(x)
    return Network(weights, biases, values, activation)


def back(passed: Network, at: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """From the gradient at the output: what went into each layer and the gradient at what came out of it, and the gradient at x."""
    pairs = []
    for layer in reversed(range(len(passed.weights))):
        if layer < len(passed.weights) - 1:
            at = before(passed.activation, passed.values[layer + 1], at)
        pairs.append((passed.values[layer], at))
        weight = passed.weights[layer]
        at = at @ weight.T if weight.dim() == 2 else (weight @ at[..., None])[..., 0]
    return pairs[::-1], at


def before(activation: str, y: Tensor, at: Tensor) -> Tensor:
    """The gradient at what went into an activation, from that at ``y``, which came out of it."""
    match activation:
        case "relu":
            at_x: Tensor = torch.ops.aten.threshold_backward(at, y, 0.0)
            return at_x
        case "tanh":
            return at * (1 - y.square())
    return at * -torch.expm1(-y)


def numbers(groups: list[slice]) -> Tensor:
    """Of members that stand group after group, the number of the group of each."""
    return torch.repeat_interleave(torch.tensor([group.stop - group.start for group in groups]))


def sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of the values (m, ...) with the same ``index``: (count, ...)."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, index, values)


def products(left: Tensor, right: Tensor, groups: list[slice]) -> Tensor:
    """For each group left' right: (m, a), (m, b) -> (G, a, b)."""
    return torch.stack([left[group].T @ right[group] for group in groups])
