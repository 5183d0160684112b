"""Embedding tables that grow: initial values, the bound, provisional rows; and that scores leak nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.mamo import Mamo
from model.meta import Optimiser, adapt, differentiate, predict
from model.settings import Feature, FeatureSchema, ModelSettings
from model.tables import Table
from model.tasks import Task
from model.texts import Texts
from tests.model_cases import CLOSED, PAPER, TASKS, learn, small_model


def table(max_rows: int = 1000, overflow_rows: int = 4, seed: int = 1, width: int = 4) -> Table:
    return Table("item", width, deviation=0.1, zero_from=3, seed=seed, max_rows=max_rows, overflow_rows=overflow_rows)


def provisional(of: Table) -> set[str]:
    """The keys that are in no version yet."""
    return {of.keys[row] for row in of.provisional.nonzero()[0]}


def test_the_initial_value_of_a_key_is_the_same_in_every_process_and_for_all_time() -> None:
    """What any process that held another seed of str hashes, or another library, would have to find as well."""
    expected = [-0.14946798980236053, 0.002577523933723569, 0.02419535256922245, 0.0]
    np.testing.assert_allclose(table().initial("id=i1"), expected, rtol=1e-6)


def test_initial_values_differ_by_key_table_and_seed_and_are_of_the_stated_deviation() -> None:
    one = table()
    other_name = Table("user", 4, deviation=0.1, zero_from=3, seed=1, max_rows=9, overflow_rows=4)
    values = [one.initial("a"), one.initial("b"), table(seed=2).initial("a"), other_name.initial("a")]
    assert len({tuple(value.tolist()) for value in values}) == 4
    many = torch.stack([one.initial(f"id={number}") for number in range(2000)])
    assert many[:, :3].std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(many[:, :3].mean().item()) < 0.01
    assert not many[:, 3].any()


@given(st.lists(st.text(max_size=3), max_size=200))
def test_a_table_grows_and_a_key_keeps_its_row(keys: list[str]) -> None:
    grown = table()
    rows = grown.lookup(keys)
    assert grown.lookup(keys) == rows
    assert len(grown) == len(set(keys)) == len(set(rows))
    assert len(grown.values) >= len(grown)
    for key, row in zip(keys, rows, strict=True):
        assert grown.keys[row] == key
        assert torch.equal(grown.values[row], grown.initial(key))


def test_growth_past_the_allotted_rows_keeps_what_was_learned() -> None:
    grown = table()
    grown.assign(["first"], torch.full((1, 4), 7.0))
    grown.admit([f"k{number}" for number in range(1000)])
    assert grown.values[grown.rows["first"]].tolist() == [7.0] * 4


def test_looked_up_keys_are_provisional_until_admitted_or_assigned() -> None:
    some = table()
    some.lookup(["a", "b", "c"])
    assert (some.known, provisional(some)) == (0, {"a", "b", "c"})
    some.admit(["a"])
    some.assign(["b"], torch.ones(1, 4))
    assert (some.known, provisional(some)) == (2, {"c"})
    keys, values = some.export()
    assert keys == ["a", "b"]
    assert torch.equal(values, torch.stack([some.initial("a"), torch.ones(4)]))


def test_a_full_table_serves_further_keys_from_overflow_rows_of_their_feature() -> None:
    full = table(max_rows=3)
    full.admit(["id=a", "id=b", "genre=x"])
    rows = full.lookup([f"id={number}" for number in range(500)] + [f"genre={number}" for number in range(500)])
    assert {full.keys[row] for row in rows} == {f"{feature}~{number}" for feature in ("id", "genre") for number in range(4)}
    counts = np.bincount(rows)
    assert counts[counts > 0].min() > 80  # the keys share the rows about evenly
    assert full.lookup(["id=a", "genre=x"]) == [0, 2]
    full.admit([f"id={number}" for number in range(5000)])
    assert full.known == 3 + 4
    assert len(full) == 3 + 8


def test_overflow_rows_are_shared_alike_in_every_table_whatever_came_before() -> None:
    one, other = table(max_rows=1), table(max_rows=1)
    one.admit(["id=a"])
    other.admit(["id=b"])
    for number in range(50, 0, -1):
        other.lookup([f"id={number}"])
    for number in range(1, 51):
        assert one.home(f"id={number}") == other.home(f"id={number}")
    assert one.home("id=b") == one.home("id=b") != "id=b"
    assert one.home("id=a") == "id=a"


def test_overflow_rows_and_keys_that_name_no_value_are_their_own_home() -> None:
    full = table(max_rows=1)
    full.admit(["id=a"])
    for key in (full.home("id=b"), "age#", "age#2", "genre?"):
        assert full.home(key) == key
        for take in (full.lookup, full.admit):
            assert full.keys[take([key])[0]] == key


def test_a_provisional_key_moves_to_an_overflow_row_once_others_filled_the_table() -> None:
    some = table(max_rows=2)
    some.lookup(["id=late"])
    some.admit(["id=a", "id=b"])
    (row,) = some.admit(["id=late"])
    assert some.keys[row].startswith("id~")
    some.trim()
    assert some.keys[some.lookup(["id=late"])[0]].startswith("id~")
    assert "id=late" not in some.rows


def test_trimming_forgets_provisional_rows_alone_and_says_that_rows_moved() -> None:
    some = table(max_rows=10)
    some.lookup(["p1"])
    some.assign(["a", "b"], torch.tensor([[1.0] * 4, [2.0] * 4]))
    layout = some.layout
    some.trim()
    assert (some.layout, len(some)) == (layout, 3)  # few: nothing to gain
    some.lookup([f"p{number}" for number in range(20)])
    some.trim()
    assert some.layout > layout
    assert (some.keys, provisional(some), some.pending) == (["a", "b"], set(), 0)
    assert some.values[: len(some)].tolist() == [[1.0] * 4, [2.0] * 4]


def test_keys_that_a_table_gave_name_their_rows_in_whatever_table_and_wherever_these_have_moved() -> None:
    some, other = table(), table()
    rows = some.admit(["a", "b", "c"])
    other.admit(["c", "x", "a"])
    keys, asked_later = some.keys_of(rows[[2, 0]]), some.keys_of(rows)
    assert some.admit(keys).tolist() == [2, 0]
    assert other.admit(keys).tolist() == [0, 2]
    some.clear()
    assert some.admit(["d", "a"]).tolist() == [0, 1]
    assert some.admit(keys).tolist() == [2, 1]
    assert some.keys == ["d", "a", "c"]
    assert list(asked_later) == ["a", "b", "c"]


def test_rows_given_by_their_table_become_part_of_the_version() -> None:
    some = table()
    keys = some.keys_of(np.array(some.lookup(["a", "b"])))
    some.admit(keys)[:] = -1  # Theirs who asked.
    assert (provisional(some), some.pending, some.admit(keys).tolist()) == (set(), 0, [0, 1])


def test_a_table_of_lookups_alone_is_bounded() -> None:
    some = table(max_rows=50)
    for start in range(0, 5000, 10):
        some.trim()
        some.lookup([f"id={number}" for number in range(start, start + 10)])
        assert len(some) <= 50 + 10


@given(
    st.integers(2, 30),
    st.lists(st.tuples(st.sampled_from(["lookup", "admit", "assign", "trim"]), st.lists(st.integers(0, 40), max_size=20)), max_size=12),
)
def test_keys_that_lie_in_a_record_are_found_as_texts_are(most: int, calls: list[tuple[str, list[int]]]) -> None:
    by_text, in_record = table(max_rows=most), table(max_rows=most)
    for number, (call, ids) in enumerate(calls):
        keys = [f"id={each}" if each % 3 else f"é{each}" for each in ids]
        lying = lying_in_a_record(keys)
        values = torch.full((len(keys), 4), float(number))
        if call == "lookup":
            assert by_text.lookup(keys) == in_record.lookup(keys)
        elif call == "admit":
            assert by_text.admit(keys).tolist() == in_record.admit(lying).tolist()
        elif call == "assign":
            assert by_text.assign(keys, values).tolist() == in_record.assign(lying, values).tolist()
        else:
            by_text.trim()
            in_record.trim()
        assert (by_text.keys, by_text.rows, by_text.layout) == (in_record.keys, in_record.rows, in_record.layout)
        assert (by_text.known, provisional(by_text)) == (in_record.known, provisional(in_record))
        assert by_text.pending == in_record.pending == len(provisional(by_text))
        assert torch.equal(by_text.values, in_record.values)
        assert list(in_record.keys_of(np.arange(len(in_record)))) == in_record.keys


def lying_in_a_record(keys: list[str]) -> Texts:
    ends = np.cumsum([0, *(len(key.encode()) for key in keys)])
    return Texts("".join(keys).encode(), np.stack([ends[:-1], ends[1:]], 1))


# In the model.


def test_users_items_and_values_never_seen_are_served_at_once_and_alike_everywhere() -> None:
    task = Task("nobody", ["never", "seen"], [4.0, 2.0], ["before"], [3.0])
    scores = []
    for warm in (False, True):
        model = Mamo(ModelSettings(), FeatureSchema(), (1.0, 5.0))
        if warm:
            predict(model, TASKS)
        model.items.set("before", {"id": "?", "genre": "unknown"})
        scores.append(predict(model, [task]).score.item())
        assert model.item_table.known == 0
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert 1 <= scores[0] <= 5


def test_a_model_at_its_bound_goes_on_learning_and_grows_no_more() -> None:
    schema = FeatureSchema(user={"job": Feature(kind="categorical")})
    model = Mamo(ModelSettings(max_rows=5, overflow_rows=3, embedding_size=4), schema, (1.0, 5.0))
    optimiser = Optimiser(model)
    for number in range(60):
        model.users.set(f"u{number}", {"job": f"job{number}"})
        tasks = [Task(f"u{number}", [f"i{number}", "i0"], [5.0, 1.0], [f"i{number + 1}"], [4.0])]
        (gradient,), writing = differentiate(model, adapt(model, tasks, learning=True), {f"u{number}"})
        changed = optimiser.step(gradient, writing.composed())
        assert len(changed["item"])
        assert len(model.item_table) <= 5 + 3 + 3
    assert model.item_table.known <= 5 + 3
    assert model.user_table.known <= 5 + 3 + 3
    assert len(optimiser.moments_of("item")) == len(model.item_table.values)
    assert torch.isfinite(predict(model, tasks).score).all()


def test_gradients_of_keys_that_share_an_overflow_row_add_up() -> None:
    model = small_model(**PAPER | {"max_rows": 1, "overflow_rows": 1})
    model.item_table.clear()
    model.item_table.admit(["id=first"])
    task = Task("bob", ["i2"], [1.0], ["i1", "i3", "i7"], [2.0, 4.0, 3.0])
    gradient, _ = learn(model, [task])
    before = model.item_table.initial("id~0")
    Optimiser(model).step(gradient, None)
    part = gradient.rows["item"]
    summed = sum((value for key, value in zip(part.keys, part.values, strict=True) if key == "id~0"), torch.zeros(3, dtype=torch.float64))
    assert part.keys.count("id~0") == 1
    after = model.item_table.values[model.item_table.rows["id~0"]]
    np.testing.assert_allclose(after, before - 0.01 * summed, rtol=1e-6)


def test_a_missing_late_or_changed_profile_is_served_from_the_next_step_on() -> None:
    model = small_model(**CLOSED)
    task = Task("late", ["i1"], [5.0], ["i2"], [3.0])
    without = predict(model, [task]).score.item()
    model.users.set("late", {"job": "doctor", "age": 60})
    late = predict(model, [task]).score.item()
    model.items.set("i2", {"genre": ["drama"]})
    changed = predict(model, [task]).score.item()
    model.users.set("late", None)
    model.items.set("i2", {"genre": ["comedy"]})
    assert len({without, late, changed}) == 3
    assert predict(model, [task]).score.item() == pytest.approx(without, abs=1e-12)


# Leaks.

EVERY: list[Any] = [
    pytest.param(PAPER, id="gradient steps"),
    pytest.param(PAPER | {"order": "second", "inner_clip": 0.3}, id="second order, clipped"),
    pytest.param(PAPER | {"local": "decision"}, id="decision"),
    pytest.param(CLOSED, id="closed form"),
    pytest.param(CLOSED | {"inner_steps": 2, "layers": 2}, id="closed form after inner steps"),
    pytest.param(CLOSED | {"memory": "off"}, id="closed form, memory off"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("settings", EVERY)
def test_a_score_depends_neither_on_its_rating_nor_on_other_tasks(settings: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    model = small_model(dtype=dtype, **settings)
    scores = adapt(model, TASKS, learning=True).scores
    turned = [task._replace(query_ratings=[6 - rating for rating in task.query_ratings]) for task in TASKS]
    with_other_ratings = adapt(model, turned, learning=True).scores
    assert torch.equal(scores.score, with_other_ratings.score)
    assert scores.sd is None or torch.equal(scores.sd, with_other_ratings.sd)  # type: ignore[arg-type]
    others = [Task(f"o{number}", ["i1", "x", "i3"] * number, [1.0, 5.0, 3.0] * number, ["i1", "y"], [2.0, 2.0]) for number in range(4)]
    for number, task in enumerate(TASKS):
        q = len(task.query_items)
        for beside in ([], others, TASKS[::-1]):
            found = predict(model, [*beside, task])
            np.testing.assert_allclose(found.score[-1, :q], scores.score[number, :q], rtol=0, atol=tolerance)
            if scores.sd is not None:
                assert found.sd is not None
                np.testing.assert_allclose(found.sd[-1, :q], scores.sd[number, :q], rtol=0, atol=tolerance)


@pytest.mark.parametrize("settings", EVERY)
def test_scores_do_depend_on_the_support_and_stay_on_the_scale(settings: dict[str, Any]) -> None:
    """What makes the test above able to fail."""
    model = small_model(**settings)
    task = Task("ann", ["i1", "i2"], [1.0, 1.0], ["i1"], [3.0])
    low = predict(model, [task]).score.item()
    high = predict(model, [task._replace(support_ratings=[5.0, 5.0])]).score.item()
    assert 1 <= low < high <= 5
    off_the_scale = predict(model, [task._replace(support_ratings=[30.0, 30.0])]).score.item()
    assert 1 <= off_the_scale <= 5


def test_learning_from_a_step_changes_no_score_that_was_made_in_it() -> None:
    model = small_model(**CLOSED)
    adapted = adapt(model, TASKS, learning=True)
    before = adapted.scores.score.clone()
    (gradient,), writing = differentiate(model, adapted, {"ann", "bob"})
    Optimiser(model).step(gradient, writing.composed())
    assert torch.equal(adapted.scores.score, before)
    assert not torch.equal(predict(model, TASKS).score, before)


def test_a_full_table_is_not_made_anew_for_the_shared_rows_that_lookups_find() -> None:
    table = Table("item", 2, deviation=0.1, zero_from=2, seed=1, max_rows=3, overflow_rows=2)
    table.admit(["id=a", "id=b"])
    table.lookup(["id=c"])  # Before it is full: a row of its own, which is let go once the table has filled up.
    table.admit(["id=d"])
    table.trim()
    layout, shared = table.layout, table.lookup(["id=c", "id=e", "id=f"])
    assert layout == 1
    for _ in range(3):
        table.trim()
        assert table.lookup(["id=c", "id=e", "id=f"]) == shared
    assert table.layout == layout
    assert len(table) <= 3 + 2
