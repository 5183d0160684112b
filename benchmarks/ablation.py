"""What each part of the model adds: the demo again with parts switched off, through the whole system, on the same events.

Every variant is a run of ``coldstream demo`` in a process of its own, two at a time. Errors come from the logs that the runs leave,
differences to the full model are paired event by event, and their standard errors are clustered by user. A finished variant is not run
again (``--restart`` does). Gradient-step variants cost about ten times as much an event, so all are compared on the first ``--events``.

    make ablation                       # all variants, the first 20,000 events
    make ablation ARGS="--events 100000 --only memory"
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from streaming.brokers import open_log
from streaming.prequential import clustered_se, coverage, errors
from streaming.scored import ScoredRun, read_run
from streaming.validation import Limits

RESULTS = Path("benchmarks/results/ablation.json")


class Variant(NamedTuple):
    """A run: its name, the group it belongs to, and what it sets."""

    name: str
    group: str
    sets: tuple[str, ...]


PAPER = ("preset=paper", "worker.support_size=20")
VARIANTS = (
    Variant("default (memory = both)", "memory", ()),
    Variant("memory = feature", "memory", ("model.memory=feature",)),
    Variant("memory = task", "memory", ("model.memory=task",)),
    Variant("memory = off", "memory", ("model.memory=off",)),
    Variant("default, no rehearsal", "rest", ("rehearsal.users=0",)),
    Variant("default, support 50", "rest", ("worker.support_size=50",)),
    Variant("default, no recency", "rest", ("model.recency=0",)),
    Variant("default, stale (micro-batch 256, update 16)", "rest", ("worker.micro_batch=256",)),
    Variant("fast (micro-batch 256, update 64)", "rest", ("worker.micro_batch=256", "trainer.meta_update=64")),
    Variant("paper", "paper", PAPER),
    Variant("paper, memory = off", "paper", (*PAPER, "model.memory=off")),
    Variant("MeLU (off + decision)", "paper", (*PAPER, "model.memory=off", "model.local=decision")),
    Variant("paper, local = none", "paper", (*PAPER, "model.local=none")),
)
"""The first of the group ``memory`` is what all others are compared with."""


def folder_of(variant: Variant, out: Path, events: int) -> Path:
    """Where a variant's run is kept."""
    return out / f"{''.join(char if char.isalnum() else '-' for char in variant.name)}-{events}"


def run(variant: Variant, out: Path, events: int, *, restart: bool) -> Path:
    """Run a variant unless it is there already. Raises `RuntimeError` with what the run said where it failed."""
    folder = folder_of(variant, out, events)
    if restart or not (folder / "report.json").exists():
        sets = [word for each in (*variant.sets, "metrics.enabled=false") for word in ("--set", each)]
        program = str(Path(sys.executable).with_name("coldstream"))
        command = [program, "demo", "--out", str(folder), "--events", str(events), *sets]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{variant.name}: exit code {done.returncode}\n{done.stderr}")
    return folder


def read(folder: Path) -> tuple[ScoredRun, dict[str, Any]]:
    """The scores of a finished run, and its report."""
    with open_log(f"embedded:{folder / 'log.db'}") as log:
        return read_run(log, Limits()), json.loads((folder / "report.json").read_text())


def compare(run: ScoredRun, base: ScoredRun) -> dict[str, float | None]:
    """Errors of a run, and its paired difference to ``base`` on the events that both scored."""
    both = run.scored & base.scored
    few = both & (run.earlier >= 1) & (run.earlier <= 5)
    whole = errors(run.rating[both], run.score[both], run.user[both])
    change = (np.abs(run.score - run.rating) - np.abs(base.score - base.rating))[both]
    return {
        "mae": whole.mae,
        "rmse": whole.rmse,
        "mae_1_5": errors(run.rating[few], run.score[few], run.user[few]).mae,
        "difference": float(change.mean()),
        "difference_se": clustered_se(change, run.user[both]),
        "coverage_80": coverage(run),
    }


def main(
    events: Annotated[int, typer.Option(min=100, help="How many events, from the first.")] = 20_000,
    out: Annotated[Path, typer.Option(help="Where the runs are kept.")] = Path("runs/ablation"),
    only: Annotated[str | None, typer.Option(help="One group: memory, rest or paper.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 2,
    restart: Annotated[bool, typer.Option("--restart", help="Run finished variants again.")] = False,
    results: Annotated[Path, typer.Option(help="Where the figures go.", dir_okay=False)] = RESULTS,
) -> None:
    """Run all variants and compare them with the full model."""
    console = Console()
    chosen = [variant for variant in VARIANTS if only is None or variant.group == only or variant is VARIANTS[0]]
    with Progress(console=console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("variants", total=len(chosen))

        def one(variant: Variant) -> Path:
            folder = run(variant, out, events, restart=restart)
            progress.advance(task)
            return folder

        folders = list(pool.map(one, chosen))
    base, _ = read(folders[0])
    rows = []
    table = Table(
        title=f"first {events:,} events of MovieLens-100K; difference of MAE to the first row, paired, ± its standard error by user"
    )
    for heading in ("variant", "MAE", "RMSE", "MAE 1-5 earlier", "difference", "80 % interval", "events/s"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for variant, folder in zip(chosen, folders, strict=True):
        scored, report = read(folder)
        row = compare(scored, base) | {"events_per_second": report["events_per_second"]}
        rows.append({"variant": variant.name, "sets": variant.sets, **row})
        difference = "-" if variant is chosen[0] else f"{row['difference']:+.4f} ± {row['difference_se']:.4f}"
        inside = "-" if row["coverage_80"] is None else f"{row['coverage_80']:.1%}"
        table.add_row(
            variant.name,
            f"{row['mae']:.4f}",
            f"{row['rmse']:.4f}",
            f"{row['mae_1_5']:.4f}",
            difference,
            inside,
            f"{row['events_per_second']:,.0f}",
        )
    console.print(table)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_bytes(msgspec.json.format(msgspec.json.encode({"events": events, "variants": rows})))
    console.print(f"figures: {results}")


if __name__ == "__main__":
    typer.run(main)
