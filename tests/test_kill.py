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
from streaming.events import Position, Version
from streaming.journal import read_journal
from streaming.scored import read_run
from streaming.topics import POSITION_KEY
from tests.nursery import Nursery
from tests.small_runs import MICRO_BATCH, Stream, fill, small
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
            topics[name] = sha256([repr((record.key, unnamed(record.key, record.value))).encode() for record in read(log, name, 0)])
        topics["updates"] = sha256([whole.value for whole in joined(read(log, "updates", 0))])
        for name in ("model", "snapshots"):
            versions = [decode(whole.value, Version, what=name) for whole in joined(read(log, name, 0))]
            # The clock is no part of a run; all else is, the optimiser's state included.
            topics[name] = sha256([encode(msgspec.structs.replace(version, made_at=0)) for version in versions])
        return Result(run.scores_sha256, len(run), topics)


def unnamed(key: bytes | None, value: bytes | None) -> bytes | None:
    """A record's value, but for the names of the changelog and of takeovers, which are random."""
    if key != POSITION_KEY:
        return value
    return encode(msgspec.structs.replace(decode(value, Position, what="position"), changelog="", owners=[]))


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
