from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from streaming import health as module
from streaming.errors import EndpointError
from streaming.health import Endpoint, Health
from streaming.metrics import Metrics


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(stall=30, commit_age=60, clock=clock)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def endpoint(metrics: Metrics, health: Health) -> Iterator[Endpoint]:
    with Endpoint(metrics.registry, health, port=0) as endpoint:
        yield endpoint


def ask(endpoint: Endpoint, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(endpoint.url + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


def failing(endpoint: Endpoint, path: str) -> set[str]:
    status, body, headers = ask(endpoint, path)
    assert headers["Content-Type"] == "application/json"
    answer = json.loads(body)
    assert (status == 200) == answer["ok"]
    assert status in (200, 503)
    return {name for name, condition in answer["conditions"].items() if not condition["ok"]}


def make_ready(health: Health) -> None:
    health.assigned(2)
    health.restored()
    health.loaded(7)


def test_metrics_are_served(endpoint: Endpoint, metrics: Metrics) -> None:
    metrics.commits.inc(3)
    status, body, headers = ask(endpoint, "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    assert b"coldstream_commits_total 3.0" in body
    assert b"process_resident_memory_bytes" in body


def test_openmetrics_is_served_to_who_asks_for_it(endpoint: Endpoint) -> None:
    _, body, headers = ask(endpoint, "/metrics?x=1", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_process_is_healthy_from_its_start_and_ready_only_when_all_is_there(endpoint: Endpoint, health: Health) -> None:
    assert failing(endpoint, "/healthz") == set()
    assert failing(endpoint, "/readyz") == {"assignment", "state", "model"}
    health.assigned(2)
    assert failing(endpoint, "/readyz") == {"state", "model"}
    health.restored()
    assert failing(endpoint, "/readyz") == {"model"}
    health.loaded(7)
    assert failing(endpoint, "/readyz") == set()
    health.restored(done=False)
    assert failing(endpoint, "/readyz") == {"state"}


def test_a_main_loop_that_hangs_is_neither_healthy_nor_ready(endpoint: Endpoint, health: Health, clock: Clock) -> None:
    make_ready(health)
    clock.now += 30
    assert failing(endpoint, "/healthz") == set()
    clock.now += 0.1
    assert failing(endpoint, "/healthz") == {"main_loop"}
    assert failing(endpoint, "/readyz") == {"main_loop"}
    health.beat()
    assert failing(endpoint, "/healthz") == set()


def test_a_fatal_error_is_named_and_stays(endpoint: Endpoint, health: Health) -> None:
    make_ready(health)
    health.fail("the log's disk is full")
    health.beat()
    assert failing(endpoint, "/healthz") == {"no_fatal_error"}
    assert failing(endpoint, "/readyz") == {"no_fatal_error"}
    assert b"the log's disk is full" in ask(endpoint, "/healthz")[1]


def test_losing_the_assignment_is_seen_and_a_stand_by_is_ready(endpoint: Endpoint, health: Health) -> None:
    make_ready(health)
    health.assigned(None)
    assert failing(endpoint, "/readyz") == {"assignment"}
    health.assigned(0)
    assert failing(endpoint, "/readyz") == set()


def test_without_commits_a_process_is_ready_only_while_nothing_waits(endpoint: Endpoint, health: Health, clock: Clock) -> None:
    make_ready(health)
    for _ in range(10):  # an hour of nothing to do
        clock.now += 360
        health.beat()
        health.waiting(0)
    assert failing(endpoint, "/readyz") == set()
    health.waiting(5)  # time counts from here, not from the last commit
    assert failing(endpoint, "/readyz") == set()
    for _ in range(3):
        clock.now += 20.1
        health.beat()
        health.waiting(6)
    assert failing(endpoint, "/readyz") == {"progress"}
    assert failing(endpoint, "/healthz") == set()
    health.committed()
    assert failing(endpoint, "/readyz") == set()


def test_head_answers_without_a_body(endpoint: Endpoint) -> None:
    for path, status in (("/healthz", 200), ("/readyz", 503), ("/metrics", 200)):
        assert ask(endpoint, path, "HEAD")[:2] == (status, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_but_reading_is_allowed(endpoint: Endpoint, method: str) -> None:
    status, _, headers = ask(endpoint, "/metrics", method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"


def test_other_paths_are_not_found(endpoint: Endpoint) -> None:
    for path in ("/", "/metrics/", "/../etc/passwd"):
        assert ask(endpoint, path)[0] == 404


def test_a_request_without_end_is_cut_off(endpoint: Endpoint) -> None:
    with closing(socket.create_connection((endpoint.host, endpoint.port), timeout=5)) as client:
        client.sendall(b"GET /" + b"a" * 70_000)
        assert b"414" in client.recv(100)


def test_slow_clients_take_no_more_than_their_share_and_are_let_go(
    metrics: Metrics, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(module._Handler, "timeout", 0.5)
    with Endpoint(metrics.registry, health, port=0) as endpoint:
        slow = [socket.create_connection((endpoint.host, endpoint.port), timeout=5) for _ in range(2)]
        time.sleep(0.1)
        with closing(socket.create_connection((endpoint.host, endpoint.port), timeout=5)) as third:
            assert third.recv(10) == b""  # closed at once
        for client in slow:
            assert client.recv(10) == b""  # closed after the time-out
            client.close()
        time.sleep(0.1)
        assert ask(endpoint, "/healthz")[0] == 200


def test_a_port_in_use_is_an_error_that_names_the_setting(endpoint: Endpoint, metrics: Metrics, health: Health) -> None:
    with pytest.raises(EndpointError, match=rf"metrics.port = {endpoint.port}.*in use.*or to 0"):
        Endpoint(metrics.registry, health, port=endpoint.port)


def test_an_address_of_another_machine_is_an_error_that_names_the_setting(metrics: Metrics, health: Health) -> None:
    with pytest.raises(EndpointError, match=r"metrics.host = 192\.0\.2\.1"):
        Endpoint(metrics.registry, health, host="192.0.2.1", port=0)


def test_closing_frees_the_port_and_leaves_no_thread(metrics: Metrics, health: Health) -> None:
    before = threading.active_count()
    endpoint = Endpoint(metrics.registry, health, port=0)
    assert ask(endpoint, "/healthz")[0] == 200
    endpoint.close()
    endpoint.close()
    with pytest.raises(urllib.error.URLError):
        ask(endpoint, "/healthz")
    with Endpoint(metrics.registry, health, port=endpoint.port) as again:
        assert ask(again, "/healthz")[0] == 200
    time.sleep(0.05)
    assert threading.active_count() == before


def test_it_listens_on_loopback_only_unless_told_otherwise(endpoint: Endpoint) -> None:
    assert endpoint.host == "127.0.0.1"
    assert endpoint.url == f"http://127.0.0.1:{endpoint.port}"
