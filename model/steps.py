"""The adaptation engine for gradient steps (Eq. 11), with derivatives taken by hand.

`Mamo.forward` with `model.adaptation.gradient_steps` is the specification, and what tests hold this against. There are two ways. Where all
layers are adapted and meta-gradients are of first order, compiled loops take one task at a time (`model.ownsteps`, whose `serves` is the
rule). Everything else takes all tasks at once, in tensors that autograd can go back through in second order: where the work goes away is
told in `model.fastweights`; besides, supports of like length go together, so that little is padded.

Shapes as in `model.mamo` and `model.tasks`: B tasks in G groups, of U users, n interactions of a support, q of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from model import ownsteps
from model.engine import Gradients
from model.fastweights import Blended, Fast, Networks, Pair, Passed, Pulled, layers
from model.mamo import Leaves, Mamo, Prediction
from model.tasks import Batch

PART_ROWS = 400
"""Padding of so many interactions costs about as much as the calls that one more part takes."""


class Part(NamedTuple):
    """Tasks whose supports are of like length: their numbers, adapted networks, and the pass over their queries."""

    tasks: Tensor
    networks: Networks
    query: Passed


class Stepped(NamedTuple):
    """What gradients go back through; in second order also the leaves at which autograd takes them."""

    parts: list[Part]
    order: Tensor  # (B,), where each task stands among those of the parts, one part after the other
    leaves: Leaves | None
    own: ownsteps.Own | None = None
    """Where tasks were adapted one by one; then there are no parts."""


def solve(model: Mamo, batch: Batch, *, learning: bool) -> tuple[Prediction, Stepped]:
    """Adapt every task to its support and score its query, as `Mamo.forward` does."""
    if ownsteps.serves(model):
        prediction, own = ownsteps.solve(model, batch, learning=learning)
        return prediction, Stepped([], batch.user_of.new_empty(0), None, own)
    if learning and model.settings.order == "second":
        leaves, batch = model.leaves(batch, requires_grad=True)
        users = model.users.embed(*leaves.user_profiles, leaves.user_values)
        items = model.items.embed(*leaves.item_profiles, leaves.item_values)
        prediction, stepped = _solve(model, batch, leaves.phi, users, items, learning=True)
        return prediction, stepped._replace(leaves=leaves)
    return in_factors(model, batch, learning=learning)


@torch.no_grad()
def in_factors(model: Mamo, batch: Batch, *, learning: bool) -> tuple[Prediction, Stepped]:
    """As `solve`, all tasks at once whatever the settings: what is found holds their adapted networks."""
    return _solve(
        model, batch, model.phi, model.users.embed_at(batch.user_places), model.items.embed_at(batch.item_places), learning=learning
    )


def _solve(
    model: Mamo, batch: Batch, phi: dict[str, Tensor], users: Tensor, items: Tensor, *, learning: bool
) -> tuple[Prediction, Stepped]:
    """As `solve`, of embedded profiles (U, features, d_e) and (I, features, d_e + 1)."""
    settings, memory = model.settings, model.memory
    p_u, p_i = users.flatten(1), items[..., :-1].flatten(1)
    attention = memory.attention(p_u, settings.temperature, centred=settings.centred)
    support, lengths = batch.support.padded(), torch.diff(batch.support.bounds)
    rated = batch.item_of[support.items]
    parts = []
    for tasks in alike(lengths):
        n = max(1, int(lengths[tasks].max()))
        own = of_users(batch.user_of[tasks], len(p_u))
        networks = start(model, phi, own(attention))
        passed = networks.fix(own(p_u)[:, None], embedding(rated[tasks, :n], p_i))
        slopes = 2 * settings.inner_rate * support.mask[tasks, :n] / lengths[tasks, None].clamp(min=1)
        steps = 0 if settings.local == "none" else settings.inner_steps
        for step in range(steps):
            if step:
                passed = networks.again(passed)
            pulled = networks.pull(passed, (passed.score - support.ratings[tasks, :n]) * slopes, whole=False)
            networks.learn(pulled, settings.inner_rate, settings.inner_clip, last=step == steps - 1)
        query = networks.passes(passed.user[0], embedding(batch.item_of[batch.query_items[tasks]], p_i))
        parts.append(Part(tasks, networks, query))
    order = torch.argsort(torch.cat([part.tasks for part in parts]))
    score = torch.cat([part.query.score for part in parts])[order]
    mixing = adapted = None
    if learning and settings.task_memory:
        mixing = adapted = (attention @ memory.mixing.flatten(1)).view(-1, *memory.mixing.shape[1:])
    if mixing is not None and settings.adapts_inner_layers:
        adapted = torch.cat([torch.cat([half.dense()[0] for half in part.networks.joint], 1) for part in parts])[order].mT
    return Prediction(score, None, attention, p_u, [], adapted, mixing, None, None), Stepped(parts, order, None)


def start(model: Mamo, phi: dict[str, Tensor], attention: Tensor) -> Networks:
    """The networks of tasks whose users have this attention (B, K), before adaptation (Eq. 7, 9, 10)."""
    settings, memory = model.settings, model.memory
    theta_u = [phi[name] for name in model.user_names]
    user = layers(theta_u)
    if settings.feature_memory:
        sizes = [theta.numel() for theta in theta_u]
        rows = [row.view(-1, *theta.shape) for row, theta in zip(torch.split(memory.gradient, sizes, 1), theta_u, strict=True)]
        shift = zip(rows[::2], rows[1::2], user, strict=True)
        user = [Blended(-settings.tau * attention, weights, biases, layer) for weights, biases, layer in shift]
    if not settings.task_memory:
        return Networks(settings, phi, user, None)
    of_user, of_item = memory.mixing.mT.chunk(2, 1)  # (K, d_e, d_e) each, from e_u and from e_i
    # Unlike a user's one row, the rows of a support's items are too many for a blend.
    own = Fast((attention @ of_item.flatten(1)).view(-1, *of_item.shape[1:]), None)
    return Networks(settings, phi, user, (Blended(attention, of_user, None, None), own))


def of_users(user: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    """What gives each task the value of its user, of (count, ...): a view where every user has one task, in order."""
    if len(user) == count and torch.equal(user, torch.arange(count)):
        return lambda values: values
    return lambda values: values[user]


def alike(lengths: Tensor) -> list[Tensor]:
    """Tasks by the lengths (B,) of their supports: lists of their numbers, each rising, cut where less padding is worth one more part."""
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order].tolist()
    cuts, longest = [0], sizes[0]
    for place, size in enumerate(sizes):
        if (longest - size) * (len(sizes) - place) > PART_ROWS and 3 * size < 2 * longest:
            cuts.append(place)
            longest = size
    return [order[start:end].sort().values for start, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


@torch.no_grad()
def pull(stepped: Stepped, at_score: Tensor) -> Pulled:
    """From the gradient at the scores (B, q) of all tasks back through their queries, at the adapted parameters, in order of tasks."""
    if stepped.own is not None:
        return ownsteps.pull(stepped.own, at_score)
    parts = [part.networks.pull(part.query, at_score[part.tasks], whole=True) for part in stepped.parts]
    if len(parts) == 1:
        return parts[0]

    def joined(values: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(values))[stepped.order]

    def by_layer(of_parts: list[list[Pair]]) -> list[Pair]:
        return [(joined(x for x, _ in layer), joined(at for _, at in layer)) for layer in zip(*of_parts, strict=True)]

    return Pulled(
        by_layer([part.rating for part in parts]),
        by_layer([part.joint for part in parts]),
        by_layer([part.user for part in parts]),
        by_layer([part.item for part in parts]),
        joined(part.at_p_u for part in parts),
        joined(part.at_p_i for part in parts),
    )


@torch.no_grad()
def gradients(model: Mamo, batch: Batch, stepped: Stepped, at_score: Tensor, *, users: Tensor) -> Gradients:
    """The gradients, in first order, of a loss that has gradient ``at_score`` (B, q) at the scores. ``users`` (W,) write."""
    phi, task, groups, tasks_of = model.phi, batch.user_of, len(batch.ends.tasks), batch.tasks_of
    of_task = torch.from_numpy(np.repeat(np.arange(groups), np.diff(batch.ends.tasks, prepend=0)))
    pulled = pull(stepped, at_score)

    def weight(x: Tensor, at: Tensor) -> Tensor:
        rows = x.shape[1]
        return products(x.flatten(0, 1), at.flatten(0, 1), [slice(of.start * rows, of.stop * rows) for of in tasks_of])

    into, joined = {}, not model.settings.task_memory  # Without M_uI the first rating layer is what joins e_u and e_i.
    if joined:
        into["rating.0.weight"] = torch.cat([weight(*pair) for pair in pulled.joint], 1)
        into["rating.0.bias"] = sums(pulled.joint[1][1].sum(1), of_task, groups)
    for side, pairs, below in (("user", pulled.user, 0), ("item", pulled.item, 0), ("rating", pulled.rating, int(joined))):
        for layer, (x, at) in enumerate(pairs, below):
            into[f"{side}.{layer}.weight"] = weight(x, at)
            into[f"{side}.{layer}.bias"] = sums(at.sum(1), of_task, groups)
    at_p_u = sums(pulled.at_p_u[:, 0], task, len(batch.users))
    at_p_i = sums(pulled.at_p_i.flatten(0, 1), batch.query_items.flatten(), len(batch.item_of))
    # The bias of an item has no part in these scores.
    no_bias = np.zeros(len(at_p_i), at_score.numpy().dtype)
    theta_u, mixing = writings(model, batch, pulled, users)
    return Gradients(
        vectors=torch.cat([into[name].reshape(groups, -1) for name in phi], 1),
        user_rows=model.users.embed_back(batch.user_places, batch.ends.users, at_p_u.numpy()),
        item_rows=model.items.embed_back(batch.item_places[batch.item_of.numpy()], batch.ends.items, at_p_i.numpy(), no_bias),
        theta_u=theta_u,
        mixing=mixing,
    )


@torch.no_grad()
def writings(model: Mamo, batch: Batch, pulled: Pulled, users: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients at the adapted theta_u and M_uI of the ``users`` (W,) who write, summed over their tasks: see `engine.Gradients`.

    M_uI has one only where no step adapts it: else it is written as adapted.
    """
    if not len(users):
        return None, None
    place = torch.full((len(batch.users),), -1)
    place[users] = torch.arange(len(users))
    of_task = place[batch.user_of]
    tasks = (of_task >= 0).nonzero()[:, 0]

    def weight(x: Tensor, at: Tensor) -> Tensor:
        return sums(x[tasks].mT @ at[tasks], of_task[tasks], len(users))

    theta_u = [part.flatten(1) for x, at in pulled.user for part in (weight(x, at), sums(at[tasks].sum(1), of_task[tasks], len(users)))]
    mixing = None
    if model.settings.task_memory and not model.settings.adapts_inner_layers:
        mixing = torch.cat([weight(*pair) for pair in pulled.joint], 1).mT
    return torch.cat(theta_u, 1), mixing


def sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of the values (m, ...) with the same ``index``: (count, ...)."""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, index, values)


def products(left: Tensor, right: Tensor, groups: list[slice]) -> Tensor:
    """For each group left' right: (m, a), (m, b) -> (G, a, b)."""
    return torch.stack([left[group].T @ right[group] for group in groups])
