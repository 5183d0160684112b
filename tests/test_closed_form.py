"""The closed form against a posterior found another way: conditioning the joint Gaussian of all ratings, support and query.

With w ~ N(w0, Lambda^-1) and ratings r = mu + b + x w + noise of precision N, all ratings are jointly Gaussian with the mean
m = mu + b + X w0 and the covariance X Lambda^-1 X' + N^-1. No w is ever solved for here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.adaptation import Posterior
from model.mamo import Mamo
from model.meta import adapt, predict
from model.tasks import Task
from tests.model_cases import CLOSED, TASKS, forward, learn, small_model


def condition(
    x: np.ndarray, mean: np.ndarray, ratings: np.ndarray, precision: np.ndarray, prior_precision: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the ratings past the first ``n``, given the first ``n`` of them."""
    joint = x @ np.diag(1 / prior_precision) @ x.T + np.diag(1 / precision)
    if n == 0:
        return mean, np.diag(joint)
    gain = joint[n:, :n] @ np.linalg.inv(joint[:n, :n])
    return mean[n:] + gain @ (ratings[:n] - mean[:n]), np.diag(joint[n:, n:] - gain @ joint[:n, n:])


@settings(max_examples=60)
@given(
    tasks=st.integers(1, 4),
    n=st.integers(0, 12),
    q=st.integers(1, 4),
    features=st.integers(1, 6),
    padding=st.integers(0, 3),
    repeats=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_posterior_is_the_conditioned_joint_gaussian(
    tasks: int, n: int, q: int, features: int, padding: int, repeats: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tasks, n + q, features))
    if repeats:
        x[:, : n + q] = x[:, rng.integers(0, n + q, n + q)]  # the same items several times, in the query too
    precision = rng.uniform(0.2, 5, (tasks, n + q))
    prior_precision, w0 = rng.uniform(0.1, 10, features), rng.normal(size=(tasks, features))
    residual = rng.normal(size=(tasks, n + q)) * 2

    padded = np.concatenate([x[:, :n], rng.normal(size=(tasks, padding, features))], 1)
    posterior = Posterior(
        *(
            torch.from_numpy(part)
            for part in (
                padded,
                np.concatenate([residual[:, :n], 99 * np.ones((tasks, padding))], 1),
                np.concatenate([precision[:, :n], np.zeros((tasks, padding))], 1),
                prior_precision,
                w0,
            )
        )
    )
    mean, variance = posterior.predict(torch.from_numpy(x[:, n:]))
    for task in range(tasks):
        expected, of_rating = condition(x[task], x[task] @ w0[task], residual[task], precision[task], prior_precision, n)
        np.testing.assert_allclose(mean[task].numpy(), expected, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(variance[task].numpy(), of_rating - 1 / precision[task, n:], rtol=1e-7, atol=1e-9)


def network(model: Mamo, name: str, x: np.ndarray, theta: dict[str, np.ndarray]) -> np.ndarray:
    for layer in range(model.settings.layers):
        x = x @ theta[f"{name}.{layer}.weight"] + theta[f"{name}.{layer}.bias"]
        if layer < model.settings.layers - 1:
            x = np.tanh(x)
    return x


def profiles(model: Mamo, user: str, item: str) -> tuple[np.ndarray, np.ndarray, float]:
    """p_u, p_i and the bias of the item."""
    rows = {name: dict(zip(table.keys, table.values.numpy(), strict=False)) for name, table in model.tables.items()}

    def embedded(side: str, key: str) -> list[np.ndarray]:
        entries = (model.users if side == "user" else model.items).entries(key)
        return [sum((np.float32(weight).astype(float) * rows[side][name] for name, weight in feature), np.zeros(())) for feature in entries]

    of_item = embedded("item", item)
    return np.concatenate(embedded("user", user)), np.concatenate([part[:-1] for part in of_item]), sum(part[-1] for part in of_item)


def expected_ratings(model: Mamo, task: Task, attention: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of a task's query ratings, by numpy and the joint Gaussian."""
    s, d = model.settings, model.settings.embedding_size
    phi = {name: value.numpy() for name, value in model.phi.items()}
    theta, place = dict(phi), 0
    for name in [name for name in phi if name.startswith("user.")]:
        if s.feature_memory:
            shift = (attention @ model.memory.gradient.numpy())[place : place + phi[name].size]
            theta[name] = phi[name] - s.tau * shift.reshape(phi[name].shape)
            place += phi[name].size
    items = [*task.support_items, *task.query_items]
    n = len(task.support_items)
    x, mean = np.ones((len(items), d + 1)), np.zeros(len(items))
    w0 = np.zeros(d + 1)
    for number, item in enumerate(items):
        p_u, p_i, bias = profiles(model, task.user, item)
        e_u, e_i = network(model, "user", p_u, theta), network(model, "item", p_i, theta)
        x[number, :d] = e_i
        if s.task_memory:
            x[number, :d] = np.tensordot(attention, model.memory.mixing.numpy(), 1) @ np.concatenate([e_u, e_i])
        w0 = e_u @ phi["prior.weight"] + phi["prior.bias"]
        if s.task_memory:
            w0 = w0 + phi["gate"] * (attention @ model.memory.weights.numpy())
        mean[number] = phi["mean"].item() + bias
    precision = np.full(len(items), np.exp(phi["log_precision"].item()))
    if s.recency:
        for number in range(n):
            precision[number] *= (1 + n - 1 - number) ** -np.log1p(np.exp(phi["recency"].item()))
    return condition(x, mean + x @ w0, np.array(task.support_ratings), precision, np.exp(phi["log_prior"]), n)


@pytest.mark.parametrize(
    "over",
    [{}, {"recency": 0.0}, {"memory": "off"}, {"memory": "feature"}, {"memory": "task"}, {"layers": 2, "activation": "tanh"}],
    ids=["both", "no recency", "off", "feature", "task", "two layers"],
)
def test_scores_and_variances_are_those_of_the_joint_gaussian(over: dict[str, Any]) -> None:
    model = small_model(**CLOSED | over)
    prediction, batch = forward(model)
    assert prediction.variance is not None
    for number, task in enumerate(TASKS):
        attention = prediction.attention[batch.user_of[number]].detach().numpy()
        mean, variance = expected_ratings(model, task, attention)
        q = len(task.query_items)
        np.testing.assert_allclose(prediction.score[number, :q].detach().numpy(), mean, rtol=1e-9)
        np.testing.assert_allclose(prediction.variance[number, :q].detach().numpy(), variance, rtol=1e-9)


def test_an_empty_support_gives_back_the_prior() -> None:
    model = small_model(**CLOSED)
    task = Task("new", [], [], ["i1"], [1.0])
    prediction, _ = forward(model, [task])
    assert prediction.last_layer is not None
    assert prediction.last_layer_prior is not None
    remembered = model.phi["gate"] * (prediction.attention[0] @ model.memory.weights)
    np.testing.assert_allclose(prediction.last_layer[0].detach(), (prediction.last_layer_prior[0] + remembered).detach(), rtol=1e-12)


def test_padding_of_the_support_changes_nothing() -> None:
    """The same task alone, and beside one with a longer support and a longer query."""
    model = small_model(**CLOSED)
    short = TASKS[1]
    long = Task("cem", ["i1", "i2", "i3", "i4", "i5"] * 4, [1.0, 2.0, 3.0, 4.0, 5.0] * 4, ["i1", "i2", "i3", "i4"], [1.0] * 4)
    alone, beside = predict(model, [short]), predict(model, [long, short])
    assert alone.sd is not None
    assert beside.sd is not None
    np.testing.assert_allclose(beside.score[1, :2], alone.score[0], rtol=1e-12)
    np.testing.assert_allclose(beside.sd[1, :2], alone.sd[0], rtol=1e-12)


def test_recency_weighs_the_newest_rating_most_and_is_a_power_of_the_newer_ones() -> None:
    model = small_model(**CLOSED | {"recency": 0.8})
    model.phi["recency"].copy_(torch.tensor([0.8]).expm1().log())
    _, batch = forward(model)
    newer = batch.support.padded().newer
    assert newer[0, :3].tolist() == [2, 1, 0]
    assert newer[2, :4].tolist() == [3, 2, 1, 0]
    forwards = adapt(model, [Task("bob", ["i1", "i2"], [1.0, 5.0], ["i1"], [3.0])], learning=False).scores.score
    backwards = adapt(model, [Task("bob", ["i2", "i1"], [5.0, 1.0], ["i1"], [3.0])], learning=False).scores.score
    assert float(backwards[0, 0]) < float(forwards[0, 0])  # the rating of i1 itself counts for more when it is the newer one
    even = small_model(**CLOSED | {"recency": 0.0})
    assert "recency" not in even.phi
    in_order = predict(even, [Task("bob", ["i1", "i2"], [1.0, 5.0], ["i1"], [3.0])]).score
    turned = predict(even, [Task("bob", ["i2", "i1"], [5.0, 1.0], ["i1"], [3.0])]).score
    np.testing.assert_allclose(in_order, turned, rtol=1e-12)


def test_more_evidence_narrows_the_score_and_never_below_a_ratings_noise() -> None:
    model = small_model(**CLOSED | {"recency": 0.0})
    noise = float(model.phi["log_precision"].exp()) ** -0.5
    sds = []
    for n in range(6):
        scores = predict(model, [Task("ann", ["i1", "i2", "i3", "i4", "i5"][:n], [3.0] * n, ["i1"], [3.0])])
        assert scores.sd is not None
        sds.append(float(scores.sd[0, 0]))
    assert sds == sorted(sds, reverse=True)
    assert sds[-1] < sds[0]
    assert min(sds) > noise


def test_the_gradient_through_the_solve_at_the_prior_of_one_weight_by_hand() -> None:
    """F = 1, x = 1: w = (N n r + L w0) / (N n + L), so that d w / d w0 = L / (N n + L) and d w / d L = N n (w0 - r) / (N n + L)^2."""
    n, precision, ratings, prior, w0 = 4, 0.5, 2.0, 3.0, 1.0
    of_prior = torch.tensor([prior], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[w0]], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, n, dtype=torch.float64)
    posterior = Posterior(ones[..., None], ratings * ones, precision * ones, of_prior, start)
    by_prior, by_start = torch.autograd.grad(posterior.mean.sum(), [of_prior, start])
    assert by_start.item() == pytest.approx(prior / (precision * n + prior))
    assert by_prior.item() == pytest.approx(precision * n * (w0 - ratings) / (precision * n + prior) ** 2)


def test_gaussian_loss_is_the_negative_log_density_but_for_a_constant() -> None:
    """The mean gradient of phi's mean is that of the normal density of the query ratings, computed by numpy."""
    model = small_model(**CLOSED)
    eps = 1e-5
    losses = []
    for sign in (1, -1):
        model.phi["mean"].add_(sign * eps)
        total = 0.0
        prediction, batch = forward(model)
        for number, task in enumerate(TASKS):
            mean, variance = expected_ratings(model, task, prediction.attention[batch.user_of[number]].detach().numpy())
            total -= float(np.sum(-0.5 * np.log(2 * np.pi * variance) - (np.array(task.query_ratings) - mean) ** 2 / (2 * variance)))
        losses.append(total)
        model.phi["mean"].sub_(sign * eps)
    gradient, _ = learn(model)
    assert float(model.of_vector(gradient.vector)["mean"]) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-6)
