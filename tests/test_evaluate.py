from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers import cli, evaluate
from consumers.datasets import DataSet, load
from consumers.evaluate import Epoch, ask, mean_and_error, model_for, of_metric, outcome, train
from consumers.layers import load as load_settings
from consumers.scenarios import SCENARIOS, Biases, Protocol, Split, episode, split
from consumers.settings import Settings
from model.mamo import Mamo
from model.memory import Memory
from model.tasks import Task
from streaming.errors import SourceError
from streaming.events import Interaction
from streaming.validation import Limits

SMALL = Protocol(fewest=5, most=12, warm_ratings=1, query=2)
SCHEMA = {"user": {"group": {"kind": "categorical"}}, "item": {"id": {"kind": "id"}, "kind": {"kind": "categorical"}}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# The split


@st.composite
def logs(draw: st.DrawFn) -> list[Interaction]:
    """Interactions in order of time, of each user and item at most one."""
    seen = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=20, max_size=80, unique=True))
    times = sorted(draw(st.lists(st.integers(1, 50), min_size=len(seen), max_size=len(seen))))
    return [Interaction(f"u{u}", f"i{i}", float((u * i) % 5 + 1), time) for (u, i), time in zip(seen, times, strict=True)]


def split_or_none(log: list[Interaction]) -> Split | None:
    try:
        return split(log, SMALL)
    except SourceError:
        return None


@settings(max_examples=200, deadline=None)
@given(logs())
def test_nothing_asked_is_learned_from_and_who_is_cold_is_unknown(log: list[Interaction]) -> None:
    parts = split_or_none(log)
    if parts is None:
        return
    rating = {(one.user, one.item): one.rating for one in log}
    learned = {(one.user, one.item) for rated in parts.train.values() for one in rated}
    by_user: dict[str, list[Interaction]] = {}
    for one in log:
        by_user.setdefault(one.user, []).append(one)
    moment = log[round(0.8 * len(log))].timestamp if round(0.8 * len(log)) < len(log) else log[-1].timestamp
    counted = Counter(
        one.item
        for rated in by_user.values()
        if SMALL.fewest <= len(rated) <= SMALL.most and rated[0].timestamp < moment
        for one in rated
        if one.timestamp < moment
    )
    for scenario, tasks in parts.test.items():
        assert len({each.user for each in tasks}) == len(tasks)
        for asked_of in tasks:
            asked = {(asked_of.user, item) for item in asked_of.query_items}
            given_ = {(asked_of.user, item) for item in asked_of.support_items}
            assert asked.isdisjoint(learned)
            assert asked.isdisjoint(given_)
            assert (by_user[asked_of.user][0].timestamp < moment) == (scenario[0] == "W")
            assert {counted[item] > SMALL.warm_ratings for item in asked_of.query_items} == {scenario[2] == "W"}
            assert len(asked_of.support_items) >= SMALL.fewest - SMALL.query
            assert 1 <= len(asked_of.query_items) <= SMALL.query
            if scenario[0] == "C":
                assert asked_of.user not in parts.train
            for items, ratings in ((asked_of.support_items, asked_of.support_ratings), (asked_of.query_items, asked_of.query_ratings)):
                assert [rating[asked_of.user, item] for item in items] == list(ratings)
    for user, rated in parts.train.items():
        assert by_user[user][0].timestamp < moment
        assert all(counted[one.item] > SMALL.warm_ratings for one in rated)
    assert {one.user for one in parts.test["W-W"]} == set(parts.train)


@settings(max_examples=50, deadline=None)
@given(logs(), st.data())
def test_a_rating_that_is_asked_changes_nothing_that_is_learned_from(log: list[Interaction], data: st.DataObject) -> None:
    parts = split_or_none(log)
    if parts is None:
        return
    asked = sorted({(one.user, item) for tasks in parts.test.values() for one in tasks for item in one.query_items})
    user, item = data.draw(st.sampled_from(asked))
    changed = [Interaction(o.user, o.item, 6.0 - o.rating if (o.user, o.item) == (user, item) else o.rating, o.timestamp) for o in log]
    assert split(changed, SMALL).train == parts.train


def test_episodes_keep_time_and_share_nothing() -> None:
    rated = [Interaction("u", f"i{n}", float(n), n) for n in range(9)]
    drawn = episode("u", rated, 10, np.random.default_rng(1))
    assert len(drawn.query_items) == 4
    assert sorted([*drawn.support_items, *drawn.query_items]) == [f"i{n}" for n in range(9)]
    assert list(drawn.support_items) == sorted(drawn.support_items)
    assert [f"i{rating:g}" for rating in drawn.support_ratings] == list(drawn.support_items)


@pytest.mark.parametrize(("log", "says"), [([], "no interaction"), ([Interaction("u", "i", 3.0, 1)], "no warm user")])
def test_too_little_data_is_said(log: list[Interaction], says: str) -> None:
    with pytest.raises(SourceError, match=says):
        split(log, Protocol())


# The baseline


def test_biases_are_the_ridge_regression_they_claim_to_be() -> None:
    generator = np.random.default_rng(3)
    log = [
        Interaction(f"u{u}", f"i{i}", float(generator.integers(1, 6)), i) for u in range(8) for i in range(6) if generator.random() < 0.7
    ]
    train_set: dict[str, list[Interaction]] = {}
    for one in log:
        train_set.setdefault(one.user, []).append(one)
    users, items = sorted(train_set), sorted({one.item for one in log})
    x = np.zeros((len(log), len(users) + len(items)))
    for row, one in enumerate(log):
        x[row, users.index(one.user)] = x[row, len(users) + items.index(one.item)] = 1
    mean = np.mean([one.rating for one in log])
    exact = np.linalg.solve(x.T @ x + 5 * np.eye(x.shape[1]), x.T @ (np.array([one.rating for one in log]) - mean))
    baseline = Biases(train_set, pull=5.0, rounds=200)
    asked = [
        Task(user, [o.item for o in train_set[user]], [o.rating for o in train_set[user]], items, [0.0] * len(items)) for user in users
    ]
    expected = [[mean + exact[u] + exact[len(users) + i] for i in range(len(items))] for u in range(len(users))]
    assert np.allclose(baseline.ask(asked), expected, atol=1e-6)
    assert np.allclose(Biases(train_set, pull=math.inf).ask(asked), mean)


# Measures


@pytest.mark.parametrize("scale", [(-10.0, 10.0), (0.0, 2000.0)])
def test_ndcg_is_that_of_a_scale_of_1_to_5(scale: tuple[float, float]) -> None:
    low, high = scale
    ratings = np.random.default_rng(4).integers(1, 6, (20, 6)).astype(float)
    scores = np.random.default_rng(5).uniform(1, 5, (20, 6))
    wide = [(low + (values - 1) / 4 * (high - low)).tolist() for values in (ratings, scores)]
    items = list("abcdef")
    there = outcome([Task("u", [], [], items, row) for row in wide[0]], wide[1], scale)
    here = outcome([Task("u", [], [], items, row) for row in ratings.tolist()], scores.tolist(), (1.0, 5.0))
    assert there.ndcg_3 == pytest.approx(here.ndcg_3)
    assert ((here.ndcg_3 >= 0) & (here.ndcg_3 <= 1)).all()


def test_measures_by_hand() -> None:
    tasks = [Task("a", [], [], ["x", "y"], [5.0, 1.0]), Task("b", [], [], ["x"], [3.0])]
    found = outcome(tasks, [[4.0, 9.0], [1.0]], (1.0, 5.0))
    assert found.mae.tolist() == [2.5, 2.0]  # 9 is brought to 5
    assert found.mse.tolist() == [8.5, 4.0]
    assert found.ndcg_1[0] == pytest.approx(1 / 31)
    assert math.isnan(found.ndcg_1[1])  # one item cannot be ordered
    assert of_metric(found, "mae") == pytest.approx((2.25, 0.25))
    assert of_metric(found, "rmse") == pytest.approx((2.5, 2.25 / (2 * 2.5)))
    assert of_metric(found, "ndcg_1") == (found.ndcg_1[0], None)
    assert mean_and_error(np.array([math.nan])) == (None, None)


# Learning


def types_of_users(users: int = 90, items: int = 30, rated: int = 18, seed: int = 5) -> DataSet:
    """Two groups of users who like opposite kinds of items, which no bias can tell; later users are cold."""
    generator = np.random.default_rng(seed)
    log = []
    for u in range(users):
        for step, i in enumerate(generator.permutation(items)[:rated].tolist()):
            liked = (u % 2 == 0) == (i % 2 == 0)
            log.append(
                Interaction(
                    f"u{u}",
                    f"i{i}",
                    float(np.clip(round((4.5 if liked else 1.5) + generator.normal() / 2), 1, 5)),
                    1_000_000 + u * 100 + step,
                )
            )
    profiles: dict[str, dict[str, Any]] = {f"u{u}": {"group": "ab"[u % 2]} for u in range(users)}
    return DataSet("toy", log, profiles, {f"i{i}": {"kind": "xy"[i % 2]} for i in range(items)})


def toy_settings(**model: object) -> Settings:
    given_model = {"embedding_size": 4, "memory_rows": 2, "row_rate": 0.01, "learning_rate": 0.01, **model}
    return Settings.model_validate({"threads": 1, "schema": SCHEMA, "model": given_model})


PAPER = {
    "local": "all",
    "tau": 0.05,
    "inner_steps": 2,
    "inner_rate": 0.05,
    "loss": "squared",
    "layers": 2,
    "rating_layers": 2,
    "network_rate": 0.01,
}
TOY = Protocol(fewest=8, most=20, warm_ratings=5, query=4)


@pytest.mark.parametrize(
    "model",
    [{}, PAPER, {**PAPER, "memory": "off", "local": "decision", "embedding_size": 16, "inner_rate": 0.2}],
    ids=["default", "steps", "melu"],
)
def test_learning_beats_biases_where_users_differ_in_kind(model: dict[str, object]) -> None:
    report = evaluate.evaluate(toy_settings(**model), types_of_users(), seeds=1, epochs=25, batch=8, protocol=TOY)
    for scenario in ("W-W", "C-W"):
        ours, biases = (report["results"][method][scenario]["mae"]["mean"] for method in ("coldstream", "biases"))
        assert biases > 1.2
        assert ours < 0.6 * biases
        less = report["results"]["coldstream"][scenario]["mae_less_biases"]
        assert less["mean"] == pytest.approx(ours - biases)
        assert less["mean"] < -4 * less["se"]


def state(model: Mamo) -> dict[str, torch.Tensor]:
    memory = {field.name: getattr(model.memory, field.name).clone() for field in fields(Memory)}
    return memory | {"phi": model.vector.clone()} | {name: table.export()[1].clone() for name, table in model.tables.items()}


@pytest.mark.parametrize("model", [{}, PAPER], ids=["default", "steps"])
def test_asking_writes_nothing_and_training_writes_memories(model: dict[str, object]) -> None:
    data, chosen = types_of_users(users=30), toy_settings(**model)
    parts = split(data.interactions, TOY)
    made = model_for(chosen, data, seed=1)
    fresh = state(made)
    list(train(made, parts, TOY, epochs=1, batch=8, seed=1))
    before = state(made)
    assert all(not torch.equal(before[name], fresh[name]) for name in ("profile", "gradient", "mixing", "phi"))
    first = ask(made, parts.test["C-W"])
    assert all(torch.equal(value, before[name]) for name, value in state(made).items())
    assert ask(made, parts.test["C-W"]) == first


def test_scores_do_not_depend_on_the_ratings_asked_for() -> None:
    data = types_of_users(users=30)
    parts = split(data.interactions, TOY)
    made = model_for(toy_settings(), data, seed=1)
    hidden = [one._replace(query_ratings=[1.0] * len(one.query_items)) for one in parts.test["W-W"]]
    assert ask(made, hidden) == ask(made, parts.test["W-W"])


def test_the_same_seed_gives_the_same_numbers_and_another_one_others() -> None:
    def run(seed: int) -> dict[str, Any]:
        epochs: list[Epoch] = []
        chosen = toy_settings().model_copy(update={"seed": seed})
        report = evaluate.evaluate(chosen, types_of_users(users=30), seeds=2, epochs=2, batch=8, protocol=TOY, on_epoch=epochs.append)
        assert [(one.run, one.seed, one.epoch) for one in epochs] == [(0, seed, 1), (0, seed, 2), (1, seed + 1, 1), (1, seed + 1, 2)]
        results: dict[str, Any] = report["results"]
        return results

    assert run(1) == run(1)
    assert run(1)["coldstream"] != run(2)["coldstream"]
    assert run(1)["biases"] == run(2)["biases"]
    assert run(1)["coldstream"]["W-W"]["mae"]["sd"] > 0


def test_training_that_runs_away_is_said() -> None:
    data = types_of_users(users=30)
    wild = toy_settings(**{**PAPER, "optimiser": "sgd", "learning_rate": 10, "network_rate": 10, "row_rate": 10, "reduction": "sum"})
    with pytest.raises(evaluate.Diverged, match=r"model\.learning_rate"):
        evaluate.evaluate(wild, data, seeds=1, epochs=20, batch=8, protocol=TOY)


# Data sets and the command


def recbole(folder: Path, data: DataSet) -> Path:
    folder.mkdir()
    lines = [f"{one.user}\t{one.item}\t{one.rating:g}\t{one.timestamp}" for one in data.interactions]
    (folder / "toy.inter").write_text("\n".join(["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines]) + "\n")
    users = [f"{key}\t{30 + number}\t{features['group']}" for number, (key, features) in enumerate(data.users.items())]
    (folder / "toy.user").write_text("\n".join(["user_id:token\tage:token\tgender:token", *users]) + "\n")
    items = [f"{key}\t199{number % 10}\t{features['kind']} z" for number, (key, features) in enumerate(data.items.items())]
    (folder / "toy.item").write_text("\n".join(["item_id:token\trelease_year:token\tclass:token_seq", *items]) + "\n")
    return folder


def test_recbole_form_is_read_in_order_of_time_with_the_latest_rating(tmp_path: Path) -> None:
    folder = recbole(tmp_path / "toy", types_of_users(users=2))
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4\t90030\nu\tj\t2\t90020\nu\ti\t1\t90010\n"
    (folder / "toy.inter").write_text(text)
    data = load(folder, Limits())
    assert data.interactions == [Interaction("u", "j", 2.0, 90_020_000), Interaction("u", "i", 4.0, 90_030_000)]
    assert data.name == "toy"
    assert data.users["u1"] == {"age": "31", "gender": "b"}
    assert data.items["i1"] == {"release_year": "1991", "class": ["y", "z"]}


def test_movielens_1m_form(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::2::5::90100\n1::3::4::90090\n")
    (tmp_path / "users.dat").write_text("1::F::25::10::48067\n")
    (tmp_path / "movies.dat").write_bytes("2::Misérables, Les (1995)::Drama|Musical\n3::Untitled::Comedy\n".encode("latin-1"))
    data = load(tmp_path, Limits())
    assert [one.item for one in data.interactions] == ["3", "2"]
    assert data.users == {"1": {"gender": "F", "age": "25", "occupation": "10"}}
    assert data.items["2"] == {"title": "Misérables, Les (1995)", "class": ["Drama", "Musical"], "release_year": "1995"}
    assert data.items["3"] == {"title": "Untitled", "class": ["Comedy"]}


def test_a_line_that_cannot_be_taken_is_named(tmp_path: Path) -> None:
    folder = recbole(tmp_path / "toy", types_of_users(users=2))
    with (folder / "toy.inter").open("a") as file:
        file.write("u\ti\t9\t90001\n")
    with pytest.raises(SourceError, match=r"toy\.inter, line 38: rating"):
        load(folder, Limits())


def test_the_command_reports_and_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recbole(tmp_path / "toy", types_of_users(users=60, rated=25))
    out = tmp_path / "new" / "found.json"
    arguments = ["evaluate", "--data", str(data), "--seeds", "2", "--epochs", "2", "--out", str(out)]
    assert cli.execute(arguments) == 0
    shown = capsys.readouterr().out
    report = json.loads(out.read_text())
    for scenario in SCENARIOS:
        assert set(report["results"]) == {"coldstream", "biases", "global_mean"}
        assert scenario in shown
    mae = report["results"]["coldstream"]["C-W"]["mae"]
    assert f"{mae['mean']:.4f} ± {mae['se']:.4f} ({mae['sd']:.4f})" in shown
    assert report["protocol"]["seeds"] == [1, 2]
    assert report["data"]["cold_users"] > 0
    assert report["results"]["coldstream"]["W-C"]["mae"]["mean"] is None  # every item is warm here
    assert "–" in shown


def test_without_data_it_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.execute(["evaluate", "--data", str(tmp_path / "none")]) == 6
    said = capsys.readouterr().err
    assert "make data" in said
    assert "grouplens.org" in said


def test_a_data_set_with_a_missing_part_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = recbole(tmp_path / "toy", types_of_users(users=2))
    (data / "toy.user").unlink()
    assert cli.execute(["evaluate", "--data", str(data)]) == 6
    assert "toy.user is missing" in capsys.readouterr().err


def test_the_paper_preset_trains_on_the_command_line(tmp_path: Path) -> None:
    data = recbole(tmp_path / "toy", types_of_users(users=60, rated=25))
    out = tmp_path / "found.json"
    assert cli.execute(["evaluate", "--data", str(data), "--preset", "paper", "--seeds", "1", "--epochs", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["settings"]["model"]["local"] == "all"


def test_settings_of_the_demo_serve_both_data_sets() -> None:
    from consumers.demo_files import SETTINGS

    schema = load_settings(SETTINGS).settings.feature_schema
    assert {"age", "gender", "occupation"} <= set(schema.user)
    assert {"id", "class", "release_year"} <= set(schema.item)
