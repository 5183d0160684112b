"""Copies of the notebook's estimator go on alike and on their own, and what is refused or only asked leaves no trace in one.

river's contract suite asks that others can pickle an estimator, so that is tested; nothing of this project writes or reads a pickle.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

from model.estimator import MAMORanker
from tests.test_estimator import events, small, walk


def test_predictions_change_nothing() -> None:
    asked, left_alone = small(), small()
    for user, item, y, x in events(60):
        before = pickle.dumps(asked)
        asked.predict_one(user, item, x)
        asked.predict_one("nobody", "nothing", {"age": 99, "job": "spy", "genre": ["new"]})
        asked.predict_sd_one(user, "i1", {"age": 80})
        asked.rank(user, {"i1", "i2", "unheard of"}, {"job": "cook"})
        assert pickle.dumps(asked) == before
        asked.learn_one(user, item, y, x)
        left_alone.learn_one(user, item, y, x)
    assert walk(asked, events(20, seed=6)) == walk(left_alone, events(20, seed=6))


@pytest.mark.parametrize(
    "copied",
    [
        lambda ranker: pickle.loads(pickle.dumps(ranker)),  # noqa: S301  its own
        copy.deepcopy,
        lambda ranker: ranker.clone(include_attributes=True),
    ],
    ids=["pickle", "deepcopy", "clone"],
)
def test_a_copy_goes_on_alike_and_on_its_own(copied: Callable[[MAMORanker], MAMORanker]) -> None:
    ranker = small()
    walk(ranker, events(61))  # in the middle of a micro-batch
    one, other = copied(ranker), copied(ranker)
    expected = walk(ranker, events(50, seed=6))
    assert walk(one, events(50, seed=6)) == expected
    assert walk(other, events(50, seed=6)) == expected


def test_those_that_saw_the_same_have_the_same_pickle_in_the_middle_of_a_meta_update_too() -> None:
    one, other = small(), small()
    walk(one, events(24))
    walk(other, events(24))
    assert one._parts, "8 events of the 16 that make a meta-update"
    assert pickle.dumps(one) == pickle.dumps(other)


def test_a_clone_knows_the_parameters_and_nothing_else() -> None:
    ranker = small(seed=3)
    fresh = walk(ranker, events(40))
    clone = ranker.clone()
    assert clone._get_params() == ranker._get_params()
    assert walk(clone, events(40)) == fresh


@pytest.mark.parametrize("y", [0.9, 6, float("nan"), float("inf")])
def test_a_rating_off_the_scale_is_refused_and_leaves_nothing(y: float) -> None:
    ranker = small()
    before = pickle.dumps(ranker)
    with pytest.raises(ValueError, match=r"off the scale of 1 to 5"):
        ranker.learn_one("ann", "i1", y, {"age": 3})
    assert pickle.dumps(ranker) == before
