"""Gradient steps as others would write them, from the same parameters to the same scores: what the engine is measured beside.

`by_loop` takes one user at a time through autograd, as the published code of MAMO and of MeLU does; `by_vmap` takes all at once through
`torch.func`. `bare` only multiplies: the batched products that the steps cannot do without, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import embedding

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

    def forward(self, p_u: Tensor, p_i: Tensor) -> Tensor:
        """Scores (n,) of items p_i (n, d_i) for the user p_u (d_u,)."""
        theta = self.theta

        def network(name: str, x: Tensor) -> Tensor:
            hidden: Tensor = torch.relu(x @ theta[f"{name}_0_weight"] + theta[f"{name}_0_bias"])
            out: Tensor = hidden @ theta[f"{name}_1_weight"] + theta[f"{name}_1_bias"]
            return out

        e_u, e_i = network("user", p_u), network("item", p_i)
        mixed = torch.cat([e_u.expand_as(e_i), e_i], -1) @ theta["mixing"].T
        score: Tensor = network("rating", mixed)[..., 0]
        return score


def given(model: Mamo, tasks: Sequence[Task]) -> Given:
    """Look everything up, as the engine does; supports are of one length."""
    batch = collate([tasks], model.users, model.items, model.dtype)
    p_u = model.users.embed(batch.user_rows, batch.user_weights, model.user_table.values).flatten(1)
    p_i = model.items.embed(batch.item_rows, batch.item_weights, model.item_table.values)[..., :-1].flatten(1)
    attention = model.memory.attention(p_u, model.settings.temperature, centred=model.settings.centred)
    count = len(p_u)
    theta = {name: value.expand(count, *value.shape) for name, value in model.phi.items()}
    shift = torch.split(attention @ model.memory.gradient, [model.phi[name].numel() for name in model.user_names], 1)
    theta |= {
        name: model.phi[name] - model.settings.tau * b.view(-1, *model.phi[name].shape)
        for name, b in zip(model.user_names, shift, strict=True)
    }
    theta["mixing"] = (attention @ model.memory.mixing.flatten(1)).view(-1, *model.memory.mixing.shape[1:])
    support = batch.support.padded()
    asked = embedding(batch.item_of[batch.query_items], p_i)
    return Given(theta, p_u, embedding(batch.item_of[support.items], p_i), support.ratings, asked)


def by_loop(model: Mamo, tasks: Sequence[Task]) -> Tensor:
    """Scores (B, q): each user adapted on its own, by a stochastic gradient descent over a module's parameters."""
    start, scores = given(model, tasks), []
    for user in range(len(tasks)):
        own = Recommender({name: value[user] for name, value in start.theta.items()})
        parameters = list(own.parameters())
        for _ in range(model.settings.inner_steps):
            loss = (own(start.p_u[user], start.p_i[user]) - start.ratings[user]).square().mean()
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
        return (score(theta, p_u, p_i) - ratings).square().mean()

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
