"""What the embedded log costs: appends, steps (records and offsets in one commit), reads.

The step is that of a worker: scores and support sets of a micro-batch, a position record, an update, and the offset consumed.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, quantiles
from typing import Annotated, Literal, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from streaming.embedded import EmbeddedLog
from streaming.log import Message, Topic, TopicPartition

TOPICS = [
    Topic("interactions"),
    Topic("scores"),
    Topic("support", cleanup="compact"),
    Topic("updates", retention_ms=3_600_000, retention_bytes=256 << 20),
]
SOURCE = TopicPartition("interactions", 0)

Durability = Literal["process", "power"]


class Times(NamedTuple):
    """Seconds of each call, and seconds of processor time a call: what is left on a machine with other work to do."""

    seconds: list[float]
    processor: float


def timed(times: int, work: Callable[[], object]) -> Times:
    """Time so many calls."""
    seconds = []
    begin = time.process_time()
    for _ in range(times):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return Times(seconds, (time.process_time() - begin) / times)


def measure(
    folder: Path, durability: Durability, commits: int, batch: int, update_bytes: int, users: int
) -> list[tuple[str, str, Times, int]]:
    """Rows of the table: what was done, its size, the times of each commit or poll, records in each."""
    dice = random.Random(1)
    score, support, event, update = os.urandom(150), os.urandom(1200), os.urandom(60), os.urandom(update_bytes)
    rows: list[tuple[str, str, Times, int]] = []
    with EmbeddedLog(folder / f"{durability}.db", durability=durability) as log:
        log.create(TOPICS)
        events = [Message("interactions", b"user", event)] * batch
        rows.append(("append", f"{batch} x {len(event)} B", timed(commits, lambda: log.append(events)), batch))
        writer = log.writer("bench")

        def step(update: bytes | None) -> None:
            keys = [b"user-%d" % dice.randrange(users) for _ in range(batch)]
            messages = [Message("scores", key, score) for key in keys]
            messages += [Message("support", key, support) for key in dict.fromkeys(keys)]
            messages.append(Message("support", b"position", score, 0))
            if update is not None:
                messages.append(Message("updates", None, update, 0))
            writer.commit(messages, {SOURCE: 1}, "bench")

        rows.append(("step", f"{batch} scores, {batch} support sets", timed(commits, lambda: step(None)), batch))
        rows.append(("step, update", f"and {update_bytes // 1000} KB", timed(commits // 4, lambda: step(update)), batch))
        reader = log.reader()
        reader.assign({SOURCE: 0})
        rows.append(("read", f"{batch} a poll", timed(commits // 2, lambda: reader.poll(batch)), batch))
        rows.append(("read", "256 a poll", timed(commits * batch // 2 // 256, lambda: reader.poll(256)), 256))
        rows.append(("read nothing", "1 partition", timed(commits, lambda: reader.poll(256, only=[])), 0))
        member = log.member("bench-members", "interactions")
        rows.append(("assignment", "", timed(commits, member.assignment), 0))
    return rows


def main(
    commits: Annotated[int, typer.Option(help="Commits of each kind.", min=100)] = 4000,
    batch: Annotated[int, typer.Option(help="Events in a micro-batch.", min=1)] = 16,
    update_bytes: Annotated[int, typer.Option(help="Size of an update.", min=0, max=1_000_000)] = 200_000,
    users: Annotated[int, typer.Option(help="Users whose support sets there are.", min=1)] = 943,
    folder: Annotated[Path | None, typer.Option(help="Where the logs are written; default: the system's temporary folder.")] = None,
) -> None:
    """Measure the embedded log at both settings of durability."""
    table = Table(
        "durability",
        "work",
        "size",
        "p50 µs",
        "p99 µs",
        "max ms",
        "mean µs",
        "processor µs",
        "per second",
        "records/s",
        title="Embedded log",
    )
    for column in table.columns[3:]:
        column.justify = "right"
    shares: dict[Durability, int] = {"process": 1, "power": 10}
    for durability, share in shares.items():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            for work, size, (seconds, processor), records in measure(
                Path(scratch), durability, max(commits // share, 100), batch, update_bytes, users
            ):
                cuts = quantiles(seconds, n=100)
                table.add_row(
                    durability,
                    work,
                    size,
                    f"{cuts[49] * 1e6:,.0f}",
                    f"{cuts[98] * 1e6:,.0f}",
                    f"{max(seconds) * 1e3:,.1f}",
                    f"{mean(seconds) * 1e6:,.0f}",
                    f"{processor * 1e6:,.0f}",
                    f"{1 / mean(seconds):,.0f}",
                    f"{records / mean(seconds):,.0f}" if records else "",
                )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
