"""The best of a catalogue against scoring every item as a query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import catalogue
from model.catalogue import Block, Catalogue
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


def stocked(over: dict[str, Any], items: int = 150, by: float = 1.0) -> Mamo:
    model = small_model(**over)
    rng = np.random.default_rng(1)
    for number in range(5, items):
        model.items.set(
            f"i{number}", {"genre": [str(genre) for genre in rng.choice(["drama", "crime", "comedy", "war"], 2, replace=False)]}
        )
    rows = model.item_table.admit([f"id=i{number}" for number in range(items)])
    model.item_table.values[rows] = torch.from_numpy(by * rng.standard_normal((items, model.item_table.width)))
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
    keys = items.renew()
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
        best = [item for _, item in of_all(model, task, items.keys)[:wanted]]
        assert set(best) <= set(found)
        assert len(set(found)) == len(found)


def test_candidates_are_few_more_than_wanted() -> None:
    found = Catalogue(stocked(CLOSED, items=2000)).candidates(TASKS, [10] * 3)
    assert all(10 <= len(each) < 20 for each in found)


def test_where_inner_steps_come_before_the_solve_every_item_is_a_candidate() -> None:
    items = Catalogue(stocked(CLOSED | {"inner_steps": 1}))
    assert items.candidates(TASKS[:1], [3]) == [items.keys]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scores=st.lists(st.sampled_from([0.0, 0.9999, 1.0, 1.0002, 3.0, 3.0001, 4.9997, 5.0, 5.0003, 9.0, np.nan]), min_size=1, max_size=30),
    wanted=st.integers(1, 12),
)
def test_ties_and_scores_beyond_the_scale_leave_the_best_by_key(scores: list[float], wanted: int) -> None:
    items = Catalogue(small_model(**CLOSED))
    items.keys = [f"i{(number * 7) % 31:02d}" for number in range(len(scores))]
    found = items._choose(torch.tensor(scores, dtype=torch.float64), wanted)
    shown = [3.0 if np.isnan(score) else min(5.0, max(1.0, score)) for score in scores]
    best = sorted((-score, key) for score, key in zip(shown, items.keys, strict=True))[:wanted]
    assert {key for _, key in best} <= set(found)


def test_what_changes_is_renewed_and_what_does_not_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stocked(CLOSED)
    items = Catalogue(model)
    made = list[int]()
    make = items._made

    def count(start: int) -> Block:
        made.append(start)
        return make(start)

    monkeypatch.setattr(items, "_made", count)

    def check() -> None:
        (found,) = items.candidates(TASKS[:1], [5])
        assert {item for _, item in of_all(model, TASKS[0], items.keys)[:5]} <= set(found)

    check()
    check()
    assert made == [0]
    model.set_vector(model.vector + 0.1)  # a new version
    check()
    assert made == [0, 0]
    model.items.set("i9", {"genre": ["war"]})  # a new profile
    check()
    assert made == [0, 0, 0]
    model.items.set("unrated", {"genre": ["crime"]})
    check()
    assert "unrated" in items.keys
    model.item_table.admit(["id=seen"])
    assert "seen" in items.renew()


def test_past_its_bound_a_table_is_made_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stocked(CLOSED)
    monkeypatch.setattr(catalogue, "BLOCK_ITEMS", 50)
    whole, bounded = Catalogue(model), Catalogue(model, table_bytes=9_000)
    assert bounded.candidates(TASKS, [5] * 3) == whole.candidates(TASKS, [5] * 3)
    assert len(whole._blocks) == 3
    assert 0 < len(bounded._blocks) < 3
    monkeypatch.setattr(catalogue, "SCORES_AT_ONCE", 1)  # users go one by one then
    assert bounded.candidates(TASKS, [5] * 3) == whole.candidates(TASKS, [5] * 3)


def test_an_empty_catalogue_has_no_best() -> None:
    model = Mamo(ModelSettings(**CLOSED), SCHEMA, (1.0, 5.0))
    assert Catalogue(model).candidates(TASKS, [3] * 3) == [[], [], []]
