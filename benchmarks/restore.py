"""What restoring state costs: a changelog of many users, read into a local store and into memory, and again after a restart.

Each restoration is a process of its own, with all of a worker imported, so that its peak of memory is that of a worker. Then the
store is read and written as steps do.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from consumers.opening import connect, topics_of
from consumers.settings import Settings
from streaming.codec import encode
from streaming.events import Interaction, Position, Support
from streaming.log import Message, TopicPartition
from streaming.topics import POSITION_KEY

RESULTS = Path("benchmarks/results/restore.json")
GROUP = "coldstream"
STEP = 256
"""Events in a step, as in the setting `fast`."""

Figures = dict[str, float]


def settings_of(folder: Path, *, store: bool) -> Settings:
    """A worker of one partition; without rehearsal or a model that would matter here."""
    return Settings.model_validate(
        {
            "broker": f"embedded:{folder / 'log.db'}",
            "topics": {"partitions": 1},
            "metrics": {"enabled": False},
            "worker": {"support_size": 20, "state_dir": str(folder / "state") if store else ""},
            "log_level": "error",
        }
    )


def supports(users: int, interactions: int, ordinals: list[int], dice: random.Random) -> list[Message]:
    """Support sets of these users: items of a catalogue of 100,000, times of a year."""
    messages = []
    for ordinal in ordinals:
        rated = [(str(dice.randrange(100_000)), float(dice.randint(1, 5)), 1_700_000_000_000 + dice.randrange(31_536_000_000))]
        rated += [(str(dice.randrange(100_000)), float(dice.randint(1, 5)), rated[0][2] + 60_000 * n) for n in range(1, interactions)]
        value = encode(Support(rated, ("interactions", 0, interactions * users + ordinal), interactions, ordinal))
        messages.append(Message("support", b"user-%d" % ordinal, value, 0))
    return messages


def position(users: int, offset: int) -> Message:
    """The position record of the last step."""
    return Message("support", POSITION_KEY, encode(Position(offset, users, 0, {"items": 0, "users": 0}, "bench")), 0)


def fill(folder: Path, users: int, interactions: int) -> int:
    """Write the changelog; users last changed in another order than they came in. Returns the bytes of its keys and values."""
    settings, dice = settings_of(folder, store=False), random.Random(1)
    order = list(range(users))
    dice.shuffle(order)
    size = 0
    with connect(settings, create=True) as log:
        log.create(topics_of(settings).values())
        events = log.append([Message("interactions", b"user-0", b"", 0)])[-1] + 1
        for start in track(range(0, users, 5000), "changelog"):
            messages = supports(users, interactions, order[start : start + 5000], dice)
            log.append(messages)
            size += sum(len(message.key or b"") + len(message.value or b"") for message in messages)
        with log.writer(f"{GROUP}-0") as writer:
            writer.commit([position(users, events)], {TopicPartition("interactions", 0): events}, GROUP)
    return size


def go_on(folder: Path, users: int, interactions: int, changed: int) -> None:
    """Let so many users' support sets change after the store was left."""
    with connect(settings_of(folder, store=False)) as log:
        log.append([*supports(users, interactions, random.Random(2).sample(range(users), changed), random.Random(3)), position(users, 1)])


def restore(folder: Path, *, store: bool) -> Figures:
    """Take the partition over as a worker does, in this process; its peak of memory is the process's."""
    from consumers.state import State, Takeover
    from consumers.system import System
    from streaming.metrics import Metrics

    settings = settings_of(folder, store=store)
    assert System.__name__, "imported for its weight alone"  # noqa: S101
    peak = 0
    with connect(settings) as log:
        state = State(log, settings, Metrics(), {name: topic.name for name, topic in topics_of(settings).items()})
        begun, busy = time.perf_counter(), time.process_time()
        takeover = Takeover(state, 0)
        done = False
        while not done:
            done = takeover.advance(1.0)
            peak = max(peak, size_of(folder))
        seconds, processor = time.perf_counter() - begun, time.process_time() - busy
        figures = {
            "records": takeover.records,
            "users": len(takeover.sets),
            "seconds": seconds,
            "processor_seconds": processor,
            "store_peak_bytes": peak,
        }
        takeover.close()
    return figures | {"memory_peak_bytes": memory_peak(), "store_bytes": size_of(folder)}


def memory_peak() -> int:
    """The most bytes that were resident. Not by `getrusage`, whose figure begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def size_of(folder: Path) -> int:
    """Bytes of the local store, its log of writes included."""
    return sum(path.stat().st_size for path in (folder / "state").glob("*"))


def rates(folder: Path, users: int, count: int) -> Figures:
    """Of random users, a second, with processor time: support sets read; written; and events, each of which does both, in steps."""
    from consumers.state import State
    from streaming.metrics import Metrics

    settings, generator = settings_of(folder, store=True), np.random.default_rng(4)
    with connect(settings) as log:
        state = State(log, settings, Metrics(), {name: topic.name for name, topic in topics_of(settings).items()})
        sets = state.open(0, lambda: None)
        names = [f"user-{ordinal}" for ordinal in generator.integers(0, users, 2 * count)]
        begun, busy = time.perf_counter(), time.process_time()
        found = sum(sets.get(name) is not None for name in names[:count])
        reads, reads_processor = time.perf_counter() - begun, time.process_time() - busy
        values = [(name, sets.held.value(name)) for name in names[:count]]
        begun, busy = time.perf_counter(), time.process_time()
        for name, value in values:
            sets.held.put(name, value)
            sets.held.covered = sets.covered._replace(timestamp=sets.covered.timestamp + 1)
            sets.settle()
        sets.held.settle()
        writes, writes_processor = time.perf_counter() - begun, time.process_time() - busy
        events = [Interaction(name, "item", 3.0, 1_700_000_000_000) for name in names[count:]]
        begun, busy = time.perf_counter(), time.process_time()
        for start in range(0, count, STEP):
            for number, event in enumerate(events[start : start + STEP], start):
                sets.append(event.user, event, ("interactions", 0, number))
            sets.begin(sets.changes())
            sets.commit(position(users, start).value or b"", users + 10 * count + start)
        sets.close()
        steps, steps_processor = time.perf_counter() - begun, time.process_time() - busy
    assert found == count, "every user has a support set"  # noqa: S101
    return {
        "reads_per_second": count / reads,
        "reads_per_processor_second": count / reads_processor,
        "writes_per_second": count / writes,
        "writes_per_processor_second": count / writes_processor,
        "events_per_second": count / steps,
        "events_per_processor_second": count / steps_processor,
    }


def apart(folder: Path, what: str, users: int, count: int) -> Figures:
    """One part of it in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.restore",
        "--part",
        what,
        "--folder",
        str(folder),
        "--users",
        str(users),
        "--count",
        str(count),
    ]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    return answer


def main(
    users: Annotated[int, typer.Option(help="Users with a support set.", min=1000)] = 1_000_000,
    interactions: Annotated[int, typer.Option(help="Interactions of each.", min=1)] = 20,
    count: Annotated[int, typer.Option(help="Support sets read, and as many written, for the rates.", min=1000)] = 100_000,
    results: Annotated[Path, typer.Option(help="Where the figures go.", dir_okay=False)] = RESULTS,
    folder: Annotated[Path | None, typer.Option(help="Where log and store are written; default: the system's temporary folder.")] = None,
    part: Annotated[str, typer.Option(help="One part of it, in this process.", hidden=True)] = "",
) -> None:
    """Restore a partition of many users: whole, after a restart, and where the store is a little behind; then read and write it."""
    if part:
        assert folder is not None, "a part is of a folder that was filled before"  # noqa: S101
        figures = rates(folder, users, count) if part == "rates" else restore(folder, store=part == "store")
        print(json.dumps(figures))
        return
    console = Console()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        changelog = fill(place, users, interactions)
        rows = {"into a new store": apart(place, "store", users, count), "after a restart": apart(place, "store", users, count)}
        go_on(place, users, interactions, users // 100)
        rows["one user in 100 behind"] = apart(place, "store", users, count)
        rows["into memory, no store"] = apart(place, "memory", users, count)
        speed = apart(place, "rates", users, count)
    table = Table("", "records", "s", "cpu s", "memory MB", "store MB", "at most", title=f"{users:,} users")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in rows.items():
        sizes = ("memory_peak_bytes", "store_bytes", "store_peak_bytes") if "memory" not in name else ("memory_peak_bytes",)
        table.add_row(
            name,
            f"{row['records']:,.0f}",
            f"{row['seconds']:,.1f}",
            f"{row['processor_seconds']:,.1f}",
            *(f"{row[size] / 1e6:,.0f}" for size in sizes),
        )
    console.print(table)
    console.print(f"changelog: {changelog / 1e6:,.0f} MB of keys and values, {interactions} interactions a user")
    for name, rate in speed.items():
        console.print(f"{name.replace('_', ' ')}: {rate:,.0f}")
    machine = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    everything = {
        "machine": machine,
        "users": users,
        "interactions": interactions,
        "changelog_bytes": changelog,
        "restorations": rows,
        "rates": speed,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_bytes(msgspec.json.format(msgspec.json.encode(everything)) + b"\n")
    console.print(f"figures: {results}")


if __name__ == "__main__":
    typer.run(main)
