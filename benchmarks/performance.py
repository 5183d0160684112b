"""docs/performance.md: its tables, made from the files of benchmarks/results and from nothing else.

.venv/bin/python -m benchmarks.performance
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path("docs/performance.md")
RESULTS = Path("benchmarks/results")
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
    """Microseconds of processor that a process used for an event; several workers' together."""
    used = [seconds for process, seconds in run["processor"].items() if process.partition("-")[0] == name]
    return f"{1e6 * sum(used) / counted(run):,.0f}" if used else ""


def counted(run: Run) -> int:
    """How many events were scored while processor time was counted."""
    found: int = run.get("counted", run["scored"])
    return found


def errors(run: Run) -> str:
    """How far the scores of a run were from the ratings."""
    return f"{run['mae']:.4f} / {run['rmse']:.4f}"


def throughput(runs: Sequence[Run]) -> str:
    """How many events a second are scored from a topic filled before, what each costs, and how well all were."""

    def cells(run: Run) -> list[str]:
        used = (each(run, name) for name in ("worker", "trainer", "broker"))
        return [run["name"], f"{run['events_per_second']:,.0f}", *used, f"{run['scored']:,}", errors(run)]

    return table(["", "events/s", "worker us", "trainer us", "broker us", "events", "MAE / RMSE"], map(cells, runs))


def workers(runs: Sequence[Run]) -> str:
    """Events for each second of processor time of the workers, and their share of those of one worker."""
    each_second = [counted(run) / sum(used for name, used in run["processor"].items() if name.startswith("worker")) for run in runs]
    rows = [
        [run["name"], f"{run['events_per_second']:,.0f}", f"{events:,.0f}", f"{events / each_second[0]:.2f}"]
        for run, events in zip(runs, each_second, strict=True)
    ]
    return table(["", "events/s", "events per worker-processor-second", "of one worker's"], rows)


def stages(runs: Sequence[Run]) -> str:
    """Where a worker's time goes: by the clock and, after the stroke, of its own thread's processor, both in microseconds an event."""
    workers = [run for run in runs if run["system"] != "quixstreams"]
    measured = [stage for stage, used in workers[0]["worker"]["stages"].items() if used]

    def cells(run: Run) -> list[str]:
        seen = run["worker"]
        return [" / ".join(f"{1e6 * seen[of][stage] / run['scored']:,.0f}" for of in ("stages", "processor")) for stage in measured]

    return table(["", *measured], ([run["name"], *cells(run)] for run in workers))


def latency(runs: Sequence[Run]) -> str:
    """From an event's send to its score in the hands of a read_committed reader."""

    def cells(run: Run) -> list[str]:
        waits = (f"{run['latency_ms'][key]:,.0f}" for key in ("p50", "p90", "p99", "max"))
        return [run["name"], *waits, f"{run['caught_up_seconds']:.1f}", f"{run['scored'] / run['wall_seconds']:,.0f}", errors(run)]

    return table(["", "p50 ms", "p90 ms", "p99 ms", "longest ms", "last one waited s", "scored/s", "MAE / RMSE"], map(cells, runs))


def adaptation(runs: Sequence[Run]) -> str:
    """Users a second by the engine, the median of its repetitions, and how many times as long each peer took, the median over turns.

    Then the same of the engine and of the plain model called in a row.
    """
    peers = ("plain", "loop", "lean loop", "vmap", "bare")

    def cells(run: Run) -> list[str]:
        beside = (f"{run['ratios'][name]:.2f}" if name in run["ratios"] else "" for name in peers)
        low, high = deciles(run["seconds"]["engine"])
        spread = f"{run['users'] / high:,.0f} to {run['users'] / low:,.0f}"
        row = run["in_a_row"]
        warm = [f"{row['engine']:,.0f}", f"{row['engine'] / row['plain']:.2f}"]
        return [run["name"], str(run["threads"]), f"{run['users_per_second']['engine']:,.0f}", spread, *beside, *warm]

    heads = [
        "",
        "threads",
        "engine users/s",
        "its deciles",
        "plain",
        "loop",
        "lean loop",
        "vmap(grad)",
        "bare",
        "engine in a row",
        "plain in a row",
    ]
    return table(heads, map(cells, runs))


def deciles(took: Sequence[float]) -> tuple[float, float]:
    """The tenth and the ninetieth percentile."""
    ordered = sorted(took)
    return ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def limit(runs: Sequence[Run]) -> str:
    """What gradient steps cannot do without, and the share of it that the engine reaches."""
    rows = []
    for run in runs:
        if run["products_flop"]:
            bare = statistics.median(run["seconds"]["bare"])
            flop = run["products_flop"]
            row = run["in_a_row"]
            shares = [f"{100 * share:.0f} %" for share in (run["ratios"]["bare"], row["engine"] / row["bare"])]
            rows.append(
                [run["name"], f"{flop / run['users'] / 1e6:.2f}", f"{flop / bare / 1e9:.0f}", f"{run['users'] / bare:,.0f}", *shares]
            )
    return table(["", "MFLOP a user", "GFLOP/s of the bare products", "users/s of these", "reached", "in a row"], rows)


def catalogue(runs: Sequence[Run]) -> str:
    """Milliseconds a user, the median of the repetitions."""
    ways = ("adapt", "adapt and choose", "after a new version", "after a new profile", "bare products")

    def cells(run: Run) -> list[str]:
        took = run["seconds"]
        return [run["name"], *(f"{1e3 * statistics.median(took[way]) / run['users']:.2f}" if way in took else "" for way in ways)]

    return table(["", *(f"{way}, ms" for way in ways)], map(cells, runs))


def large_catalogue(runs: Sequence[Run]) -> str:
    """The same of many more items, in seconds a user, and what it takes."""
    ways = ("adapt and choose", "after a new version", "after a new profile")

    def cells(run: Run) -> list[str]:
        took, memory = run["seconds"], run["resident"]
        seconds = (f"{statistics.median(took[way]) / run['users']:.2f}" if way in took else "" for way in ways)
        return [run["name"], *seconds, f"{memory['before'] / 1e6:,.0f}", f"{memory['peak'] / 1e6:,.0f}"]

    return table(["", *(f"{way}, s" for way in ways), "resident before, MB", "at most, MB"], map(cells, runs))


def growth(runs: Sequence[Run]) -> str:
    """What an event costs at each size, medians over repetitions."""
    cases: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        cases.setdefault((run["curve"], run["size"]), []).append(run)

    def cells(case: tuple[str, int], found: Sequence[Run]) -> list[str]:
        low, high = min(run["processor_us"] for run in found), max(run["processor_us"] for run in found)
        middle = statistics.median(run["processor_us"] for run in found)
        memory = max(run["memory_peak_bytes"] for run in found) / 1e6
        rows = f"{found[0]['rows']:.1f}"
        return [f"{case[1]:,} {case[0]}", f"{middle:,.0f}", f"{low:,.0f} to {high:,.0f}", rows, f"{memory:,.0f}"]

    return table(
        ["", "us of processor an event", "of all repetitions", "rows that learn", "resident MB"], (cells(*item) for item in cases.items())
    )


def stream(runs: Sequence[Run]) -> str:
    """Events a second and what they are worth."""

    def cells(run: Run) -> list[str]:
        whole = f"{run['whole_seconds']:.0f}" if "whole_seconds" in run else ""
        return [run["name"], str(run["cores"]), f"{run['events_per_second']:,.0f}", f"{run['mae']:.4f}", f"{run['rmse']:.4f}", whole]

    return table(["", "cores", "events/s", "MAE", "RMSE", "the whole run, s"], map(cells, runs))


def restorations(measured: Run) -> str:
    """What it takes to have all support sets of a partition at hand."""

    def cells(name: str, found: Run) -> list[str]:
        disk = ("store_bytes", "store_peak_bytes") if "memory" not in name else ()
        sizes = [f"{found[size] / 1e6:,.0f}" for size in ("memory_peak_bytes", *disk)]
        took = [f"{found[key]:,.1f}" for key in ("seconds", "processor_seconds")]
        return [name, f"{found['records']:,}", *took, *sizes, *[""] * (3 - len(sizes))]

    heads = ["", "records read", "s", "s of processor", "resident MB", "disk MB", "at most"]
    return table(heads, (cells(*item) for item in measured["restorations"].items()))


def state_rates(measured: Run) -> str:
    """Support sets and events a second of one store."""
    heads = ["", "a second", "a second of processor"]
    names = ("reads", "writes", "events")
    return table(
        heads, ([name, *(f"{measured['rates'][f'{name}_per_{of}']:,.0f}" for of in ("second", "processor_second"))] for name in names)
    )


def described(machine: Mapping[str, Any]) -> str:
    """What a file's figures were measured on."""
    processor = machine.get("processor") or "a processor that was not noted"
    return f"{machine['cores']} cores of {processor}, Python {machine['python']}, {machine['system']}"


def sections(results: Path = RESULTS) -> dict[str, str]:
    """Every table by the name of its place in the page."""
    names = ("end-to-end", "adaptation", "large-catalogue", "stream", "restore", "growth")
    files = {name: json.loads((results / f"{name}.json").read_text()) for name in names}
    kinds: dict[str, list[Run]] = {}
    for run in files["end-to-end"]["runs"]:
        kinds.setdefault(run["kind"], []).append(run)

    def runs(name: str, kind: str = "") -> list[Run]:
        return [run for run in files[name]["runs"] if not kind or run["kind"] == kind]

    return {f"machine of {name}": described(file["machine"]) for name, file in files.items()} | {
        "throughput": throughput(kinds["capacity"]),
        "workers": workers(kinds.get("workers", [])),
        "stages": stages(kinds["capacity"]),
        "latency": latency(kinds["latency"]),
        "disturbed": latency(kinds["disturbed"]),
        "sustained": latency(kinds["sustained"]),
        "adaptation": adaptation(runs("adaptation", "adaptation")),
        "limit": limit(runs("adaptation", "adaptation")),
        "catalogue": catalogue(runs("adaptation", "catalogue")),
        "large-catalogue": large_catalogue(runs("large-catalogue")),
        "growth": growth(runs("growth")),
        "stream": stream(runs("stream")),
        "restorations": restorations(files["restore"]),
        "state-rates": state_rates(files["restore"]),
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
