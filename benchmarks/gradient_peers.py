"""Gradient steps as others would write them, from the same parameters to the same scores: what the engine is measured beside.

`by_loop` takes one user at a time through autograd, as the published code of MAMO and of MeLU does, `by_lean_loop` does so with care, and
`by_vmap` takes all at once through `torch.func`. `bare` only multiplies: the batched products that the steps cannot do without.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import embedding, linear, mse_loss

from model.tasks import collate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.mamo import Mamo
    from model.tasks import Task

Theta = dict[str, Tensor]


class Given(NamedTuple):
    """What adaptation starts from: a user's parameters and profile, and the support; each with a leading dimension of users."""

    theta: Theta
    p_u: Tensor  # (B, d_u)
    p_i: Tensor  # (B, n, d_i)
    ratings: Tensor  # (B, n)
    asked: Tensor  # (B, q, d_i)


class Recommender(torch.nn.Module):
    """Eq. 1 and 2 for one user, as a module whose parameters are that user's."""

    def __init__(self, theta: Theta) -> None:
        super().__init__()
        self.theta = torch.nn.ParameterDict({name.replace(".", "_"): torch.nn.Parameter(value.clone()) for name, value in theta.items()})

    @torch.no_grad()
    def begin(self, theta: Theta) -> None:
        """Start from a user's parameters."""
        for name, value in theta.items():
            self.theta[name.replace(".", "_")].copy_(value)

    def forward(self, p_u: Tensor, p_i: Tensor) -> Tensor:
        """Scores (n,) of items p_i (n, d_i) for the user p_u, (d_u,) or, repeated, (n, d_u)."""
        theta = self.theta

        def network(name: str, x: Tensor) -> Tensor:
            hidden = torch.relu(linear(x, theta[f"{name}_0_weight"].T, theta[f"{name}_0_bias"]))
            return linear(hidden, theta[f"{name}_1_weight"].T, theta[f"{name}_1_bias"])

        e_u, e_i = network("user", p_u), network("item", p_i)
        mixed = linear(torch.cat([e_u.expand_as(e_i), e_i], -1), theta["mixing"])
        return network("rating", mixed)[..., 0]


def given(model: Mamo, tasks: Sequence[Task]) -> Given:
    """Look everything up, as the engine does; supports are of one length."""
    batch = collate([tasks], model.users, model.items, model.scale, model.dtype)
    p_u, p_i = model.users.embed_at(batch.user_places).flatten(1), model.items.embed_at(batch.item_places)[..., :-1].flatten(1)
    support = batch.support.padded()
    asked = embedding(batch.item_of[batch.query_items], p_i)
    return Given(personal(model, p_u), p_u, embedding(batch.item_of[support.items], p_i), support.ratings, asked)


def personal(model: Mamo, p_u: Tensor) -> Theta:
    """The parameters that users with profiles (B, d_u) begin with: phi, shifted by the memories, and M_uI (Eq. 7, 9)."""
    attention = model.memory.attention(p_u, model.settings.temperature, centred=model.settings.centred)
    count = len(p_u)
    theta = {name: value.expand(count, *value.shape) for name, value in model.phi.items()}
    shift = torch.split(attention @ model.memory.gradient, [model.phi[name].numel() for name in model.user_names], 1)
    theta |= {
        name: model.phi[name] - model.settings.tau * b.view(-1, *model.phi[name].shape)
        for name, b in zip(model.user_names, shift, strict=True)
    }
    theta["mixing"] = (attention @ model.memory.mixing.flatten(1)).view(-1, *model.memory.mixing.shape[1:])
    return theta


def by_loop(model: Mamo, tasks: Sequence[Task]) -> Tensor:
    """Scores (B, q), as published code finds them: one module that takes each user's parameters in turn, and an optimiser for each.

    github.com/dongmanqing/Code-for-MAMO (models.py, utils.py) and github.com/hoyeoplee/MeLU (MeLU.py, embeddings.py) repeat the user's
    profile beside each interaction, and look profiles up whenever the module is called. For the same arithmetic all of a support is one
    batch here, steps are plain and not clipped, and no gradient goes on to the rows that profiles are made of.
    """
    batch = collate([tasks], model.users, model.items, model.scale, model.dtype)
    theta = personal(model, model.users.embed_at(batch.user_places).flatten(1))
    of_users, of_items = model.users.encoded(batch.user_places), model.items.encoded(batch.item_places)
    own, scores = Recommender({name: value[0] for name, value in theta.items()}), []

    def profiles(user: int, items: Tensor) -> list[Tensor]:
        """The encoded profiles of a user, repeated, and of items: rows and weights of each."""
        whose, rated = batch.user_of[user].repeat(len(items)), batch.item_of[items]
        return [*(values[whose] for values in of_users), *(values[rated] for values in of_items)]

    def score(user_rows: Tensor, user_weights: Tensor, item_rows: Tensor, item_weights: Tensor) -> Tensor:
        with torch.no_grad():
            p_u = model.users.embed(user_rows, user_weights, model.user_table.values).flatten(1)
            p_i = model.items.embed(item_rows, item_weights, model.item_table.values)[..., :-1].flatten(1)
        found: Tensor = own(p_u, p_i)
        return found

    for user, (begin, end) in enumerate(pairwise(batch.support.bounds.tolist())):
        rated, ratings = profiles(user, batch.support.items[begin:end]), batch.support.ratings[begin:end]
        own.begin({name: value[user] for name, value in theta.items()})
        optimiser = torch.optim.SGD(own.parameters(), lr=model.settings.inner_rate)
        for _ in range(model.settings.inner_steps):
            loss = mse_loss(score(*rated), ratings)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
        with torch.no_grad():
            scores.append(score(*profiles(user, batch.query_items[user])))
    return torch.stack(scores)


def by_lean_loop(model: Mamo, tasks: Sequence[Task]) -> Tensor:
    """The same with care: profiles are looked up once, the user's layers passed once for all interactions, and there is no optimiser."""
    start, scores = given(model, tasks), []
    own = Recommender({name: value[0] for name, value in start.theta.items()})
    parameters = list(own.parameters())
    for user in range(len(tasks)):
        own.begin({name: value[user] for name, value in start.theta.items()})
        for _ in range(model.settings.inner_steps):
            loss = mse_loss(own(start.p_u[user], start.p_i[user]), start.ratings[user])
            slopes = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes, strict=True):
                    parameter.sub_(slope, alpha=model.settings.inner_rate)
        with torch.no_grad():
            scores.append(own(start.p_u[user], start.asked[user]))
    return torch.stack(scores)


def by_vmap(model: Mamo, tasks: Sequence[Task]) -> Tensor:
    """Scores (B, q): all users at once, gradients by ``vmap(grad)``."""
    start = given(model, tasks)
    one = Recommender({name: value[0] for name, value in start.theta.items()})

    def score(theta: Theta, p_u: Tensor, p_i: Tensor) -> Tensor:
        found: Tensor = functional_call(one, theta, (p_u, p_i))
        return found

    def loss(theta: Theta, p_u: Tensor, p_i: Tensor, ratings: Tensor) -> Tensor:
        return mse_loss(score(theta, p_u, p_i), ratings)

    theta = {f"theta.{name.replace('.', '_')}": value for name, value in start.theta.items()}
    slopes = vmap(grad(loss))
    with torch.no_grad():
        for _ in range(model.settings.inner_steps):
            found = slopes(theta, start.p_u, start.p_i, start.ratings)
            theta = {name: value - model.settings.inner_rate * found[name] for name, value in theta.items()}
        scores: Tensor = vmap(score)(theta, start.p_u, start.asked)
        return scores


def bare(count: int, support: int, d: int, steps: int) -> tuple[Callable[[], None], float]:
    """The products of the three square layers that see every interaction, M_uI's half, the upper item layer and the rating layer.

    Each step goes forward and back through each, and all but the last change it. Returns a call of all, and its FLOP.
    """
    x, at, weight = torch.randn(count, support, d), torch.randn(count, support, d), torch.randn(count, d, d)
    out, change = torch.empty_like(x), torch.empty_like(weight)

    def multiply() -> None:
        for step in range(steps):
            for _ in range(3):
                torch.bmm(x, weight, out=out)
                torch.bmm(at, weight.mT, out=out)
                if step < steps - 1:
                    torch.bmm(x.mT, at, out=change)

    return multiply, 2.0 * count * support * d * d * 3 * (3 * steps - 1)
