"""Memory writes: composed and sequential agree, and who writes."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.memory import Memory, Writes
from model.meta import Optimiser, adapt, differentiate, predict
from model.settings import ModelSettings, half_life, rate
from model.tasks import Task
from tests.model_cases import CLOSED, PAPER, TASKS, forward, learn, small_model

D_U, THETA, D, F = 3, 5, 2, 3


def some_memory(rng: np.random.Generator, rows: int) -> Memory:
    shapes = {"profile": (rows, D_U), "gradient": (rows, THETA), "mixing": (rows, D, 2 * D), "weights": (rows, F), "centre": (D_U,)}
    return Memory(**{name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()})


def of_user(options: ModelSettings, centre: torch.Tensor, *parts: torch.Tensor) -> Writes:
    return Writes.of_users(options, centre.numpy(), *(part[None].numpy() for part in parts))


def some_write(rng: np.random.Generator, rows: int, options: ModelSettings, centre: torch.Tensor) -> Writes:
    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    attention = torch.softmax(3 * normal(rows), 0)
    return of_user(options, centre, attention, normal(D_U), normal(THETA), normal(D, 2 * D), normal(F))


def as_one(parts: Memory | Writes) -> np.ndarray:
    return np.concatenate([getattr(parts, field.name).numpy().reshape(-1) for field in fields(parts)])


cases = {
    "rows": st.integers(1, 6),
    "gated": st.booleans(),
    "centred": st.booleans(),
    "lives": st.floats(0.5, 1000),
    "seed": st.integers(0, 2**32 - 1),
}


def options_of(gated: bool, centred: bool, lives: float) -> ModelSettings:
    return ModelSettings(
        gated=gated, centred=centred, profile_half_life=lives, gradient_half_life=2 * lives, task_half_life=3 * lives, memory_rows=3
    )


@settings(max_examples=60)
@given(count=st.integers(0, 12), cut=st.integers(0, 12), **cases)
def test_composed_writes_do_what_they_do_one_after_the_other(
    count: int, cut: int, rows: int, gated: bool, centred: bool, lives: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    options, before = options_of(gated, centred, lives), some_memory(rng, rows)
    writes = [some_write(rng, rows, options, before.centre) for _ in range(count)]

    sequential = before
    for write in writes:
        sequential = write.apply(sequential)
    composed = Writes.nothing(before)
    for write in writes:
        composed = composed.then(write)
    in_two = [Writes.nothing(before), Writes.nothing(before)]
    for number, write in enumerate(writes):
        in_two[number >= cut] = in_two[number >= cut].then(write)

    np.testing.assert_allclose(as_one(composed.apply(before)), as_one(sequential), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(as_one(in_two[0].then(in_two[1]).apply(before)), as_one(sequential), rtol=1e-9, atol=1e-10)


@settings(max_examples=40)
@given(**cases)
def test_writes_are_a_monoid(rows: int, gated: bool, centred: bool, lives: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    options, memory = options_of(gated, centred, lives), some_memory(rng, rows)
    a, b, c = (some_write(rng, rows, options, memory.centre) for _ in range(3))
    nothing = Writes.nothing(memory)
    np.testing.assert_allclose(as_one(a.then(b).then(c)), as_one(a.then(b.then(c))), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(as_one(a.then(nothing)), as_one(a))
    np.testing.assert_array_equal(as_one(nothing.then(a)), as_one(a))
    np.testing.assert_array_equal(as_one(nothing.apply(memory)), as_one(memory))


@pytest.mark.parametrize("gated", [False, True])
def test_the_order_of_writes_matters(gated: bool) -> None:
    rng = np.random.default_rng(1)
    options, memory = options_of(gated, centred=False, lives=3.0), some_memory(rng, 4)
    a, b = some_write(rng, 4, options, memory.centre), some_write(rng, 4, options, memory.centre)
    forth, back = a.then(b), b.then(a)
    assert float((forth.mixing_map - back.mixing_map).abs().max()) > 1e-6
    for name in ("profile", "gradient", "mixing", "weights"):
        assert float((getattr(forth.apply(memory), name) - getattr(back.apply(memory), name)).abs().max()) > 1e-3


def test_in_single_precision_a_long_round_agrees_to_float_tolerance() -> None:
    rng = np.random.default_rng(2)
    options = ModelSettings()
    memory = some_memory(rng, 8)
    single = Memory(**{field.name: getattr(memory, field.name).float() for field in fields(memory)})
    composed, sequential = Writes.nothing(single), memory
    for _ in range(500):
        write = some_write(rng, 8, options, memory.centre)
        sequential = write.apply(sequential)
        composed = composed.then(Writes(**{name: part.float() for name, part in write.tensors().items()}))
    np.testing.assert_allclose(as_one(composed.apply(single)), as_one(sequential), rtol=1e-4, atol=1e-5)


@settings(max_examples=40)
@given(users=st.integers(0, 6), **cases)
def test_the_writes_of_many_users_are_those_of_each_one_after_the_other(
    users: int, rows: int, gated: bool, centred: bool, lives: float, seed: int
) -> None:
    rng, options = np.random.default_rng(seed), options_of(gated, centred, lives)
    memory = some_memory(rng, rows)
    shapes = ((users, D_U), (users, THETA), (users, D, 2 * D), (users, F))
    attention = torch.softmax(torch.from_numpy(rng.standard_normal((users, rows))), 1)
    parts = [attention, *(torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)]
    expected = Writes.nothing(memory)
    for user in range(users):
        expected = expected.then(of_user(options, memory.centre, *(part[user] for part in parts)))
    composed = Writes.of_users(options, memory.centre.numpy(), *(part.numpy() for part in parts))
    np.testing.assert_allclose(as_one(composed), as_one(expected), rtol=1e-9, atol=1e-12)


def test_a_half_life_is_the_number_of_fully_attended_writes_that_forget_half() -> None:
    options = ModelSettings(profile_half_life=7.0, gradient_half_life=7.0, task_half_life=7.0, centred=False)
    rng = np.random.default_rng(3)
    before = some_memory(rng, 1)
    after = before
    for _ in range(7):
        one, zero = torch.ones(1, dtype=torch.float64), partial(torch.zeros, dtype=torch.float64)
        after = of_user(options, before.centre, one, zero(D_U), zero(THETA), zero(D, 2 * D), zero(F)).apply(after)
    for name in ("profile", "gradient", "weights"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name) / 2, rtol=1e-6)
    np.testing.assert_allclose(after.mixing, before.mixing, rtol=1e-6)  # M_uI goes back where it was read from
    assert half_life(rate(7.0)) == pytest.approx(7.0)


def test_gated_rows_that_are_not_attended_to_stay_and_literal_ones_fade() -> None:
    rng = np.random.default_rng(4)
    memory = some_memory(rng, 2)
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    parts = [torch.from_numpy(rng.standard_normal(shape)) for shape in ((D_U,), (THETA,), (D, 2 * D), (F,))]
    for gated in (True, False):
        options = options_of(gated, centred=False, lives=2.0)
        after = of_user(options, memory.centre, first, *parts).apply(memory)
        for name in ("profile", "gradient", "mixing", "weights"):
            row, now = getattr(memory, name)[1], getattr(after, name)[1]
            assert bool((row == now).all()) == gated
            assert float(now.norm()) == pytest.approx(float(row.norm())) or not gated


# Who writes, and what.

SETTINGS: list[Any] = [
    pytest.param(PAPER, id="gradient steps"),
    pytest.param(PAPER | {"local": "decision"}, id="decision"),
    pytest.param(CLOSED, id="closed form"),
]


def decay_of(writes: Writes) -> np.ndarray:
    return writes.profile_decay.numpy()


@pytest.mark.parametrize("given_settings", SETTINGS)
def test_a_user_writes_once_in_a_batch_however_many_tasks(given_settings: dict[str, Any]) -> None:
    """Each row forgets at 1 - alpha for each write, when ungated; the users of the shared tasks with a support are three."""
    model = small_model(**given_settings | {"gated": False})
    _, writes = learn(model, write=True)
    assert writes is not None
    np.testing.assert_allclose(decay_of(writes), (1 - rate(model.settings.profile_half_life)) ** 3, rtol=1e-6)


@pytest.mark.parametrize("given_settings", SETTINGS)
def test_the_write_of_a_batch_is_that_of_its_users_one_after_the_other(given_settings: dict[str, Any]) -> None:
    model = small_model(**given_settings)
    _, together = learn(model, write=True)
    apart = Writes.nothing(model.memory)
    for user in ("ann", "bob", "new", "cem"):
        _, write = learn(model, [task for task in TASKS if task.user == user], write=True)
        assert write is not None
        apart = apart.then(write)
    assert together is not None
    np.testing.assert_allclose(as_one(together), as_one(apart), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("given_settings", SETTINGS)
def test_an_empty_support_writes_nothing(given_settings: dict[str, Any]) -> None:
    model = small_model(**given_settings)
    _, writes = learn(model, [Task("new", [], [], ["i1"], [5.0]), Task("ann", [], [], ["i1"], [5.0])], write=True)
    assert writes is not None
    np.testing.assert_array_equal(as_one(writes), as_one(Writes.nothing(model.memory)))


def test_only_the_named_writers_write() -> None:
    model = small_model(**CLOSED)
    adapted = adapt(model, TASKS, learning=True)
    of_bob = differentiate(model, adapted, {"bob"})[1].composed()
    _, alone = learn(model, [task for task in TASKS if task.user == "bob"], write=True)
    assert of_bob is not None
    assert alone is not None
    np.testing.assert_allclose(as_one(of_bob), as_one(alone), rtol=1e-9, atol=1e-10)


def test_rehearsal_requests_and_a_model_without_memories_write_nothing() -> None:
    model = small_model(**CLOSED)
    before = as_one(model.memory)
    gradient, writes = learn(model)
    assert writes is None
    predict(model, TASKS)
    Optimiser(model).step(gradient, writes)
    np.testing.assert_array_equal(as_one(model.memory), before)
    _, writes = learn(small_model(**CLOSED | {"memory": "off"}), write=True)
    assert writes is None


def test_asking_for_writes_does_not_change_the_gradient() -> None:
    model = small_model(**PAPER)
    with_writes, without = learn(model, write=True)[0], learn(model)[0]
    np.testing.assert_allclose(with_writes.vector, without.vector, rtol=1e-12)


def test_m_w_takes_what_adaptation_changed_in_the_last_layer() -> None:
    """M_w[k] <- (1 - gamma a_k) M_w[k] + gamma a_k (w - what the profile predicts), of the last task of each user."""
    model = small_model(**CLOSED)
    prediction, batch = forward(model)
    _, writes = learn(model, write=True)
    assert writes is not None
    assert prediction.last_layer is not None
    assert prediction.last_layer_prior is not None
    expected, gamma = model.memory.weights.numpy().copy(), rate(model.settings.task_half_life)
    for task in (2, 1, 4):  # the last tasks of ann, bob and cem
        a = prediction.attention[batch.user_of[task]].numpy()
        change = (prediction.last_layer[task] - prediction.last_layer_prior[task]).detach().numpy()
        for k in range(len(expected)):
            expected[k] = (1 - gamma * a[k]) * expected[k] + gamma * a[k] * change
    np.testing.assert_allclose(writes.apply(model.memory).weights, expected, rtol=1e-9)


def test_spread_of_rows_is_none_for_collinear_ones_and_one_for_a_cross() -> None:
    rng = np.random.default_rng(5)
    memory = some_memory(rng, 2)
    memory.profile = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    assert memory.row_spread() == pytest.approx(0)
    memory.profile[1] = torch.tensor([0.0, 2.0, 0.0])
    assert memory.row_spread() == pytest.approx(1)
