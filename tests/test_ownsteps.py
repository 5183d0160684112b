"""Gradient steps in loops, task by task, against the specification: autograd through `Mamo.forward`. And the threads that share them."""

from __future__ import annotations

import os
import sys
import threading
import time
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import ownsteps, stepkernels, steps
from model.adaptation import gradient_steps
from model.mamo import Mamo
from model.meta import adapt
from model.tasks import Task
from tests.model_cases import PAPER, TASKS, small_model
from tests.test_engine import GROUPS, NAMES, STEPS, agree, both_ways, compare, taught

OWN = st.fixed_dictionaries(
    {
        "embedding_size": st.sampled_from([1, 2, 5, 12, 17]),
        "layers": st.integers(1, 4),
        "rating_layers": st.integers(2, 4),
        "local": st.just("all"),
        "inner_steps": st.integers(1, 4),
        "order": st.just("first"),
        "inner_rate": st.just(0.002),  # At more, four layers of positive outputs run away from each other, and take all digits with them.
    }
)


@st.composite
def own(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that steps task by task serve."""
    drawn: dict[str, Any] = draw(STEPS) | draw(OWN)
    return drawn


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, over=own())
def test_steps_task_by_task_are_those_of_autograd(groups: list[list[Task]], over: dict[str, Any]) -> None:
    fast, plain = both_ways(**over)
    assert ownsteps.serves(fast)
    compare(fast, plain, groups, 1e-9)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, over=own())
def test_steps_task_by_task_in_single_precision(groups: list[list[Task]], over: dict[str, Any]) -> None:
    compare(*both_ways(torch.float32, **over), groups, 1e-4)


def test_one_thread_and_two_find_the_same_bits() -> None:
    model = small_model(dtype=torch.float32, **PAPER | {"embedding_size": 12})
    rng = np.random.default_rng(1)
    many = []
    for number in range(60):
        rated = rng.choice(NAMES, rng.integers(0, 20)).tolist()
        many.append(Task(f"u{number % 50}", rated, rng.integers(1, 6, len(rated)).astype(float).tolist(), ["i1", "i2"], [3.0, 4.0]))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            adapted, gradients, writes = taught(model, [many])
        finally:
            torch.set_num_threads(1)
        assert writes is not None
        found.append([adapted[0].prediction.score, gradients[0].vector, *writes.tensors().values()])
    for other in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], other, strict=True))


@pytest.mark.parametrize("caller", [True, False])
def test_what_fails_in_one_thread_is_raised_and_leaves_nothing_running(caller: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here, calls, begun = threading.current_thread(), list[bool](), threading.Event()

    def fail(*_: object) -> None:
        mine = threading.current_thread() is here
        calls.append(mine)
        if mine:
            begun.wait(10)
        else:
            begun.set()
            time.sleep(0.02)
        if mine is caller:
            raise FloatingPointError("no number")

    monkeypatch.setattr(stepkernels, "adapt", fail)
    model = small_model(**PAPER | {"embedding_size": 12})
    many = [Task(f"u{number}", ["i1"], [3.0], ["i2"], [4.0]) for number in range(200)]
    torch.set_num_threads(2)
    try:
        with pytest.raises(FloatingPointError, match="no number"):
            adapt(model, many, learning=False)
        made = len(calls)
        time.sleep(0.1)
    finally:
        torch.set_num_threads(1)
    assert len(calls) == made


def test_steps_task_by_task_serve_first_order_where_all_layers_are_adapted() -> None:
    served = {"local": "all", "order": "first", "inner_steps": 3}
    assert ownsteps.serves(small_model(**PAPER | served))
    assert ownsteps.serves(small_model(**PAPER | served | {"memory": "off"}))
    for over in ({"local": "decision"}, {"order": "second"}, {"inner_steps": 0}, {"memory": "off", "rating_layers": 1}):
        assert not ownsteps.serves(small_model(**PAPER | served | over))


@pytest.mark.parametrize("over", [{}, {"layers": 3, "rating_layers": 3}, {"memory": "off"}, {"inner_clip": 0.3}], ids=str)
def test_every_parameter_adapted_task_by_task_is_that_of_autograd(over: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    base: dict[str, Any] = {"local": "all", "embedding_size": 5}
    fast, plain = both_ways(**base | over)
    kept: dict[str, torch.Tensor] = {}
    rooms: list[stepkernels.Room] = []
    loops = stepkernels.adapt

    def remember(*given: Any, **named: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  whatever gradient_steps takes
        adapted = gradient_steps(*given, **named)
        kept.update(adapted)
        return adapted

    def one_by_one(layers: Any, given: Any, found: Any, room: stepkernels.Room, first: int, stop: int) -> None:  # noqa: ANN401
        for task in range(first, stop):
            loops(layers, given, found, room, task, task + 1)
            rooms.append(deepcopy(room))

    monkeypatch.setattr("model.mamo.gradient_steps", remember)
    monkeypatch.setattr(stepkernels, "adapt", one_by_one)
    adapt(plain, TASKS, learning=False)
    own = adapt(fast, TASKS, learning=True).way
    assert isinstance(own, steps.Stepped)
    assert isinstance(own.own, ownsteps.Own)
    assert len(rooms) == len(TASKS)
    for task, room in enumerate(rooms):
        found = parameters(fast, own.own, room, task)
        assert found.keys() <= kept.keys()
        assert len(found) == 2 * (2 * fast.settings.layers + fast.settings.rating_layers) + fast.settings.task_memory
        for name, value in found.items():
            agree(value, kept[name][task], 1e-12, f"{name} of task {task}")


def parameters(model: Mamo, own: ownsteps.Own, room: stepkernels.Room, task: int) -> dict[str, torch.Tensor]:
    """All that a task has adapted, by the plain model's names."""
    settings, layers, given = model.settings, own.layers, own.given
    d, depth, n = settings.embedding_size, settings.layers, given.starts[task + 1] - given.starts[task]
    weights, biases, last = (torch.from_numpy(part.copy()) for part in room.fast)
    rating = [f"rating.{layer}" for layer in range(settings.rating_layers)]
    found = {f"{rating[-1]}.weight": last[:d, None], f"{rating[-1]}.bias": last[d:]}
    joint = weights[depth - 1 : depth + 1].reshape(2 * d, d)
    if settings.task_memory:
        found["mixing"] = joint.mT
    else:
        first = rating.pop(0)
        found |= {f"{first}.weight": joint, f"{first}.bias": biases[depth]}
    above = range(1, depth)
    numbered = dict(zip((f"user.{layer}" for layer in above), range(depth - 1), strict=True))
    numbered |= dict(zip([*(f"item.{layer}" for layer in above), *rating[:-1]], range(depth + 1, len(weights)), strict=True))
    for name, place in numbered.items():
        found |= {f"{name}.weight": weights[place], f"{name}.bias": biases[place]}
    # First layers are never written: what is learned of them stands beside the support's p_i and the user's p_u.
    p_i, learned = (torch.from_numpy(rows[:n].copy()) for rows in (room.p_i, room.learned))
    found |= {"item.0.weight": model.phi["item.0.weight"] - p_i.mT @ learned, "item.0.bias": model.phi["item.0.bias"] - learned.sum(0)}
    p_u, of_user = torch.from_numpy(given.p_u[given.user_of[task]]), torch.from_numpy(room.user_learned)
    start = torch.cat([model.phi["user.0.weight"].flatten(), model.phi["user.0.bias"]])
    if settings.feature_memory:
        attention = torch.from_numpy(given.attention[given.user_of[task]])
        start = start - layers.tau * attention @ model.memory.gradient[:, : len(start)]
    return found | {"user.0.weight": start[:-d].view(-1, d) - torch.outer(p_u, of_user), "user.0.bias": start[-d:] - of_user}


@pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen on Linux alone")
def test_helping_threads_wake_on_another_core_and_on_any_there_is() -> None:
    cores = os.sched_getaffinity(0)
    model, tasks = small_model(**PAPER), [task._replace(user=f"u{number}") for number in range(8) for task in TASKS]
    torch.set_num_threads(2)
    try:
        expected = adapt(model, tasks, learning=False).prediction.score
        for own in [{core} for core in cores] + [cores]:
            os.sched_setaffinity(0, own)
            assert torch.equal(adapt(model, tasks, learning=False).prediction.score, expected)
            for thread in ownsteps.HELPING if len(own) > 1 else ():
                assert len(os.sched_getaffinity(thread)) == len(cores) - 1
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(1)
