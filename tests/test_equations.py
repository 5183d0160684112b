"""Equations 1 to 12 of MAMO (KDD 2020): the model against loops over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from model.mamo import Mamo
from model.memory import Memory
from model.meta import Optimiser
from model.tasks import Task
from tests.model_cases import PAPER, TASKS, forward, learn, small_model
from tests.paper_loops import EPS, Paper, Theta, differences

VARIANTS: dict[str, dict[str, Any]] = {
    "literal": {},
    "repaired": {"temperature": 5.0, "centred": True, "gated": True},
    "one layer": {"layers": 1, "rating_layers": 1, "inner_steps": 1},
    "softplus": {"activation": "softplus", "inner_steps": 2},
    "feature memory": {"memory": "feature"},
    "task memory": {"memory": "task"},
    "decision": {"local": "decision"},
    "no adaptation": {"inner_steps": 0},
}


@pytest.fixture(params=list(VARIANTS))
def case(request: pytest.FixtureRequest) -> tuple[Mamo, Paper]:
    model = small_model(**PAPER | VARIANTS[request.param])
    return model, Paper.of(model)


def close(found: torch.Tensor, expected: Sequence[Any] | np.ndarray, tolerance: float = 1e-8) -> None:
    assert found.shape == np.shape(expected)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_eq_1_2_user_and_item_networks_and_the_rating_layer() -> None:
    for variant in ({}, {"layers": 1, "rating_layers": 1}, {"activation": "relu"}, {"memory": "off"}):
        model = small_model(**PAPER | variant | {"inner_steps": 0})
        paper = Paper.of(model)
        prediction, _ = forward(model)
        for number, task in enumerate(TASKS):
            theta = paper.start(task.user)
            expected = [paper.score(theta, task.user, item) for item in task.query_items]
            close(prediction.score[number, : len(expected)], expected, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
@pytest.mark.parametrize("centred", [False, True])
def test_eq_3_attention(temperature: float, centred: bool) -> None:
    model = small_model(**PAPER | {"temperature": temperature, "centred": centred})
    paper = Paper.of(model)
    prediction, batch = forward(model)
    close(prediction.p_u, [paper.p_u(user) for user in batch.users], 1e-12)
    close(prediction.attention, [paper.attention(user) for user in batch.users], 1e-12)
    close(prediction.attention.sum(1), [1.0] * len(batch.users), 1e-12)
    assert not prediction.attention.requires_grad


def test_eq_4_7_9_10_what_is_read_from_the_memories() -> None:
    model = small_model(**PAPER | {"inner_steps": 0})
    model.plain = True
    paper = Paper.of(model)
    prediction, batch = forward(model)
    assert prediction.mixing_read is not None
    for number, user in enumerate(batch.users):
        start = paper.start(user)
        for name, theta in zip(model.user_names, prediction.theta_u, strict=True):
            close(theta[number], start[name], 1e-12)
            assert not np.allclose(start[name], paper.phi[name])
        close(prediction.mixing_read[number], start["mixing"], 1e-12)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "engine"])
def test_eq_11_inner_steps_and_the_scores_after_them(case: tuple[Mamo, Paper], *, plain: bool) -> None:
    model, paper = case
    model.plain = plain
    prediction, batch = forward(model)
    assert bool(prediction.theta_u) == plain
    for number, task in enumerate(TASKS):
        theta = paper.adapt(task)
        close(prediction.score[number, : len(task.query_items)], [paper.score(theta, task.user, item) for item in task.query_items])
        at = number if model.settings.adapts_inner_layers else int(batch.user_of[number])
        for name, found in zip(model.user_names, prediction.theta_u, strict=plain):
            close(found[at], theta[name])
        if prediction.mixing is not None:
            close(prediction.mixing[at], theta["mixing"])


def test_eq_11_one_task_is_clipped_by_its_own_norm() -> None:
    clip = 0.5
    model = small_model(**PAPER | {"inner_steps": 1, "inner_clip": clip})
    paper = Paper.of(model)
    prediction, _ = forward(model)
    clipped = 0
    for number, task in enumerate(TASKS):
        if not task.support_items:
            continue
        start = paper.start(task.user)
        names = list(start)

        def support(theta: Theta, task: Task = task) -> float:
            return paper.loss(theta, task.user, task.support_items, task.support_ratings) / len(task.support_items)

        gradient = differences(support, start, names)
        norm = math.sqrt(sum(float((part**2).sum()) for part in gradient.values()))
        clipped += norm > clip
        theta = {
            name: (np.array(start[name]) - model.settings.inner_rate * min(1, clip / norm) * gradient[name]).tolist() for name in names
        }
        close(prediction.score[number, : len(task.query_items)], [paper.score(theta, task.user, item) for item in task.query_items])
    assert clipped


def expected_memory(paper: Paper) -> dict[str, Any]:
    """Eq. 5, 6 and 8, user after user: attention, gradients and changes from before the batch, a_u^T M_UI read anew."""
    s = paper.settings
    alpha, beta, gamma = (1 - 0.5 ** (1 / half) for half in (s.profile_half_life, s.gradient_half_life, s.task_half_life))
    memory = {name: np.array(value) for name, value in paper.memory.items()}
    rows = len(memory["profile"])
    for user in dict.fromkeys(task.user for task in TASKS):
        tasks = [task for task in TASKS if task.user == user]
        if not any(task.support_items for task in tasks):
            continue
        a, p_u = paper.attention(user), np.array(paper.p_u(user))
        queries = sum(len(task.query_items) for task in tasks)
        gradient_u, mixing_gradient, change = (np.zeros_like(memory[name][0]) for name in ("gradient", "mixing", "mixing"))
        for task in tasks:
            theta = paper.adapt(task)

            def query(values: Theta, task: Task = task) -> float:
                return paper.loss(values, task.user, task.query_items, task.query_ratings)

            names = [name for name in theta if name.startswith(("user.", "mixing"))]
            gradient = differences(query, theta, names)
            gradient_u += np.concatenate([gradient[name].reshape(-1) for name in names if name != "mixing"]) / queries
            if "mixing" in theta:
                mixing_gradient += gradient["mixing"] / queries
                change = np.array(theta["mixing"]) - np.array(paper.start(user)["mixing"])
        if "mixing" in names and not s.adapts_inner_layers:
            change = -s.task_step * mixing_gradient
        before = {name: value.copy() for name, value in memory.items()}
        looked = p_u - np.array(paper.memory["centre"]) if s.centred else p_u
        read = sum(a[k] * before["mixing"][k] for k in range(rows)) + change
        for k in range(rows):
            for name, step, what in (("profile", alpha, looked), ("gradient", beta, gradient_u), ("mixing", gamma, read)):
                forget = step * a[k] if s.gated else step
                memory[name][k] = step * a[k] * what + (1 - forget) * before[name][k]
        memory["centre"] = (1 - alpha / rows) * before["centre"] + alpha / rows * p_u
    return memory


def test_eq_5_6_8_memory_writes(case: tuple[Mamo, Paper]) -> None:
    model, paper = case
    expected = expected_memory(paper)
    _, writes = learn(model, write=True)
    assert writes is not None
    after: Memory = writes.apply(model.memory)
    for name, value in expected.items():
        close(getattr(after, name), value)
        assert name == "centre" or not np.allclose(value, paper.memory[name])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("variant", ["literal", "repaired", "decision", "no adaptation"])
def test_eq_12_first_order_meta_update(variant: str, reduction: str) -> None:
    model = small_model(**PAPER | VARIANTS[variant] | {"reduction": reduction, "order": "first"})
    paper = Paper.of(model)
    gradient = {name: np.zeros_like(np.array(value)) for name, value in paper.phi.items()}
    rows: dict[str, dict[str, np.ndarray]] = {"user": {}, "item": {}}
    queries = 0
    for task in TASKS:
        theta = paper.adapt(task)
        queries += len(task.query_items)

        def query(values: Theta, task: Task = task) -> float:
            return paper.loss(values, task.user, task.query_items, task.query_ratings)

        for name, part in differences(query, theta, list(paper.phi)).items():
            gradient[name] += part
        for side, table in (("user", paper.users), ("item", paper.items)):
            for key, row in table.items():
                part = np.zeros(len(row))
                for column in range(len(row)):
                    at = []
                    for sign in (1, -1):
                        table[key] = [value + sign * EPS * (column == j) for j, value in enumerate(row)]
                        at.append(query(theta))
                    part[column] = (at[0] - at[1]) / (2 * EPS)
                table[key] = row
                rows[side][key] = rows[side].get(key, 0.0) + part

    found, _ = learn(model)
    assert found.queries == queries
    Optimiser(model).step(found, None)
    step = model.settings.learning_rate / (queries if reduction == "mean" else 1)
    for name, value in paper.phi.items():
        close(model.phi[name], np.array(value) - step * gradient[name])
        assert not np.allclose(gradient[name], 0)
    for side, table in (("user", paper.users), ("item", paper.items)):
        at_hand = model.tables[side]
        for key, row in table.items():
            close(at_hand.values[at_hand.rows[key]], np.array(row) - step * rows[side][key])
