"""Promise (f), and all others with it: killed with kill -9 at random moments and started again, a run ends as the one nobody disturbed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from consumers.opening import connect
from consumers.settings import Settings
from streaming.codec import decode, encode
from streaming.events import Version
from streaming.journal import read_journal
from streaming.log import TopicPartition
from streaming.partitioner import partition_of
from streaming.scored import read_run
from tests.nursery import Nursery
from tests.small_runs import MICRO_BATCH, Stream, fill, profile, small
from tests.test_promises import findings, reasons_of
from tests.verify.reading import joined, read

N = 1000
KILLS = 6


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


class Result(NamedTuple):
    """What a run leaves that must not depend on kills: the digest of its scores, and of all that each topic keeps."""

    scores: str
    events: int
    topics: dict[str, str]


def result(settings: Settings) -> Result:
    with connect(settings) as log:
        run = read_run(log, settings.event_limits())
        topics = {}
        for name in ("scores", "support", "dead-letters"):
            topics[name] = sha256([repr((record.key, record.value)).encode() for record in read(log, name, 0)])
        topics["updates"] = sha256([whole.value for whole in joined(read(log, "updates", 0))])
        for name in ("model", "snapshots"):
            versions = [decode(whole.value, Version, what=name) for whole in joined(read(log, name, 0))]
            # The clock is no part of a run; all else is, the optimiser's state included.
            topics[name] = sha256([encode(msgspec.structs.replace(version, made_at=0)) for version in versions])
        return Result(run.scores_sha256, len(run), topics)


def sha256(values: list[bytes]) -> str:
    return hashlib.sha256(b"|".join(values)).hexdigest()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bounds": {
        "worker": {"max_users": 9, "support_size": 3},
        "trainer": {"round_updates": 3, "snapshot_every": 5},
        "model": {"max_rows": 30, "overflow_rows": 4},
        "topics": {"max_record_bytes": 4096},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_killed_at_random_moments_it_ends_as_if_nobody_had_disturbed_it(case: str, nursery: Nursery, tmp_path: Path) -> None:
    stream = Stream(N, seed=11)
    calm, killed = (small(tmp_path / name / "log.db", **CASES[case]) for name in ("calm", "killed"))
    for settings in (calm, killed):
        fill(settings, stream.profiles)
        offsets = fill(settings, stream.messages)
    nursery.start(calm, tmp_path / "calm.jsonl")
    assert nursery.end() == 0
    wanted = result(calm)

    dice = random.Random(case)
    steps = -(-N // MICRO_BATCH)
    # The first while it starts and restores, the others anywhere in a step, its commit or the trainer's.
    moments = [(0, 0.06), *((dice.randrange(2, steps // KILLS), 0.01) for _ in range(KILLS - 1))]
    inside = [cut_down(nursery, killed, tmp_path / "killed.jsonl", lines, dice.uniform(0, within)) for lines, within in moments]
    assert sum(inside) >= KILLS - 2, "kills that come too late show nothing"
    nursery.start(killed, tmp_path / "killed.jsonl")
    assert nursery.end() == 0

    found = result(killed)
    assert found.scores == wanted.scores
    assert found == wanted
    assert findings(killed, reasons=reasons_of(stream, offsets)) == []
    history = read_journal(tmp_path / "killed.jsonl")
    assert history.runs <= KILLS + 1
    assert N <= history.events_processed <= N + KILLS * MICRO_BATCH
    assert read_journal(tmp_path / "calm.jsonl").events_processed == N


def cut_down(nursery: Nursery, settings: Settings, journal: Path, lines: int, seconds: float) -> bool:
    """Start a run and kill it so many seconds after so many lines of it; returns whether it was not at its end before."""
    pid = nursery.start(settings, journal)
    for _ in range(lines):
        if nursery.line().startswith("ended"):
            return False
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return nursery.end() == -signal.SIGKILL


def test_live_workers_and_trainers_killed_stopped_and_replaced_keep_all_promises_but_the_last(nursery: Nursery, tmp_path: Path) -> None:
    """Partitions move between workers by kill -9 and by a pause beyond the session's timeout; what the paused one then does is void."""
    partitions, bursts = 3, 8
    settings = small(
        tmp_path / "log.db",
        topics={"partitions": partitions},
        worker={"poll_timeout_ms": 20, "linger_ms": 2, "max_users": 11},
        log={"session_timeout_ms": 1000},
    )
    stream = Stream(bursts * 100, seed=12, partitions=partitions)
    fill(settings, stream.profiles)
    workers = [nursery.start(settings, role="worker") for _ in range(2)]
    trainer = nursery.start(settings, role="trainer")
    dice = random.Random(3)
    offsets: list[int] = []
    nulls: dict[tuple[str, int, int], str] = {}
    for burst in range(bursts):
        leaving = [f"u{(burst * 5 + n) % 40}" for n in range(3)]
        for user, place in zip(leaving, fill(settings, [profile("users", user, None) for user in leaving]), strict=True):
            nulls["users", partition_of(user.encode(), partitions), place] = user
        offsets += fill(settings, stream.messages[burst * 100 : burst * 100 + 100])
        time.sleep(dice.uniform(0.05, 0.25))
        if burst in {1, 3}:
            os.kill(workers.pop(0), signal.SIGKILL)
            workers.append(nursery.start(settings, role="worker"))
        elif burst in {2, 5}:
            os.kill(trainer, signal.SIGKILL)
            trainer = nursery.start(settings, role="trainer")
        elif burst == 4:
            os.kill(workers[0], signal.SIGSTOP)
            time.sleep(1.5)
            os.kill(workers[0], signal.SIGCONT)
    deadline = time.monotonic() + 30
    # A promise that is broken for good stays so; one not kept yet only needs time.
    while (found := findings(settings, reasons=reasons_of(stream, offsets), nulls=nulls)) or waiting(settings):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for pid in (*workers, trainer):
        os.kill(pid, signal.SIGTERM)
    assert found == []
    assert waiting(settings) == 0


def waiting(settings: Settings) -> int:
    """Interactions that no step has committed yet."""
    with connect(settings) as log:
        tps = [TopicPartition("interactions", number) for number in range(settings.topics.partitions)]
        done = log.committed(settings.group_id, tps)
        return sum(bounds.end - done.get(tp, 0) for tp, bounds in log.bounds(tps).items())
