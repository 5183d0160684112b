from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from consumers import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_away_from_a_terminal_each_message_is_one_json_line() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    structlog.get_logger("coldstream.worker").info("step committed", partition=3, events=16)
    logging.getLogger("some.client").warning("broker %s is gone", "b1")
    first, second = lines(stream)
    assert (
        first.items() >= {"event": "step committed", "partition": 3, "events": 16, "level": "info", "logger": "coldstream.worker"}.items()
    )
    assert str(first["timestamp"]).endswith("Z")
    assert second.items() >= {"event": "broker b1 is gone", "level": "warning", "logger": "some.client"}.items()


def test_on_a_terminal_messages_are_for_people() -> None:
    stream = Terminal()
    logs.configure(stream=stream)
    structlog.get_logger().info("step committed", events=16)
    assert "step committed" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


@pytest.mark.parametrize(("form", "stream", "json_lines"), [("json", Terminal(), True), ("console", io.StringIO(), False)])
def test_the_format_can_be_forced(form: str, stream: io.StringIO, json_lines: bool) -> None:
    logs.configure(format=form, stream=stream)  # type: ignore[arg-type]
    structlog.get_logger().info("hello")
    assert stream.getvalue().startswith("{") is json_lines


def test_the_level_holds_for_both_kinds_of_loggers() -> None:
    stream = io.StringIO()
    logs.configure("warning", stream=stream)
    for logger in (structlog.get_logger("a"), logging.getLogger("b")):
        logger.info("no")
        logger.warning("yes")
    assert [line["event"] for line in lines(stream)] == ["yes", "yes"]


def test_a_clients_chatter_is_heard_only_at_debug() -> None:
    for level, heard in (("info", []), ("debug", ["connected"])):
        stream = io.StringIO()
        logs.configure(level, stream=stream)
        logging.getLogger("kafka.conn").info("connected")
        logging.getLogger("kafka.conn").debug("a whole request, the one with the password too")
        assert [line["event"] for line in lines(stream)] == heard


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_never_reach_the_stream(form: str) -> None:
    stream = io.StringIO()
    logs.configure("debug", form, stream)  # type: ignore[arg-type]
    logger = structlog.get_logger()
    logger.info("login", sasl_password="hunter2", nested={"client": [{"api_token": "hunter2"}]})
    logger.info("url kafka://me:hunter2@host", config="ssl_secret = 'hunter2', x = 1")
    logging.getLogger("kafka").warning("sasl_plain_password=%s", "hunter2")
    logging.getLogger("kafka").warning("settings %s", {"password": "hunter2"})
    password = "hunter2"
    try:
        raise ValueError(f"refused: password={password}")
    except ValueError:
        logger.exception("failed")
        logging.getLogger("x").exception("failed")
    text = stream.getvalue()
    assert "hunter2" not in text
    assert "ValueError" in text
    assert text.count(logs.HIDDEN) >= 8


@given(st.text(st.characters(categories=["L", "N"]), min_size=4).filter(lambda text: text not in "password"))
def test_a_password_in_a_text_is_masked_whatever_it_is(secret: str) -> None:
    assert logs.masked_text(f"a password={secret}, b") == "a password=***, b"


def test_what_is_no_secret_stays() -> None:
    assert logs.masked({"user": "u1", "n": 3, "deep": [1.5, None]}) == {"user": "u1", "n": 3, "deep": [1.5, None]}
    assert (
        logs.masked_text("embedded:runs/coldstream.db at http://127.0.0.1:9464/metrics")
        == "embedded:runs/coldstream.db at http://127.0.0.1:9464/metrics"
    )


def test_setting_up_twice_does_not_log_twice() -> None:
    stream = io.StringIO()
    logs.configure(stream=stream)
    logs.configure(stream=stream)
    structlog.get_logger().info("once")
    assert len(lines(stream)) == 1
