"""What runs of chaos did and showed: lines in runs/chaos/runs.jsonl, and from these the tables in docs/reliability.md."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from benchmarks.performance import filled


@dataclass
class Outcome:
    """What one run did and showed."""

    seed: int
    events: int
    nodes: int
    faults: Counter[str] = field(default_factory=Counter)
    deaths: list[str] = field(default_factory=list)
    """Processes that ended by themselves, or did not end well when asked to: none should."""
    seconds: float = 0.0
    recovery_seconds: float = 0.0
    """From the last event on until every event was scored and every update folded."""
    verify_seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    waiting: int = 0
    garbage: int = 0
    """Malformed events among the stream's own and beside them."""
    date: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).date().isoformat())

    @property
    def passed(self) -> bool:
        """Whether every promise was kept and nothing died of what was done to others."""
        return not self.findings and not self.waiting and not self.deaths

    @property
    def verdict(self) -> str:
        """The same in words."""
        if self.passed:
            return "kept every promise"
        return f"FAILED: {len(self.findings)} findings, {self.waiting} events not scored, ended: {', '.join(self.deaths) or 'none'}"

    def line(self) -> str:
        """As JSON on one line."""
        rounded = {name: round(value, 1) if isinstance(value, float) else value for name, value in vars(self).items()}
        return json.dumps(rounded) + "\n"

    @classmethod
    def read(cls, line: str) -> Self:
        """From such a line."""
        fields = json.loads(line)
        return cls(**fields | {"faults": Counter(fields["faults"])})


def table(runs: Sequence[Outcome]) -> str:
    """Two tables in Markdown: what each run showed, and how often it did what."""
    lines = [
        "| date | seed | events | malformed | brokers | faults | minutes | caught up after | ended by themselves | findings | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {run.date} | {run.seed} | {run.events:,} | {run.garbage:,} | {run.nodes} | {run.faults.total()} | {run.seconds / 60:.1f} "
        f"| {run.recovery_seconds:.0f} s | {len(run.deaths)} | {len(run.findings)} | {run.verdict} |"
        for run in runs
    ]
    kinds = sorted({kind for run in runs for kind in run.faults})
    lines += ["", "| fault | " + " | ".join(f"seed {run.seed}" for run in runs) + " | all |", "| --- " * (len(runs) + 2) + "|"]
    for kind in kinds:
        counts = [run.faults[kind] for run in runs]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + f" | {sum(counts)} |")
    return "\n".join(lines) + "\n"


def write_table(source: Path, page: Path) -> None:
    """Put the tables of the runs in ``source`` between the marks in ``page``. Raises `ValueError` where these are missing."""
    runs = [Outcome.read(line) for line in source.read_text().splitlines()]
    page.write_text(filled(page.read_text(), {"runs": f"\n{table(runs)}"}))
