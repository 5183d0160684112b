"""Meta-gradients against central finite differences, in float64 with smooth activations.

No gradient flows through a_u (Eq. 3), by design, so attention is held at its value while a parameter is moved. In second order the
differences go through the whole adaptation. In first order what adaptation added to the parameters is held constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import model.mamo
from model.adaptation import Weights, gradient_steps
from model.mamo import Mamo
from model.memory import Memory
from model.meta import Gradient, query_loss, total
from model.tasks import collate
from tests.model_cases import CLOSED, PAPER, TASKS, forward, learn, small_model

SECOND: dict[str, dict[str, Any]] = {
    "literal": {},
    "repaired memory": {"temperature": 5.0, "centred": True, "gated": True, "activation": "softplus"},
    "decision": {"local": "decision"},
    "memory off": {"memory": "off", "inner_steps": 2},
    "feature memory": {"memory": "feature", "inner_steps": 1},
    "task memory": {"memory": "task", "inner_steps": 1},
}
SOLVE: dict[str, dict[str, Any]] = {
    "gaussian loss": {},
    "squared loss": {"loss": "squared"},
    "memory off": {"memory": "off", "layers": 2, "activation": "softplus"},
    "no recency": {"recency": 0.0},
    "inner steps before the solve": {"inner_steps": 2, "inner_rate": 0.05, "layers": 2, "activation": "tanh"},
    "inner steps without memories": {"inner_steps": 1, "inner_rate": 0.05, "memory": "off"},
}
CASES = [pytest.param(PAPER | over, id=name) for name, over in SECOND.items()] + [
    pytest.param(CLOSED | over, id=f"closed form, {name}") for name, over in SOLVE.items()
]


@pytest.fixture
def attention_held(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mamo], None]:
    def hold(at: Mamo) -> None:
        held = forward(at)[0].attention.detach()
        monkeypatch.setattr(Memory, "attention", lambda *_args, **_settings: held)

    return hold


def differences(at: Mamo, eps: float = 1e-5) -> tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]:
    """Central differences of the query loss at all of phi, and at every row of the embedding tables that the tasks touch."""
    leaves, batch = at.leaves(collate([TASKS], at.users, at.items, at.scale, at.dtype), requires_grad=False)
    if at.settings.inner_steps:
        leaves = leaves._replace(phi={name: value.requires_grad_() for name, value in leaves.phi.items()})

    def loss() -> float:
        with torch.set_grad_enabled(at.settings.inner_steps > 0):
            return float(query_loss(at.settings, at.forward(leaves, batch), batch).sum().detach())

    def slope(values: Tensor) -> np.ndarray:
        flat = values.detach().view(-1)
        found = np.zeros(len(flat))
        for place in range(len(flat)):
            before = float(flat[place])
            flat[place] = before + eps
            above = loss()
            flat[place] = before - eps
            found[place] = (above - loss()) / (2 * eps)
            flat[place] = before
        return found.reshape(values.shape)

    rows = {
        "user": dict(zip(leaves.user_keys, slope(leaves.user_values), strict=True)),
        "item": dict(zip(leaves.item_keys, slope(leaves.item_values), strict=True)),
    }
    return np.concatenate([slope(value).reshape(-1) for value in leaves.phi.values()]), rows


def agree(gradient: Gradient, expected: tuple[np.ndarray, dict[str, dict[str, np.ndarray]]]) -> None:
    vector, rows = expected
    np.testing.assert_allclose(gradient.vector.numpy(), vector, rtol=1e-6, atol=1e-7)
    assert np.abs(vector).max() > 1e-2
    for name, part in gradient.rows.items():
        assert set(part.keys) == set(rows[name])
        np.testing.assert_allclose(part.values.numpy(), np.stack([rows[name][key] for key in part.keys]), rtol=1e-6, atol=1e-7)
        assert float(part.values.abs().max()) > 1e-3


@pytest.mark.parametrize("settings", CASES)
def test_second_order_gradients_go_through_the_whole_adaptation(settings: dict[str, Any], attention_held: Callable[[Mamo], None]) -> None:
    at = small_model(**settings | {"order": "second"})
    attention_held(at)
    agree(learn(at)[0], differences(at))


def test_second_order_gradients_go_through_the_clipping(attention_held: Callable[[Mamo], None]) -> None:
    at = small_model(**PAPER | {"order": "second", "inner_clip": 0.5, "inner_steps": 2})
    attention_held(at)
    agree(learn(at)[0], differences(at))


@pytest.mark.parametrize(
    "settings", [case for case in CASES if "inner steps" in str(case.id) or case.id in {"literal", "decision", "memory off"}]
)
def test_first_order_gradients_hold_what_adaptation_added_constant(
    settings: dict[str, Any], attention_held: Callable[[Mamo], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = small_model(**settings | {"order": "first"})
    at.plain = True  # whose steps can be looked into; tests/test_engine.py holds the engine against it
    attention_held(at)
    added: Weights = {}

    def remember(fast: Weights, names: list[str], adapted: Weights) -> Weights:
        added.update({name: (adapted[name] - fast[name]).detach() for name in names})
        return adapted

    steps = "gradient_steps"
    monkeypatch.setattr(
        model.mamo, steps, lambda fast, names, *rest, **named: remember(fast, names, gradient_steps(fast, names, *rest, **named))
    )
    gradient, _ = learn(at)
    assert added
    assert all(float(change.abs().max()) > 0 for change in added.values())
    monkeypatch.setattr(model.mamo, steps, lambda fast, names, *_, **__: fast | {name: fast[name] + added[name] for name in names})
    agree(gradient, differences(at))


def test_first_and_second_order_differ() -> None:
    first, second = (learn(small_model(**PAPER | {"order": order}), TASKS)[0].vector for order in ("first", "second"))
    assert float((first - second).abs().max()) > 1e-3


def test_no_gradient_flows_through_attention() -> None:
    """Rows of users matter through e_u alone: with a user network of zeros they have no gradient, though attention depends on them."""
    at = small_model(**CLOSED)
    for name in at.user_names:
        at.phi[name].zero_()
    at.set_vector(at.vector)
    at.memory.gradient.zero_()
    at.memory.mixing[..., : at.settings.embedding_size].zero_()
    gradient, _ = learn(at)
    assert float(gradient.rows["user"].values.abs().max()) == 0
    assert float(gradient.rows["item"].values.abs().max()) > 0


@pytest.mark.parametrize("settings", [PAPER, CLOSED], ids=["gradient steps", "closed form"])
def test_the_gradient_of_a_batch_is_the_sum_of_those_of_its_tasks(settings: dict[str, Any]) -> None:
    at = small_model(**settings)
    whole = learn(at)[0]
    parts = total([learn(at, [task])[0] for task in TASKS])
    assert parts.queries == whole.queries == 6
    np.testing.assert_allclose(parts.vector.numpy(), whole.vector.numpy(), rtol=1e-10, atol=1e-10)
    for name, part in whole.rows.items():
        assert list(parts.rows[name].keys) == list(part.keys)
        np.testing.assert_allclose(parts.rows[name].values.numpy(), part.values.numpy(), rtol=1e-10, atol=1e-10)


def quadratic(targets: Sequence[float]) -> tuple[Weights, Callable[[Weights], Tensor]]:
    fast = {"a": torch.zeros(len(targets), 1, dtype=torch.float64, requires_grad=True), "still": torch.ones(1, dtype=torch.float64)}
    return fast, lambda weights: weights["a"]


def test_the_bound_on_the_inner_gradient_is_one_for_each_task_over_all_its_parameters() -> None:
    """L = (a - r)^2 at a = 0 has the gradient -2 r: of 3 tasks one is below the bound, one above it, one has no support."""
    fast, predict = quadratic([0.1, 10.0, 5.0])
    ratings, mask = torch.tensor([[0.1], [10.0], [5.0]], dtype=torch.float64), torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    settings: dict[str, Any] = {"rate": 0.1, "second_order": False}
    once = gradient_steps(fast, ["a"], predict, ratings, mask, steps=1, clip=1.0, **settings)
    np.testing.assert_allclose(once["a"].detach().numpy(), [[0.02], [0.1], [0.0]], atol=1e-12)
    free = gradient_steps(fast, ["a"], predict, ratings, mask, steps=1, clip=0.0, **settings)
    np.testing.assert_allclose(free["a"].detach().numpy(), [[0.02], [2.0], [0.0]], atol=1e-12)
    twice = gradient_steps(fast, ["a"], predict, ratings, mask, steps=2, clip=1.0, **settings)
    np.testing.assert_allclose(twice["a"].detach().numpy(), [[0.036], [0.2], [0.0]], atol=1e-12)
    assert once["still"] is fast["still"]


def test_the_bound_takes_the_norm_over_all_parameters_of_a_task() -> None:
    fast = {name: torch.zeros(1, 1, dtype=torch.float64, requires_grad=True) for name in ("a", "b")}
    adapted = gradient_steps(
        fast,
        ["a", "b"],
        lambda weights: 3 * weights["a"] + 4 * weights["b"],
        torch.tensor([[1.0]], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
        rate=1.0,
        steps=1,
        clip=1.0,
        second_order=False,
    )
    assert [adapted[name].item() for name in ("a", "b")] == pytest.approx([0.6, 0.8])
