"""Histories that go on from event to event, or are kept between rehearsals, are those that the support sets come to."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers import histories
from consumers.histories import Histories, history_of
from model.history import History, rated
from model.profiles import Profiles
from model.settings import Feature
from model.tables import Table
from streaming.events import Interaction
from streaming.metrics import Metrics
from streaming.support import SupportSets

EVENTS = st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.integers(0, 12), st.integers(1, 5)), max_size=40)


def interaction(user: str, item: int, rating: int, at: int) -> Interaction:
    return Interaction(user=user, item=f"i{item}", rating=float(rating), timestamp=at)


def profiles() -> Profiles:
    table = Table("item", 3, deviation=0.1, zero_from=2, seed=1, max_rows=100, overflow_rows=2)
    return Profiles({"id": Feature(kind="id")}, table)


@given(EVENTS, st.integers(1, 6))
def test_the_history_after_an_event_is_that_of_the_support_set_after_it(events: list[tuple[str, int, int]], size: int) -> None:
    sets = SupportSets(size)
    for at, (user, item, rating) in enumerate(events):
        before = history_of(sets.get(user))
        sets.append(user, interaction(user, item, rating, at), ("interactions", 0, at))
        after, expected = before.and_then(f"i{item}", float(rating), size), history_of(sets.get(user))
        assert (after.items, after.ratings) == (expected.items, expected.ratings)
        assert np.diff(list(after.numbers)).tolist() == np.diff(list(expected.numbers)).tolist()


@given(EVENTS)
def test_what_is_kept_is_given_only_while_the_support_set_is_the_same(events: list[tuple[str, int, int]]) -> None:
    sets, metrics = SupportSets(5), Metrics()
    kept = Histories(metrics)
    for at, (user, item, rating) in enumerate(events):
        sets.append(user, interaction(user, item, rating, at), ("interactions", 0, at))
        expected = history_of(sets.get(user))
        for _ in range(2):  # staged, and committed
            for _ in range(2):
                found = kept.of(sets, user)
                assert (list(found.items), found.ratings) == (expected.items, expected.ratings)
            sets.begin(sets.changes())
            sets.commit()
        assert kept.of(sets, user) is kept.of(sets, user)


@given(EVENTS, st.sets(st.integers(0, 40)), st.booleans())
def test_what_events_led_to_is_given_until_the_next(events: list[tuple[str, int, int]], ends: set[int], fails: bool) -> None:
    sets, kept, after_events = SupportSets(5), Histories(Metrics()), dict[str, History]()
    for at, (user, item, rating) in enumerate(events):
        history = after_events.get(user) or kept.of(sets, user)
        before = sets.get(user)
        assert sets.append(user, interaction(user, item, rating, at), ("interactions", 0, at)) == (before.earlier if before else 0)
        expected = history_of(sets.get(user))
        assert (list(history.items), history.ratings) == (history_of(before).items, history_of(before).ratings)
        after_events[user] = history.and_then(f"i{item}", float(rating), 5)
        if at in ends:
            changes = sets.changes()
            sets.begin(changes)
            kept.keep(changes, after_events)
            led_to, after_events = after_events, {}
            if fails:
                sets.discard_all()
                continue
            sets.commit()
            found = kept.of(sets, user)
            assert (list(found.items), found.ratings) == (expected.items, expected.ratings)
            assert found is led_to[user]


def test_of_more_users_than_are_kept_those_looked_at_longest_ago_are_made_anew_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories, "MOST", 2)
    sets, metrics = SupportSets(5), Metrics()
    for at, user in enumerate(["ann", "bob", "cem"]):
        sets.append(user, interaction(user, 1, 4, at), ("interactions", 0, at))
    sets.begin(sets.changes())
    sets.commit()
    kept = Histories(metrics)
    ann, bob = kept.of(sets, "ann"), kept.of(sets, "bob")
    assert kept.of(sets, "ann") is ann
    kept.of(sets, "cem")
    assert kept.of(sets, "ann") is ann
    assert kept.of(sets, "bob") is not bob
    kept.of(sets, "nobody")
    kept.keep([], {})
    of_results = {
        result: metrics.registry.get_sample_value("coldstream_histories_total", {"result": result}) for result in ("unchanged", "read")
    }
    assert of_results == {"unchanged": 2, "read": 4}


def test_places_are_looked_up_again_when_they_no_longer_hold() -> None:
    sets, items = SupportSets(5), profiles()
    for at, item in enumerate([3, 1, 2]):
        sets.append("ann", interaction("ann", item, 4, at), ("interactions", 0, at))
    history = history_of(sets.get("ann"))
    (known,) = rated([history], items)
    places, ratings = known.T
    assert rated([history], items)[0] is known
    assert ratings.tolist() == [4.0, 4.0, 4.0]
    items.set("i3", {})
    items.set("i3", None)
    assert items.places(["new"])[0] == places[0], "the place of i3 is given to another"
    assert rated([history], items)[0][:, 0].tolist() == items.places(["i3", "i1", "i2"]).tolist()
    (before,) = rated([history], items)
    items.table.clear()
    items.begin()
    items.places(["i9"])
    assert rated([history], items)[0] is not before
    np.testing.assert_array_equal(rated([history], items)[0][:, 0], items.places(["i3", "i1", "i2"]))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=16), st.integers(1, 6), st.sets(st.integers(0, 16)), st.randoms())
def test_what_histories_know_of_their_places_goes_over_to_the_next(
    events: list[tuple[int, int]], size: int, asked: set[int], random: random.Random
) -> None:
    items, every, waiting = profiles(), [History.of([], [])], list[History]()
    for at, (item, rating) in enumerate(events):
        every.append(every[-1].and_then(f"i{item}", float(rating), size))
        if at % 5 == 3:  # The places given so far no longer hold.
            items.set(f"i{item}", {})
            items.set(f"i{item}", None)
        waiting += every[-2:]
        if at in asked:
            if at % 2:
                random.shuffle(waiting)
            for history, found in zip(waiting, rated(waiting, items), strict=True):
                np.testing.assert_array_equal(found, beside(history, items))
            waiting = []
    for history, found in zip(every, rated(every, items), strict=True):
        np.testing.assert_array_equal(found, beside(history, items))
        assert history.before is None


def beside(history: History, items: Profiles) -> np.ndarray:
    """Places of items one by one, and ratings."""
    return np.array([(items.places([item])[0], rating) for item, rating in zip(history.items, history.ratings, strict=True)]).reshape(-1, 2)
