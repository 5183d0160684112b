"""Everything that can go wrong, at random, seeded moments, on a real Apache Kafka; at the end the verifier reads the topics.

``python -m tests.chaos --seed 1`` runs three brokers, three workers with local stores, and two trainers over a stream with garbage and
forgotten users in it, disturbs them, and prints what was done and what the verifier found. `make chaos` runs ten seeds one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from consumers.opening import connect, topics_of
from consumers.settings import Settings
from streaming.errors import BrokerUnreachable
from streaming.log import Message
from tests.kafka_cluster import KafkaCluster, Node
from tests.nursery import Nursery, Role
from tests.small_runs import Stream, small
from tests.test_live_kill import waiting
from tests.test_promises import rules_of
from tests.verify import Finding, verify

PARTITIONS = 4
SESSION_SECONDS = 2.0
QUIET_SECONDS = 180.0
"""How long the system may take, undisturbed, to catch up at the end."""


@dataclass
class Outcome:
    """What one run did and showed."""

    seed: int
    events: int
    faults: Counter[str] = field(default_factory=Counter)
    deaths: list[str] = field(default_factory=list)
    """Processes that ended by themselves: none should."""
    seconds: float = 0.0
    recovery_seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    waiting: int = 0

    @property
    def passed(self) -> bool:
        """Whether every promise was kept and nothing died of what was done to others."""
        return not self.findings and not self.waiting and not self.deaths


class Chaos:
    """A running system and the hand that disturbs it."""

    def __init__(self, settings: Settings, cluster: KafkaCluster, nursery: Nursery, seed: int) -> None:
        self.settings = settings
        self.cluster = cluster
        self.nursery = nursery
        self.dice = random.Random(seed)
        self.running: dict[Role, list[int]] = {"worker": [], "trainer": []}
        self.outcome = Outcome(seed, 0)
        self.faults: dict[str, Callable[[], None]] = {
            "kill -9 of a worker": lambda: self.kill("worker"),
            "kill -9 of a trainer": lambda: self.kill("trainer"),
            "pause of a worker": lambda: self.pause("worker"),
            "pause of a trainer": lambda: self.pause("trainer"),
            "planned stop of a worker": lambda: self.replace("worker"),
            "one more worker for a while": self.rebalance,
            "kill -9 of a broker": self.kill_broker,
            "pause of a broker": self.pause_broker,
            "rolling restart": self.rolling_restart,
        }

    def start(self, role: Role) -> None:
        self.running[role].append(self.nursery.start(self.settings, role=role))

    def kill(self, role: Role) -> None:
        os.kill(self.running[role].pop(self.dice.randrange(len(self.running[role]))), signal.SIGKILL)
        self.start(role)

    def replace(self, role: Role) -> None:
        os.kill(self.running[role].pop(self.dice.randrange(len(self.running[role]))), signal.SIGTERM)
        self.start(role)

    def pause(self, role: Role) -> None:
        pid = self.dice.choice(self.running[role])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.2, 2.5) * SESSION_SECONDS)
        os.kill(pid, signal.SIGCONT)

    def rebalance(self) -> None:
        self.start("worker")
        time.sleep(self.dice.uniform(0.5, 3))
        os.kill(self.running["worker"].pop(), signal.SIGTERM)

    def kill_broker(self) -> None:
        node = self.dice.choice(self.cluster.nodes)
        node.kill()
        time.sleep(self.dice.uniform(0.5, 5))
        self.revive(node)

    def pause_broker(self) -> None:
        node = self.dice.choice(self.cluster.nodes)
        node.send(signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.5, 6))
        node.send(signal.SIGCONT)

    def rolling_restart(self) -> None:
        for node in self.cluster.nodes:
            node.stop()
            self.revive(node)

    def revive(self, node: Node) -> None:
        node.start()
        self.cluster.wait()

    def look_for_deaths(self) -> None:
        """Replace and note what has ended by itself."""
        for role, pids in self.running.items():
            for pid in list(pids):
                stat = Path(f"/proc/{pid}/stat")
                if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
                    pids.remove(pid)
                    self.outcome.deaths.append(role)
                    self.start(role)

    def append(self, messages: Sequence[Message]) -> None:
        """Fill the topics as other systems do, trying again while no broker takes it. What comes twice is an event twice."""
        while True:
            try:
                with connect(self.settings) as log:
                    log.append(messages)
                    return
            except BrokerUnreachable:
                time.sleep(0.5)

    def run(self, events: int, faults: int) -> Outcome:
        """Feed, disturb, let it catch up, and verify."""
        began = time.monotonic()
        with connect(self.settings) as log:
            log.create(topics_of(self.settings).values())
        stream = Stream(events, seed=self.outcome.seed, garbage=0.02, users=max(40, events // 50), partitions=PARTITIONS)
        self.append(stream.profiles)
        for _ in range(3):
            self.start("worker")
        for _ in range(2):
            self.start("trainer")
        size = -(-events // (faults + 1))
        for first in range(0, events, size):
            self.append(stream.messages[first : first + size])
            time.sleep(self.dice.uniform(0.1, 1.5))
            if first + size < events:
                name = self.dice.choice(list(self.faults))
                print(f"{time.monotonic() - began:6.1f} s  {first + size:,} events in, {name}", file=sys.stderr, flush=True)
                self.faults[name]()
                self.outcome.faults[name] += 1
                self.look_for_deaths()
        undisturbed = time.monotonic()
        while (left := waiting(self.settings)) and time.monotonic() - undisturbed < QUIET_SECONDS:
            time.sleep(1)
        self.outcome.recovery_seconds = time.monotonic() - undisturbed
        # The trainers fold what the last steps taught.
        while time.monotonic() - undisturbed < QUIET_SECONDS:
            with connect(self.settings) as log:
                self.outcome.findings = verify(log, rules_of(self.settings))
            if not self.outcome.findings:
                break
            time.sleep(5)
        self.outcome.waiting, self.outcome.events = left, events
        self.outcome.seconds = time.monotonic() - began
        for pid in (*self.running["worker"], *self.running["trainer"]):
            os.kill(pid, signal.SIGTERM)
        return self.outcome


def chaos(folder: Path, seed: int, events: int, faults: int, nodes: int) -> Outcome:
    """One run in ``folder``."""
    settings = small(
        folder / "unused.db",
        topics={"partitions": PARTITIONS, "updates_bytes": 1 << 34, "model_bytes": 1 << 34},
        worker={"poll_timeout_ms": 50, "linger_ms": 5, "micro_batch": 64, "state_dir": str(folder / "state")},
        trainer={"meta_update": 64, "snapshot_every": 200},
        log={"session_timeout_ms": int(1000 * SESSION_SECONDS)},
        kafka={"transaction_timeout_ms": 10_000, "request_timeout_ms": 5_000},
    )
    quick = {"group.min.session.timeout.ms": "200"}
    with Nursery() as nursery, KafkaCluster(folder / "kafka", nodes, settings=quick) as cluster:
        return Chaos(settings.model_copy(update={"broker": cluster.url}), cluster, nursery, seed).run(events, faults)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; default 1")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for seed in chosen.seed or [1]:
        with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
            outcome = chaos(Path(folder).resolve(), seed, chosen.events, chosen.faults, chosen.nodes)
        failed += not outcome.passed
        texts = [f"({finding.promise}) {finding.text}" for finding in outcome.findings[:20]]
        line = {
            "seed": seed,
            "events": outcome.events,
            "faults": dict(outcome.faults),
            "deaths": outcome.deaths,
            "seconds": round(outcome.seconds, 1),
            "recovery_seconds": round(outcome.recovery_seconds, 1),
            "waiting": outcome.waiting,
            "findings": texts,
        }
        with (chosen.out / "runs.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        verdict = (
            "kept every promise"
            if outcome.passed
            else f"FAILED: {len(outcome.findings)} findings, {outcome.waiting} waiting, deaths: {outcome.deaths}"
        )
        sys.stdout.write(f"seed {seed}: {sum(outcome.faults.values())} faults in {outcome.seconds:.0f} s, {verdict}\n")
        for text in texts:
            sys.stdout.write(f"  {text}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
