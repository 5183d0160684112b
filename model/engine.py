"""The adaptation engine: the closed form and its gradients, for all tasks of a batch at once, with derivatives taken by hand.

`Mamo.forward` with autograd is the specification, and what tests hold this against. The same numbers come of less work here:

- The tasks of a user share one network, one matrix T and one prior, so that an item's features are x = T' z of z = [e_i, 1]. What a support
  tells of the last layer is then T' S T with S = Z' N Z, in which items are as all users see them: no task has features of its own.
- So S is a weighted sum of products z z' of items, each made once, however many supports hold the item; and supports need no padding.
- One triangular solve of [Z' N r + Lambda w0, queries] gives scores and variances; one more the adapted w and what gradients need.
- What is summed over a support on the way back is summed by item before anything else is done with it.

Shapes as in `model.mamo` and `model.tasks`: B tasks in G groups, of U users, L interactions in all supports, q of a query, I different
items, J counted once for each group, F = d_e + 1, and E = F + 1 with the residual.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, softplus

from model.mamo import ACTIVATIONS, Mamo, Prediction
from model.numbering import bags, in_order
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
    to_user: Tensor | None  # (U, F, F), T; None where it is the identity
    prior: Tensor  # (U, F), w0
    remembered: Tensor | None  # (U, F), what M_w holds for users like these
    known: Tensor  # (I, E), z of each item and what is predicted without x w, negated
    outer: Tensor  # (I, E (E + 1) / 2 - 1), what z tells, by `outer`
    weight: Tensor  # (L,), N
    told: tuple[Tensor, Tensor]  # (B, F, F) and (B, F), Z' N Z and Z' N r
    query: Tensor  # (B, q, F), z of each query
    mean: Tensor  # (B, F), w
    spread: Tensor  # (B, F, q), A^-1 x of each query


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
def solve(model: Mamo, batch: Batch, *, learning: bool) -> tuple[Prediction, Solved | None]:
    """Adapt every task to its support and score its query, as `Mamo.forward` does.

    Without ``learning`` there is nothing to go back through, and no adapted w.
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
    e_u, mixing, to_user, remembered = users.output, None, None, None
    profile_prior = prior = torch.addmm(phi["prior.bias"], e_u, phi["prior.weight"])
    if settings.task_memory:
        remembered = attention @ memory.weights
        prior = prior + phi["gate"] * remembered
        mixing = (attention @ memory.mixing.flatten(1)).view(-1, d, 2 * d)
        to_user = mixing.new_zeros(len(p_u), d + 1, d + 1)
        to_user[:, :d, :d] = mixing[..., d:].mT
        to_user[:, d, :d] = (mixing[..., :d] @ e_u[..., None])[..., 0]
        to_user[:, d, d] = 1

    # What the supports tell, of items as all users see them.
    known = item.new_ones(len(item), d + 2)
    known[:, :d] = items.output
    known[:, d + 1] = -item[..., -1].sum(1) - phi["mean"]
    precision = phi["log_precision"].exp()
    weight = precision.expand(len(batch.support.items))
    if "recency" in phi:
        weight = weight * (1 + batch.support.newer) ** -softplus(phi["recency"])
    told_by_item = outer(known)
    a, target = told = moments(batch, known, told_by_item, weight)

    # The last layer of each task, exactly: A = T' S T + Lambda.
    asked = embedding(batch.item_of[batch.query_items], known)
    features = asked[..., :-1]
    if to_user is not None:
        own = to_user[task]
        a, target, features = own.mT @ a @ own, (target[:, None] @ own)[:, 0], features @ own
    prior_precision = phi["log_prior"].exp()
    factor, failed = torch.linalg.cholesky_ex(a + torch.diag(prior_precision))
    if bool(failed.any()):
        # Only features that have diverged come to this: such a task has no posterior, and the others must not suffer.
        factor = factor.masked_fill((failed > 0)[:, None, None], torch.nan)
    target = target + (prior_precision * prior)[task]
    half = torch.linalg.solve_triangular(factor, torch.cat([target[..., None], features.mT], 2), upper=False)
    score = (half[..., :1].mT @ half[..., 1:])[:, 0] - asked[..., -1]
    variance = half[..., 1:].square().sum(1) + 1 / precision
    prediction = Prediction(score, variance, attention, p_u, [], mixing, mixing, None, profile_prior[task])
    if not learning:
        return prediction, None
    whole = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    mean, spread, query = whole[..., 0], whole[..., 1:], asked[..., :-1]
    kept = Solved(users, items, mixing, to_user, prior, remembered, known, told_by_item, weight, told, query, mean, spread)
    return prediction._replace(last_layer=mean), kept


def outer(known: Tensor) -> Tensor:
    """The products of each row (I, E) with itself, upper triangle row by row, but for the last one: (I, E (E + 1) / 2 - 1)."""
    return torch.cat([known[:, place, None] * known[:, place:] for place in range(known.shape[1] - 1)], 1)


def moments(batch: Batch, known: Tensor, by_item: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Z' N Z (B, F, F) and Z' N r (B, F) of each support, where ``weight`` (L,) is N and r the rating plus the last of ``known`` (I, E)."""
    support, size = batch.support, known.shape[1]
    items = batch.item_of[support.items]
    packed = bags(by_item, items, support.starts, weight)
    rated = bags(known, items, support.starts, weight * support.ratings)
    full = packed.index_select(1, unpacking(size)).view(len(packed), size - 1, size)
    return full[..., :-1], full[..., -1] + rated[:, :-1]


@cache
def unpacking(size: int) -> Tensor:
    """Where the elements of the first size - 1 rows of a symmetric matrix stand among what `outer` gives."""
    place = torch.zeros(size, size, dtype=torch.int64)
    left, right = torch.triu_indices(size, size)
    place[left, right] = place[right, left] = torch.arange(len(left))
    return place[:-1].flatten()


@torch.no_grad()
def gradients(model: Mamo, batch: Batch, solved: Solved, at_score: Tensor, at_variance: Tensor, *, users: Tensor) -> Gradients:
    """The gradients of a loss that has gradients ``at_score`` and ``at_variance``, both (B, q), at the scores and variances.

    With A = T' S T + Lambda, t = T' s + Lambda w0, w = A^-1 t, V = A^-1 X' of queries X: score = x w + ..., variance = x A^-1 x + 1/N.
    So dw = A^-1 (dt - dA w) and d(x A^-1 x) = 2 v dx - v' dA v, of which all that follows is the transpose. ``users`` (W,) write.
    """
    phi, d, task, count, groups = model.phi, model.settings.embedding_size, batch.user_of, len(batch.users), len(batch.tasks_of)
    of_task, of_user, of_item = map(numbers, (batch.tasks_of, batch.users_of, batch.items_of))
    mean, spread, (s_matrix, s_vector) = solved.mean, solved.spread, solved.told
    into: dict[str, Tensor] = {}

    # At t, A and the features of queries.
    at_target = (spread @ at_score[..., None])[..., 0]
    crossed = at_target[..., None] * mean[:, None]
    at_a = -0.5 * (crossed + crossed.mT) - (spread * at_variance[:, None]) @ spread.mT
    at_features = at_score[..., None] * mean[:, None] + 2 * at_variance[..., None] * spread.mT

    # At Lambda and w0.
    prior_precision = phi["log_prior"].exp()
    of_each = torch.diagonal(at_a, dim1=1, dim2=2) + at_target * solved.prior[task]
    into["log_prior"] = prior_precision * sums(of_each, of_task, groups)
    at_prior = prior_precision * sums(at_target, task, count)

    # At T, and from there at S and s, which are of items as all users see them.
    at_matrix, at_vector, at_query, at_to_user = at_a, at_target, at_features, None
    if solved.to_user is not None:
        own = solved.to_user[task]
        through = own @ at_a
        at_matrix, at_vector, at_query = through @ own.mT, (own @ at_target[..., None])[..., 0], at_features @ own.mT
        at_own = 2 * s_matrix @ through + s_vector[..., None] * at_target[:, None]
        at_to_user = sums(at_own + solved.query.mT @ at_features, task, count)

    # At N, which multiplies what each interaction tells.
    of_each = (at_matrix * s_matrix).sum((1, 2)) + (at_vector * s_vector).sum(1) - at_variance.sum(1) / phi["log_precision"].exp()
    into["log_precision"] = sums(of_each[:, None], of_task, groups)
    if "recency" in phi:
        slower, slower_vector = moments(batch, solved.known, solved.outer, -solved.weight * torch.log1p(batch.support.newer))
        of_each = (at_matrix * slower).sum((1, 2)) + (at_vector * slower_vector).sum(1)
        into["recency"] = sums(of_each[:, None], of_task, groups) * torch.sigmoid(phi["recency"])

    # At z and r of each interaction, (z, r)' [[G, g/2], [g/2', 0]] doubled and weighed, and of each query; summed by item.
    at_known = _at_items(batch, solved, at_matrix, at_vector, torch.cat([at_query, -at_score[..., None]], -1))
    into["mean"] = -sums(at_known[:, -1:], of_item, groups)

    # Users: the prior, the constant's row of T, and their network.
    e_u, at_mixing = solved.users.output, None
    at_e_u = at_prior @ phi["prior.weight"].T
    into["prior.bias"] = sums(at_prior, of_user, groups)
    into["prior.weight"] = products(e_u, at_prior, batch.users_of)
    if solved.mixing is not None and solved.remembered is not None and at_to_user is not None:
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


def _at_items(batch: Batch, solved: Solved, at_matrix: Tensor, at_vector: Tensor, at_query: Tensor) -> Tensor:
    """The gradient at ``known`` of each item of each group, (J, E), from those at S, at s and at the queries' own (B, q, E)."""
    support, size = batch.support, solved.known.shape[1]
    rows = embedding(batch.item_of[support.padded(support.items)], solved.known)
    rows[..., -1] += support.padded(support.ratings)
    form = at_matrix.new_zeros(len(at_matrix), size, size)
    form[:, :-1, :-1] = 2 * at_matrix
    form[:, :-1, -1] = form[:, -1, :-1] = at_vector
    padded = rows.shape[0] * rows.shape[1]
    asked = batch.query_mask.flatten().nonzero()[:, 0]
    pulled = rows.new_empty(padded + len(asked), size)
    torch.bmm(rows, form, out=pulled[:padded].view(rows.shape))
    pulled[padded:] = at_query.flatten(0, 1)[asked]
    items = torch.cat([support.items, batch.query_items.flatten()[asked]])
    places = torch.cat([support.place, torch.arange(padded, len(pulled))])
    weights = torch.cat([solved.weight, pulled.new_ones(len(asked))])
    order, starts = in_order(items.numpy(), len(batch.item_of))
    return bags(pulled, places[order], starts, weights[order])


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
