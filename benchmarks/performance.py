"""docs/performance.md: its tables, made from the files of benchmarks/results and from nothing else.

.venv/bin/python -m benchmarks.performance
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs/performance.md")
RESULTS = Path("benchmarks/results")
STAGES = ("poll", "decode", "support", "adapt", "gradient", "encode", "commit", "adopt")
Run = Mapping[str, Any]


def save(path: Path, machine: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """Write what was measured, a run to a line, seconds to the microsecond."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(rounded(run)) for run in runs)
    path.write_text(f'{{"machine": {json.dumps(machine)},\n"runs": [\n{lines}\n]}}\n')


def rounded(value: Any) -> Any:  # noqa: ANN401 - whatever JSON has
    """The same with six digits after the point."""
    match value:
        case float():
            return round(value, 6)
        case dict():
            return {key: rounded(part) for key, part in value.items()}
        case list() | tuple():
            return [rounded(part) for part in value]
    return value


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def each(run: Run, name: str) -> str:
    """Microseconds of processor that a process used for an event."""
    used = run["processor"]
    return f"{1e6 * used[name] / run['scored']:,.0f}" if name in used else ""


def throughput(runs: Sequence[Run]) -> str:
    """How many events a second are scored from a topic filled before, and what each costs."""
    return table(
        ["", "events/s", "worker us", "trainer us", "broker us"],
        ([run["name"], f"{run['events_per_second']:,.0f}", *(each(run, name) for name in ("worker", "trainer", "broker"))] for run in runs),
    )


def stages(runs: Sequence[Run]) -> str:
    """Where a worker's time goes: by the clock and, after the stroke, of its own thread's processor, both in microseconds an event."""

    def cells(run: Run) -> list[str]:
        seen = run["worker"]
        return [" / ".join(f"{1e6 * seen[of][stage] / run['scored']:,.0f}" for of in ("stages", "processor")) for stage in STAGES]

    return table(["", *STAGES], ([run["name"], *cells(run)] for run in runs if run["system"] != "quixstreams"))


def latency(runs: Sequence[Run]) -> str:
    """From an event's send to its score in the hands of a read_committed reader."""
    return table(
        ["", "p50 ms", "p90 ms", "p99 ms", "longest ms", "last one waited s"],
        (
            [run["name"], *(f"{run['latency_ms'][key]:,.0f}" for key in ("p50", "p90", "p99", "max")), f"{run['caught_up_seconds']:.1f}"]
            for run in runs
        ),
    )


def adaptation(runs: Sequence[Run]) -> str:
    """Users a second by the engine and by the plain model, each the median of its repetitions."""

    def cells(run: Run) -> list[str]:
        rates = run["users_per_second"]
        return [
            run["name"],
            f"{rates['engine']:,.0f}",
            f"{rates['plain']:,.0f}",
            f"{run['ratio']:.1f}",
            f"{len(run['seconds']['engine']):,}",
        ]

    return table(["", "engine users/s", "plain model users/s", "ratio", "repetitions"], map(cells, runs))


def sections(results: Path = RESULTS) -> dict[str, str]:
    """Every table by the name of its place in the page."""
    measured = json.loads((results / "end-to-end.json").read_text())
    kinds: dict[str, list[Run]] = {}
    for run in measured["runs"]:
        kinds.setdefault(run["kind"], []).append(run)
    machine = measured["machine"]
    return {
        "machine": f"{machine['cores']} cores, Python {machine['python']}, {machine['system']}",
        "throughput": throughput(kinds["capacity"]),
        "stages": stages(kinds["capacity"]),
        "latency": latency(kinds["latency"]),
        "disturbed": latency(kinds["disturbed"]),
        "sustained": latency(kinds["sustained"]),
        "adaptation": adaptation(json.loads((results / "adaptation.json").read_text())["runs"]),
    }


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between the two marks that bear its name. Raises `ValueError` where marks are missing."""
    for name, text in tables.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not begin or not end:
            raise ValueError(f"the page has no place for {name}")
        page = f"{before}{begin}{text}\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(), sections()))
