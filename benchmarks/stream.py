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
from consumers.demo_files import require_data
from streaming.peers import RiverBiasedMF

RESULTS = Path("benchmarks/results/stream.json")
SCALE = (1.0, 5.0)
SYSTEMS = {"accurate": (16, 16), "fast": (256, 64)}
"""Events of a micro-batch and of a meta-update."""

console = Console()
Features = dict[str, float]


class Stream:
    """The events, oldest first, and the profiles of users and items as features of a factorisation machine."""

    def __init__(self, data: Path, events: int) -> None:
        rows = [line.split("\t") for line in (data / "ml-100k.inter").read_text().splitlines()[1:]]
        rows.sort(key=lambda row: float(row[3]))
        self.events = [(user, item, float(rating)) for user, item, rating, _ in rows[:events]]
        self.users = {
            user: {f"u{user}": 1.0, f"gender={gender}": 1.0, f"job={job}": 1.0, f"age={int(age) // 10}": 1.0}
            for user, age, gender, job, _ in self._rows(data / "ml-100k.user")
        }
        self.items = {
            item: {f"i{item}": 1.0, f"year={year[:3]}": 1.0} | {f"class={name}": 1.0 for name in classes.split()}
            for item, _, year, classes in self._rows(data / "ml-100k.item")
        }

    def _rows(self, path: Path) -> list[list[str]]:
        return [line.split("\t") for line in path.read_text(errors="replace").splitlines()[1:]]


def clipped(score: float) -> float:
    """The score inside the scale."""
    return min(SCALE[1], max(SCALE[0], score))


def factorisation_machine(stream: Stream) -> Callable[[str, str, float], float]:
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

    def step(user: str, item: str, rating: float) -> float:
        x: Features = stream.users.get(user, {}) | stream.items.get(item, {})
        score = clipped(float(model.predict_one(x)))  # type: ignore[no-untyped-call]
        model.learn_one(x, rating)  # type: ignore[no-untyped-call]
        return score

    return step


def biased_mf(_: Stream) -> Callable[[str, str, float], float]:
    """River's BiasedMF, as the report of `make demo` has it."""
    peer = RiverBiasedMF(SCALE)

    def step(user: str, item: str, rating: float) -> float:
        score = peer.score(int(user), int(item))
        peer.learn(int(user), int(item), rating)
        return score

    return step


PEERS = {"river FMRegressor with profiles": factorisation_machine, "river BiasedMF": biased_mf}


def fed(name: str, stream: Stream) -> dict[str, Any]:
    """A peer in a loop over the events."""
    step = PEERS[name](stream)
    began = time.perf_counter()
    scores = np.array([step(*event) for event in stream.events])
    seconds = time.perf_counter() - began
    errors = scores - np.array([rating for _, _, rating in stream.events])
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
        subprocess.run([*command, *sizes], check=True, capture_output=True)
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
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure events a second and the error that they are worth, one core for each."""
    require_data(data)
    cores = sorted(os.sched_getaffinity(0))
    stream, runs = Stream(data, events), list[dict[str, Any]]()
    for name in track([*SYSTEMS, *PEERS] * repetitions, "stream", console=console):
        os.sched_setaffinity(0, cores[-1:])
        run = coldstream(name, data, events) if name in SYSTEMS else fed(name, stream)
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
