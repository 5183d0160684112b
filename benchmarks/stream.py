"""MovieLens-100K in order of time, each event scored before it is learned from: Coldstream in lockstep beside river's models, a core each.

Coldstream keeps promises meanwhile that the others do not make (each step is committed, the run can be killed, the history replayed), and
adapts to each user; river's models are fed in a loop, `FMRegressor` with the profiles that the stream gives to Coldstream.

    .venv/bin/python -m benchmarks.stream
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from river import facto, optim

from benchmarks.measuring import machine
from benchmarks.performance import save
from consumers.datasets import DataSet, load
from consumers.demo_files import require_data
from streaming.peers import RiverBiasedMF
from streaming.validation import Limits

RESULTS = Path("benchmarks/results/stream.json")
SCALE = (1.0, 5.0)
SYSTEMS = {"accurate": (16, 16), "fast": (256, 64)}
"""Events of a micro-batch and of a meta-update."""

console = Console()
Features = dict[str, float]


def features_of(side: str, key: str, profile: Mapping[str, Any]) -> Features:
    """An id and a profile as the features of a factorisation machine, each value one of its own."""
    values = [(name, part) for name, value in profile.items() for part in (value if isinstance(value, list) else [value])]
    return {f"{side}={key}": 1.0} | {f"{name}={value}": 1.0 for name, value in values}


def clipped(score: float) -> float:
    """The score inside the scale."""
    return min(SCALE[1], max(SCALE[0], score))


def factorisation_machine(data: DataSet) -> Callable[[str, str, float], float]:
    """River's FMRegressor at the best settings found for these events; scores, then learns."""
    model = facto.FMRegressor(
        n_factors=10,
        weight_optimizer=optim.SGD(0.01),
        latent_optimizer=optim.SGD(0.01),
        intercept=3.5,
        latent_initializer=optim.initializers.Normal(mu=0.0, sigma=0.05, seed=1),
        sample_normalization=False,
        seed=1,
    )

    users = {key: features_of("user", key, profile) for key, profile in data.users.items()}
    items = {key: features_of("item", key, profile) for key, profile in data.items.items()}

    def step(user: str, item: str, rating: float) -> float:
        x = users[user] | items[item]
        score = clipped(float(model.predict_one(x)))  # type: ignore[no-untyped-call]  # river states no types here
        model.learn_one(x, rating)  # type: ignore[no-untyped-call]  # river states no types here
        return score

    return step


def biased_mf(_: DataSet) -> Callable[[str, str, float], float]:
    """River's BiasedMF, as the report of `make demo` has it."""
    peer = RiverBiasedMF(SCALE)

    def step(user: str, item: str, rating: float) -> float:
        score = peer.score(int(user), int(item))
        peer.learn(int(user), int(item), rating)
        return score

    return step


PEERS = {"river FMRegressor with profiles": factorisation_machine, "river BiasedMF": biased_mf}


def fed(name: str, data: DataSet, events: int) -> dict[str, Any]:
    """A peer in a loop over the events."""
    step, taken = PEERS[name](data), [(event.user, event.item, event.rating) for event in data.interactions[:events]]
    began = time.perf_counter()
    scores = np.array([step(*event) for event in taken])
    seconds = time.perf_counter() - began
    errors = scores - np.array([rating for _, _, rating in taken])
    return errors_of(errors) | {"name": name, "events_per_second": len(errors) / seconds, "seconds": seconds}


def errors_of(errors: np.ndarray) -> dict[str, float]:
    """Mean absolute and root mean square error, of all events and of the first 20,000."""
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "mae_first_20000": float(np.abs(errors[:20_000]).mean()),
    }


def coldstream(name: str, data: Path, events: int) -> dict[str, Any]:
    """The demo in lockstep, a process of its own; ``seconds`` are those between its first step and its last, ``whole_seconds`` all."""
    batch, update = SYSTEMS[name]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        coldstream = [sys.executable, "-c", "from consumers.cli import main; main()"]
        command = [*coldstream, "demo", "--data", str(data), "--out", folder, "--port", "0"]
        sizes = ["--micro-batch", str(batch), "--meta-update", str(update), "--events", str(events)]
        done = subprocess.run([*command, *sizes], check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the demo ended with {done.returncode}: {done.stderr}")
        whole = time.perf_counter() - began
        report: Mapping[str, Any] = json.loads((Path(folder) / "report.json").read_text())
    errors = report["results"]["coldstream"]
    return {
        "name": name,
        "events_per_second": report["events_per_second"],
        "seconds": report["seconds"],
        "whole_seconds": whole,
        "seconds_by_stage": report["seconds_by_stage"],
        "mae": errors["mae"],
        "rmse": errors["rmse"],
    }


def main(
    data: Annotated[Path, typer.Option(help="Where MovieLens-100K lies (make data).")] = Path("data/ml-100k"),
    events: Annotated[int, typer.Option(help="Only the first so many.", min=1)] = 100_000,
    repetitions: Annotated[int, typer.Option(help="Of each, by turns.", min=1)] = 2,
    results: Annotated[Path, typer.Option(help="Where the figures go.", dir_okay=False)] = RESULTS,
) -> None:
    """Measure events a second and the error that they are worth, one core for each."""
    require_data(data)
    cores = sorted(os.sched_getaffinity(0))
    read, runs = load(data, Limits()), list[dict[str, Any]]()
    for name in track([*SYSTEMS, *PEERS] * repetitions, "stream", console=console):
        os.sched_setaffinity(0, cores[-1:])
        run = coldstream(name, data, events) if name in SYSTEMS else fed(name, read, events)
        runs.append(run | {"events": events, "cores": 1})
    os.sched_setaffinity(0, cores)
    if len(cores) > 1:
        runs.append(coldstream("accurate", data, events) | {"events": events, "cores": len(cores)})
    table = Table("", "cores", "events/s", "MAE", "RMSE", "whole, s", title=f"MovieLens-100K, {events:,} events")
    for run in runs:
        whole = f"{run['whole_seconds']:.0f}" if "whole_seconds" in run else ""
        table.add_row(run["name"], str(run["cores"]), f"{run['events_per_second']:,.0f}", f"{run['mae']:.4f}", f"{run['rmse']:.4f}", whole)
    console.print(table)
    save(results, machine(), runs)
    console.print(f"figures: {results}")


if __name__ == "__main__":
    typer.run(main)
