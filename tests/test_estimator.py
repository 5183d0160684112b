from __future__ import annotations

import doctest
import importlib.util
import pickle
import sys
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from river import preprocessing
from river.checks import check_estimator
from river.reco.base import Ranker

import model.estimator
import model.features
from consumers import lockstep
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from model.estimator import MAMORanker
from model.mamo import Mamo
from model.meta import Adapted, Gradient, Optimiser, Writing, differentiate
from model.settings import PRESETS, Feature, FeatureSchema, ModelSettings
from streaming.codec import decode, encode
from streaming.events import Interaction, Profile, Score
from streaming.log import Message, TopicPartition

torch.set_num_threads(1)

SCHEMA = FeatureSchema(
    user={"age": Feature(kind="numeric", mean=30, scale=10, bins=(25, 40)), "job": Feature(kind="categorical")},
    item={"id": Feature(kind="id"), "genre": Feature(kind="multivalued", max_values=3)},
)
Event = tuple[str, str, float, dict[str, Any]]


def events(count: int, *, users: int = 25, items: int = 40, seed: int = 5) -> list[Event]:
    """Bursts of events of one user, some items rated again; every event with the features of its user and item."""
    rng = np.random.default_rng(seed)
    jobs, genres = ["writer", "doctor", "cook"], ["drama", "crime", "comedy", "war"]
    of_user = [{"age": float(rng.integers(15, 60)), "job": jobs[rng.integers(3)]} for _ in range(users)]
    of_item = [{"genre": [str(genre) for genre in rng.choice(genres, rng.integers(1, 4), replace=False)]} for _ in range(items)]
    made: list[Event] = []
    while len(made) < count:
        user = int(rng.integers(users))
        for item in rng.integers(items, size=rng.integers(1, 12)).tolist():
            rating = float(np.clip(np.round(3 + rng.normal() + (item % 3 - 1) * (user % 2)), 1, 5))
            made.append((f"u{user}", f"i{item}", rating, of_user[user] | of_item[item]))
    return made[:count]


def streamed(log: Path, stream: list[Event], settings: dict[str, Any]) -> list[tuple[float, float | None, int]]:
    """Score, standard deviation and model version of every event as worker and trainer make them in lockstep."""
    wanted = Settings.model_validate(
        {"broker": f"embedded:{log}", "threads": 1, "topics": {"partitions": 1}, "metrics": {"enabled": False}} | settings
    )
    users = {user: {name: x[name] for name in SCHEMA.user} for user, _, _, x in stream}
    items = {item: {"genre": x["genre"]} for _, item, _, x in stream}
    with System(wanted) as system:
        names = {name: topic.name for name, topic in system.topics.items()}
        profiles = [Message(names["users"], user.encode(), encode(Profile(features))) for user, features in users.items()]
        profiles += [Message(names["items"], item.encode(), encode(Profile(features))) for item, features in items.items()]
        happened = [
            Message(names["interactions"], user.encode(), encode(Interaction(user, item, rating, 10**9 + 1000 * number)))
            for number, (user, item, rating, _) in enumerate(stream)
        ]
        system.log.append([*profiles, *happened])
        with Stop() as stop:
            lockstep.run(system, stop, until_end=True)
        with system.log.reader() as reader:
            reader.assign({TopicPartition(names["scores"], 0): 0})
            scores: list[Score] = []
            while records := reader.poll(1000):
                scores += [decode(record.value, Score, what="score") for record in records if record.value is not None]
    assert [(score.user, score.item) for score in scores] == [(user, item) for user, item, _, _ in stream]
    return [(score.score, score.sd, score.model_version) for score in scores]


def walk(ranker: MAMORanker, stream: list[Event]) -> list[float]:
    """Test, then train."""
    scores = []
    for user, item, y, x in stream:
        scores.append(ranker.predict_one(user, item, x))
        ranker.learn_one(user, item, y, x)
    return scores


def small(**changed: object) -> MAMORanker:
    params: dict[str, Any] = {"schema": SCHEMA, "micro_batch": 8, "rehearsal_users": 8}
    return MAMORanker(**(params | changed))


LIVELY: dict[str, Any] = {
    "learning_rate": 0.01,
    "network_rate": 0.003,
    "row_rate": 0.02,
    "profile_half_life": 5,
    "gradient_half_life": 5,
    "task_half_life": 5,
    "max_rows": 30,
    "overflow_rows": 4,
    # The estimator scores one event at a time and the worker a batch, which differ in the last bit (2e-7). Adam divides by the size of a
    # gradient: one that is zero but for that bit, where only a trace of decay acts, becomes a step that differs at this rate by 2e-5.
    "user_decay": 0.003,
}
"""Settings under which a few hundred events move the model far enough for a difference to show."""


@pytest.mark.parametrize(
    ("model_settings", "estimator", "worker"),
    [
        (LIVELY, {"micro_batch": 8, "meta_update": 8}, {"micro_batch": 8}),
        (LIVELY, {"micro_batch": 16, "meta_update": 5, "support_size": 6}, {"micro_batch": 16, "support_size": 6}),
        (PRESETS["paper"]["model"] | {"embedding_size": 6}, {"micro_batch": 8, "rehearsal_users": 0}, {"micro_batch": 8}),
    ],
    ids=["default", "several meta-updates", "paper"],
)
def test_scores_are_those_of_the_stream(
    tmp_path: Path, model_settings: dict[str, Any], estimator: dict[str, Any], worker: dict[str, Any]
) -> None:
    stream = events(300)
    ranker = small(settings=ModelSettings(**model_settings), rehearsal_query=3, seed=7, **estimator)
    system = {
        "seed": 7,
        "model": model_settings,
        "schema": SCHEMA.model_dump(),
        "worker": worker,
        "trainer": {"meta_update": ranker.meta_update},
        "rehearsal": {"users": ranker.rehearsal_users, "query": ranker.rehearsal_query},
    }
    expected = streamed(tmp_path / "log.db", stream, system)
    scores, deviations = list[float](), list[float]()
    for user, item, y, x in stream:
        scores.append(ranker.predict_one(user, item, x))
        if ranker.model.closed_form:
            deviations.append(ranker.predict_sd_one(user, item, x))
        ranker.learn_one(user, item, y, x)
    assert expected[-1][2] > 15  # versions: the model did learn
    assert np.std([score for score, _, _ in expected]) > 0.05
    np.testing.assert_allclose(scores, [score for score, _, _ in expected], atol=1e-5)
    if deviations:
        np.testing.assert_allclose(deviations, [sd or 0.0 for _, sd, _ in expected], atol=1e-5)


def test_defaults_are_those_of_the_stream() -> None:
    ranker, settings = MAMORanker(), Settings()
    assert ranker.scale == (settings.rating.minimum, settings.rating.maximum)
    assert ranker.support_size == settings.worker.support_size
    assert ranker.micro_batch == settings.worker.micro_batch
    assert ranker.meta_update == settings.trainer.meta_update
    assert settings.trainer.round_updates == 1
    assert ranker.rehearsal_users == settings.rehearsal.users
    assert ranker.rehearsal_query == settings.rehearsal.query
    assert ranker.seed == settings.seed
    assert ranker.model.settings == settings.model
    assert settings.feature_schema == FeatureSchema()


@pytest.fixture
def rivers_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """river's checks import scikit-learn for data sets that no ranker is checked with; where it is missing, an empty module does."""
    if importlib.util.find_spec("sklearn") is None:
        stand_in = types.ModuleType("sklearn")
        monkeypatch.setattr(stand_in, "datasets", types.ModuleType("sklearn.datasets"), raising=False)
        monkeypatch.setitem(sys.modules, "sklearn", stand_in)


@pytest.mark.usefixtures("rivers_data")
@pytest.mark.parametrize("params", [*MAMORanker._unit_test_params(), {"seed": None}, {"schema": SCHEMA, "micro_batch": 4}])
def test_river_finds_nothing_amiss(params: dict[str, Any]) -> None:
    check_estimator(MAMORanker(**params))


def test_river_is_asked_to_skip_only_what_every_ranker_skips() -> None:
    assert MAMORanker()._unit_test_skips() == Ranker._unit_test_skips(MAMORanker())


@pytest.mark.parametrize("module", [model.estimator, model.features], ids=lambda module: module.__name__)
def test_examples_in_docstrings_hold(module: types.ModuleType) -> None:
    done = doctest.testmod(module)
    assert done.attempted > 2
    assert done.failed == 0


def test_the_seed_decides() -> None:
    assert walk(small(seed=1), events(40)) == walk(small(seed=1), events(40))
    assert walk(small(seed=1), events(40)) != walk(small(seed=2), events(40))
    assert walk(small(seed=None), events(40)) != walk(small(seed=None), events(40))


def test_an_event_counts_at_once_for_its_user_and_later_for_all() -> None:
    ranker = small(micro_batch=3)
    walk(ranker, events(30))
    mine, others, before = ranker.predict_one("new", "i1"), ranker.predict_one("other", "i1"), ranker.model.vector
    ranker.learn_one("new", "i1", 5)
    assert ranker.predict_one("new", "i1") > mine
    assert ranker.predict_one("other", "i1") == others
    ranker.learn_one("new", "i2", 5)
    assert ranker.model.vector is before
    ranker.learn_one("new", "i3", 5)
    assert ranker.predict_one("other", "i1") != others


def test_only_the_last_ratings_of_a_user_count() -> None:
    long, short = (small(support_size=2, micro_batch=1000) for _ in range(2))
    for item, y in (("i1", 1), ("i2", 1), ("i3", 5), ("i4", 4)):
        long.learn_one("ann", item, y)
    for item, y in (("i3", 5), ("i4", 4)):
        short.learn_one("ann", item, y)
    assert long.predict_one("ann", "i5") == short.predict_one("ann", "i5")


def test_numbers_and_texts_name_the_same_users_and_items() -> None:
    numbers, texts = small(), small()
    for user, item, y, _ in events(30):
        numbers.learn_one(int(user[1:]), np.int64(item[1:]), int(y))
        texts.learn_one(user[1:], item[1:], y)
    assert numbers.predict_one(3, 4) == texts.predict_one("3", "4")


def test_features_are_remembered_and_a_prediction_may_try_others() -> None:
    ranker = small(settings=ModelSettings(**LIVELY))
    walk(ranker, events(120))
    ranker.learn_one("ann", "i1", 4, {"age": 20, "job": "cook", "genre": {"war"}, "unknown": object})
    known = ranker.predict_one("ann", "i2")
    assert ranker.predict_one("ann", "i2", {"job": "cook", "age": np.float32(20)}) == known
    assert ranker.predict_one("ann", "i2", {"job": "writer"}) != known
    assert ranker.predict_one("ann", "i2", {"genre": ["war", "drama"]}) != known
    assert ranker.predict_one("ann", "i2") == known
    ranker.learn_one("ann", "i1", 4, {"job": None})
    assert ranker.model.users.features["ann"] == {"age": 20.0}


def test_only_declared_features_are_kept() -> None:
    ranker = small(schema=FeatureSchema())
    ranker.learn_one("ann", "i1", 4, {"profile": "x", "id": "another", "age": object()})
    assert ranker.model.users.features == ranker.model.items.features == {}
    assert not ranker.is_contextual
    assert small().is_contextual


def test_features_may_come_out_of_rivers_transformers() -> None:
    scaler = preprocessing.StandardScaler()
    ranker = small(schema=FeatureSchema(user={"age": Feature(kind="numeric")}))
    for user, item, y, x in events(20):
        age = {"age": x["age"]}
        scaler.learn_one(age)
        ranker.learn_one(user, item, y, scaler.transform_one(age))
    assert abs(ranker.model.users.features[user]["age"]) < 3  # type: ignore[arg-type]


def test_ranking_orders_by_prediction() -> None:
    ranker = small()
    walk(ranker, events(100))
    items = [f"i{number}" for number in range(40)]
    ranked = ranker.rank("u3", items)
    scores = [ranker.predict_one("u3", item) for item in ranked]
    assert set(ranked) == set(items)
    assert len(ranked) == len(items)
    assert np.diff(scores).max() <= 1e-6
    assert ranker.rank("u3", {7, "i1"}) in ([7, "i1"], ["i1", 7])
    assert ranker.rank("u3", set()) == []


def test_items_that_all_stand_at_the_end_of_the_scale_are_still_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = small()
    walk(ranker, events(60))
    items = [f"i{number}" for number in range(40)]
    expected = ranker.rank("u3", items)
    # As where all of them are expected to get more than there is.
    monkeypatch.setattr("model.kernels.inside", lambda scores, *_: np.full(scores.shape, 5.0))
    assert {ranker.predict_one("u3", item) for item in items} == {5.0}
    assert ranker.rank("u3", items) == expected != sorted(items)


def test_a_bool_is_an_end_of_the_scale() -> None:
    bools, ends = MAMORanker(micro_batch=2), MAMORanker(micro_batch=2)
    for number, (user, item, _, _) in enumerate(events(20)):
        bools.learn_one(user, item, (np.bool_ if number % 2 else bool)(number % 3 == 0))
        ends.learn_one(user, item, 5 if number % 3 == 0 else 1)
    assert bools.predict_one("u1", "i1") == ends.predict_one("u1", "i1")


@pytest.mark.parametrize(("user", "item", "x"), [("caf\udce9", "i", {}), ("u", "\ud800", {}), ("u", "i", {"job": "\udc80"})])
def test_what_no_utf8_has_is_refused_by_name_and_leaves_nothing(user: str, item: str, x: dict[str, Any]) -> None:
    ranker = small()
    before = pickle.dumps(ranker)
    with pytest.raises(ValueError, match=r"\\ud.* is no text that UTF-8 has"):
        ranker.learn_one(user, item, 3, x)
    with pytest.raises(ValueError, match=r"\\ud.* is no text that UTF-8 has"):
        ranker.predict_one(user, item, x)
    assert pickle.dumps(ranker) == before


def test_broken_off_between_two_steps_no_event_is_learned_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, steps = small(meta_update=4), Optimiser.step

    def interrupted(self: Optimiser, *arguments: Any) -> Any:  # noqa: ANN401
        made.append(steps(self, *arguments))
        if len(made) == 1:
            raise KeyboardInterrupt
        return made[-1]

    made: list[Any] = []
    monkeypatch.setattr(Optimiser, "step", interrupted)
    stream = events(9)
    walk(ranker, stream[:7])
    with pytest.raises(KeyboardInterrupt):
        ranker.learn_one(*stream[7])
    assert len(ranker._waiting) == 0
    ranker.learn_one(*stream[8])
    assert (len(made), ranker._learned, len(ranker._waiting)) == (1, 8, 1)


def test_a_rating_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"rating .* not str"):
        small().learn_one("ann", "i1", "5")  # type: ignore[arg-type]


def test_a_feature_of_no_kind_is_named_and_leaves_nothing() -> None:
    ranker = small()
    before = pickle.dumps(ranker)
    with pytest.raises(TypeError, match=r"x\['job'\].*dict"):
        ranker.learn_one("ann", "i1", 3, {"age": 3, "job": {}})
    assert pickle.dumps(ranker) == before


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scale": (5, 1)}, "scale"),
        ({"scale": (1, float("inf"))}, "scale"),
        ({"support_size": 0}, "support_size .* at least 1"),
        ({"micro_batch": 2.5}, "micro_batch"),
        ({"rehearsal_users": -1}, "rehearsal_users .* at least 0"),
        ({"schema": FeatureSchema(user={"land": Feature(kind="categorical")}, item={"land": Feature(kind="categorical")})}, "'land'"),
    ],
)
def test_wrong_parameters_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAMORanker(**params)


def test_gradient_steps_have_no_standard_deviation() -> None:
    ranker = MAMORanker(ModelSettings(**PRESETS["paper"]["model"]))
    with pytest.raises(NotImplementedError, match="closed_form"):
        ranker.predict_sd_one("ann", "i1")


def test_gradients_that_are_not_finite_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = small(micro_batch=4)
    walk(ranker, events(8))
    expected = ranker.model.vector.clone()

    def broken(of: Mamo, adapted: Adapted, *writers: Collection[str]) -> tuple[list[Gradient], Writing]:
        gradients, writing = differentiate(of, adapted, *writers)
        for gradient in gradients:
            gradient.vector[0] = torch.nan
        return gradients, writing

    monkeypatch.setattr(model.estimator, "differentiate", broken)
    walk(ranker, events(4, seed=6))
    assert torch.equal(ranker.model.vector, expected)


def test_memory_usage_counts_what_tensors_hold() -> None:
    little, much = (MAMORanker(ModelSettings(embedding_size=size))._raw_memory_usage for size in (4, 64))
    assert much - little > 8 * 64 * 128 * 4  # M_UI alone, 8 rows of 64 x 128 in 32 bits
