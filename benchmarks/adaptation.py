"""Adapting, scoring and differentiating users: the engine beside the plain model, by turns, in one run and on one core.

The plain model is `Mamo.forward` with autograd on the same batch: the same numbers, and what the engine is tested against. Users are
made up, of the demo's features, and rate items drawn by a power law; the work does not depend on what they like.

    make bench                                              # with the embedded log
    .venv/bin/python -m benchmarks.adaptation --seconds 20
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.performance import save
from consumers.demo_files import SETTINGS as DEMO
from model.mamo import Mamo
from model.meta import Optimiser, adapt, differentiate, predict
from model.settings import FeatureSchema, ModelSettings
from model.tasks import Task

RESULTS = Path("benchmarks/results/adaptation.json")
ITEMS = 2_000
SHAPE = 1.1
"""Of the power law by which items are drawn."""

console = Console()


class Work(NamedTuple):
    """So many users, each with a support and a query of these sizes."""

    name: str
    users: int
    support: int
    query: int
    learning: bool


WORKS = [
    Work("adapt and score, support 50, 256 users", 256, 50, 1, learning=False),
    Work("adapt and score, support 50, 16 users", 16, 50, 1, learning=False),
    Work("meta-update, support 50, 10 queries, 64 users", 64, 50, 10, learning=True),
    Work("meta-update, support 100, 1 query, 512 users", 512, 100, 1, learning=True),
]


def tasks(work: Work, rng: np.random.Generator) -> list[Task]:
    """One task for each user, in which no item comes twice."""
    weights = np.arange(1, ITEMS + 1) ** -SHAPE
    made = []
    for user in range(work.users):
        drawn = rng.choice(ITEMS, work.support + work.query, replace=False, p=weights / weights.sum())
        ratings = rng.integers(1, 6, len(drawn)).astype(float).tolist()
        items = [f"i{item}" for item in drawn]
        n = work.support
        made.append(Task(f"u{user}", items[:n], ratings[:n], items[n:], ratings[n:]))
    return made


def model(*, plain: bool) -> Mamo:
    """The default model with the demo's features and profiles for everybody."""
    schema = FeatureSchema(**tomllib.loads(DEMO.read_text())["schema"])
    made, rng = Mamo(ModelSettings(), schema, (1.0, 5.0)), np.random.default_rng(1)
    made.plain = plain
    genres = [f"genre{number}" for number in range(18)]
    for item in range(ITEMS):
        classes = [str(genre) for genre in rng.choice(genres, rng.integers(1, 4), replace=False)]
        made.items.set(f"i{item}", {"class": classes, "release_year": float(rng.integers(1930, 1999))})
    for user in range(max(work.users for work in WORKS)):
        job = f"job{rng.integers(21)}"
        made.users.set(f"u{user}", {"age": float(rng.integers(15, 70)), "gender": "FM"[rng.integers(2)], "occupation": job})
    return made


def once(of: Mamo, optimiser: Optimiser, work: Work, batch: list[Task]) -> None:
    """The work, from ids to scores, or to a model that has learned."""
    if not work.learning:
        predict(of, batch)
        return
    (gradient,), writes = differentiate(of, adapt(of, batch, learning=True), {task.user for task in batch})
    optimiser.step(gradient, writes)


def timed(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, by turns, for so long altogether; the first call of each does not count."""
    for call in calls.values():
        call()
    took: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - began)
    return took


def measure(work: Work, seconds: float) -> dict[str, Any]:
    """The engine beside the plain model."""
    batches = [tasks(work, np.random.default_rng(seed)) for seed in range(8)]

    def calls(*, plain: bool) -> Callable[[], None]:
        of, turn = model(plain=plain), itertools.cycle(batches)
        optimiser = Optimiser(of)
        return lambda: once(of, optimiser, work, next(turn))

    took = timed({"engine": calls(plain=False), "plain": calls(plain=True)}, seconds)
    rates = {name: work.users / statistics.median(each) for name, each in took.items()}
    return work._asdict() | {"users_per_second": rates, "ratio": rates["engine"] / rates["plain"], "seconds": took}


def main(
    seconds: Annotated[float, typer.Option(help="For each work.", min=1)] = 20.0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure users a second, the median of all repetitions, on one core."""
    torch.set_num_threads(1)
    table = Table("", "engine users/s", "plain users/s", "ratio", "spread", title="`default`, one core")
    runs = []
    for work in WORKS:
        console.print(f"{work.name} ...")
        run = measure(work, seconds)
        runs.append(run)
        rates = run["users_per_second"]
        low, high = np.quantile(run["seconds"]["engine"], [0.1, 0.9])
        spread = f"{work.users / high:,.0f} to {work.users / low:,.0f}"
        table.add_row(work.name, f"{rates['engine']:,.0f}", f"{rates['plain']:,.0f}", f"{run['ratio']:.1f}", spread)
    console.print(table)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    machine = versions | {"system": platform.platform(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    save(results, machine, runs)
    console.print(f"figures: {results}")


if __name__ == "__main__":
    typer.run(main)
