"""A real Apache Kafka on this machine, from deploy/kafka: for tests, for `make kafka`, and for brokers to be killed.

`KafkaCluster` starts one or more nodes in a folder of their own and can kill, pause, stop and start each. The command line keeps a cluster
running after it returns: ``python -m tests.kafka_cluster up DIR --nodes 3`` and ``python -m tests.kafka_cluster down DIR``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.kafka_proxy import Proxy

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy" / "kafka"
LIBS = ROOT / ".kafka" / "libs"
CLUSTER_ID = "Q29sZHN0cmVhbUNsdXN0ZQ"
START_SECONDS = 60.0
KILLED = {
    "group.min.session.timeout.ms": "200",
    # A broker that is gone is missed before it is back, and one that comes back need not wait until it has been missed.
    "broker.session.timeout.ms": "2500",
    "broker.heartbeat.interval.ms": "250",
}
"""Settings of brokers that are to be killed and stopped: by default others wait 9 s for them."""


class BrokerFailed(Exception):
    """A node did not come up, or Apache Kafka cannot be had. The message says where its output is."""


def install() -> Path:
    """The folder of Apache Kafka's jars, fetched by Maven where it is not there yet. Raises `BrokerFailed`."""
    stamp = LIBS.parent / "installed"
    pom = (DEPLOY / "pom.xml").read_text()
    if stamp.exists() and stamp.read_text() == pom:
        return LIBS
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            raise BrokerFailed(f"{tool} is not installed: Apache Kafka needs Java 17 or later, and Maven fetches it")
    shutil.rmtree(LIBS, ignore_errors=True)
    command = ["mvn", "-q", "-B", "-f", str(DEPLOY / "pom.xml"), "dependency:copy-dependencies", "-DincludeScope=runtime"]
    done = subprocess.run([*command, f"-DoutputDirectory={LIBS}"], capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise BrokerFailed(f"Maven could not fetch Apache Kafka (exit code {done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    stamp.write_text(pom)
    return LIBS


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens at now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
        return found


def end_with_parent() -> None:
    """Ask the kernel, where it is Linux, to kill this process when the one that started it has ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Node:
    """One broker, and controller, of a cluster."""

    def __init__(self, number: int, folder: Path, port: int, lines: Mapping[str, str], heap_mb: int) -> None:
        self.number = number
        self.folder = folder
        self.port = port
        self.heap_mb = heap_mb
        self.tied = True
        """Whether it ends with this process, even if that is killed."""
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "server.properties"
        own = "".join(f"{name}={value}\n" for name, value in lines.items())
        self.config.write_text((DEPLOY / "server.properties").read_text() + "\n# This node\n" + own)

    def java(self, main: str, *arguments: str) -> list[str]:
        """The command that runs a class of Apache Kafka."""
        flags = [
            f"-Xmx{self.heap_mb}m",
            "-Xms128m",
            # Its second compiler takes a quarter of a core for minutes, and what comes of it is no faster at what is asked here.
            "-XX:TieredStopAtLevel=1",
            "-XX:+UseSerialGC",
            "-Xshare:auto",
            "-Djava.awt.headless=true",
        ]
        logging = f"-Dlog4j2.configurationFile={DEPLOY / 'log4j2.xml'}"
        return ["java", *flags, logging, "-cp", f"{install()}/*", main, *arguments]

    def format(self, *, scram: str = "") -> None:
        """Prepare the node's folder; ``scram`` makes a user that the cluster knows from its start."""
        if (self.folder / "data" / "meta.properties").exists():
            return
        more = ["--add-scram", scram] if scram else []
        command = self.java("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self.config), *more)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise BrokerFailed(f"the folder {self.folder} could not be formatted:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def start(self) -> None:
        """Start the process; `KafkaCluster.wait` waits until it serves."""
        with (self.folder / "broker.log").open("ab") as out:
            self.process = subprocess.Popen(
                self.java("kafka.Kafka", str(self.config)),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent if self.tied else None,  # noqa: PLW1509 - one system call, before any thread of the child
            )
        (self.folder / "pid").write_text(str(self.process.pid))

    def send(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGKILL, SIGSTOP, SIGCONT or SIGTERM."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End the process at once, as a loss of power to it would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, timeout: float = 60) -> None:
        """A planned stop."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def serves(self) -> bool:
        """Whether the node takes connections."""
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class KafkaCluster:
    """Nodes of Apache Kafka below ``folder``. A context manager: entering starts and waits, leaving ends them.

    ``settings`` are added to every node's properties, over those of deploy/kafka/server.properties. If ``proxied``, each node has another
    listener that is reached through a `Proxy` of its own: whoever comes by ``proxied_url`` is sent back there, the nodes among themselves
    and whoever comes by ``url`` are not.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 1,
        *,
        ports: list[int] | None = None,
        settings: Mapping[str, str] | None = None,
        heap_mb: int = 384,
        scram: str = "",
        proxied: bool = False,
    ) -> None:
        self.folder = folder
        self.scram = scram
        clients = ports or free_ports(nodes)
        controllers = free_ports(nodes)
        self.proxies = [Proxy(0, port) for port in free_ports(nodes)] if proxied else []
        copies = min(3, nodes)
        voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in enumerate(controllers, 1))
        self.nodes = [
            Node(
                number,
                folder / f"node-{number}",
                clients[number - 1],
                {
                    "node.id": str(number),
                    "controller.quorum.voters": voters,
                    "listeners": f"CLIENT://127.0.0.1:{clients[number - 1]},CONTROLLER://127.0.0.1:{controllers[number - 1]}",
                    "log.dirs": str(folder / f"node-{number}" / "data"),
                    "default.replication.factor": str(copies),
                    "min.insync.replicas": str(max(1, copies - 1)),
                    "offsets.topic.replication.factor": str(copies),
                    "transaction.state.log.replication.factor": str(copies),
                    "transaction.state.log.min.isr": str(max(1, copies - 1)),
                    **(settings or {}),
                    **(self._outer(clients[number - 1], controllers[number - 1], self.proxies[number - 1]) if proxied else {}),
                },
                heap_mb,
            )
            for number in range(1, nodes + 1)
        ]

    @staticmethod
    def _outer(client: int, controller: int, proxy: Proxy) -> dict[str, str]:
        inner = f"CLIENT://127.0.0.1:{client}"
        return {
            "listeners": f"{inner},OUTER://127.0.0.1:{proxy.port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"{inner},OUTER://127.0.0.1:{proxy.listens}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,CLIENT:PLAINTEXT,OUTER:PLAINTEXT",
        }

    @property
    def proxied_url(self) -> str:
        """The cluster behind its proxies."""
        return "kafka:" + ",".join(f"127.0.0.1:{proxy.listens}" for proxy in self.proxies)

    @property
    def url(self) -> str:
        """The cluster as the setting ``broker`` names it."""
        return "kafka:" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def start(self) -> Self:
        """Format, start and wait for all nodes."""
        for node in self.nodes:
            node.format(scram=self.scram)
        for node in self.nodes:
            node.start()
        self.wait()
        return self

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Wait until every node that was started takes connections. Raises `BrokerFailed`."""
        deadline = time.monotonic() + seconds
        for node in self.nodes:
            while node.process is not None and not node.serves():
                if node.process.poll() is not None or time.monotonic() > deadline:
                    tail = (node.folder / "broker.log").read_text(errors="replace")[-3000:]
                    raise BrokerFailed(f"node {node.number} did not come up in {seconds:.0f} s; {node.folder / 'broker.log'} ends:\n{tail}")
                time.sleep(0.05)

    def stop(self) -> None:
        """End all nodes at once: what they hold is thrown away with them."""
        for node in self.nodes:
            node.kill()
        for proxy in self.proxies:
            proxy.close()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def up(folder: Path, nodes: int, port: int) -> int:
    """Start a cluster that outlives this process, on ports from ``port`` on."""
    if (folder / "cluster.json").exists():
        sys.stderr.write(f"error: {folder} has a cluster already; `make kafka-down` ends it\n")
        return 1
    cluster = KafkaCluster(folder, nodes, ports=[port + number for number in range(nodes)], heap_mb=512)
    for node in cluster.nodes:
        node.tied = False
    try:
        cluster.start()
    except BrokerFailed as error:
        cluster.stop()
        sys.stderr.write(f"error: {error}\n")
        return 1
    pids = [node.process.pid for node in cluster.nodes if node.process]
    (folder / "cluster.json").write_text(json.dumps({"pids": pids, "broker": cluster.url}))
    sys.stdout.write(f'{nodes} node{"s" if nodes > 1 else ""} of Apache Kafka: broker = "{cluster.url}"\n')
    return 0


def down(folder: Path) -> int:
    """End a cluster started by `up`, and delete what it held."""
    path = folder / "cluster.json"
    if not path.exists():
        sys.stdout.write("no cluster is up\n")
        return 0
    for pid in json.loads(path.read_text())["pids"]:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            # The number may be another process's by now.
            if b"kafka.Kafka" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder)
    sys.stdout.write("the cluster is down, and what it held is deleted\n")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.kafka_cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", help="fetch Apache Kafka into .kafka/libs")
    starting = commands.add_parser("up", help="start a cluster that goes on when this command ends")
    starting.add_argument("folder", type=Path)
    starting.add_argument("--nodes", type=int, default=1)
    starting.add_argument("--port", type=int, default=9092, help="of the first node; the others take the next ones")
    ending = commands.add_parser("down", help="end the cluster and delete what it held")
    ending.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    try:
        if chosen.command == "install":
            install()
            return 0
        return up(chosen.folder.resolve(), chosen.nodes, chosen.port) if chosen.command == "up" else down(chosen.folder.resolve())
    except BrokerFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
