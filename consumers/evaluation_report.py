"""What a person sees of `coldstream evaluate`: the bar while it trains, the table, the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from consumers.scenarios import SCENARIOS

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console

    from consumers.evaluate import Epoch

NAMES = {"coldstream": "Coldstream", "biases": "biases", "global_mean": "global mean"}
LINES_OF_A_RUN = 4
"""Lines that a run tells of its training where there is no terminal."""


class EpochBar:
    """Shows the epochs of all runs; used with ``with``."""

    def __init__(self, console: Console, *, runs: int, epochs: int) -> None:
        self._console = console
        self._epochs = epochs
        self._bar = Progress(
            TextColumn("seed {task.fields[seed]}, epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            TextColumn("training MAE {task.fields[mae]:.4f}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("evaluate", total=runs * epochs, seed="-", epoch=0, epochs=epochs, mae=float("nan"))

    def epoch(self, done: Epoch) -> None:
        """Take in an epoch."""
        self._bar.update(self._task, completed=done.run * self._epochs + done.epoch, seed=done.seed, epoch=done.epoch, mae=done.mae)
        if not self._console.is_terminal and done.epoch % -(-self._epochs // LINES_OF_A_RUN) == 0:
            self._console.print(f"seed {done.seed}, epoch {done.epoch}/{self._epochs}, training MAE {done.mae:.4f}", highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def results_table(report: dict[str, Any]) -> Table:
    """The results: means over users with their standard errors, and with more than one seed the deviation over seeds in brackets."""
    data, protocol = report["data"], report["protocol"]
    seeds = len(protocol["seeds"])
    table = Table(
        title=f"{data['name']}: {data['warm_users']:,} warm and {data['cold_users']:,} cold users, {data['warm_items']:,} warm and "
        f"{data['cold_items']:,} cold items, {data['training_ratings']:,} ratings to learn from; {seeds} seed{'s' * (seeds > 1)}",
        title_justify="left",
        caption="W warm, C cold; user - item. Mean ± standard error over users" + (" (deviation over seeds)." if seeds > 1 else "."),
        caption_justify="left",
    )
    for column in ("", "", "users"):
        table.add_column(column)
    for column in ("MAE", "RMSE", "nDCG@1", "nDCG@3", "MAE less biases'"):
        table.add_column(column, justify="right")
    for scenario in SCENARIOS:
        for number, (method, results) in enumerate(report["results"].items()):
            found = results[scenario]
            cells = [shown(found["mae"]), shown(found["rmse"]), shown(found["ndcg_1"], digits=3), shown(found["ndcg_3"], digits=3)]
            less = "" if method == "biases" else shown(found["mae_less_biases"], sign="+")
            last = number == len(report["results"]) - 1
            first = number == 0
            table.add_row(scenario * first, NAMES[method], f"{found['users']:,}" * first, *cells, less, end_section=last)
    return table


def shown(value: dict[str, float | None], *, digits: int = 4, sign: str = "") -> str:
    """A mean with its standard error and its deviation over seeds, as far as they are known; a dash where nothing is."""
    if value["mean"] is None:
        return "–"
    error = "" if value["se"] is None else f" ± {value['se']:.{digits}f}"
    return f"{value['mean']:{sign}.{digits}f}{error}" + (f" ({value['sd']:.{digits}f})" if value["sd"] else "")


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
