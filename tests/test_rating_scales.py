"""Whatever scale ratings are on, the model learns, says how sure it is in their own points, and survives what it is sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from consumers.settings import Settings
from model import kernels
from model.estimator import MAMORanker
from model.mamo import Mamo
from model.meta import Gradient, Optimiser, RowGradients, adapt, differentiate, predict
from model.settings import PRESETS, Feature, FeatureSchema, ModelSettings
from tests.model_cases import SCHEMA, TASKS

SCALES = [(0.0, 1.0), (0.5, 5.0), (-10.0, 10.0), (0.0, 1000.0), (-1e6, 1e6)]


def ranker(scale: tuple[float, float], preset: str) -> MAMORanker:
    return MAMORanker(ModelSettings(**PRESETS[preset].get("model", {})), scale=scale, micro_batch=8, meta_update=8, rehearsal_users=8)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_model_on_any_scale_is_the_model_on_1_to_5_in_other_points(scale: tuple[float, float], preset: str) -> None:
    """So it is with the same events, each rating brought over."""
    (low, high), rng = scale, np.random.default_rng(3)
    ours, usual = ranker(scale, preset), ranker((1.0, 5.0), preset)
    for _ in range(300):
        user, item, share = int(rng.integers(20)), int(rng.integers(30)), float(rng.integers(9)) / 8
        ours.learn_one(user, item, low + share * (high - low))
        usual.learn_one(user, item, 1 + 4 * share)
    for user in range(20):
        at, other = ours.predict_one(user, 1), usual.predict_one(user, 1)
        assert (at - low) / (high - low) == pytest.approx((other - 1) / 4, abs=1e-4)
        assert low <= at <= high
        if preset == "default":
            assert ours.predict_sd_one(user, 1) / (high - low) == pytest.approx(usual.predict_sd_one(user, 1) / 4, rel=1e-3)


@pytest.mark.parametrize("scale", [(0.0, 0.3), (1.0, 5.0), (0.1, 0.7)])
def test_no_score_lies_beyond_its_scale_by_rounding(scale: tuple[float, float]) -> None:
    found = kernels.inside(np.array([[-99.0, 99.0, np.nan]], np.float32), 1.0, (scale[1] - scale[0]) / 4, *scale)
    assert found.tolist() == [[scale[0], scale[1], (scale[0] + scale[1]) / 2]]


def test_a_model_of_another_scale_made_before_ratings_were_brought_over_is_not_taken_for_one_made_now() -> None:
    usual, other = Settings(), Settings.model_validate({"rating": {"minimum": 0, "maximum": 10}})
    assert "brought_to" not in usual.decisive()["rating"]
    assert other.decisive()["rating"]["brought_to"] == [1.0, 5.0]


@pytest.mark.parametrize("where", ["phi", "rows"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e19, -1e30])
def test_a_gradient_whose_square_would_not_be_finite_is_refused_as_one_that_is_not(where: str, number: float) -> None:
    model = Mamo(ModelSettings(), SCHEMA, (1.0, 5.0))
    (gradient,), _ = differentiate(model, adapt(model, TASKS, learning=True), set())
    assert gradient.finite()
    broken = gradient.vector.clone() if where == "phi" else gradient.rows["item"].values.clone()
    broken.view(-1)[0] = number
    part = gradient.rows["item"]
    rows = gradient.rows if where == "phi" else gradient.rows | {"item": RowGradients(part.keys, broken)}
    assert not Gradient(gradient.queries, broken if where == "phi" else gradient.vector, rows).finite()


def test_the_largest_gradient_that_is_taken_leaves_all_numbers_finite() -> None:
    model = Mamo(ModelSettings(), SCHEMA, (1.0, 5.0))
    optimiser = Optimiser(model)
    for _ in range(3):
        (gradient,), _ = differentiate(model, adapt(model, TASKS, learning=True), set())
        largest = {name: RowGradients(part.keys, torch.full_like(part.values, 9e14)) for name, part in gradient.rows.items()}
        huge = Gradient(1, torch.full_like(gradient.vector, 9e14), largest)
        assert huge.finite()
        optimiser.step(huge, None)
        optimiser.step(gradient, None)
    assert model.vector.isfinite().all()
    assert optimiser.moments.isfinite().all()
    for name, table in model.tables.items():
        assert table.values.isfinite().all()
        assert optimiser.moments_of(name).isfinite().all()


def test_a_long_list_to_be_ranked_under_paper_takes_memory_as_it_is_long() -> None:
    """Not with its square: 60,000 items were 28 GB."""
    model = ranker((1.0, 5.0), "paper")
    model.learn_one("ann", 1, 4)
    assert len(model.rank("ann", range(60_000))) == 60_000


@pytest.mark.parametrize("name", ["a=b", "", "="])
@pytest.mark.parametrize("side", ["user", "item"])
def test_a_feature_whose_name_would_be_taken_for_a_value_is_refused(side: str, name: str) -> None:
    with pytest.raises(ValueError, match="NAME=VALUE"):
        FeatureSchema.model_validate({side: {name: Feature(kind="categorical")}})


@pytest.mark.parametrize(
    "wrong", [{"prior_precision": float("inf")}, {"prior_precision": 1e300}, {"gradient_half_life": float("inf")}, {"tau": float("nan")}]
)
def test_settings_that_no_model_can_be_made_of_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ModelSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"mean": float("nan")}, {"scale": float("inf")}, {"bins": (float("nan"), 1.0)}])
def test_a_number_whose_direction_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Feature(kind="numeric", **wrong)


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_nothing_can_be_drawn_by_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        MAMORanker(seed=seed)


def test_scores_of_a_diverged_task_stand_in_the_middle_of_their_scale() -> None:
    model = Mamo(ModelSettings(), SCHEMA, (0.0, 100.0))
    model.set_vector(model.vector * float("nan"))
    scores = predict(model, TASKS)
    assert scores.sd is not None
    assert scores.score[:, 0].tolist() == [50.0] * len(TASKS)
    assert scores.sd[:, 0].tolist() == [100.0] * len(TASKS)
