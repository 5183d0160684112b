"""Memories that live, on synthetic users of known types: attention finds the types, and the memory helps users never seen before.

Users are of four types, two hidden bits. Each bit is seen through three features of the profile, each wrong one time in ten: three
features a bit tell .945 of the types, and no more. In the world `same`, what a user likes depends on whether the bits are the same, so that
no feature by itself, nor any weighted sum of them, tells anything about it: what a profile predicts through the networks is worth nothing,
and what the memory adds can be seen in a short stream. In the world `each`, each type likes a genre of its own, much of which a sum of the
features does tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from model.mamo import Mamo
from model.meta import Optimiser, adapt, differentiate
from model.settings import PRESETS, Feature, FeatureSchema, ModelSettings
from model.tasks import Task

ITEMS, EVENTS, FEATURES = 40, 8, 6
NOISE = 0.5  # of a rating: a score from the true taste is wrong by .4 on average

# A stream of hundreds of users, not of tens of thousands, needs memories that learn as much faster.
SHORT: dict[str, Any] = {"profile_half_life": 15.0, "gradient_half_life": 15.0, "task_half_life": 15.0}
LITERAL = {name: PRESETS["paper"]["model"][name] for name in ("temperature", "centred", "gated", *SHORT)}


class User(NamedTuple):
    kind: int
    profile: dict[str, str]
    items: list[str]
    ratings: list[float]


class Outcome(NamedTuple):
    error: np.ndarray  # (new users,) mean absolute error of their first scores, before any rating of theirs
    attention: np.ndarray  # (new users, K)
    kinds: np.ndarray
    model: Mamo


def people(rng: np.random.Generator, count: int, world: str, quality: np.ndarray) -> list[User]:
    liked = {"same": 1.2 * np.array([[1, -1], [-1, 1], [-1, 1], [1, -1]]), "each": 2.0 * np.eye(4) - 0.5}[world]
    made = []
    for _ in range(count):
        bits = rng.integers(0, 2, 2)
        seen = [bits[number // 3] ^ (rng.random() < 0.1) for number in range(FEATURES)]
        items = rng.permutation(ITEMS)[:EVENTS]
        kind = int(2 * bits[0] + bits[1])
        ratings = np.clip(3 + liked[kind][items % liked.shape[1]] + quality[items] + rng.normal(0, NOISE, EVENTS), 1, 5)
        profile = {f"f{number}": f"v{value}" for number, value in enumerate(seen)}
        made.append(User(kind, profile, [f"i{item}" for item in items], ratings.tolist()))
    return made


def stream(world: str = "same", count: int = 700, at_once: int = 2, **settings: Any) -> Outcome:  # noqa: ANN401
    """Learn from ``count`` users, a few of them a step, each event from those before it; then score 400 new ones."""
    rng = np.random.default_rng(1)
    quality = rng.normal(0, 0.3, ITEMS)
    past, new = people(rng, count, world, quality), people(rng, 400, world, quality)
    schema = FeatureSchema(user={f"f{number}": Feature(kind="categorical") for number in range(FEATURES)})
    model = Mamo(ModelSettings(**settings), schema, (1.0, 5.0))
    optimiser = Optimiser(model)
    for number, user in enumerate(past):
        model.users.set(f"past{number}", user.profile)
    for start in range(0, count, at_once):
        tasks = [
            Task(f"past{number}", user.items[:n], user.ratings[:n], [user.items[n]], [user.ratings[n]])
            for number, user in enumerate(past[start : start + at_once], start)
            for n in range(EVENTS)
        ]
        (gradient,), writing = differentiate(model, adapt(model, tasks, learning=True), {task.user for task in tasks})
        optimiser.step(gradient, writing.composed())

    for number, user in enumerate(new):
        model.users.set(f"new{number}", user.profile)
    unseen = adapt(model, [Task(f"new{number}", [], [], user.items, user.ratings) for number, user in enumerate(new)], learning=False)
    error = (unseen.scores.score - torch.tensor([user.ratings for user in new])).abs().mean(1)
    return Outcome(error.numpy(), unseen.prediction.attention.numpy(), np.array([user.kind for user in new]), model)


def purity(outcome: Outcome) -> float:
    """The share of new users who are of the commonest type among those that attend most to the same row; chance is about .28."""
    most = outcome.attention.argmax(1)
    return sum(np.bincount(outcome.kinds[most == row]).max() for row in np.unique(most)) / len(most)


def user_spread(outcome: Outcome) -> float:
    """How far, as a share of all attention, users are from the average user."""
    return float(np.abs(outcome.attention - outcome.attention.mean(0)).sum(1).mean() / 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are too small to share out, and waiting for a busy second core costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alive() -> Outcome:
    return stream(**SHORT)


@pytest.fixture(scope="module")
def literal() -> Outcome:
    return stream(**LITERAL)


@pytest.fixture(scope="module")
def off() -> Outcome:
    return stream(memory="off")


def test_attention_finds_the_types(alive: Outcome) -> None:
    assert purity(alive) > 0.8
    assert len(np.unique(alive.attention.argmax(1))) >= 4


def test_rows_and_attention_keep_a_spread(alive: Outcome) -> None:
    assert alive.model.memory.row_spread() > 0.8
    assert user_spread(alive) > 0.3


def test_the_memory_helps_new_users(alive: Outcome, off: Outcome) -> None:
    """Paired over the same new users, by more than five standard errors, and by a fifth of the error at least."""
    gain = off.error - alive.error
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
    assert alive.error.mean() < 0.8 * off.error.mean()


def test_the_literal_memory_dies_on_the_same_stream(literal: Outcome, off: Outcome) -> None:
    """Temperature 1, no centring, no gate: rows become collinear, all users attend alike, and M_UI shrinks to nothing."""
    assert literal.model.memory.row_spread() < 0.01
    assert user_spread(literal) < 0.01
    assert purity(literal) < 0.35
    assert float(literal.model.memory.mixing.norm()) < 0.01
    gain = off.error - literal.error
    assert gain.mean() < 0.05


@pytest.mark.parametrize(("world", "count"), [("each", 2400), ("same", 2400)])
def test_the_default_as_it_is_finds_the_types_and_helps_on_a_longer_stream(world: str, count: int) -> None:
    """Also where only the profile as a whole tells something: decay of the users' rows must not pull all profiles together there."""
    alive, off = (stream(world, count, 4, **settings) for settings in ({}, {"memory": "off"}))
    assert purity(alive) > 0.85
    assert alive.model.memory.row_spread() > 0.8
    assert user_spread(alive) > 0.4
    gain = off.error - alive.error
    assert gain.mean() > 5 * gain.std() / len(gain) ** 0.5
