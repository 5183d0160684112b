"""The best of a catalogue against scoring every item as a query."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import catalogue
from model.catalogue import Catalogue
from model.mamo import Mamo
from model.meta import predict
from model.settings import ModelSettings
from model.tasks import Task
from tests.model_cases import CLOSED, PAPER, SCHEMA, small_model

VARIANTS: dict[str, dict[str, Any]] = {
    "closed form": CLOSED,
    "closed form, two layers, no memories": CLOSED | {"layers": 2, "memory": "off"},
    "gradient steps": PAPER,
    "gradient steps, one layer each": PAPER | {"layers": 1, "rating_layers": 1},
    "gradient steps without M_uI, three layers": PAPER | {"memory": "feature", "layers": 3, "rating_layers": 3, "activation": "relu"},
    "gradient steps of one rating layer alone": PAPER | {"memory": "off", "local": "decision", "rating_layers": 1},
    "decision": PAPER | {"local": "decision"},
    "no adaptation": PAPER | {"local": "none"},
}
TASKS = [
    Task("ann", ["i1", "i2", "i30"], [4.0, 2.0, 5.0], [], []),
    Task("bob", ["i7"] * 2, [5.0, 5.0], [], []),
    Task("new", [], [], [], []),
]


def stocked(over: dict[str, Any], items: int = 150, by: float = 1.0, dtype: torch.dtype = torch.float64) -> Mamo:
    model = small_model(dtype=dtype, **over)
    rng = np.random.default_rng(1)
    for number in range(5, items):
        model.items.set(
            f"i{number}", {"genre": [str(genre) for genre in rng.choice(["drama", "crime", "comedy", "war"], 2, replace=False)]}
        )
    rows = model.item_table.admit([f"id=i{number}" for number in range(items)])
    model.item_table.values[rows] = torch.from_numpy(by * rng.standard_normal((items, model.item_table.width))).to(dtype)
    return model


def of_all(model: Mamo, task: Task, items: list[str]) -> list[tuple[float, str]]:
    """Every item scored as a query, best first, equal ones by key."""
    scores = predict(model, [task._replace(query_items=items, query_ratings=[0.0] * len(items))]).score[0].tolist()
    return sorted(((-score, item) for score, item in zip(scores, items, strict=True)))


@pytest.fixture(params=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> Mamo:
    return stocked(VARIANTS[request.param])


def test_the_table_gives_each_item_the_score_that_it_has_as_a_query(model: Mamo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "BLOCK_ITEMS", 64)
    items = Catalogue(model)
    keys = items.every()
    assert len(keys) == 150
    scores = items._scores(TASKS).clamp(1.0, 5.0)
    for row, task in zip(scores, TASKS, strict=True):
        expected = {item: -score for score, item in of_all(model, task, keys)}
        np.testing.assert_allclose(row.numpy(), [expected[key] for key in keys], rtol=0, atol=1e-9)


@pytest.mark.parametrize("wanted", [1, 7, 200])
@pytest.mark.parametrize("by", [0.3, 3.0], ids=["inside the scale", "mostly beyond it"])
def test_the_best_are_among_the_candidates(model: Mamo, wanted: int, by: float) -> None:
    model.item_table.values *= by
    items = Catalogue(model)
    for task, found in zip(TASKS, items.candidates(TASKS, [wanted] * 3), strict=True):
        best = [item for _, item in of_all(model, task, items.every())[:wanted]]
        assert set(best) <= set(found)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("over", VARIANTS.values(), ids=list(VARIANTS))
def test_the_best_are_among_the_candidates_in_single_precision_too(over: dict[str, Any]) -> None:
    model = stocked(over | {"embedding_size": 12}, items=5000, by=0.5, dtype=torch.float32)
    items = Catalogue(model)
    apart = 0.0
    for task, found, chosen_by in zip(TASKS, items.candidates(TASKS, [25] * 3), items._scores(TASKS).clamp(1.0, 5.0), strict=True):
        ranked = of_all(model, task, items.every())
        assert {item for _, item in ranked[:25]} <= set(found)
        by_key = dict(zip(items.every(), chosen_by.tolist(), strict=True))
        apart = max(apart, *(abs(by_key[item] + score) for score, item in ranked))
    assert apart < catalogue.MARGIN * 4.0 / 10, "what chooses is far nearer to what scores than the margin is wide"


def test_candidates_are_few_more_than_wanted() -> None:
    found = Catalogue(stocked(CLOSED, items=2000)).candidates(TASKS, [10] * 3)
    assert all(10 <= len(each) < 20 for each in found)


def test_where_inner_steps_come_before_the_solve_every_item_is_a_candidate() -> None:
    items = Catalogue(stocked(CLOSED | {"inner_steps": 1}))
    assert items.candidates(TASKS[:1], [3]) == [items.every()]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.lists(st.sampled_from([0.0, 0.9999, 1.0, 1.0002, 3.0, 3.0001, 4.9997, 5.0, 5.0003, 9.0, np.nan]), min_size=1, max_size=30),
    wanted=st.integers(1, 12),
)
def test_ties_and_scores_beyond_the_scale_leave_the_best_by_key(scores: list[float], wanted: int) -> None:
    items = Catalogue(Mamo(ModelSettings(**CLOSED), SCHEMA, (1.0, 5.0)))
    keys = items.keys.added = [f"i{(number * 7) % 31:02d}" for number in range(len(scores))]
    found = items._choose(torch.tensor(scores, dtype=torch.float64), wanted)
    shown = [3.0 if np.isnan(score) else min(5.0, max(1.0, score)) for score in scores]
    best = sorted((-score, key) for score, key in zip(shown, keys, strict=True))[:wanted]
    assert {key for _, key in best} <= set(found)


def test_what_changes_is_renewed_and_what_does_not_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "BLOCK_ITEMS", 100)
    model = stocked(CLOSED)
    items = Catalogue(model)
    made, make = list[slice](), items._made

    def counted(place: slice) -> catalogue.Block:
        made.append(place)
        return make(place)

    monkeypatch.setattr(items, "_made", counted)

    def check(*expected: slice) -> None:
        made.clear()
        (found,) = items.candidates(TASKS[:1], [5])
        assert {item for _, item in of_all(model, TASKS[0], items.every())[:5]} <= set(found)
        assert made == list(expected)

    both = slice(0, 100), slice(100, 150)
    check(*both)
    check()
    model.set_vector(model.vector + 0.1)  # a new version
    check(*both)
    model.items.set("i9", {"genre": ["war"]})  # a new profile
    check(slice(150, 151))
    model.items.set("unrated", {"genre": ["crime"]})
    check(slice(150, 152))
    model.item_table.lookup(["id=seen"])
    check()
    model.item_table.admit(["id=seen"])
    check(slice(150, 153))
    assert {"unrated", "seen"} <= set(items.every())
    model.items.set("unrated", None)
    check()
    assert "unrated" not in items.every()
    model.item_table.clear()
    model.item_table.admit(["id=i1", "id=i2", "id=i7", "id=i30"])
    check(slice(0, 100), slice(100, 149))  # i0 had a row alone, and so had what was seen


class Served(NamedTuple):
    """What a catalogue should hold, as sets say it."""

    profiles: set[str]
    rows: set[str]


CHANGES = st.lists(
    st.tuples(st.sampled_from(["profile", "drop", "look", "admit", "profile", "drop", "clear"]), st.integers(0, 2), st.booleans()),
    max_size=30,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=CHANGES, at_once=st.integers(1, 4), stale=st.sampled_from([0, 2, 1000]))
def test_whatever_changes_the_best_are_among_the_candidates(
    changes: list[tuple[str, int, bool]], at_once: int, stale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"BLOCK_ITEMS": 3, "ADDED_ITEMS": at_once, "MOST_STALE": stale}.items():
        monkeypatch.setattr(catalogue, name, value)
    model = small_model(**CLOSED)
    expected = Served(set(model.items.features), {key.removeprefix("id=") for key in model.item_table.export()[0] if key.startswith("id=")})
    items, rng = Catalogue(model), np.random.default_rng(1)
    for what, number, asked in [*changes, ("look", 0, True)]:
        key = f"n{number}"
        if what == "profile":
            model.items.set(key, {"genre": [str(rng.choice(["drama", "crime", "war"]))]})
            expected.profiles.add(key)
        elif what == "drop":
            model.items.set(key, None)
            expected.profiles.discard(key)
        elif what == "look":
            model.item_table.lookup([f"id={key}"])
        elif what == "admit":
            rows = model.item_table.admit([f"id={key}"])
            model.item_table.values[rows] = torch.from_numpy(rng.standard_normal((1, model.item_table.width)))
            model.set_vector(model.vector.clone())  # Rows change with the version alone.
            expected.rows.add(key)
        elif what == "clear":
            model.item_table.clear()
            expected.rows.clear()
        if asked:
            (found,) = items.candidates(TASKS[:1], [2])
            assert sorted(items.every()) == sorted(expected.profiles | expected.rows)
            assert len(set(found)) == len(found)
            assert set(found) <= set(items.every())
            assert {item for _, item in of_all(model, TASKS[0], items.every())[:2]} <= set(found)


def test_an_item_that_was_dropped_and_came_back_takes_no_other_place() -> None:
    model = small_model(**CLOSED)
    for number in range(60):
        model.items.set(f"z{number}", {"genre": [f"genre{number}"]})
    items = Catalogue(model)
    ranked = [item for _, item in of_all(model, TASKS[0], items.every())]
    place, back = next((place, item) for place, item in enumerate(ranked) if place > 2 and item.startswith("z"))
    profile = model.items.features[back]
    for _ in range(3):
        model.items.set(back, None)
        model.items.set(back, profile)
        (found,) = items.candidates(TASKS[:1], [place + 2])
        assert set(ranked[: place + 2]) <= set(found)


def test_items_that_were_never_known_leave_nothing() -> None:
    model = stocked(CLOSED)
    items = Catalogue(model)
    for number in range(20):
        model.items.set(f"unknown{number}", None)
        items.renew()
    assert not items._gone
    assert len(items.keys) == 150


def test_rows_that_move_while_a_question_is_answered_do_not_change_whose_they_are() -> None:
    model = stocked(CLOSED, items=20)
    table = model.item_table
    table.lookup(["id=asked"])
    rows = table.admit([f"id=later{number}" for number in range(5)])
    table.values[rows] = torch.from_numpy(3 * np.random.default_rng(3).standard_normal((5, table.width)))
    items, unknown = Catalogue(model), [f"x{number}" for number in range(80)]
    table.max_rows = 50
    before = table.layout
    task = Task("ann", unknown, [3.0] * 80, [], [])
    (found,) = items.candidates([task], [3])
    assert table.layout > before, "the place of the row that was only looked up is another's"
    table.max_rows = 1000
    assert {item for _, item in of_all(model, task, items.every())[:3]} <= set(found)
    assert {f"later{number}" for number in range(5)} <= set(items.every())


def test_a_catalogue_of_more_items_than_the_version_may_hold_is_encoded_once() -> None:
    model = stocked(CLOSED, items=50)
    for number in range(300):
        model.items.set(f"new{number}", {"genre": ["drama"]})
    model.item_table.max_rows = 100
    items, layout, encoded = Catalogue(model), model.item_table.layout, list[str]()
    encode = model.items._encode

    def counted(key: str) -> tuple[list[int], list[float]]:
        encoded.append(key)
        return encode(key)

    model.items._encode = counted  # type: ignore[method-assign]
    for _ in range(4):
        items.candidates(TASKS, [5] * 3)
    assert model.item_table.layout == layout
    assert model.item_table.pending > model.item_table.max_rows, "it has more than the version may hold"
    assert len(encoded) < 2 * 350


def test_past_its_bound_a_table_is_made_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stocked(CLOSED)
    monkeypatch.setattr(catalogue, "BLOCK_ITEMS", 50)
    whole, bounded = Catalogue(model), Catalogue(model, table_bytes=4_000)
    assert bounded.candidates(TASKS, [5] * 3) == whole.candidates(TASKS, [5] * 3)
    assert len(whole._blocks) == 3
    assert 0 < len(bounded._blocks) < 3
    monkeypatch.setattr(catalogue, "SCORES_AT_ONCE", 1)  # users go one by one then
    assert bounded.candidates(TASKS, [5] * 3) == whole.candidates(TASKS, [5] * 3)


def test_of_more_items_than_are_remembered_the_best_are_the_same_and_none_is_given_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stocked(CLOSED)
    monkeypatch.setattr(catalogue, "BLOCK_ITEMS", 50)
    expected = Catalogue(model).candidates(TASKS, [5] * 3)
    for kept in (0, 1 << 20):
        model.items.remember = 20
        model.items._forget()
        assert Catalogue(model, table_bytes=kept).candidates(TASKS, [5] * 3) == expected
        assert model.items._places.keys() <= {*TASKS[0].support_items, *TASKS[1].support_items, Catalogue(model).keys[0]}
        model.items.remember = 1000


ITEMS = st.sets(st.sampled_from(["a", "b=c", "d", "e", "=f"]))


@given(profiled=ITEMS, admitted=ITEMS, asked=ITEMS)
def test_the_keys_are_all_that_have_a_profile_or_a_row_in_the_version(profiled: set[str], admitted: set[str], asked: set[str]) -> None:
    model = Mamo(ModelSettings(**CLOSED), SCHEMA, (1.0, 5.0))
    for key in sorted(profiled):
        model.items.set(key, {"genre": "drama"})
    model.item_table.admit([*(f"id={key}" for key in sorted(admitted)), "genre=drama"])
    model.item_table.lookup(f"id={key}" for key in sorted(asked))
    keys = Catalogue(model).keys
    assert sorted(keys) == sorted(profiled | admitted)
    assert keys[:] == list(keys)
    assert keys[1:] == [keys[place] for place in range(1, len(keys))]


def test_an_empty_catalogue_has_no_best() -> None:
    model = Mamo(ModelSettings(**CLOSED), SCHEMA, (1.0, 5.0))
    assert Catalogue(model).candidates(TASKS, [3] * 3) == [[], [], []]
