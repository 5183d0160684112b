"""The demo, killed with kill -9 at random moments: its scores must be those of the run that nobody disturbed, bit for bit.

Both runs are `coldstream demo` in processes of their own. The second is killed when it has come to a random event, a random part of a step
later, and started again. It fails if the scores differ, or if more than one micro-batch a kill was done twice.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from streaming.report import Report, read_report

_TAIL_BYTES = 2000
_TO = re.compile(rb'"to":(\d+)')
_LOOK_SECONDS = 0.005
_STEP_SECONDS = 0.04


class Failed(Exception):
    """The demo itself did not run."""


class Demo(NamedTuple):
    """One run of the demo in a folder, over the first ``events`` events."""

    out: Path
    data: Path
    events: int

    def start(self) -> subprocess.Popen[bytes]:
        """Start it, or start it again; what it says is added to ``output.txt``."""
        command = [sys.executable, "-c", "from consumers.cli import main; main()", "demo", "--out", str(self.out), "--data", str(self.data)]
        with (self.out / "output.txt").open("ab") as output:
            return subprocess.Popen([*command, "--events", str(self.events), "--port", "0"], stdout=output, stderr=subprocess.STDOUT)

    def reached(self) -> int:
        """The offset up to which steps have begun, by the run journal."""
        try:
            with (self.out / "journal.jsonl").open("rb") as journal:
                journal.seek(max(0, journal.seek(0, os.SEEK_END) - _TAIL_BYTES))
                found = _TO.findall(journal.read())
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def follow(self, process: subprocess.Popen[bytes], until: int, bar: Progress, task: TaskID) -> bool:
        """Wait until it has come to an event, or has ended; returns whether it still runs. Raises `Failed` if it ended badly."""
        while process.poll() is None:
            reached = self.reached()
            bar.update(task, completed=reached)
            if reached >= until:
                return True
            time.sleep(_LOOK_SECONDS)
        if process.returncode:
            raise Failed(f"the demo in {self.out} ended with code {process.returncode}; see {self.out / 'output.txt'}")
        bar.update(task, completed=self.events)
        return False


def undisturbed(demo: Demo, bar: Progress) -> None:
    """Run it from start to end."""
    demo.follow(demo.start(), demo.events + 1, bar, bar.add_task("undisturbed", total=demo.events, kills=""))


def killed(demo: Demo, moments: list[int], dice: random.Random, bar: Progress) -> None:
    """Run it to the end, killed when it has come to each of these events."""
    task = bar.add_task("killed", total=demo.events, kills="")
    process = demo.start()
    try:
        for number, moment in enumerate(moments, 1):
            if not demo.follow(process, moment, bar, task):
                raise Failed(f"the demo in {demo.out} ended before kill {number}, at event {moment}")
            time.sleep(dice.uniform(0, _STEP_SECONDS))
            process.kill()
            if process.wait() != -signal.SIGKILL:
                raise Failed(f"the demo in {demo.out} ended before kill {number}, at event {moment}")
            bar.update(task, kills=f"{number} kills")
            process = demo.start()
        demo.follow(process, demo.events + 1, bar, task)
    finally:
        process.kill()
        process.wait()


def compare(calm: Report, killed: Report, events: int, kills: int) -> tuple[Table, bool]:
    """Both runs over so many events side by side, and whether the second kept the promise."""
    table = Table("", "undisturbed", f"killed {kills} times", "", title="kill -9")
    bound = events + kills * int(killed.settings["worker"]["micro_batch"])
    repeated = killed.events_processed is not None and events <= killed.events_processed <= bound
    held = {
        "scores": (calm.scores, killed.scores, killed.scores == calm.scores == events),
        "scores_sha256": (calm.scores_sha256[:16], killed.scores_sha256[:16], killed.scores_sha256 == calm.scores_sha256),
        "MAE": tuple(f"{report.results['coldstream'].mae:.6f}" for report in (calm, killed)),
        "runs": (calm.runs, killed.runs),
        f"events_processed (at most {bound:,})": (calm.events_processed, killed.events_processed, repeated),
        "seconds of processing": tuple(f"{report.seconds or 0:.1f}" for report in (calm, killed)),
    }
    kept = True
    for name, (one, other, *checks) in held.items():
        verdict = "" if not checks else "same" if checks == [True] and one == other else "within" if checks == [True] else "FAILED"
        kept = kept and verdict != "FAILED"
        table.add_row(name, str(one), str(other), verdict)
    return table, kept


def main(
    kills: Annotated[int, typer.Option(help="How often it is killed.", min=1)] = 10,
    events: Annotated[int | None, typer.Option(help="Only the first so many events.", min=200)] = None,
    seed: Annotated[int, typer.Option(help="Of the random moments.")] = 1,
    data: Annotated[Path, typer.Option(help="Where MovieLens-100K lies.")] = Path("data/ml-100k"),
    out: Annotated[Path, typer.Option(help="Folder for both runs; what is in it is replaced.")] = Path("runs/kill-demo"),
) -> None:
    """Run the demo twice, once undisturbed and once killed at random moments, and compare."""
    with (data / "ml-100k.inter").open("rb") as lines:
        total = sum(1 for _ in lines) - 1
    total = min(total, events or total)
    demos = [Demo(out / name, data, total) for name in ("a", "b")]
    for demo in demos:
        shutil.rmtree(demo.out, ignore_errors=True)
        demo.out.mkdir(parents=True)
    dice = random.Random(seed)
    # The last hundred events are spared, for a kill after the end shows nothing.
    moments = sorted(dice.randrange(total - 100) for _ in range(kills))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[kills]}"))
    try:
        with Progress(*columns, console=console) as bar:
            undisturbed(demos[0], bar)
            killed(demos[1], moments, dice, bar)
    except Failed as error:
        console.print(f"kill-demo: {error}", style="red")
        raise typer.Exit(1) from None
    reports = [read_report(demo.out / "report.json") for demo in demos]
    table, kept = compare(reports[0], reports[1], total, kills)
    console.print(table)
    if not kept:
        console.print("kill-demo: the killed run is not the undisturbed one", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
