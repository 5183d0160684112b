"""Both engines, of the closed form and of gradient steps, against the specification: autograd through `Mamo.forward`, a group at a time."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from model import engine, ownsteps, stepkernels, steps
from model.adaptation import gradient_steps
from model.lanes import LANES
from model.mamo import Mamo
from model.memory import Writes, compose
from model.meta import Adapted, Gradient, adapt, differentiate, passes
from model.tasks import Task
from tests.model_cases import CLOSED, PAPER, TASKS, small_model

NAMES = [f"i{number}" for number in range(1, 8)]
RATINGS = st.sampled_from([1.0, 2.0, 3.5, 4.0, 5.0])
FLOOR = 0.01
"""Sums of terms of the size of ratings that come to less have lost digits on either side."""


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Supports of any length, empty and with an item several times; users with and without profiles."""
    support = draw(st.lists(st.tuples(st.sampled_from(NAMES), RATINGS), max_size=12))
    query = draw(st.lists(st.tuples(st.sampled_from(NAMES), RATINGS), min_size=1, max_size=4))
    user = draw(st.sampled_from(["ann", "bob", "cem", "new"]))
    return Task(user, [item for item, _ in support], [rating for _, rating in support], [item for item, _ in query], [r for _, r in query])


def crowd(seed: int) -> list[list[Task]]:
    """More tasks than go side by side or share what is read of the memories: two groups, the first of several blocks."""
    rng = np.random.default_rng(seed)

    def rated(most: int, least: int) -> tuple[list[str], list[float]]:
        items = rng.choice(NAMES, rng.integers(least, most + 1)).tolist()
        return items, rng.choice([1.0, 2.0, 3.5, 4.0, 5.0], len(items)).tolist()

    def task() -> Task:
        return Task(str(rng.choice(["ann", "bob", "cem", "new"])), *rated(12, 0), *rated(4, 1))

    return [[task() for _ in range(rng.integers(33, 40))], [task() for _ in range(rng.integers(1, 20))]]


FEW = st.lists(st.lists(tasks(), min_size=1, max_size=4), min_size=1, max_size=3)
GROUPS = FEW | FEW | FEW | st.integers(0, 2**32 - 1).map(crowd)
VARIANTS = st.fixed_dictionaries(
    {
        "embedding_size": st.sampled_from([1, 2, 5]),
        "layers": st.integers(1, 3),
        "activation": st.sampled_from(["relu", "tanh", "softplus"]),
        "memory": st.sampled_from(["both", "feature", "task", "off"]),
        "recency": st.sampled_from([0.0, 0.4]),
        "loss": st.sampled_from(["gaussian", "squared"]),
        "centred": st.booleans(),
    }
)


STEPS = st.fixed_dictionaries(
    {
        "embedding_size": st.sampled_from([1, 2, 5, 12]),
        "layers": st.integers(1, 3),
        "rating_layers": st.integers(1, 3),
        "activation": st.sampled_from(["relu", "tanh", "softplus"]),
        "memory": st.sampled_from(["both", "feature", "task", "off"]),
        "local": st.sampled_from(["all", "decision", "none"]),
        "inner_steps": st.integers(0, 4),
        "inner_clip": st.sampled_from([0.0, 0.3]),
        "order": st.sampled_from(["first", "second"]),
        "centred": st.booleans(),
    }
)

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


ONE_SIDED = Task("ann", ["i1"] * 6, [4.0, 5.0, 3.0, 4.0, 4.0, 5.0], ["i2", "i1"], [2.0, 5.0])
"""One direction is seen, all others are not."""


def both_ways(dtype: torch.dtype = torch.float64, **over: Any) -> tuple[Mamo, Mamo]:  # noqa: ANN401  whatever ModelSettings takes
    base = PAPER if over.get("local", "closed_form") != "closed_form" else CLOSED
    fast, plain = (small_model(dtype=dtype, **base | over) for _ in range(2))
    plain.plain = True
    return fast, plain


def taught(model: Mamo, groups: list[list[Task]]) -> tuple[list[Adapted], list[Gradient], Writes | None]:
    """What a worker makes of groups of which every user writes, in the first group with a support."""
    seen: set[str] = set()
    writers = []
    for group in groups:
        writers.append({task.user for task in group if task.support_items} - seen)
        seen |= writers[-1]
    adapted, gradients, writes = list[Adapted](), list[Gradient](), list[Writes | None]()
    for span in passes(model, [len(group) for group in groups]):
        adapted.append(adapt(model, *groups[span], learning=True))
        found, writing = differentiate(model, adapted[-1], *writers[span])
        gradients += found
        writes.append(writing.composed())
    return adapted, gradients, compose(writes)


def agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """The same to ``tolerance`` of the largest number, and all of them numbers."""
    one, other = (value.detach().cpu().double().numpy() for value in (found, expected))
    assert one.shape == other.shape, what
    assert np.isfinite(other).all(), what
    scale = max(FLOOR, float(np.abs(other).max(initial=0.0)))
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=what)


def compare(fast: Mamo, plain: Mamo, groups: list[list[Task]], tolerance: float) -> None:
    adapted, gradients, writes = taught(fast, groups)
    one_by_one, expected, expected_writes = taught(plain, groups)
    assert len(one_by_one) == len(groups) == len(gradients) == len(expected)
    assert len(adapted) == (1 if fast.analytic else len(groups))
    together = [
        (each.prediction, tasks, users) for each in adapted for tasks, users in zip(each.batch.tasks_of, each.batch.users_of, strict=True)
    ]
    for (found, tasks_of, users_of), alone in zip(together, one_by_one, strict=True):
        q, mask, slow = alone.batch.query_mask.shape[1], alone.batch.query_mask.cpu(), alone.prediction
        agree(found.score[tasks_of, :q].cpu() * mask, slow.score.cpu() * mask, tolerance, "score")
        agree(found.attention[users_of], slow.attention, tolerance, "attention")
        assert (found.variance is None, found.last_layer is None) == (slow.variance is None, slow.last_layer is None)
        if found.variance is not None and slow.variance is not None:
            agree(found.variance[tasks_of, :q].cpu() * mask, slow.variance.cpu() * mask, tolerance, "variance")
        if found.last_layer is not None and slow.last_layer is not None:
            agree(found.last_layer[tasks_of], slow.last_layer, tolerance, "adapted w")
        assert (found.mixing is None) == (slow.mixing is None)
        if found.mixing is not None and slow.mixing is not None and fast.settings.adapts_inner_layers:
            agree(found.mixing[tasks_of], slow.mixing, tolerance, "adapted M_uI")
    for gradient, by_autograd in zip(gradients, expected, strict=True):
        assert gradient.queries == by_autograd.queries
        parts, slow_parts = fast.of_vector(gradient.vector), plain.of_vector(by_autograd.vector)
        for name, part in parts.items():
            agree(part, slow_parts[name], tolerance, name)
        for side, rows in gradient.rows.items():
            assert sorted(rows.keys) == sorted(by_autograd.rows[side].keys)
            place = {key: number for number, key in enumerate(by_autograd.rows[side].keys)}
            agree(rows.values, by_autograd.rows[side].values[[place[key] for key in rows.keys]], tolerance, f"rows of {side}")
    assert (writes is None) == (expected_writes is None)
    if writes is not None and expected_writes is not None:
        for name, part in asdict(writes).items():
            agree(part, getattr(expected_writes, name), tolerance, f"writes of {name}")


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, over=VARIANTS)
def test_scores_gradients_and_writes_are_those_of_autograd(groups: list[list[Task]], over: dict[str, Any]) -> None:
    compare(*both_ways(**over), groups, 1e-9)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, over=VARIANTS)
def test_and_in_single_precision(groups: list[list[Task]], over: dict[str, Any]) -> None:
    compare(*both_ways(torch.float32, **over), groups, 1e-4)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, over=STEPS, padding=st.sampled_from([0, steps.PART_ROWS]))
def test_gradient_steps_are_those_of_autograd(groups: list[list[Task]], over: dict[str, Any], padding: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "PART_ROWS", padding)  # 0: supports of other lengths go apart wherever that saves anything
        compare(*both_ways(**over), groups, 1e-9)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, over=STEPS)
def test_gradient_steps_in_single_precision(groups: list[list[Task]], over: dict[str, Any]) -> None:
    compare(*both_ways(torch.float32, **over), groups, 1e-4)


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


@pytest.mark.parametrize("local", ["all", "decision"])
def test_every_parameter_adapted_in_factors_is_that_of_autograd(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = both_ways(local=local, embedding_size=12, inner_clip=0.3, order="second")
    kept: dict[str, torch.Tensor] = {}

    def remember(*given: Any, **named: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  whatever gradient_steps takes
        adapted = gradient_steps(*given, **named)
        kept.update(adapted)
        return adapted

    monkeypatch.setattr("model.mamo.gradient_steps", remember)
    adapt(plain, TASKS, learning=False)
    way = adapt(fast, TASKS, learning=True).way
    assert isinstance(way, steps.Stepped)
    (part,) = way.parts
    sides = (
        {"user": part.networks.user, "item": part.networks.item, "rating": part.networks.rating}
        if local == "all"
        else {"rating": part.networks.rating}
    )
    for side, layers in sides.items():
        for number, layer in enumerate(layers):
            weight, bias = layer.dense()
            assert bias is not None
            agree(weight, kept[f"{side}.{number}.weight"], 1e-12, f"{side}.{number}.weight")
            agree(bias, kept[f"{side}.{number}.bias"], 1e-12, f"{side}.{number}.bias")


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
            rooms.append(stepkernels.Room(*(part.copy() for part in room)))

    monkeypatch.setattr("model.mamo.gradient_steps", remember)
    monkeypatch.setattr(stepkernels, "adapt", one_by_one)
    adapt(plain, TASKS, learning=False)
    own = adapt(fast, TASKS, learning=True).way
    assert isinstance(own, steps.Stepped)
    assert isinstance(own.own, ownsteps.Own)
    layers, given = own.own.layers, own.own.given
    names = [*(f"user.{layer}" for layer in range(1, fast.settings.layers)), "", ""]
    names += [f"item.{layer}" for layer in range(1, fast.settings.layers)]
    names += [f"rating.{layer}" for layer in range(fast.settings.rating_layers)]
    d, depth, last = 5, fast.settings.layers, f"rating.{fast.settings.rating_layers - 1}"
    if fast.settings.task_memory:
        joint, biased = kept["mixing"].mT, None
    else:
        first = names.pop(names.index("rating.0"))
        joint, biased = kept[f"{first}.weight"], kept[f"{first}.bias"]
    for task, room in enumerate(rooms):
        n = given.starts[task + 1] - given.starts[task]
        weights, biases = torch.from_numpy(room.weights), torch.from_numpy(room.biases)
        for place, name in enumerate(names[:-1]):
            if name:
                agree(weights[place], kept[f"{name}.weight"][task], 1e-12, f"{name}.weight of {task}")
                agree(biases[place], kept[f"{name}.bias"][task], 1e-12, f"{name}.bias of {task}")
        agree(weights[depth - 1 : depth + 1].reshape(2 * d, d), joint[task], 1e-12, f"what joins both sides of {task}")
        if biased is not None:
            agree(biases[depth], biased[task], 1e-12, f"its bias of {task}")
        agree(torch.from_numpy(room.last[:d, None]), kept[f"{last}.weight"][task], 1e-12, f"the last layer of {task}")
        agree(torch.from_numpy(room.last[d:]), kept[f"{last}.bias"][task], 1e-12, f"its bias of {task}")
        # First layers are never written: what is learned of them stands beside the support's p_i and the user's p_u.
        p_i, learned = (torch.from_numpy(rows[:n]) for rows in (room.p_i, room.learned[0]))
        agree(fast.phi["item.0.weight"] - p_i.mT @ learned, kept["item.0.weight"][task], 1e-12, f"item.0.weight of {task}")
        agree(fast.phi["item.0.bias"] - learned.sum(0), kept["item.0.bias"][task], 1e-12, f"item.0.bias of {task}")
        p_u, of_user = torch.from_numpy(given.p_u[given.user_of[task]]), torch.from_numpy(room.user_learned[0, 0])
        attention = torch.from_numpy(given.attention[given.user_of[task]])
        start = torch.cat([fast.phi["user.0.weight"].flatten(), fast.phi["user.0.bias"]])
        if fast.settings.feature_memory:
            start = start - layers.tau * attention @ fast.memory.gradient[:, : len(start)]
        weight, bias = start[:-d].view(-1, d), start[-d:]
        agree(weight - torch.outer(p_u, of_user), kept["user.0.weight"][task], 1e-12, f"user.0.weight of {task}")
        agree(bias - of_user, kept["user.0.bias"][task], 1e-12, f"user.0.bias of {task}")


def test_supports_of_like_length_go_together_where_that_saves_more_than_it_costs() -> None:
    lengths = torch.tensor([100, 3, 99, 2, *[4] * 10])
    first, second = steps.alike(lengths)
    assert first.tolist() == [0, 2]
    assert second.tolist() == [1, 3, *range(4, 14)]
    assert [each.tolist() for each in steps.alike(torch.tensor([5, 0, 9]))] == [[0, 1, 2]]
    assert [len(each) for each in steps.alike(torch.zeros(3, dtype=torch.int64))] == [3]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, log_prior=st.floats(-30, 1), log_precision=st.floats(-2, 4), memory=st.sampled_from(["both", "off"]))
@example([[ONE_SIDED]], -12.0, 0.0, "both")
@example([[ONE_SIDED]], -20.0, 3.0, "both")
@example([[ONE_SIDED]], -25.0, 0.0, "both")
def test_a_nearly_singular_system_loses_no_more_than_its_condition(
    groups: list[list[Task]], log_prior: float, log_precision: float, memory: str
) -> None:
    fast, plain = both_ways(memory=memory)
    for model in (fast, plain):
        vector = model.vector.clone()
        phi = model.of_vector(vector)
        phi["log_prior"].fill_(log_prior)
        phi["log_precision"].fill_(log_precision)
        model.set_vector(vector)
    # What the seen directions leave open, the prior alone decides: the condition is that of the seen over Lambda.
    condition = max(worst_condition(fast, group) for group in groups)
    assume(condition < 1e11)
    compare(fast, plain, groups, max(1e-9, 10 * float(np.finfo(float).eps) * condition))


def worst_condition(model: Mamo, group: list[Task]) -> float:
    """The largest condition of the precision matrices of these tasks."""
    solved = adapt(model, group, learning=True).way
    assert isinstance(solved, engine.Solved)
    prior = torch.diag(model.phi["log_prior"].exp())
    worst = 0.0
    for task, user in enumerate(solved.given.user_of):
        to_user = torch.from_numpy(solved.given.to_user[user])
        told = torch.from_numpy(solved.found.told[task // LANES, ..., task % LANES])
        worst = max(worst, float(torch.linalg.cond(to_user.mT @ told @ to_user + prior)))
    return worst


def test_a_task_without_a_posterior_harms_no_other() -> None:
    fast, _ = both_ways()
    fine = Task("bob", ["i2"], [1.0], ["i1"], [2.0])
    expected = adapt(fast, [fine], learning=False).prediction.score
    fast.item_table.values[fast.item_table.rows["id=i4"]] = torch.nan
    found = adapt(fast, [fine, Task("ann", ["i4"], [3.0], ["i1"], [2.0])], learning=False)
    agree(found.prediction.score[0], expected[0], 1e-12, "the other's score")
    assert found.prediction.score[1].isnan().all()
    assert found.scores.score[1].tolist() == [3.0]


@pytest.mark.parametrize("over", [{}, {"local": "all"}, {"local": "all", "order": "second"}], ids=["solve", "steps", "second order"])
def test_without_learning_the_scores_are_the_same_and_nothing_can_be_differentiated(over: dict[str, Any]) -> None:
    fast, _ = both_ways(**over)
    group = [Task("ann", ["i1", "i2"], [4.0, 2.0], ["i3"], [3.0]), Task("new", [], [], ["i1"], [5.0])]
    scored = adapt(fast, group, learning=False)
    assert torch.equal(scored.prediction.score, adapt(fast, group, learning=True).prediction.score)
    with pytest.raises(AssertionError, match="without learning"):
        differentiate(fast, scored)


def test_groups_go_together_until_they_are_too_many_and_alone_by_autograd() -> None:
    model = small_model(**CLOSED)
    assert [(span.start, span.stop) for span in passes(model, [64, 64, 300, 100, 600, 1])] == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert list(passes(model, [])) == []
    assert [(span.start, span.stop) for span in passes(small_model(**PAPER | {"order": "second"}), [3, 2])] == [(0, 1), (1, 2)]
    assert len(list(passes(small_model(**PAPER), [3, 2]))) == 1


def test_inner_steps_before_the_solve_are_left_to_autograd() -> None:
    assert small_model(**CLOSED | {"inner_steps": 1}).plain
