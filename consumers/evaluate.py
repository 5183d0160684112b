"""`coldstream evaluate`: train on tasks of warm users, then ask the four scenarios with everything read-only."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from consumers.inspection import public
from consumers.scenarios import PULL, SCENARIOS, Biases, Protocol, Split, episode, split
from consumers.system import new_model
from consumers.threads import limit_threads
from model.memory import user_spread
from model.meta import Optimiser, adapt, differentiate, predict
from model.ranking import ndcg
from model.tasks import brought

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from consumers.datasets import DataSet
    from consumers.settings import Settings
    from model.mamo import Mamo
    from model.tasks import Task

METRICS = ("mae", "rmse", "ndcg_1", "ndcg_3")
ASKED_AT_ONCE = 64


class Outcome(NamedTuple):
    """What a method did on a scenario, by task: mean absolute and mean squared error, nDCG at 1 and 3 (NaN where it says nothing)."""

    mae: np.ndarray
    mse: np.ndarray
    ndcg_1: np.ndarray
    ndcg_3: np.ndarray


class Epoch(NamedTuple):
    """An epoch done: the run (from 0) and its seed, the epoch (from 1), and the MAE on training queries, each before its meta-update."""

    run: int
    seed: int
    epoch: int
    mae: float


class Diverged(ArithmeticError):
    """Training ran away: a gradient is not a number any more."""

    def __init__(self, epoch: int) -> None:
        super().__init__(f"training ran away in epoch {epoch}; lower rates with --set, such as model.learning_rate or model.row_rate")


def model_for(settings: Settings, data: DataSet, seed: int) -> Mamo:
    """A new model that knows the profiles of ``data``."""
    model = new_model(settings.model_copy(update={"seed": seed}))
    for side, profiles in ((model.users, data.users), (model.items, data.items)):
        for key, features in profiles.items():
            side.set(key, features)
    return model


def train(model: Mamo, parts: Split, protocol: Protocol, *, epochs: int, batch: int, seed: int) -> Iterator[float]:
    """Train for ``epochs``, each warm user once in each; yields the MAE of every epoch, each query scored before its meta-update.

    For every ``batch`` of users there is one meta-update, and one memory write of each of them.
    """
    optimiser = Optimiser(model)
    generator = np.random.default_rng(seed)
    users = list(parts.train)
    for epoch in range(epochs):
        error, queries = 0.0, 0
        order = generator.permutation(len(users))
        for start in range(0, len(users), batch):
            chosen = [users[place] for place in order[start : start + batch]]
            tasks = [episode(user, parts.train[user], protocol.query, generator) for user in chosen]
            adapted = adapt(model, tasks, learning=True)
            (gradient,), writing = differentiate(model, adapted, chosen)
            if not gradient.finite():
                raise Diverged(epoch + 1)
            optimiser.step(gradient, writing.composed())
            rows = zip(adapted.scores.score.tolist(), tasks, strict=True)
            error += sum(abs(score - rating) for row, task in rows for score, rating in zip(row, task.query_ratings, strict=False))
            queries += gradient.queries
        yield error / queries


def ask(model: Mamo, tasks: Sequence[Task]) -> list[list[float]]:
    """Scores of each task's query, with parameters and memories as they are: nothing is learned or written."""
    scores = []
    for start in range(0, len(tasks), ASKED_AT_ONCE):
        part = tasks[start : start + ASKED_AT_ONCE]
        rows = predict(model, part).score.tolist()
        scores += [row[: len(one.query_items)] for row, one in zip(rows, part, strict=True)]
    return scores


def outcome(tasks: Sequence[Task], scores: Sequence[Sequence[float]], scale: tuple[float, float]) -> Outcome:
    """Compare scores, brought inside the ``scale``, with the ratings. A query of one item cannot be ordered: no nDCG.

    Its gains, powers of two, are of ratings brought to a scale of 1 to 5, so that those of every scale are gains.
    """
    width = max((len(one.query_items) for one in tasks), default=1)
    score, rating, mask = (torch.zeros(len(tasks), width, dtype=torch.float64) for _ in range(3))
    for row, (one, given) in enumerate(zip(tasks, scores, strict=True)):
        size = len(one.query_items)
        score[row, :size] = torch.tensor(given, dtype=torch.float64).clamp(*scale)
        rating[row, :size] = torch.tensor(one.query_ratings, dtype=torch.float64)
        mask[row, :size] = 1
    sizes = mask.sum(1)
    error = (score - rating) * mask
    gained = torch.from_numpy(brought(rating.numpy(), scale))
    ranked = [torch.where(sizes > 1, ndcg(score, gained, mask, k), torch.nan).numpy() for k in (1, 3)]
    return Outcome((error.abs().sum(1) / sizes).numpy(), (error.square().sum(1) / sizes).numpy(), *ranked)


def mean_and_error(values: np.ndarray) -> tuple[float | None, float | None]:
    """The mean over users and its standard error; None where there are too few to say."""
    values = values[~np.isnan(values)]
    mean = float(values.mean()) if len(values) else None
    return mean, float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def of_metric(found: Outcome, metric: str) -> tuple[float | None, float | None]:
    """A metric over users with its standard error. RMSE is the root of the mean over users of their mean squared errors."""
    if metric != "rmse":
        return mean_and_error(getattr(found, metric))
    mean, error = mean_and_error(found.mse)
    if not mean or error is None:
        return mean, None
    return math.sqrt(mean), error / (2 * math.sqrt(mean))


def summary(runs: Sequence[Outcome], beside: Outcome) -> dict[str, Any]:
    """The metrics of a method on a scenario: mean over runs, standard error over users (averaged over runs), deviation over runs.

    ``mae_less_biases`` is the mean over users of how much their MAE is above that of ``beside`` (below 0: better), with the standard
    error of the difference, which is far smaller than that of either.
    """
    found: dict[str, Any] = {"users": len(beside.mae)}
    measured = {metric: [of_metric(run, metric) for run in runs] for metric in METRICS}
    measured["mae_less_biases"] = [mean_and_error(run.mae - beside.mae) for run in runs]
    for metric, values in measured.items():
        means = [mean for mean, _ in values if mean is not None]
        errors = [error for _, error in values if error is not None]
        found[metric] = {
            "mean": float(np.mean(means)) if means else None,
            "se": float(np.mean(errors)) if errors else None,
            "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        }
    return found


def evaluate(
    settings: Settings,
    data: DataSet,
    *,
    seeds: int = 3,
    epochs: int,
    batch: int,
    protocol: Protocol = Protocol(),  # noqa: B008 - immutable
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the protocol with ``seeds`` seeds, from ``settings.seed`` on, and return the report as JSON has it.

    Raises `SourceError` where the data cannot be split, `Diverged` where training runs away.
    """
    began = time.monotonic()
    limit_threads(settings.cores())
    parts = split(data.interactions, protocol)
    chosen = [settings.seed + run for run in range(seeds)]

    def results(scores: Callable[[Sequence[Task]], list[list[float]]]) -> dict[str, Outcome]:
        scale = (settings.rating.minimum, settings.rating.maximum)
        return {scenario: outcome(tasks, scores(tasks), scale) for scenario, tasks in parts.test.items()}

    runs, spreads = [], []
    for run, seed in enumerate(chosen):
        model = model_for(settings, data, seed)
        for epoch, mae in enumerate(train(model, parts, protocol, epochs=epochs, batch=batch, seed=seed), 1):
            on_epoch(Epoch(run, seed, epoch, mae))
        runs.append(results(functools.partial(ask, model)))
        attention = adapt(model, parts.test["W-W"], learning=False).prediction.attention
        spreads.append(user_spread(attention.detach()))
    methods = {"coldstream": runs}
    for name, pull in (("biases", PULL), ("global_mean", math.inf)):
        methods[name] = [results(Biases(parts.train, pull=pull).ask)]
    beside = methods["biases"][0]
    return {
        "data": {"name": data.name, **parts.counts},
        "protocol": {**asdict(protocol), "epochs": epochs, "batch": batch, "seeds": chosen},
        "settings": public(settings),
        "seconds": round(time.monotonic() - began, 1),
        "attention_spread": float(np.mean(spreads)),
        "results": {
            name: {scenario: summary([run[scenario] for run in found], beside[scenario]) for scenario in SCENARIOS}
            for name, found in methods.items()
        },
    }
