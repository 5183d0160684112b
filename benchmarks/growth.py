"""What an event costs as users, items and supports grow: whole steps of worker and trainer in lockstep, on an embedded log.

So many users are held, each with a support set, and so many items have a profile and a row in the model version; then events of random
users about random items are scored, learned from and committed. Of a larger catalogue more different items are rated, so that more rows
learn from each event; along the curve "catalogue" it grows and what is rated does not. Support sets are held in memory: what a local store
adds is measured in `benchmarks.restore`. A case is a process of its own, and the cases of a curve are measured by turns, several times.

    .venv/bin/python -m benchmarks.growth
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measuring import machine
from benchmarks.performance import save
from benchmarks.restore import memory_peak
from consumers import lockstep
from consumers.demo_files import SETTINGS as DEMO
from consumers.settings import Settings
from consumers.system import System
from streaming.chunks import Joiner
from streaming.codec import decode, encode, texts
from streaming.events import Interaction, Support, Update
from streaming.log import Message, TopicPartition, present

RESULTS = Path("benchmarks/results/growth.json")
PLOTS = Path("docs/growth.svg")
BASE = {"users": 10_000, "items": 10_000, "support": 50}
CURVES = {
    "users": [1_000, 10_000, 100_000, 1_000_000],
    "items": [1_000, 10_000, 100_000, 1_000_000],
    "catalogue": [1_000, 10_000, 100_000, 1_000_000],
    "support": [10, 25, 50, 100, 200, 400],
}
RATED = 1_000
"""Different items that are rated, whatever the size of the catalogue that they are spread over, along its curve."""
NAMES = {"items": "items, all of them rated", "catalogue": f"items, {RATED:,} of them rated", "support": "interactions in a support set"}
GENRES = [f"genre{number}" for number in range(18)]
CLOCK = 1_700_000_000_000

console = Console()


def settings_of(folder: Path, support: int) -> Settings:
    """The setting `fast`, of one partition."""
    return Settings.model_validate(
        {
            "broker": f"embedded:{folder / 'log.db'}",
            "topics": {"partitions": 1},
            "metrics": {"enabled": False},
            "worker": {"support_size": support, "micro_batch": 256},
            "trainer": {"meta_update": 64},
            "schema": tomllib.loads(DEMO.read_text())["schema"],
            "log_level": "error",
        }
    )


def popular(items: int, catalogue: int) -> Callable[[int], list[str]]:
    """Draws so many of the ``items`` of a catalogue that are rated, the k-th most popular k times as rarely as the first.

    These lie all over the catalogue, as what was added to it over the years does.
    """
    weights = np.cumsum(1 / np.arange(1, items + 1))
    rng = np.random.default_rng(1)
    rated = rng.permutation(catalogue)[:items]
    return lambda count: [f"i{item}" for item in rated[np.searchsorted(weights, weights[-1] * rng.random(count))].tolist()]


def event(dice: random.Random, users: int, item: str) -> Message:
    """An interaction of any user."""
    user = f"u{dice.randrange(users)}"
    return Message("interactions", user.encode(), encode(Interaction(user, item, float(dice.randint(1, 5)), CLOCK)))


def sizes_of(curve: str, size: int) -> dict[str, int]:
    """The sizes of a case: all items of a catalogue are rated, but along its own curve."""
    sizes = BASE | ({"items": RATED} if curve == "catalogue" else {}) | {curve: size}
    return {"catalogue": sizes["items"]} | sizes


def case(users: int, items: int, catalogue: int, support: int, events: int) -> dict[str, Any]:
    """Microseconds of the clock and of the processor that an event takes, here and now, how many rows learn from it, the peak of memory."""
    dice, drawn = random.Random(1), popular(items, catalogue)
    with tempfile.TemporaryDirectory() as folder, System(settings_of(Path(folder), support)) as system:
        trainer = system.trainer()
        worker = system.worker(trainer.versions)
        worker.tables.assign([0])
        worker.open(0)
        profiles: list[dict[str, Any]] = [
            {"class": dice.sample(GENRES, dice.randint(1, 3)), "release_year": float(dice.randint(1930, 1999))} for _ in range(500)
        ]
        model, names = worker.model, [f"i{item}" for item in range(catalogue)]
        for item, name in enumerate(names):
            model.items.set(name, profiles[item % 500])
        model.item_table.assign([f"id={name}" for name in names], 0.1 * torch.randn(catalogue, model.item_table.width))
        # As in a process that has run for long: it has seen them all.
        model.items.places(names)
        model.users.places([f"u{user}" for user in range(users)])
        sets = worker.held[0].support
        # A thousand different histories; more would take longer to make up than to measure.
        histories = [[(item, float(dice.randint(1, 5)), CLOCK) for item in drawn(support)] for _ in range(1_000)]
        for user in range(users):
            sets.held.put(f"u{user}", encode(Support(histories[user % 1_000], ("interactions", 0, 0), support, user)))
        sets.ordinals_given = users
        sets.held.grew(None)
        for start in range(0, events, 4096):
            system.log.append([event(dice, users, item) for item in drawn(min(4096, events - start))])
        tp, reader, size = TopicPartition("interactions", 0), system.log.reader(), system.settings.worker.micro_batch
        reader.assign({tp: 0})
        took = list[tuple[float, float]]()
        for _ in range(events // size):
            records = lockstep.read(system.log, reader, size, tp)
            began, busy = time.perf_counter(), time.process_time()
            worker.step(0, records, system.settings.group_id)
            trainer.catch_up()
            took.append((time.perf_counter() - began, time.process_time() - busy))
        reader.close()
        rows = rows_learned(system) / (len(took) * size)
    took = took[len(took) // 2 :]  # What is compiled or looked up for the first time is not what a step costs.
    clock, processor = (1e6 * statistics.median(step) / size for step in zip(*took, strict=True))
    return {"clock_us": clock, "processor_us": processor, "rows": rows, "steps": len(took), "memory_peak_bytes": memory_peak()}


def rows_learned(system: System) -> int:
    """How many rows of embedding tables the updates in the log hold a gradient of."""
    joiner, topic = Joiner(), system.topics["updates"].name
    values = filter(None, map(joiner.feed, present(system.log, [TopicPartition(topic, 0)])))
    updates = (decode(value, Update, what="an update") for value in values)
    return sum(len(texts(rows.ids, what="ids")) for update in updates for rows in update.rows.values())


def apart(size: dict[str, int], events: int) -> dict[str, Any]:
    """A case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--case", json.dumps(size), "--events", str(events)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # Before it stands what was logged.
    return found


def plot(runs: list[dict[str, Any]]) -> Figure:
    """Microseconds an event along each curve."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    for axes, (curve, sizes) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        found = {size: [run["processor_us"] for run in runs if run["curve"] == curve and run["size"] == size] for size in sizes}
        found = {size: each for size, each in found.items() if each}
        axes.plot(list(found), [statistics.median(each) for each in found.values()], marker="o", color="#2a6f97")
        axes.fill_between(list(found), list(map(min, found.values())), list(map(max, found.values())), alpha=0.25, color="#2a6f97")
        axes.set(xlabel=NAMES.get(curve, curve), ylim=(0, None))
        if curve != "support":
            axes.set_xscale("log")
    figure.axes[0].set_ylabel("µs of processor an event")
    return figure


def main(
    repetitions: Annotated[int, typer.Option(help="Of each case, by turns.", min=1)] = 3,
    events: Annotated[int, typer.Option(help="Scored in each case.", min=1024)] = 8192,
    results: Annotated[Path, typer.Option(help="Where the figures go.", dir_okay=False)] = RESULTS,
    plots: Annotated[Path, typer.Option(help="Where the curves go.")] = PLOTS,
    alone: Annotated[str, typer.Option("--case", help="Measure one case, given as JSON, and print it.", hidden=True)] = "",
) -> None:
    """Measure `fast`, everything learning, on one core each for worker and trainer by turns."""
    if alone:
        print(json.dumps(case(**json.loads(alone), events=events)))
        return
    cases = [(curve, size) for curve, sizes in CURVES.items() for size in sizes]
    runs: list[dict[str, Any]] = [
        {"curve": curve, "size": size} | sizes_of(curve, size) | apart(sizes_of(curve, size), events)
        for curve, size in track([each for _ in range(repetitions) for each in cases], "growth", console=console)
    ]
    table = Table(
        "", "size", "µs of processor an event", "µs by the clock", "rows that learn, an event", "resident MB", title="`fast` in lockstep"
    )
    for curve, size in cases:
        found = [run for run in runs if (run["curve"], run["size"]) == (curve, size)]
        medians = [f"{statistics.median(run[key] for run in found):,.0f}" for key in ("processor_us", "clock_us")]
        table.add_row(
            curve, f"{size:,}", *medians, f"{found[0]['rows']:.1f}", f"{max(run['memory_peak_bytes'] for run in found) / 1e6:,.0f}"
        )
    console.print(table)
    save(results, machine() | {"base": BASE, "events": events}, runs)
    plot(runs).savefig(plots, metadata={"Date": None})
    console.print(f"figures: {results}, curves: {plots}")


if __name__ == "__main__":
    typer.run(main)
