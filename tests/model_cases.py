"""Small models and tasks that several tests share. What they check them against is written in the tests themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model.mamo import Mamo, Prediction
from model.memory import Writes
from model.meta import Gradient, adapt, differentiate
from model.settings import Feature, FeatureSchema, ModelSettings
from model.tasks import Batch, Task, collate

torch.set_num_threads(1)  # Tensors here are too small to share out, and waiting for a busy second core costs most of the time.

SCHEMA = FeatureSchema(
    user={"age": Feature(kind="numeric", mean=30, scale=10, bins=(25, 40)), "job": Feature(kind="categorical")},
    item={"id": Feature(kind="id"), "genre": Feature(kind="multivalued", max_values=3)},
)

USERS: dict[str, dict[str, Any]] = {
    "ann": {"age": 23, "job": "writer"},
    "bob": {"age": 45, "job": "doctor"},
    "cem": {"job": "writer"},
}
ITEMS: dict[str, dict[str, Any]] = {
    "i1": {"genre": ["drama", "crime"]},
    "i2": {"genre": ["comedy"]},
    "i3": {"genre": ["drama"]},
    "i4": {},
}

TASKS = [
    Task("ann", ["i1", "i2", "i3"], [4.0, 2.0, 5.0], ["i4"], [3.0]),
    Task("bob", ["i2"], [1.0], ["i1", "i3"], [2.0, 4.0]),
    Task("ann", ["i1", "i2", "i3", "i4"], [4.0, 2.0, 5.0, 3.0], ["i5"], [1.0]),
    Task("new", [], [], ["i1"], [5.0]),
    Task("cem", ["i3", "i3"], [3.0, 4.0], ["i3"], [4.0]),
]
"""Two tasks of one user, an empty support, a repeated item, a user and an item without a profile, queries of several items."""

PAPER: dict[str, Any] = {
    "embedding_size": 2,
    "layers": 2,
    "rating_layers": 2,
    "activation": "tanh",
    "memory_rows": 3,
    "local": "all",
    "tau": 0.3,
    "inner_rate": 0.05,
    "inner_steps": 3,
    "temperature": 1.0,
    "centred": False,
    "gated": False,
    "profile_half_life": 3.0,
    "gradient_half_life": 4.0,
    "task_half_life": 5.0,
    "loss": "squared",
    "optimiser": "sgd",
    **{name: 0.01 for name in ModelSettings.model_fields if name.endswith("_rate") and name != "inner_rate"},  # one lambda for all
    "weight_decay": 0.0,
    "user_decay": 0.0,
    "prior_decay": 0.0,
    "reduction": "sum",
}
"""The equations literally, at sizes that loops and finite differences can bear."""

CLOSED: dict[str, Any] = {
    "embedding_size": 2,
    "memory_rows": 3,
    "local": "closed_form",
    "loss": "gaussian",
    "tau": 0.3,
    "recency": 0.4,
    "task_step": 0.1,
    "temperature": 5.0,
    "centred": True,
    "gated": True,
    "profile_half_life": 3.0,
    "gradient_half_life": 4.0,
    "task_half_life": 5.0,
}
"""The closed form and the repaired memory, whatever the defaults are tuned to."""


def small_model(
    *,
    seed: int = 1,
    schema: FeatureSchema = SCHEMA,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **settings: Any,  # noqa: ANN401  whatever ModelSettings takes
) -> Mamo:
    """A model in which nothing is zero: parameters, memories and the rows of the shared tasks are moved at random."""
    model = Mamo(ModelSettings(**settings), schema, (1.0, 5.0), seed=seed, dtype=dtype, device=device)
    for key, features in USERS.items():
        model.users.set(key, features)
    for key, features in ITEMS.items():
        model.items.set(key, features)
    rng = np.random.default_rng(seed)

    def moved(value: torch.Tensor, by: float) -> torch.Tensor:
        return value + torch.from_numpy(by * rng.standard_normal(tuple(value.shape))).to(dtype)

    model.set_vector(moved(model.vector, 0.2))
    for name in ("profile", "gradient", "mixing", "weights", "centre"):
        setattr(model.memory, name, moved(getattr(model.memory, name), 0.2))
    collate([TASKS], model.users, model.items, model.scale, dtype)
    for table in model.tables.values():
        table.admit(list(table.keys))
        table.values = moved(table.values, 0.3)
    return model


def forward(model: Mamo, tasks: list[Task] = TASKS) -> tuple[Prediction, Batch]:
    """One pass."""
    adapted = adapt(model, tasks, learning=True)
    return adapted.prediction, adapted.batch


def learn(model: Mamo, tasks: list[Task] = TASKS, *, write: bool = False) -> tuple[Gradient, Writes | None]:
    """What a worker sends of a step; with ``write`` all users of the step write."""
    (gradient,), writing = differentiate(model, adapt(model, tasks, learning=True), {task.user for task in tasks} if write else set())
    return gradient, writing.composed()
