"""TLS, SASL, secrets and rights, on a real broker that asks for all of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from consumers.cli import execute
from consumers.exits import Exit
from consumers.inspection import toml
from consumers.live import run_worker
from consumers.opening import connect
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from consumers.training import run_trainer
from streaming.errors import AccessRefused, BrokerUnreachable
from streaming.kafka import KafkaLog, KafkaOptions, Security
from streaming.log import TopicPartition
from tests.kafka_secure import PASSWORD, SCRAM_USER, WRONG, Right, SecureCluster
from tests.small_runs import SMALL, T0, Stream, fill, small
from tests.test_live_kill import waiting
from tests.test_promises import findings

pytestmark = pytest.mark.kafka

ROOT = Path(__file__).resolve().parent.parent
QUICK = 20.0
"""Seconds within which whatever cannot succeed must have said so."""


def rights() -> dict[str, list[Right]]:
    """What docs/security.md says that each process needs."""
    rows = re.findall(r"^\| `(.+?)` \|(.*)\|(.*)\|(.*)\|(.*)\|$", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    found = {}
    for process, *cells in rows:
        reads, writes, groups, ids = ([name.strip() for name in cell.split(",") if name.strip()] for cell in cells)
        found[process] = [
            *(Right("TOPIC", "*", operation) for operation in ("DESCRIBE", "DESCRIBE_CONFIGS")),
            *(Right("TOPIC", name, "READ") for name in reads),
            *(Right("TOPIC", name, "WRITE") for name in writes),
            *(Right("GROUP", name.split()[0], "DESCRIBE" if "DESCRIBE" in name else "READ") for name in groups),
            *(Right("TRANSACTIONAL_ID", name.replace("-N", "-0"), "WRITE") for name in ids),
        ]
    return found


PROCESSES = rights()
USERS = {process: process.replace(" ", "-") for process in PROCESSES}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureCluster]:
    with SecureCluster(tmp_path_factory.mktemp("secure"), [*USERS.values(), "ann", "creator"]) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDSTREAM_KAFKA_PASSWORD", PASSWORD)


def security(cluster: SecureCluster, given: dict[str, Any]) -> Security:
    usual = {"protocol": "SASL_SSL", "ca_file": str(cluster.ca), "mechanism": "PLAIN", "username": "ann", "password": PASSWORD}
    ours = {"cert_file": str(cluster.client_cert), "key_file": str(cluster.client_key)} if given.get("cert_file") else {}
    return Security(**(usual | given | ours))


@pytest.mark.parametrize(
    ("listener", "given"),
    [
        ("SECURE", {}),
        ("SECURE", {"mechanism": "SCRAM-SHA-512", "username": SCRAM_USER}),
        ("SASL", {"protocol": "SASL_PLAINTEXT"}),
        ("MUTUAL", {"protocol": "SSL", "cert_file": "ours"}),
        ("ELSEWHERE", {"protocol": "SSL", "check_hostname": False}),
    ],
    ids=["plain", "scram", "without tls", "by certificate", "another host"],
)
def test_who_is_known_is_let_in(cluster: SecureCluster, listener: str, given: dict[str, Any]) -> None:
    with KafkaLog(cluster.at(listener).removeprefix("kafka:"), KafkaOptions(security=security(cluster, given))) as log:
        assert log.topics() == {}, "who has no right sees no topic"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("SECURE", {"password": WRONG}, "user ann by PLAIN.*kafka.username and the password"),
    ("SECURE", {"mechanism": "SCRAM-SHA-512", "username": SCRAM_USER, "password": WRONG}, "user scrambled by SCRAM-SHA-512"),
    ("SECURE", {"username": "nobody"}, "user nobody"),
    ("SECURE", {"mechanism": "SCRAM-SHA-256"}, "kafka.mechanism = SCRAM-SHA-256: the broker takes PLAIN, SCRAM-SHA-512"),
    ("EXPIRED", {"protocol": "SSL"}, "not valid now .certificate has expired"),
    ("STRANGE", {"protocol": "SSL"}, "authority that is not trusted.*kafka.ca_file = .*ca.pem does not have it"),
    ("SECURE", {"ca_file": ""}, "authority that is not trusted.*kafka.ca_file must name"),
    ("ELSEWHERE", {"protocol": "SSL"}, "does not name the host 127.0.0.1"),
    ("MUTUAL", {"protocol": "SSL"}, "kafka.cert_file and kafka.key_file"),
    ("SECURE", {"protocol": "PLAINTEXT"}, "kafka.protocol = PLAINTEXT: the broker speaks only with TLS"),
    ("SASL", {"protocol": "PLAINTEXT"}, "kafka.protocol = PLAINTEXT: .*SASL_PLAINTEXT must be meant"),
    ("SECURE", {"protocol": "SSL"}, "kafka.protocol = SSL: .*SASL_SSL must be meant"),
    ("SASL", {}, "kafka.protocol = SASL_SSL: the broker speaks without TLS"),
    ("OPEN", {"protocol": "SASL_PLAINTEXT"}, "kafka.protocol = SASL_PLAINTEXT: the broker takes no SASL"),
]


@pytest.mark.parametrize(("listener", "given", "told"), REFUSED)
def test_what_cannot_succeed_is_said_at_once(cluster: SecureCluster, listener: str, given: dict[str, Any], told: str) -> None:
    began = time.monotonic()
    with pytest.raises(AccessRefused, match=told) as caught:
        KafkaLog(cluster.at(listener).removeprefix("kafka:"), KafkaOptions(security=security(cluster, given)))
    assert not isinstance(caught.value, BrokerUnreachable), "that would be waited for"
    assert time.monotonic() - began < QUICK
    assert cluster.at(listener) in str(caught.value)
    assert WRONG not in str(caught.value)


def config(cluster: SecureCluster, folder: Path, user: str, **kafka: Any) -> tuple[Settings, Path]:  # noqa: ANN401 - settings
    """Settings of a small run as a user of the secured listener, and a file of them."""
    sections = SMALL | {"broker": cluster.at("SECURE"), "kafka": cluster.sasl(user, **kafka), "log": {"session_timeout_ms": 1500}}
    path = folder / f"{user}.toml"
    path.write_text("\n".join(f"{name} = {toml(value)}" for name, value in sections.items()))
    return small(folder / "unused.db", **{name: sections[name] for name in ("kafka", "log")}).model_copy(
        update={"broker": sections["broker"]}
    ), path


@pytest.mark.parametrize("source", ["environment", "file"])
@pytest.mark.parametrize("secret", [PASSWORD, WRONG], ids=["right", "wrong"])
def test_no_output_ever_shows_the_password(cluster: SecureCluster, tmp_path: Path, secret: str, source: str) -> None:
    """The commands run as processes, and all that they write is looked at, with everything logged that can be."""
    environment = {name: value for name, value in os.environ.items() if name != "COLDSTREAM_KAFKA_PASSWORD"} | {"OMP_NUM_THREADS": "1"}
    (tmp_path / "secret").write_text(secret + "\n")
    more = {"password_file": str(tmp_path / "secret")} if source == "file" else {}
    environment |= {"COLDSTREAM_KAFKA_PASSWORD": secret} if source == "environment" else {}
    _, path = config(cluster, tmp_path, "ann", **more)
    for command in (["config"], ["topics", "list"]):
        arguments = [
            sys.executable,
            "-c",
            "from consumers.cli import main; main()",
            *command,
            "--verbose",
            "--config",
            str(path),
            "--set",
            "log_format=json",
        ]
        began = time.monotonic()
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
        out = done.stdout + done.stderr
        assert secret not in out
        assert secret not in json.dumps(out), "nor escaped"
        refused = secret is WRONG and command != ["config"]
        assert done.returncode == (Exit.LOG_UNAVAILABLE if refused else Exit.DONE), out
        assert ("does not take us as the user ann" in out) is refused
        assert time.monotonic() - began < 2 * QUICK, "not a minute of tries"


class Rights:
    """Gives rights to users, and takes them."""

    def __init__(self, cluster: SecureCluster) -> None:
        self.admin = cluster.admin()

    def give(self, user: str, *given: Right) -> None:
        self.give_all({user: given})

    def give_all(self, given: Mapping[str, Sequence[Right]]) -> None:
        assert not self.admin.create_acls([right.acl(user) for user, rights in given.items() for right in rights])["failed"]
        time.sleep(0.5)  # until the broker has read it

    @contextlib.contextmanager
    def without(self, user: str, right: Right) -> Iterator[None]:
        self.admin.delete_acls([right.acl(user)])
        time.sleep(0.5)
        try:
            yield
        finally:
            self.give(user, right)


@pytest.fixture(scope="module")
def granted(cluster: SecureCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rights]:
    """Topics made by somebody who may do that, and every process's user with exactly its rights."""
    rights = Rights(cluster)
    rights.give("creator", *(Right("TOPIC", "*", operation) for operation in ("DESCRIBE", "DESCRIBE_CONFIGS")))
    _, path = config(cluster, tmp_path_factory.mktemp("creator"), "creator")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDSTREAM_KAFKA_PASSWORD", PASSWORD)
        assert execute(["topics", "create", "--config", str(path)]) == Exit.LOG_UNAVAILABLE, "CREATE is missing"
        rights.give("creator", Right("TOPIC", "*", "CREATE"))
        assert execute(["topics", "create", "--config", str(path)]) == Exit.DONE
    rights.give_all({USERS[process]: given for process, given in PROCESSES.items()})
    yield rights
    rights.admin.close()


def serve(settings: Settings, role: str, done: Callable[[], bool] = lambda: False) -> None:
    """Run a worker or trainer here, until it is done, for a minute at the most."""
    with Stop() as stop, System(settings) as system:
        ends = time.monotonic() + 60

        def watch() -> None:
            while not (stop or done() or time.monotonic() > ends):
                time.sleep(0.2)
            stop.ask()

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            (run_worker if role == "worker" else run_trainer)(system, stop)
        finally:
            stop.ask()
            watching.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rights")


@pytest.fixture(scope="module")
def everybody(cluster: SecureCluster, granted: Rights, folder: Path) -> Settings:
    """Settings of somebody who may do anything, with a stream in the topics."""
    settings = small(folder / "unused.db").model_copy(update={"broker": cluster.at("OPEN")})
    stream = Stream(80, seed=4)
    fill(settings, [*stream.profiles, *stream.messages])
    return settings


@pytest.fixture(scope="module")
def scored(cluster: SecureCluster, everybody: Settings, folder: Path) -> Settings:
    """As `everybody`, once a worker with exactly its rights has scored the stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDSTREAM_KAFKA_PASSWORD", PASSWORD)
        serve(config(cluster, folder, "worker")[0], "worker", lambda: waiting(everybody) == 0)
    assert waiting(everybody) == 0
    return everybody


@pytest.fixture(scope="module")
def trained(cluster: SecureCluster, scored: Settings, folder: Path) -> Settings:
    """As `scored`, once a trainer with exactly its rights has made a version of it."""
    with pytest.MonkeyPatch.context() as patch, connect(scored) as log:
        patch.setenv("COLDSTREAM_KAFKA_PASSWORD", PASSWORD)
        model = TopicPartition("model", 0)
        serve(config(cluster, folder, "trainer")[0], "trainer", lambda: log.bounds([model])[model].end > 0)
        assert log.bounds([model])[model].end > 0
    return scored


def refused(granted: Rights, user: str, right: Right, run: Callable[[], object]) -> None:
    """Without the right, ``run`` raises an error that names user, resource and operation, instead of trying on."""
    began = time.monotonic()
    with granted.without(user, right), pytest.raises(AccessRefused, match=f"user {user} ") as caught:
        run()
    told = str(caught.value)
    assert f"needs {right.operation} of" in told
    assert right.name.rstrip("*") in told
    assert time.monotonic() - began < 45, "it was tried again for long"


@pytest.mark.parametrize(
    "right",
    [
        Right("TOPIC", "*", "DESCRIBE_CONFIGS"),
        Right("TOPIC", "interactions", "READ"),
        Right("TOPIC", "model", "READ"),
        Right("TOPIC", "scores", "WRITE"),
        Right("TOPIC", "support", "WRITE"),
        Right("TRANSACTIONAL_ID", "coldstream-0", "WRITE"),
    ],
    ids=" ".join,
)
def test_a_worker_names_what_it_may_not(cluster: SecureCluster, granted: Rights, everybody: Settings, tmp_path: Path, right: Right) -> None:
    fill(everybody, Stream(3, seed=9, garbage=0).messages)
    settings, _ = config(cluster, tmp_path, "worker")
    refused(granted, "worker", right, lambda: serve(settings, "worker"))


@pytest.mark.parametrize(
    "right",
    [
        Right("TOPIC", "updates", "READ"),
        Right("TOPIC", "model", "WRITE"),
        Right("GROUP", "coldstream-trainer", "READ"),
        Right("TRANSACTIONAL_ID", "coldstream-trainer", "WRITE"),
    ],
    ids=" ".join,
)
def test_a_trainer_names_what_it_may_not(cluster: SecureCluster, granted: Rights, scored: Settings, tmp_path: Path, right: Right) -> None:
    settings, _ = config(cluster, tmp_path, "trainer")
    refused(granted, "trainer", right, lambda: serve(settings, "trainer"))


def test_worker_and_trainer_keep_their_promises_with_exactly_their_rights(trained: Settings) -> None:
    assert findings(trained) == []


COMMANDS: list[tuple[list[str], Exit, Right]] = [
    (["replay", "ratings.csv"], Exit.DONE, Right("TOPIC", "interactions", "WRITE")),
    (["replay", "ratings.csv"], Exit.DONE, Right("TRANSACTIONAL_ID", "coldstream-replay-*", "WRITE")),
    (["score", "u1", "--best", "2", "--timeout", "1"], Exit.NO_ANSWER, Right("TOPIC", "requests", "WRITE")),
    (["report"], Exit.DONE, Right("TOPIC", "scores", "READ")),
    (["status"], Exit.DONE, Right("GROUP", "coldstream", "DESCRIBE")),
    (["audit"], Exit.DONE, Right("TOPIC", "support", "READ")),
    (["model", "list"], Exit.DONE, Right("TOPIC", "model", "READ")),
    (["dead-letters", "list"], Exit.DONE, Right("TOPIC", "dead-letters", "READ")),
    (["dead-letters", "send-back", "0"], Exit.DATA, Right("TRANSACTIONAL_ID", "coldstream-sent-back", "WRITE")),
    (["backtest", "--try", "worker.support_size=3", "--out", "backtest"], Exit.DONE, Right("TOPIC", "interactions", "READ")),
    (["topics", "check"], Exit.USAGE, Right("TOPIC", "*", "DESCRIBE")),
    (["model", "rollback", "0"], Exit.DONE, Right("TRANSACTIONAL_ID", "coldstream-trainer", "WRITE")),
]


@pytest.mark.parametrize(("command", "code", "right"), COMMANDS, ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None)
def test_a_command_runs_with_exactly_its_rights_and_names_what_is_missing(
    cluster: SecureCluster,
    granted: Rights,
    trained: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: list[str],
    code: Exit,
    right: Right,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ratings.csv").write_text(f"user,item,rating,timestamp\nu1,i1,3,{T0}\nu2,i1,4,{T0}\n")
    user = next(USERS[process] for process in PROCESSES if command[: len(process.split())] == process.split())
    _, path = config(cluster, tmp_path, user)
    with granted.without(user, right):
        assert execute([*command, "--config", str(path)]) == Exit.LOG_UNAVAILABLE
    told = capfd.readouterr().err
    assert f"user {user} " in told
    assert f"needs {right.operation} of" in told
    assert right.name.rstrip("*") in told
    assert execute([*command, "--config", str(path)]) == code, capfd.readouterr().err
