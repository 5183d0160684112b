"""From profiles to keys and weights: every value of any profile is encoded, and absurd ones do no harm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.features import as_number, encode
from model.profiles import Profiles
from model.settings import Feature
from model.tables import Table

AGE = Feature(kind="numeric", mean=30, scale=10, bins=(18, 40))
GENRE = Feature(kind="multivalued", max_values=3)
JOB = Feature(kind="categorical")

texts = st.text(max_size=8)
values: st.SearchStrategy[Any] = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.lists(texts, max_size=6)
schemas = st.builds(
    Feature,
    kind=st.sampled_from(["id", "categorical", "multivalued", "numeric"]),
    mean=st.floats(-1e6, 1e6),
    scale=st.floats(1e-6, 1e6),
    bins=st.lists(st.floats(-100, 100), max_size=3, unique=True).map(lambda bins: tuple(sorted(bins))),
    max_values=st.integers(1, 4),
)


@given(texts, schemas, values | st.just(10**400), texts)
def test_anything_is_encoded_within_the_slots_of_its_feature(name: str, feature: Feature, value: Any, own_id: str) -> None:  # noqa: ANN401
    entries = encode(name, feature, value, own_id)
    assert 1 <= len(entries) <= feature.slots
    assert len({entry.key for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.key.startswith(name)
        assert entry.key[len(name)] in "=#?"
        assert abs(entry.weight) <= 5
    assert entries == encode(name, feature, value, own_id)


@given(st.lists(texts, max_size=9))
def test_several_values_have_together_the_length_of_one(genres: list[str]) -> None:
    entries = encode("genre", GENRE, genres, "")
    assert sum(entry.weight**2 for entry in entries) == pytest.approx(1)
    distinct = list(dict.fromkeys(genres))[:3]
    assert [entry.key for entry in entries] == ([f"genre={genre}" for genre in distinct] or ["genre?"])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_a_direction_and_a_bin(age: float) -> None:
    direction, bin_ = encode("age", AGE, age, "")
    assert direction.key == "age#"
    assert direction.weight == pytest.approx(min(5, max(-5, (age - 30) / 10)))
    assert bin_ == (f"age#{0 if age < 18 else 1 if age < 40 else 2}", 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "", "old", "nan", None, ["30"], [], "1e999", 10**400])
def test_what_is_no_finite_number_is_a_missing_one(value: Any) -> None:  # noqa: ANN401
    assert as_number(value) is None
    assert encode("age", AGE, value, "") == [("age?", 1.0)]


@pytest.mark.parametrize("value", [30, 30.0, "30", " 30 ", "3e1"])
def test_a_number_may_be_written_in_several_ways(value: Any) -> None:  # noqa: ANN401
    assert encode("age", AGE, value, "") == [("age#", 0.0), ("age#1", 1.0)]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("", "job="),
        ("a=b#?", "job=a=b#?"),
        (7, "job=7"),
        (7.0, "job=7"),
        (0.5, "job=0.5"),
        (1e16, "job=10000000000000000"),
        (-0.0, "job=0"),
        (1e300, "job=1e+300"),
    ],
)
def test_a_category_is_whatever_stands_there(value: Any, key: str) -> None:  # noqa: ANN401
    assert encode("job", JOB, value, "") == [(key, 1.0)]


@pytest.mark.parametrize(("one", "other"), [(1234567.0, 1234568.0), (2**53, 2**53 - 1), (0.1, 0.1000001)])
def test_different_numbers_are_different_categories(one: float, other: float) -> None:
    assert encode("zip", JOB, one, "") != encode("zip", JOB, other, "")


def test_a_category_does_not_hold_lists_and_several_values_no_numbers() -> None:
    assert encode("job", JOB, ["a"], "") == [("job?", 1.0)]
    assert encode("genre", GENRE, 3.0, "") == [("genre?", 1.0)]
    assert encode("genre", GENRE, "drama", "") == [("genre=drama", 1.0)]


def test_an_id_is_its_owners_whatever_the_profile_says() -> None:
    for value in (None, "other", 5.0):
        assert encode("id", Feature(kind="id"), value, "i7") == [("id=i7", 1.0)]


# Profiles: what is known of whom, and when.


def profiles(**bounds: int) -> Profiles:
    table = Table("user", 2, deviation=0.1, zero_from=2, seed=1, max_rows=100, overflow_rows=2)
    return Profiles({"age": AGE, "genre": GENRE, "job": JOB}, table, **bounds)


def seen(of: Profiles, key: str) -> list[tuple[str, float]]:
    """The keys and weights that a profile is made of in a batch."""
    of.begin()
    rows, weights = of.encoded(of.places([key]))
    return [(of.table.keys[row], round(weight, 4)) for row, weight in zip(rows[0].tolist(), weights[0].tolist(), strict=True) if weight]


def test_a_missing_profile_has_keys_of_its_own() -> None:
    assert seen(profiles(), "nobody") == [("age?", 1.0), ("genre?", 1.0), ("job?", 1.0)]


def test_a_late_profile_takes_effect_and_a_changed_one_replaces_it_and_a_dropped_one_is_gone() -> None:
    users = profiles()
    assert ("job?", 1.0) in seen(users, "u")
    users.set("u", {"job": "writer", "genre": ["a", "b"], "age": 50})
    assert seen(users, "u") == [("age#", 2.0), ("age#2", 1.0), ("genre=a", 0.7071), ("genre=b", 0.7071), ("job=writer", 1.0)]
    users.set("u", {"job": "doctor", "age": 10})
    assert seen(users, "u") == [("age#", -2.0), ("age#0", 1.0), ("genre?", 1.0), ("job=doctor", 1.0)]
    users.set("u", None)
    assert seen(users, "u") == [("age?", 1.0), ("genre?", 1.0), ("job?", 1.0)]
    users.set("never seen", None)


def test_what_the_schema_does_not_name_is_ignored() -> None:
    users = profiles()
    users.set("u", {"job": "writer", "shoe size": 44, **{f"x{number}": "y" for number in range(100)}})
    assert len(seen(users, "u")) == 3


def test_embedding_is_the_weighted_sum_of_rows_feature_by_feature() -> None:
    users = profiles()
    users.set("u", {"job": "writer", "genre": ["a", "b"], "age": 35})
    users.begin()
    rows, weights = users.encoded(users.places(["u", "nobody"]))
    found = users.embed(rows, weights, users.table.values).numpy()
    assert found.shape == (2, 3, 2)
    row = {key: users.table.values[number].numpy() for key, number in users.table.rows.items()}
    np.testing.assert_allclose(found[0, 0], 0.5 * row["age#"] + row["age#1"], rtol=1e-6)
    np.testing.assert_allclose(found[0, 1], (row["genre=a"] + row["genre=b"]) / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(found[0, 2], row["job=writer"], rtol=1e-6)
    np.testing.assert_allclose(found[1], np.stack([row["age?"], row["genre?"], row["job?"]]), rtol=1e-6)


def test_remembered_places_are_bounded_and_forgetting_them_changes_nothing() -> None:
    few, many = profiles(remember=3), profiles()
    for number in range(3):
        for users in (few, many):
            users.set(f"u{number}", {"job": f"j{number}"})
    for _ in range(3):
        for number in range(20):
            assert seen(few, f"u{number}") == seen(many, f"u{number}")
    assert len(few._places) <= 4


def test_profiles_past_the_bound_are_refused_and_counted_but_known_ones_may_change() -> None:
    users = profiles(remember=2)
    for number in range(4):
        users.set(f"u{number}", {"job": "writer"})
    assert users.refused == 2
    assert ("job?", 1.0) in seen(users, "u3")
    users.set("u0", {"job": "doctor"})
    assert ("job=doctor", 1.0) in seen(users, "u0")
    users.set("u0", None)
    users.set("u3", {"job": "writer"})
    assert ("job=writer", 1.0) in seen(users, "u3")
