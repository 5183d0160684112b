from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from consumers.opening import connect, endpoint, topics_of
from consumers.settings import Settings
from streaming.errors import BrokerUnreachable, EndpointError, LogUnavailable
from streaming.health import Health
from streaming.metrics import Metrics


def test_the_port_that_was_got_is_logged_and_served_until_the_end() -> None:
    structlog.reset_defaults()
    settings = Settings.model_validate({"metrics": {"port": 0}})
    with capture_logs() as logs, endpoint(settings, Metrics(), Health()):
        (line,) = logs
        assert line["url"] == f"http://127.0.0.1:{line['port']}"
        with urllib.request.urlopen(f"{line['url']}/healthz", timeout=5) as answer:
            assert answer.status == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{line['url']}/healthz", timeout=5)


def test_an_error_is_told_to_health_without_secrets() -> None:
    health = Health()
    settings = Settings.model_validate({"metrics": {"enabled": False}})
    with pytest.raises(RuntimeError), endpoint(settings, Metrics(), health):
        raise RuntimeError("boom password=hunter2")
    assert health.live()["no_fatal_error"] == (False, "RuntimeError: boom password=***")


def test_a_taken_port_stops_the_process_before_it_works() -> None:
    with capture_logs() as logs, endpoint(Settings.model_validate({"metrics": {"port": 0}}), Metrics(), Health()):
        taken = Settings.model_validate({"metrics": {"port": logs[0]["port"]}})
        with pytest.raises(EndpointError, match=r"metrics\.port"), endpoint(taken, Metrics(), Health()):
            pass


def test_switched_off_nothing_listens() -> None:
    with capture_logs() as logs, endpoint(Settings.model_validate({"metrics": {"enabled": False}}), Metrics(), Health()):
        assert logs == []


def test_looking_at_a_log_does_not_make_one(tmp_path: Path) -> None:
    settings = Settings(broker=f"embedded:{tmp_path}/deep/x.db")
    with pytest.raises(LogUnavailable, match="topics create"):
        connect(settings)
    assert list(tmp_path.iterdir()) == []
    with connect(settings, create=True) as log:
        log.create(topics_of(settings).values())
    with connect(settings) as log:
        assert log.topics() == {topic.name: topic for topic in topics_of(settings).values()}


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LogUnavailable, match=r"folder .*file cannot be made"):
        connect(Settings(broker=f"embedded:{tmp_path}/file/x.db"), create=True)


def test_a_broker_that_does_not_answer_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consumers.patience.FIRST_ANSWER_SECONDS", 0.0)
    with pytest.raises(BrokerUnreachable, match="no broker answers"):
        connect(Settings.model_validate({"broker": "kafka:127.0.0.1:1", "kafka": {"request_timeout_ms": 500}}))
