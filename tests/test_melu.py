"""Memory off and adaptation of the decision layers alone: MeLU (Lee et al., KDD 2019), as a loop over users written here.

Plain tensors, one user at a time: the inner loop adapts the rating layers on the support, the outer loop moves everything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from model.mamo import Mamo
from model.meta import Optimiser, predict
from model.tasks import Task
from tests.model_cases import PAPER, TASKS, learn, small_model

MELU = PAPER | {"memory": "off", "local": "decision", "activation": "relu", "embedding_size": 3, "inner_rate": 0.02, "inner_steps": 2}


class Melu:
    """The parameters theta_1 (embeddings and the layers of users and items) and theta_2 (the decision layers)."""

    def __init__(self, model: Mamo) -> None:
        self.theta = {name: value.clone() for name, value in model.phi.items()}
        self.rows = {
            f"{side} {key}": value.clone()
            for side, table in model.tables.items()
            for key, value in zip(table.keys, table.values, strict=False)
        }
        self.entries = {"user": model.users.entries, "item": model.items.entries}

    def profile(self, side: str, key: str) -> Tensor:
        parts = []
        for feature in self.entries[side](key):
            rows = [self.rows[f"{side} {name}"] * float(np.float32(weight)) for name, weight in feature]
            parts.append(torch.stack(rows).sum(0)[:3])
        return torch.cat(parts)

    def score(self, theta: dict[str, Tensor], user: str, item: str) -> Tensor:
        e_u, e_i = (
            relu(self.profile(side, key) @ theta[f"{side}.0.weight"] + theta[f"{side}.0.bias"]) @ theta[f"{side}.1.weight"]
            + theta[f"{side}.1.bias"]
            for side, key in (("user", user), ("item", item))
        )
        hidden = relu(torch.cat([e_u, e_i]) @ theta["rating.0.weight"] + theta["rating.0.bias"])
        return (hidden @ theta["rating.1.weight"] + theta["rating.1.bias"])[0]

    def adapted(self, task: Task, *, rate: float, steps: int, second_order: bool) -> dict[str, Tensor]:
        theta = dict(self.theta)
        decision = [name for name in theta if name.startswith("rating.")]
        for _ in range(steps if task.support_items else 0):
            pairs = zip(task.support_items, task.support_ratings, strict=True)
            loss = torch.stack([(self.score(theta, task.user, item) - rating) ** 2 for item, rating in pairs]).mean()
            gradients = torch.autograd.grad(loss, [theta[name] for name in decision], create_graph=second_order)
            theta |= {name: theta[name] - rate * part for name, part in zip(decision, gradients, strict=True)}
        return theta

    def step(self, tasks: list[Task], *, rate: float, meta_rate: float, steps: int, second_order: bool) -> list[list[float]]:
        """Scores of the queries, then one meta-update from them."""
        moving = [*self.theta.values(), *self.rows.values()]
        for tensor in moving:
            tensor.requires_grad_()
        gradients, scores = [torch.zeros_like(tensor) for tensor in moving], []
        for task in tasks:
            theta = self.adapted(task, rate=rate, steps=steps, second_order=second_order)
            found = [self.score(theta, task.user, item) for item in task.query_items]
            loss = torch.stack([(score - rating) ** 2 for score, rating in zip(found, task.query_ratings, strict=True)]).sum()
            for gradient, part in zip(gradients, torch.autograd.grad(loss, moving, allow_unused=True), strict=True):
                if part is not None:
                    gradient.add_(part)
            scores.append([score.item() for score in found])
        moved = [tensor.detach() - meta_rate * part for tensor, part in zip(moving, gradients, strict=True)]
        self.theta = dict(zip(self.theta, moved, strict=False))
        self.rows = dict(zip(self.rows, moved[len(self.theta) :], strict=True))
        return scores


@pytest.mark.parametrize("order", ["first", "second"])
def test_off_and_decision_is_melu_step_after_step(order: str) -> None:
    model = small_model(**MELU | {"order": order})
    optimiser = Optimiser(model)
    melu = Melu(model)
    before = model.vector.clone()
    for _ in range(4):
        found = predict(model, TASKS).score
        gradient, writes = learn(model, write=True)
        assert writes is None
        optimiser.step(gradient, writes)
        expected = melu.step(TASKS, rate=0.02, meta_rate=0.01, steps=2, second_order=order == "second")
        for number, scores in enumerate(expected):
            np.testing.assert_allclose(found[number, : len(scores)], np.clip(scores, 1, 5), rtol=1e-7)
    for name, value in model.phi.items():
        np.testing.assert_allclose(value, melu.theta[name], rtol=1e-7, atol=1e-8)
    for side, table in model.tables.items():
        for key, value in zip(table.keys, table.values, strict=False):
            np.testing.assert_allclose(value, melu.rows[f"{side} {key}"], rtol=1e-7, atol=1e-8)
    assert float((model.vector - before).abs().max()) > 0.01


@pytest.mark.parametrize("over", [{"inner_steps": 0}, {"local": "none"}])
def test_without_inner_steps_or_local_adaptation_the_support_is_of_no_account(over: dict[str, Any]) -> None:
    model = small_model(**MELU | over)
    with_support = predict(model, [Task("ann", ["i1", "i2"], [5.0, 5.0], ["i3"], [1.0])]).score
    without = predict(model, [Task("ann", [], [], ["i3"], [1.0])]).score
    np.testing.assert_allclose(with_support, without, rtol=1e-12)
    adapting = predict(small_model(**MELU), [Task("ann", ["i1", "i2"], [5.0, 5.0], ["i3"], [1.0])]).score
    assert abs(float(adapting[0, 0] - without[0, 0])) > 1e-3
