"""Equations 1 to 4 and 7 to 11 of MAMO (KDD 2020), one task at a time in loops over plain numbers, written from the paper.

Gradients are central finite differences of losses that the loops compute, so that nothing here shares code with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.mamo import Mamo
from model.settings import ModelSettings
from model.tasks import Task
from tests.model_cases import ITEMS, USERS

Row = list[float]
Matrix = list[Row]
Theta = dict[str, Any]
EPS = 1e-5


def activation(name: str, x: float) -> float:
    return {"tanh": math.tanh, "softplus": lambda z: math.log1p(math.exp(z)), "relu": lambda z: max(z, 0.0)}[name](x)


def layer(x: Row, weight: Matrix, bias: Row) -> Row:
    return [sum(x[a] * weight[a][b] for a in range(len(x))) + bias[b] for b in range(len(bias))]


def network(x: Row, theta: Theta, name: str, layers: int, act: str) -> Row:
    for number in range(layers):
        x = layer(x, theta[f"{name}.{number}.weight"], theta[f"{name}.{number}.bias"])
        if number < layers - 1:
            x = [activation(act, value) for value in x]
    return x


def cosine(a: Row, b: Row) -> float:
    norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm


def softmax(values: Row) -> Row:
    parts = [math.exp(value) for value in values]
    return [part / sum(parts) for part in parts]


def profile(side: str, key: str, table: dict[str, Row], width: int) -> Row:
    """p_u or p_i: the concatenated embeddings of the features of the schema of the shared cases; weights are kept in 32 bits."""
    features = (USERS if side == "user" else ITEMS).get(key, {})
    summed: list[list[tuple[str, float]]] = []
    if side == "user":
        if "age" in features:
            age = features["age"]
            summed.append([("age#", (age - 30) / 10), (f"age#{0 if age < 25 else 1 if age < 40 else 2}", 1.0)])
        else:
            summed.append([("age?", 1.0)])
        summed.append([(f"job={features['job']}" if "job" in features else "job?", 1.0)])
    else:
        genres = features.get("genre", [])
        summed.append([(f"id={key}", 1.0)])
        summed.append([(f"genre={genre}", 1 / math.sqrt(len(genres))) for genre in genres] or [("genre?", 1.0)])
    return [
        sum(float(np.float32(weight)) * table[entry][column] for entry, weight in entries) for entries in summed for column in range(width)
    ]


@dataclass
class Paper:
    """Phi, the memories and the embedding tables as plain lists."""

    settings: ModelSettings
    phi: Theta
    memory: dict[str, Any]
    users: dict[str, Row]
    items: dict[str, Row]
    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, model: Mamo) -> Paper:
        memory = {name: getattr(model.memory, name).tolist() for name in ("profile", "gradient", "mixing", "centre")}
        phi = {name: value.tolist() for name, value in model.phi.items()}
        users, items = (dict(zip(table.keys, table.values.tolist(), strict=False)) for table in (model.user_table, model.item_table))
        return cls(model.settings, phi, memory, users, items, {name: value.shape for name, value in model.phi.items()})

    def p_u(self, user: str) -> Row:
        return profile("user", user, self.users, self.settings.embedding_size)

    def attention(self, user: str) -> Row:
        """Eq. 3, with the temperature and the centring of the repaired memory."""
        looked = self.p_u(user)
        if self.settings.centred:
            looked = [x - c for x, c in zip(looked, self.memory["centre"], strict=True)]
        return softmax([self.settings.temperature * cosine(looked, row) for row in self.memory["profile"]])

    def start(self, user: str) -> Theta:
        """Eq. 4, 7, 9 and 10: the fast weights before any step."""
        a = self.attention(user)
        theta = {name: np.array(value).tolist() for name, value in self.phi.items()}
        if self.settings.feature_memory:
            b_u = [sum(a[k] * row[j] for k, row in enumerate(self.memory["gradient"])) for j in range(len(self.memory["gradient"][0]))]
            place = 0
            for name in [name for name in theta if name.startswith("user.")]:
                flat = np.array(theta[name]).reshape(-1)
                for j in range(len(flat)):
                    flat[j] -= self.settings.tau * b_u[place]
                    place += 1
                theta[name] = flat.reshape(self.shapes[name]).tolist()
        if self.settings.task_memory:
            theta["mixing"] = self.m_ui(a)
        return theta

    def m_ui(self, a: Row) -> Matrix:
        d = self.settings.embedding_size
        return [[sum(a[k] * self.memory["mixing"][k][i][j] for k in range(len(a))) for j in range(2 * d)] for i in range(d)]

    def score(self, theta: Theta, user: str, item: str) -> float:
        """Eq. 1 and 2."""
        s = self.settings
        e_u = network(self.p_u(user), theta, "user", s.layers, s.activation)
        e_i = network(profile("item", item, self.items, s.embedding_size), theta, "item", s.layers, s.activation)
        both = e_u + e_i
        if "mixing" in theta:
            both = [sum(row[j] * both[j] for j in range(len(both))) for row in theta["mixing"]]
        return network(both, theta, "rating", s.rating_layers, s.activation)[0]

    def loss(self, theta: Theta, user: str, items: Sequence[str], ratings: Sequence[float]) -> float:
        return sum((self.score(theta, user, item) - rating) ** 2 for item, rating in zip(items, ratings, strict=True))

    def adapt(self, task: Task) -> Theta:
        """Eq. 11: theta <- theta - rho grad of the mean squared error of the support."""
        theta = self.start(task.user)
        names = [
            n for n in theta if n.startswith(("rating.",) if self.settings.local == "decision" else ("user.", "item.", "rating.", "mixing"))
        ]
        if not task.support_items:
            return theta
        for _ in range(self.settings.inner_steps):
            count = len(task.support_items)

            def support(values: Theta, count: int = count) -> float:
                return self.loss(values, task.user, task.support_items, task.support_ratings) / count

            gradient = differences(support, theta, names)
            for name in names:
                theta[name] = (np.array(theta[name]) - self.settings.inner_rate * gradient[name]).tolist()
        return theta


def differences(loss: Callable[[Theta], float], theta: Theta, names: list[str]) -> dict[str, np.ndarray]:
    """Central finite differences of a loss at some of the parameters."""
    found = {}
    for name in names:
        value = np.array(theta[name])
        gradient = np.zeros_like(value)
        for place in np.ndindex(*value.shape):
            at = []
            for sign in (1, -1):
                moved = value.copy()
                moved[place] += sign * EPS
                at.append(loss(theta | {name: moved.tolist()}))
            gradient[place] = (at[0] - at[1]) / (2 * EPS)
        found[name] = gradient
    return found
