"""Everything that can go wrong, at random, seeded moments, on a real Apache Kafka; at the end the verifier reads the topics.

``python -m tests.chaos --seed 1`` runs three brokers, each behind a proxy, three workers with local stores, and two trainers over a stream
with garbage and users to be forgotten in it, disturbs them, and prints what was done and what the verifier found. `make chaos` runs ten
seeds one by one; ``python -m tests.chaos --table`` writes the table of all runs into docs/reliability.md. It needs Linux.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consumers.opening import connect, topics_of
from consumers.patience import FIRST_ANSWER_SECONDS, within
from consumers.settings import Settings
from consumers.system import compile_loops
from streaming.errors import BrokerUnreachable
from streaming.log import Message
from tests.chaos_outcome import Outcome, write_table
from tests.kafka_cluster import KILLED, KafkaCluster, Node
from tests.nursery import Nursery, Role, ended
from tests.small_runs import Stream, profile, small
from tests.test_live_kill import waiting
from tests.test_promises import reasons_of, rules_of
from tests.verify import verify

PARTITIONS = 4
SESSION_SECONDS = 2.0
QUIET_SECONDS = 180.0
"""How long the system may take, undisturbed, to catch up at the end."""

STOP_SECONDS = 30.0
"""How long a process that was asked to stop may take."""

FULL_BYTES = 4096
"""How far into its files a process may write whose disk is said to be full: the header of a store, and nothing behind it."""

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"


class Chaos:
    """A running system and the hand that disturbs it. The system reaches the brokers through their proxies, the hand does not."""

    def __init__(self, settings: Settings, cluster: KafkaCluster, nursery: Nursery, seed: int) -> None:
        self.settings = settings.model_copy(update={"broker": cluster.url})
        self.theirs = settings.model_copy(update={"broker": cluster.proxied_url})
        self.cluster = cluster
        self.nursery = nursery
        self.dice = random.Random(seed)
        self.running: dict[Role, list[int]] = {"worker": [], "trainer": []}
        self.leaving: list[tuple[Role, int]] = []
        self.reasons: dict[tuple[str, int, int], str] = {}
        self.outcome = Outcome(seed, 0, len(cluster.nodes))
        self.began = time.monotonic()
        self.faults: dict[str, Callable[[], None]] = {
            "kill -9 of a worker": lambda: self.kill("worker"),
            "kill -9 of a trainer": lambda: self.kill("trainer"),
            "pause of a worker": lambda: self.pause("worker"),
            "pause of a trainer": lambda: self.pause("trainer"),
            "planned stop of a worker": lambda: self.replace("worker"),
            "planned stop of a trainer": lambda: self.replace("trainer"),
            "one more worker for a while": self.rebalance,
            "full disk under a worker's store": self.fill_disk,
            "burst of garbage": self.garbage,
            "cut of a broker's connections": self.cut,
            "half-open connections of a broker": self.half_open,
            "kill -9 of a broker": self.kill_broker,
            "pause of a broker": self.pause_broker,
            "rolling restart": self.rolling_restart,
        }

    def plan(self, count: int) -> list[str]:
        """So many faults in a random order, each kind as often as any other, give or take one."""
        kinds = list(self.faults)
        chosen = kinds * (count // len(kinds)) + self.dice.sample(kinds, count % len(kinds))
        self.dice.shuffle(chosen)
        return chosen

    def start(self, role: Role) -> None:
        self.running[role].append(self.nursery.start(self.theirs, role=role))

    def any(self, role: Role) -> int:
        """Which of them it hits."""
        return self.dice.choice(self.running[role])

    def kill(self, role: Role) -> None:
        pid = self.any(role)
        self.running[role].remove(pid)
        os.kill(pid, signal.SIGKILL)
        self.start(role)

    def stop(self, role: Role, pid: int) -> None:
        """Ask a process to stop. That it does, and well, is looked at in the end."""
        self.running[role].remove(pid)
        os.kill(pid, signal.SIGTERM)
        self.leaving.append((role, pid))

    def replace(self, role: Role) -> None:
        self.stop(role, self.any(role))
        self.start(role)

    def pause(self, role: Role) -> None:
        pid = self.any(role)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self.dice.uniform(0.2, 2.5) * SESSION_SECONDS)
        os.kill(pid, signal.SIGCONT)

    def rebalance(self) -> None:
        self.start("worker")
        time.sleep(self.dice.uniform(0.5, 3))
        self.stop("worker", self.running["worker"][-1])

    def fill_disk(self) -> None:
        """No file of one worker can grow, so that it cannot write to its local stores: a limit stands in for a disk of its own."""
        pid = self.any("worker")
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, hard))
        time.sleep(self.dice.uniform(2, 6))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))

    def garbage(self) -> None:
        self.feed(Stream(200, seed=self.dice.randrange(1 << 30), garbage=1.0, partitions=PARTITIONS), 0, 200)

    def cut(self) -> None:
        self.dice.choice(self.cluster.proxies).cut()

    def half_open(self) -> None:
        proxy = self.dice.choice(self.cluster.proxies)
        requests, answers = self.dice.choice([(True, True), (True, False), (False, True)])
        proxy.half_open(requests=requests, answers=answers)
        time.sleep(self.dice.uniform(0.5, 5))
        proxy.mend()

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
        """Note and replace what has ended by itself."""
        for role, pids in self.running.items():
            for pid in list(pids):
                if (code := ended(pid)) is not None:
                    pids.remove(pid)
                    self.outcome.deaths.append(f"a {role} by itself, with {code}")
                    self.say(f"a {role} ended by itself, with exit code {code}")
                    self.start(role)

    def look_for_ends(self) -> None:
        """Those who were asked to stop have done so, in time and with exit code 0."""
        deadline = time.monotonic() + STOP_SECONDS
        for role, pid in self.leaving:
            while (code := ended(pid)) is None and time.monotonic() < deadline:
                time.sleep(0.1)
            if code != 0:
                self.outcome.deaths.append(f"a {role} that was asked to stop, with {code}")

    def append(self, messages: Sequence[Message]) -> list[int]:
        """Fill the topics as other systems do, trying again while no broker takes it. What comes twice is an event twice."""
        while True:
            try:
                with connect(self.settings) as log:
                    return log.append(messages)
            except BrokerUnreachable:
                time.sleep(0.5)

    def feed(self, stream: Stream, first: int, after: int) -> None:
        """Append a part of a stream, and remember what is wrong with its garbage."""
        part = Stream(0)
        part.messages, part.reasons = stream.messages[first:after], stream.reasons[first:after]
        self.reasons |= reasons_of(part, self.append(part.messages))
        self.outcome.garbage += sum(reason is not None for reason in part.reasons)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {text}", file=sys.stderr, flush=True)

    def run(self, events: int, faults: int) -> Outcome:
        """Feed, disturb, let it catch up, and verify."""
        with connect(self.settings) as log:
            # A cluster that has just started may cut off whoever comes first.
            within(FIRST_ANSWER_SECONDS, lambda: log.create(topics_of(self.settings).values()))
        users = max(40, events // 50)
        stream = Stream(events, seed=self.outcome.seed, garbage=0.02, users=users, partitions=PARTITIONS)
        self.append(stream.profiles)
        for role in ("worker", "worker", "worker", "trainer", "trainer"):
            self.start(role)
        size = -(-events // (faults + 1))
        plan = self.plan(faults)
        for first in range(0, events, size):
            self.feed(stream, first, first + size)
            self.append([profile("users", f"u{self.dice.randrange(users)}", None) for _ in range(2)])
            time.sleep(self.dice.uniform(0.1, 1.5))
            if plan:
                name, start = plan.pop(), time.monotonic()
                self.faults[name]()
                self.outcome.faults[name] += 1
                self.say(f"{min(events, first + size):,} events in, {name} ({time.monotonic() - start:.1f} s)")
                self.look_for_deaths()
        self.outcome.events = events
        self.verify()
        for role, pids in self.running.items():
            for pid in list(pids):
                self.stop(role, pid)
        self.look_for_ends()
        self.outcome.seconds = time.monotonic() - self.began
        return self.outcome

    def verify(self) -> None:
        """Undisturbed, the system catches up; then every promise is kept. The trainers fold last what the last steps taught."""
        undisturbed = time.monotonic()
        self.say("undisturbed from now on")
        while time.monotonic() - undisturbed < QUIET_SECONDS:
            self.look_for_deaths()
            try:
                self.outcome.waiting = waiting(self.settings)
                if self.outcome.waiting:
                    self.say(f"{self.outcome.waiting:,} interactions wait")
                else:
                    start = time.monotonic()
                    with connect(self.settings) as log:
                        found = verify(log, rules_of(self.settings, reasons=self.reasons))
                    self.outcome.verify_seconds = time.monotonic() - start
                    self.outcome.findings = [f"({finding.promise}) {finding.text}" for finding in found]
                    self.outcome.recovery_seconds = start - undisturbed
                    if not found:
                        break
                    self.say(f"verified too early, or a promise broken: {self.outcome.findings[0]}")
            except BrokerUnreachable as error:
                self.say(f"the verifier waits for a broker: {error}")
            time.sleep(1)
        self.say(f"caught up after {self.outcome.recovery_seconds:.1f} s, verified in {self.outcome.verify_seconds:.1f} s")


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
    # Or the faults would hit processes that compile, for minutes, and nothing would be scored until the last of them had happened.
    compile_loops(settings)
    with Nursery(folder / "said.jsonl") as nursery, KafkaCluster(folder / "kafka", nodes, settings=KILLED, proxied=True) as cluster:
        return Chaos(settings, cluster, nursery, seed).run(events, faults)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, action="append", help="may be repeated; default 1")
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--table", action="store_true", help=f"run nothing; write the table of the runs in OUT into {PAGE.name}")
    chosen = parser.parse_args()
    lines = chosen.out / "runs.jsonl"
    if chosen.table:
        write_table(lines, PAGE)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for seed in chosen.seed or [1]:
        with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
            outcome = chaos(Path(folder).resolve(), seed, chosen.events, chosen.faults, chosen.nodes)
            # A seed may be run again to find out about a run before: what that one said stays.
            (Path(folder) / "said.jsonl").replace(chosen.out / f"said-{seed}-{dt.datetime.now(dt.UTC):%Y%m%d-%H%M%S}.jsonl")
        failed += not outcome.passed
        with lines.open("a") as file:
            file.write(outcome.line())
        sys.stdout.write(f"seed {seed}: {outcome.faults.total()} faults in {outcome.seconds:.0f} s, {outcome.verdict}\n")
        for text in outcome.findings[:20]:
            sys.stdout.write(f"  {text}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
