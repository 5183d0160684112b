"""End to end on a real Apache Kafka: how many events a second, how long from an event to its score, and quixstreams beside it.

One worker and one trainer of Coldstream, exactly once, everything learning; each run on a broker of its own, all on the same cores. The
peer does what a user would write instead: it keeps a user's last 20 interactions and learns nothing. Load comes from `benchmarks.load`.

    make bench-kafka                                  # all of it, about 40 minutes
    make bench-kafka ARGS="--only capacity --seconds 60"
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from prometheus_client import ProcessCollector
from rich.console import Console
from rich.table import Table

from consumers.processes import Process, Processes
from tests.kafka_cluster import KafkaCluster

RESULTS = Path("benchmarks/results/end-to-end.json")
PEERS = Path(".cache/venv-peers/bin/python")
SETTINGS = {
    "accurate": {"worker.micro_batch": 16, "trainer.meta_update": 16},
    "fast": {"worker.micro_batch": 256, "trainer.meta_update": 64},
}
"""The named settings of docs/performance.md; all else is as it is by default."""

console = Console()
Result = dict[str, Any]


class Case(NamedTuple):
    """One run: which system, over how many partitions, and the load."""

    kind: str
    system: str
    partitions: int = 1
    rate: float = 0.0
    seconds: float = 60.0
    commit_interval: float = 0.0
    """Of quixstreams, in seconds."""

    @property
    def name(self) -> str:
        """In a word, for tables."""
        of = f"{self.system}, {self.partitions} partition{'s' if self.partitions > 1 else ''}"
        interval = f", commit every {self.commit_interval:g} s" if self.commit_interval else ""
        return f"{of}{interval}{f', {self.rate:,.0f}/s offered' if self.rate else ''}"


class Load:
    """`benchmarks.load` as a process of its own."""

    def __init__(self, broker: str, what: str, *arguments: object) -> None:
        command = [str(PEERS), "benchmarks/load.py", what, "--broker", broker, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def ready(self) -> None:
        """Wait until it watches the scores."""
        assert self._process.stdout is not None  # noqa: S101 - it was made with one
        if self._process.stdout.readline().strip() != "ready":
            raise SystemExit("the load did not start")

    def result(self) -> Result:
        """Wait for its end. Raises `SystemExit` where it failed."""
        out, _ = self._process.communicate()
        if self._process.returncode:
            raise SystemExit("the load failed")
        found: Result = json.loads(out.strip().splitlines()[-1])
        return found


def processor_seconds(pid: int) -> float:
    """What a process has used."""
    collected = ProcessCollector(pid=lambda: pid, registry=None).collect()
    return next(s.value for family in collected for s in family.samples if s.name == "process_cpu_seconds_total")


@contextlib.contextmanager
def coldstream(case: Case, broker: str, folder: Path) -> Iterator[dict[str, Process]]:
    """A worker and a trainer, once both are ready."""
    sets = {
        "broker": f"kafka:{broker}",
        "topics.partitions": case.partitions,
        "log_format": "json",
        "metrics.port": 0,
        **SETTINGS[case.system],
    }
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    with Processes() as processes:
        found = {
            name: processes.add(Process(name, [name, "--config", "consumers/demo.toml", *words], folder / f"{name}.log"))
            for name in ("trainer", "worker")
        }
        deadline = time.monotonic() + 120
        while not all(process.seen.ready for process in found.values()):
            for process in found.values():
                process.look()
                if process.code is not None or time.monotonic() > deadline:
                    raise SystemExit(
                        f"{process.name} did not get ready: {process.said}\n{(folder / f'{process.name}.log').read_text()[-2000:]}"
                    )
            time.sleep(0.2)
        yield found


@contextlib.contextmanager
def quixstreams(case: Case, broker: str, folder: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The peer, started."""
    command = [str(PEERS), "benchmarks/quix_peer.py", "--broker", broker, "--state", str(folder / "quix")]
    process = subprocess.Popen([*command, "--commit-interval", str(case.commit_interval)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None  # noqa: S101 - it was made with one
        process.stdout.readline()
        yield {"worker": process}
    finally:
        process.kill()
        process.wait()


def create_topics(case: Case, broker: str) -> None:
    """As `coldstream topics create` does, for the peer too."""
    program = str(Path(sys.executable).with_name("coldstream"))
    subprocess.run(
        [program, "topics", "create", "--set", f"broker=kafka:{broker}", "--set", f"topics.partitions={case.partitions}"],
        check=True,
        capture_output=True,
    )


def run(case: Case) -> Result:
    """One case on a broker of its own, which is thrown away."""
    with tempfile.TemporaryDirectory(dir=".kafka", prefix="bench-") as scratch:
        folder = Path(scratch).resolve()
        cluster = KafkaCluster(folder / "kafka", heap_mb=1024)
        cluster.nodes[0].short_lived = False
        with cluster:
            broker = cluster.url.removeprefix("kafka:")
            create_topics(case, broker)
            node = cluster.nodes[0].process
            assert node is not None  # noqa: S101 - it has just been started
            opened = quixstreams if case.system == "quixstreams" else coldstream
            if case.kind == "capacity":
                return capacity(case, broker, folder, opened, node.pid)
            turns = case.rate * case.seconds
            Load(broker, "fill", "--count", 0, "--turns", -(-int(turns) // 100_000)).result()
            with opened(case, broker, folder) as processes:
                if case.system == "quixstreams":
                    time.sleep(10)
                return measured(case, broker, processes, node.pid, "offer", "--rate", case.rate, "--seconds", case.seconds)


def capacity(case: Case, broker: str, folder: Path, opened: Any, node: int) -> Result:  # noqa: ANN401 - one of two context managers
    """Events a second from a topic that was filled before, over the time after the first fifth."""
    count = int(case.seconds * case.rate)
    Load(broker, "fill", "--count", count, "--turns", -(-count // 100_000)).result()
    load = Load(broker, "drain", "--count", count, "--seconds", 6 * case.seconds, "--partitions", case.partitions)
    load.ready()
    with opened(case, broker, folder) as processes:
        found = watched(load, processes, node)
    marks = found.pop("marks")
    first = next(((at, done) for at, done in marks if done >= count / 5), (0.0, 0))
    last = marks[-1]
    found["events_per_second"] = (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0
    return found


def measured(case: Case, broker: str, processes: Any, node: int, *what: object) -> Result:  # noqa: ANN401
    """A load that is watched from the start."""
    load = Load(broker, str(what[0]), *what[1:], "--partitions", case.partitions)
    load.ready()
    return watched(load, processes, node)


def watched(load: Load, processes: Any, node: int) -> Result:  # noqa: ANN401
    """The load's own result, and what each process used of the processor meanwhile."""
    pids = {name: process.pid for name, process in processes.items()} | {"broker": node}
    before = {name: processor_seconds(pid) for name, pid in pids.items()}
    began = time.monotonic()
    found = load.result()
    found["wall_seconds"] = time.monotonic() - began
    found["processor"] = {name: processor_seconds(pid) - before[name] for name, pid in pids.items()} | {"load": found["processor_seconds"]}
    worker = processes["worker"]
    if isinstance(worker, Process):
        for process in processes.values():
            process.look()
        found["stages"] = {name: process.seen.processor for name, process in processes.items()}
        found["stages_clock"] = {name: process.seen.stages for name, process in processes.items()}
        found["commits"] = worker.seen.commits
        found["mae"] = worker.seen.mae
        found["version"] = worker.seen.version
        found["seconds_per_commit"] = found["wall_seconds"] / max(1, worker.seen.commits)
    return found


def cases(only: str, seconds: float) -> Iterator[Case]:
    """All of it, or one kind."""
    kinds = {
        "capacity": [
            Case("capacity", "accurate", 1, 1000, seconds / 5),
            Case("capacity", "accurate", 8, 1000, seconds / 5),
            Case("capacity", "fast", 1, 4000, seconds / 5),
            Case("capacity", "fast", 8, 4000, seconds / 5),
            Case("capacity", "quixstreams", 1, 8000, seconds / 5, 5.0),
            Case("capacity", "quixstreams", 1, 8000, seconds / 5, 0.1),
        ],
        "latency": [
            Case("latency", "fast", 1, 500, seconds / 3),
            Case("latency", "quixstreams", 1, 500, seconds / 3, 5.0),
            Case("latency", "quixstreams", 1, 500, seconds / 3, 0.02),
        ],
        "sustained": [Case("sustained", "accurate", 1, 1000, seconds), Case("sustained", "fast", 1, 3000, seconds)],
    }
    if only and only not in kinds:
        raise typer.BadParameter(f"--only must be one of {', '.join(kinds)}")
    for kind, listed in kinds.items():
        if only in ("", kind):
            yield from listed


def show(results: list[Result]) -> None:
    """The table at the end."""
    table = Table(
        "", "events/s", "p50 ms", "p99 ms", "max ms", "lag at the end s", "worker us", "trainer us", "broker us", title="an event"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for result in results:
        scored = max(1, result["scored"])
        latency = result.get("latency_ms", {})
        used = result["processor"]
        table.add_row(
            f"{result['kind']}: {result['name']}",
            f"{result.get('events_per_second', scored / result['wall_seconds']):,.0f}",
            *(f"{latency[key]:,.1f}" if latency else "" for key in ("p50", "p99", "max")),
            f"{result['caught_up_seconds']:.1f}" if "caught_up_seconds" in result else "",
            *(f"{1e6 * used[name] / scored:,.0f}" if name in used else "" for name in ("worker", "trainer", "broker")),
        )
    console.print(table)


def main(
    only: Annotated[str, typer.Option(help="capacity, latency or sustained; all without it.")] = "",
    system: Annotated[str, typer.Option(help="accurate, fast or quixstreams; all without it.")] = "",
    partitions: Annotated[int, typer.Option(help="Only cases of so many partitions.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of a sustained run; others take a part of it.", min=15)] = 300.0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measure throughput, latency and processor time, case by case."""
    if not PEERS.exists():
        raise SystemExit("`make bench-kafka` makes the environment of quixstreams and of the load first")
    Path(".kafka").mkdir(exist_ok=True)
    done: list[Result] = []
    for case in cases(only, seconds):
        if (system and case.system != system) or (partitions and case.partitions != partitions):
            continue
        console.print(f"{case.kind}: {case.name} ...")
        load = os.getloadavg()[0]
        done.append(case._asdict() | {"name": case.name, "load_before": load} | run(case))
        show(done[-1:])
        results.parent.mkdir(parents=True, exist_ok=True)
        machine = {"python": platform.python_version(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
        results.write_bytes(msgspec.json.format(msgspec.json.encode({"machine": machine, "runs": done})) + b"\n")
    show(done)
    console.print(f"figures: {results}")


if __name__ == "__main__":
    assert shutil.which("java"), "Apache Kafka needs Java 17 or later"  # noqa: S101
    typer.run(main)
