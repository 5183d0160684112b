"""The alert rules: over written series by promtool, and in a real Prometheus that scrapes a real worker."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from consumers import lockstep
from consumers.stop import Stop
from consumers.system import System
from streaming.errors import Fenced
from streaming.log import Message
from streaming.metrics import STAGES, Metrics
from tests.small_runs import Stream, fill, packed, run, small

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "prometheus"
RULES = FOLDER / "coldstream.rules.yml"
WRITTEN = sorted((FOLDER / "tests").glob("*.yml"))
PATH = os.pathsep.join([str(ROOT / ".tools" / "prometheus"), os.environ.get("PATH", "")])


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not on this machine: `make prometheus` fetches it from Debian's packages")
    return found


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=100)


def loaded(path: Path) -> Any:  # noqa: ANN401 - whatever a file holds
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in loaded(RULES)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_configurations_and_rules_are_valid() -> None:
    for name in ("prometheus.yml", "compose.yml"):
        done = promtool("check", "config", FOLDER / name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 rule files found" in done.stdout


def test_each_alert_fires_where_it_should_and_keeps_silent_where_it_should_not() -> None:
    done = promtool("test", "rules", *WRITTEN)
    assert done.returncode == 0, done.stdout + done.stderr


def test_written_series_tell_of_each_alert_that_never_fires(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    broken = loaded(RULES)
    for group in broken["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = f"({rule['expr']}) and on () (vector(0) > 0)"
    (tmp_path / RULES.name).write_text(yaml.safe_dump(broken), encoding="utf-8")
    done = promtool("test", "rules", *(tmp_path / "tests" / path.name for path in WRITTEN))
    assert done.returncode != 0
    assert [name for name in ALERTS if f'alertname="{name}"' not in done.stdout + done.stderr] == []


def test_each_alert_has_series_for_which_it_fires_and_others_for_which_it_does_not() -> None:
    fires, silent = set(), set()
    for test in (test for path in WRITTEN for test in loaded(path)["tests"]):
        name, _, what = test["name"].partition(": ")
        told = {sample["labels"] for check in test["promql_expr_test"] for sample in check["exp_samples"]}
        if what.startswith("fires"):
            assert f'{{alertname="{name}"}}' in told, test["name"]
            fires.add(name)
        else:
            assert what.startswith("silent"), test["name"]
            assert f'{{alertname="{name}"}}' not in told, test["name"]
            silent.add(name)
    assert fires == set(ALERTS)
    assert silent >= set(ALERTS)


def test_rules_use_metrics_and_labels_that_exist() -> None:
    described = {metric.name: metric for metric in Metrics().described}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for rule in rules():
        used = set(re.findall(r"\bcoldstream[_:][a-z_:]+", rule["expr"]))
        assert used or "up{" in rule["expr"]
        for name in used:
            assert name in recorded or name in described or described[name.removesuffix("_count")].kind == "histogram", name
        assert set(re.findall(r'stage="(\w+)"', rule["expr"])) <= set(STAGES)


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text("utf-8"), re.MULTILINE)}
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        said = re.search(r"What to do: docs/alerts\.md#(\w+)$", rule["annotations"]["description"])
        assert said is not None, name
        assert said[1] in headings, name


# --- a real Prometheus, a real worker

MINUTE_MS = 500
"""What a minute of the rules lasts in the test; but for this they are the rules as they are."""

CONFIG = """
broker = "embedded:{log}"
threads = 1
log_format = "json"
metrics = {{port = 0}}
topics = {{partitions = 1}}
worker = {{micro_batch = 8, support_size = 4, poll_timeout_ms = 50}}
trainer = {{meta_update = 8}}
rehearsal = {{users = 3, query = 2}}
model = {{embedding_size = 4, memory_rows = 3}}
"""


def quickened(text: str) -> str:
    """Rules whose minutes are short. Days and hours stay: no test waits for them."""
    return re.sub(r"\b(\d+)m\b", lambda found: f"{int(found[1]) * MINUTE_MS}ms", text)


def test_only_minutes_are_quickened() -> None:
    assert quickened("rate(coldstream_m[15m]) > 5m1 offset 1h\nfor: 2m\n") == "rate(coldstream_m[7500ms]) > 5m1 offset 1h\nfor: 1000ms\n"


@contextmanager
def running(command: list[str], folder: Path, *, name: str) -> Iterator[subprocess.Popen[str]]:
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.DEVNULL, stderr=log, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(true: Callable[[], bool], what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Asked:
    """What a running Prometheus answers; nothing while it starts."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def firing(self) -> set[tuple[str, str]]:
        """Name and, of dead letters, reason of the alerts that fire."""
        alerts = self._data("alerts").get("alerts", [])
        return {(alert["labels"]["alertname"], alert["labels"].get("reason", "")) for alert in alerts if alert["state"] == "firing"}

    def value(self, query: str) -> float:
        """The value of a query with one result; -1 without any."""
        found = self._data(f"query?{urllib.parse.urlencode({'query': query})}").get("result", [])
        return float(found[0]["value"][1]) if found else -1

    def _data(self, path: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"{self.url}/{path}", timeout=5) as answer:
                data: dict[str, Any] = json.load(answer)["data"]
                return data
        except (urllib.error.URLError, ConnectionError):
            return {}


def endpoint_port(log: Path) -> int:
    """Where a process said that it serves its metrics; 0 before it did."""
    found = re.search(r'"port": ?(\d+)', log.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


@pytest.mark.timeout(300)
def test_alerts_of_a_real_prometheus_fire_and_clear_over_a_real_worker(tmp_path: Path) -> None:
    prometheus = program("prometheus")
    log = tmp_path / "log.db"
    settings = small(log)
    fill(settings, Stream(40, garbage=0).messages)
    (tmp_path / "coldstream.toml").write_text(CONFIG.format(log=log), encoding="utf-8")
    (tmp_path / RULES.name).write_text(quickened(RULES.read_text(encoding="utf-8")), encoding="utf-8")
    config, port = loaded(FOLDER / "prometheus.yml"), free_port()
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms")
    # No trainer runs here.
    (job,) = config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "coldstream-worker"]
    worker = [sys.executable, "-c", "from consumers.cli import main; main()", "worker", "--config", str(tmp_path / "coldstream.toml")]
    with running(worker, tmp_path, name="worker") as scored:
        # On a fresh checkout it compiles all loops first, with all that runs beside it.
        until(lambda: endpoint_port(tmp_path / "worker.log") > 0, "the worker serves its metrics", seconds=150)
        job["static_configs"][0]["targets"] = [f"127.0.0.1:{endpoint_port(tmp_path / 'worker.log')}"]
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        flags = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path / 'tsdb'}", "--config.file=prometheus.yml"]
        with running([prometheus, *flags], tmp_path, name="prometheus"):
            asked = Asked(port)
            until(lambda: asked.value("sum(coldstream_events_total)") == 40, "all events are scored and scraped")
            assert not {"ColdstreamDeadLetters", "ColdstreamDown"} & {name for name, _ in asked.firing()}

            fill(settings, [Message("interactions", b"bob", packed(), 0)])
            until(lambda: ("ColdstreamDeadLetters", "wrong-key") in asked.firing(), "the alert of dead letters fires")

            scored.send_signal(signal.SIGSTOP)
            until(lambda: ("ColdstreamDown", "") in asked.firing(), "the alert of a worker that does not answer fires")
            scored.send_signal(signal.SIGCONT)
            until(lambda: ("ColdstreamDown", "") not in asked.firing(), "it ends when the worker answers")
            until(lambda: ("ColdstreamDeadLetters", "wrong-key") not in asked.firing(), "the alert of dead letters ends")
            assert scored.poll() is None


# --- what the alerts rely on


def metric(system: System, name: str, **labels: str) -> float | None:
    return system.metrics.registry.get_sample_value(f"coldstream_{name}", labels)


def test_a_profile_that_is_refused_is_counted(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, [Message("users", b"bob", b"\xc1"), Message("interactions", b"ann", packed(), 0)])
    with Stop() as stop, System(settings) as system:
        lockstep.run(system, stop, until_end=True)
        assert metric(system, "dead_letters_total", reason="not-decodable") == 1


@pytest.mark.parametrize("users", [0, 3])
def test_attention_is_unknown_until_somebody_is_rehearsed(tmp_path: Path, users: int) -> None:
    settings = small(tmp_path / "log.db", rehearsal={"users": users})
    fill(settings, Stream(40, garbage=0).messages)
    with Stop() as stop, System(settings) as system:
        lockstep.run(system, stop, until_end=True)
        spread = metric(system, "attention_spread", over="rows")
    assert spread is not None
    assert math.isnan(spread) == (users == 0)


def test_a_worker_tells_the_age_of_the_version_it_starts_at(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(40, garbage=0).messages)
    run(settings)
    with System(settings) as system:
        assert math.isnan(metric(system, "model_version") or 0)
        worker = system.worker()
        assert metric(system, "model_version") == worker.versions.version > 0
        age = metric(system, "model_version_age_seconds")
    assert age is not None
    assert 0 <= age < 100


def test_a_step_that_is_given_up_is_counted(tmp_path: Path) -> None:
    settings = small(tmp_path / "log.db")
    fill(settings, Stream(40, garbage=0).messages)
    with Stop() as stop, System(settings) as system:
        with pytest.raises(Fenced):
            lockstep.run(system, stop, until_end=True, on_step=lambda _: run(settings))
        assert metric(system, "transactions_aborted_total") == 1
        assert metric(system, "commits_total") == 2, "the first step, and the version that came of it"
