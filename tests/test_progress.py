"""What a progress bar says where its output is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from consumers.lockstep import Progress
from consumers.progress import StepBar
from streaming.metrics import StepReport


def told(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[float, int]], total: int) -> list[str]:
    """The lines of a run whose steps ended at these times with so many events each."""
    now, done, out = [0.0], 0, io.StringIO()
    monkeypatch.setattr("consumers.progress.time.monotonic", lambda: now[0])
    with StepBar(Console(file=out, width=200)) as bar:
        for at, events in steps:
            now[0], done = at, done + events
            report = StepReport(partition=0, events=events, errors=[0.5] * events)
            bar.step(Progress(done, total, report))
    return out.getvalue().splitlines()


def test_what_is_compiled_before_the_first_step_ends_is_none_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(32.0, 16), *((32.0 + n, 100) for n in range(1, 41))]
    assert told(monkeypatch, steps, 4016) == [
        "1,616/4,016 events, 100 events/s, running MAE 0.5000",
        "3,216/4,016 events, 100 events/s, running MAE 0.5000",
        "4,016/4,016 events, 100 events/s, running MAE 0.5000",
    ]


def test_a_run_of_one_step_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, [(2.0, 10)], 10) == ["10/10 events, 5 events/s, running MAE 0.5000"]
