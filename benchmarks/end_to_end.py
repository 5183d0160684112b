"""End to end on a real Apache Kafka: how many events a second, how long from an event to its score, and quixstreams beside it.

One worker and one trainer of Coldstream, exactly once, everything learning; each run on a broker of its own, all on the same cores. The
peer does what a user would write instead: it keeps a user's last 20 interactions and learns nothing. Load comes from `benchmarks.load`.

    make bench-kafka                                  # all of it, about half an hour
    make bench-kafka ARGS="--only capacity --seconds 60"
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import typer
from prometheus_client import ProcessCollector
from rich.console import Console
from rich.table import Table

from benchmarks.performance import save
from consumers.opening import connect, topics_of
from consumers.processes import Process, Processes
from consumers.settings import Settings
from tests.kafka_cluster import KafkaCluster

RESULTS = Path("benchmarks/results/end-to-end.json")
PEERS = Path(".cache/venv-peers/bin/python")
SETTINGS = {
    "accurate": {"worker.micro_batch": 16, "trainer.meta_update": 16},
    "accurate-64": {"worker.micro_batch": 64, "trainer.meta_update": 16},
    "fast": {"worker.micro_batch": 256, "trainer.meta_update": 64},
}
"""The named settings of docs/performance.md; all else is as it is by default. The second learns as much from each event as the first, from
scores that are up to 64 events old."""

console = Console()
Result = dict[str, Any]
Running = Mapping[str, Process | subprocess.Popen[str]]


class Case(NamedTuple):
    """One run: which system, over how many partitions, and the load."""

    kind: str
    system: str
    partitions: int = 1
    rate: float = 0.0
    seconds: float = 60.0
    commit_interval: float = 0.0
    """Of quixstreams, in seconds."""
    workers: int = 1
    disturbed: Literal["", "kill -9", "planned stop"] = ""
    """What is done to a worker every 20 s from the 30th on, while the others go on and another is started in its place."""

    @property
    def name(self) -> str:
        """In a word, for tables."""
        of = f"{self.system}, {self.partitions} partition{'s' if self.partitions > 1 else ''}"
        if self.kind == "workers":
            return f"{of}, {self.workers} worker{'s' if self.workers > 1 else ''}"
        interval = f", commit every {self.commit_interval:g} s" if self.commit_interval else ""
        offered = f", {self.rate:,.0f}/s offered" if self.rate and self.kind != "capacity" else ""
        return f"{of}{interval}{offered}{f', {self.disturbed} every 20 s' if self.disturbed else ''}"


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
        self.since = time.monotonic()

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
def coldstream(case: Case, broker: str, folder: Path) -> Iterator[Running]:
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

        def started(name: str) -> Process:
            role = name.partition("-")[0]
            return processes.add(Process(name, [role, "--config", "consumers/demo.toml", *words], folder / f"{name}.log"))

        found = {name: started(name) for name in ("trainer", "worker", *(f"worker-{more}" for more in range(1, case.workers)))}
        deadline = time.monotonic() + 120
        while not all(process.seen.ready for process in found.values()):
            for process in found.values():
                process.look()
                if process.code is not None or time.monotonic() > deadline:
                    raise SystemExit(
                        f"{process.name} did not get ready: {process.said}\n{(folder / f'{process.name}.log').read_text()[-2000:]}"
                    )
            time.sleep(0.2)
        if case.disturbed:
            threading.Thread(target=disturb, args=(case, list(found.values())[1:], started), daemon=True).start()
        yield found


def disturb(case: Case, workers: list[Process], started: Callable[[str], Process]) -> None:
    """Kill or stop the worker that has been there longest, and start another 10 s later, as often as the run has room for."""
    for turn in range(int((case.seconds - 30) // 20)):
        time.sleep(30 if turn == 0 else 10)
        victim = workers.pop(0)
        if case.disturbed == "kill -9":
            os.kill(victim.pid, signal.SIGKILL)
        else:
            victim.ask_to_stop()
        time.sleep(10)
        workers.append(started(f"worker-after-{turn}"))


@contextlib.contextmanager
def quixstreams(case: Case, broker: str, folder: Path) -> Iterator[Running]:
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


def run(case: Case) -> Result:
    """One case on a broker of its own, which is thrown away."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=".kafka", prefix="bench-"))).resolve()
        cluster = KafkaCluster(folder / "kafka", heap_mb=1024)
        stack.enter_context(cluster)
        settings = Settings.model_validate({"broker": cluster.url, "topics": {"partitions": case.partitions}})
        with connect(settings, create=True) as log:
            log.create(topics_of(settings).values())
        broker, count = cluster.url.removeprefix("kafka:"), int(case.rate * case.seconds)
        filled = case.kind in ("capacity", "workers")
        Load(broker, "fill", "--count", count if filled else 0, "--turns", -(-count // 100_000)).result()
        started = quixstreams(case, broker, folder) if case.system == "quixstreams" else coldstream(case, broker, folder)
        if filled:
            load = Load(broker, "drain", "--partitions", case.partitions, "--count", count, "--seconds", 60 + 6 * case.seconds)
            load.ready()
            processes = stack.enter_context(started)
        else:
            processes = stack.enter_context(started)
            if case.system == "quixstreams":
                time.sleep(10)  # It has nothing that says when it has joined its group and made its changelog topic.
            load = Load(broker, "offer", "--partitions", case.partitions, "--rate", case.rate, "--seconds", case.seconds)
            load.ready()
        pids = {name: process.pid for name, process in processes.items() if not case.disturbed or name == "trainer"}
        found = watched(load, pids | {"broker": int((cluster.nodes[0].folder / "pid").read_text())})
        for name, process in processes.items():
            if isinstance(process, Process):
                process.look()
                found[name] = msgspec.to_builtins(process.seen)
        return found | ({"events_per_second": pace(found["marks"], count)} if filled else {})


def pace(marks: list[list[float]], count: int) -> float:
    """Events a second after the first fifth of them."""
    first, last = next((mark for mark in marks if mark[1] >= count / 5), marks[0]), marks[-1]
    return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0


def watched(load: Load, pids: dict[str, int]) -> Result:
    """The load's own result, what each process used of the processor meanwhile, and how many events were scored in that time."""
    before = {name: processor_seconds(pid) for name, pid in pids.items()}
    began = time.monotonic()
    found = load.result()
    used = {name: processor_seconds(pid) - before[name] for name, pid in pids.items()}
    # From a topic filled before, the first events are scored before all processes are ready.
    early = max((mark[-1] for mark in found["marks"] if mark[0] <= began - load.since), default=0)
    seconds = {"wall_seconds": time.monotonic() - began, "processor": used | {"load": found["processor_seconds"]}}
    return found | seconds | {"counted": max(1, found["scored"] - early)}


def cases(only: str, seconds: float) -> Iterator[Case]:
    """All of it, or one kind."""
    kinds = {
        "capacity": [
            Case("capacity", "accurate", 1, 2000, seconds / 10),
            Case("capacity", "accurate-64", 1, 2000, seconds / 10),
            Case("capacity", "accurate-64", 8, 2500, seconds / 10),
            Case("capacity", "fast", 1, 6000, seconds / 10),
            Case("capacity", "fast", 8, 6000, seconds / 10),
            Case("capacity", "quixstreams", 1, 16000, seconds / 10, 5.0),
            Case("capacity", "quixstreams", 1, 16000, seconds / 10, 0.1),
        ],
        "workers": [Case("workers", "fast", 8, 6000, seconds / 10, workers=workers) for workers in (1, 2)],
        "latency": [
            Case("latency", "fast", 1, 1000, seconds / 5),
            Case("latency", "quixstreams", 1, 1000, seconds / 5, 5.0),
            Case("latency", "quixstreams", 1, 1000, seconds / 5, 0.02),
        ],
        "disturbed": [
            Case("disturbed", "fast", 8, 200, seconds / 3, workers=2, disturbed="kill -9"),
            Case("disturbed", "fast", 8, 200, seconds / 3, workers=2, disturbed="planned stop"),
        ],
        "sustained": [Case("sustained", "accurate-64", 1, 2000, seconds), Case("sustained", "fast", 1, 5000, seconds)],
    }
    if only and only not in kinds:
        raise typer.BadParameter(f"--only must be one of {', '.join(kinds)}")
    for kind, listed in kinds.items():
        if only in ("", kind):
            yield from listed


def shown(result: Result) -> dict[str, str]:
    """What tables say of a run, by the heads of their columns."""
    used, latency = result["processor"], result.get("latency_ms", {})
    told = {"events/s": f"{result.get('events_per_second', result['scored'] / result['wall_seconds']):,.0f}"}
    told |= {f"{key} ms": f"{latency[key]:,.1f}" for key in ("p50", "p99", "max") if latency}
    if "caught_up_seconds" in result:
        told["last waited s"] = f"{result['caught_up_seconds']:.1f}"
    for name in ("worker", "trainer", "broker"):
        if name in used:
            told[f"{name} us"] = f"{1e6 * used[name] / result['counted']:,.0f}"
    return told


def show(results: list[Result]) -> None:
    """The tables at the end, one a kind; microseconds are of processor time, an event."""
    for kind, of_kind in itertools.groupby(results, lambda result: result["kind"]):
        rows = {result["name"]: shown(result) for result in of_kind}
        heads = list(dict.fromkeys(head for row in rows.values() for head in row))
        table = Table(kind, *heads)
        for column in table.columns[1:]:
            column.justify = "right"
        for name, row in rows.items():
            table.add_row(name, *(row.get(head, "") for head in heads))
        console.print(table)


def main(
    only: Annotated[str, typer.Option(help="capacity, workers, latency, disturbed or sustained; all without it.")] = "",
    system: Annotated[str, typer.Option(help="accurate, accurate-64, fast or quixstreams; all without it.")] = "",
    partitions: Annotated[int, typer.Option(help="Only cases of so many partitions.")] = 0,
    seconds: Annotated[float, typer.Option(help="Of a sustained run; others take a part of it.", min=15)] = 300.0,
    results: Annotated[Path, typer.Option(help="Where the figures go.", dir_okay=False)] = RESULTS,
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
        console.print("    " + ", ".join(f"{head} {value}" for head, value in shown(done[-1]).items()), highlight=False)
        machine = {"python": platform.python_version(), "system": platform.platform(), "cores": len(os.sched_getaffinity(0))}
        save(results, machine, done)
    show(done)
    console.print(f"figures: {results}")


if __name__ == "__main__":
    typer.run(main)
