"""Both engines against the specification: autograd through `Mamo.forward`, a group at a time. Loops of steps: `tests.test_ownsteps`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from model import engine, steps
from model.adaptation import gradient_steps
from model.lanes import LANES
from model.mamo import Mamo, Prediction
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
        "embedding_size": st.sampled_from([1, 2, 5, 17]),
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


def agree(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str, terms: torch.Tensor | None = None) -> None:
    """The same to ``tolerance`` of the largest number, of ``terms`` as well where it is a sum of such, and all of them numbers."""
    one, other = (value.detach().cpu().double().numpy() for value in (found, expected))
    assert one.shape == other.shape, what
    assert np.isfinite(other).all(), what
    scale = max([FLOOR, *(float(value.detach().abs().max()) for value in (expected, terms) if value is not None and value.numel())])
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale, err_msg=what)


def task_of(values: np.ndarray, task: int) -> torch.Tensor:
    """What stands for a task in values (C, ..., LANES)."""
    return torch.from_numpy(values[task // LANES, ..., task % LANES])


def transform(plain: Mamo, of: Prediction, user: int) -> torch.Tensor:
    """T of a user, [e_i, 1] T = [M_uI [e_u, e_i], 1], of what the plain model has for theta_u and M_uI."""
    d = plain.settings.embedding_size
    t = torch.eye(d + 1, dtype=plain.dtype)
    if of.mixing is not None:
        theta = {name: value[user] for name, value in zip(plain.user_names, of.theta_u, strict=True)}
        e_u = plain._network(theta, "user", plain.settings.layers, of.p_u[user][None])[0]
        of_user, of_item = of.mixing[user].chunk(2, 1)
        t[:d, :d], t[d, :d] = of_item.mT, of_user @ e_u
    return t


def compare(fast: Mamo, plain: Mamo, groups: list[list[Task]], tolerance: float) -> None:
    adapted, gradients, writes = taught(fast, groups)
    one_by_one, expected, expected_writes = taught(plain, groups)
    assert len(one_by_one) == len(groups) == len(gradients) == len(expected)
    assert len(adapted) == (1 if fast.analytic else len(groups))
    together = [(each, tasks, users) for each in adapted for tasks, users in zip(each.batch.tasks_of, each.batch.users_of, strict=True)]
    for ((_, found, _, way), tasks_of, users_of), alone in zip(together, one_by_one, strict=True):
        q, mask, slow = alone.batch.query_mask.shape[1], alone.batch.query_mask.cpu(), alone.prediction
        agree(found.score[tasks_of, :q].cpu() * mask, slow.score.cpu() * mask, tolerance, "score")
        agree(found.attention[users_of], slow.attention, tolerance, "attention")
        assert (found.variance is None, found.last_layer is None) == (slow.variance is None, slow.last_layer is None)
        if found.variance is not None and slow.variance is not None:
            agree(found.variance[tasks_of, :q].cpu() * mask, slow.variance.cpu() * mask, tolerance, "variance")
        if found.last_layer is not None and slow.last_layer is not None:
            agree(found.last_layer[tasks_of], slow.last_layer, tolerance, "adapted w")
        if isinstance(way, engine.Solved):
            # The closed form says of M_uI what T is: what it makes of e_u and of e_i.
            for task, user in zip(range(tasks_of.start, tasks_of.stop), alone.batch.user_of.tolist(), strict=True):
                agree(task_of(way.found.to_user, task), transform(plain, slow, user), tolerance, "T")
        else:
            assert (found.mixing is None) == (slow.mixing is None)
        if found.mixing is not None and slow.mixing is not None and fast.settings.adapts_inner_layers:
            agree(found.mixing[tasks_of], slow.mixing, tolerance, "adapted M_uI")
    for gradient, by_autograd in zip(gradients, expected, strict=True):
        assert gradient.queries == by_autograd.queries
        parts, slow_parts = fast.of_vector(gradient.vector), plain.of_vector(by_autograd.vector)
        for name, part in parts.items():
            # What nearly cancels is as far off as its terms are: in single precision, by the measure of the gradient as a whole.
            agree(part, slow_parts[name], tolerance, name, by_autograd.vector if fast.dtype == torch.float32 else None)
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


def test_supports_of_like_length_go_together_where_that_saves_more_than_it_costs() -> None:
    lengths = torch.tensor([100, 3, 99, 2, *[4] * 10])
    first, second = steps.alike(lengths)
    assert first.tolist() == [0, 2]
    assert second.tolist() == [1, 3, *range(4, 14)]
    assert [each.tolist() for each in steps.alike(torch.tensor([5, 0, 9]))] == [[0, 1, 2]]
    assert [len(each) for each in steps.alike(torch.zeros(3, dtype=torch.int64))] == [3]


def nearly_singular(log_prior: float, log_precision: float, **over: Any) -> tuple[Mamo, Mamo]:  # noqa: ANN401  as `both_ways`
    """What the seen directions leave open, the prior alone decides: the condition is that of the seen over Lambda."""
    both = both_ways(**over)
    for model in both:
        vector = model.vector.clone()
        phi = model.of_vector(vector)
        phi["log_prior"].fill_(log_prior)
        phi["log_precision"].fill_(log_precision)
        model.set_vector(vector)
    return both


def lost(condition: float) -> float:
    """What a system of this condition may lose in double precision."""
    return max(1e-9, 10 * float(np.finfo(float).eps) * condition)


@pytest.mark.parametrize(("log_prior", "log_precision"), [(-12.0, 0.0), (-20.0, 3.0), (-25.0, 0.0), (-30.0, 0.0)])
def test_a_nearly_singular_system_loses_no_more_than_its_condition(log_prior: float, log_precision: float) -> None:
    fast, plain = nearly_singular(log_prior, log_precision)
    condition = worst_condition(fast, [ONE_SIDED])
    assert condition > 1e5
    compare(fast, plain, [[ONE_SIDED]], lost(condition))


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(groups=GROUPS, log_prior=st.floats(-30, 1), log_precision=st.floats(-2, 4), memory=st.sampled_from(["both", "off"]))
def test_and_so_do_any(groups: list[list[Task]], log_prior: float, log_precision: float, memory: str) -> None:
    fast, plain = nearly_singular(log_prior, log_precision, memory=memory)
    condition = max(worst_condition(fast, group) for group in groups)
    assume(condition < 1e11)
    compare(fast, plain, groups, lost(condition))


def worst_condition(model: Mamo, group: list[Task]) -> float:
    """The largest condition of the precision matrices of these tasks."""
    solved = adapt(model, group, learning=True).way
    assert isinstance(solved, engine.Solved)
    prior = torch.diag(model.phi["log_prior"].exp())
    worst = 0.0
    for task in range(len(solved.given.user_of)):
        told, to_user = task_of(solved.found.told, task)[:, : len(prior)], task_of(solved.found.to_user, task)
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
