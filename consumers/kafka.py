"""From settings to a connection with Apache Kafka, secrets included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from consumers import patience
from consumers.layers import PASSWORD_VARIABLE
from streaming.brokers import open_log
from streaming.errors import LogUnavailable
from streaming.kafka.client import Security

if TYPE_CHECKING:
    from consumers.settings import KafkaSettings, Settings
    from streaming.log import Log

SECRET_BYTES = 4096


def connect(settings: Settings) -> Log:
    """Connect to the brokers that ``broker`` names, waiting a minute for them to come up. Raises `LogUnavailable`."""
    kafka = settings.kafka
    options = {
        "session_timeout_ms": settings.log.session_timeout_ms,
        "max_poll_interval_ms": kafka.max_poll_interval_ms,
        "transaction_timeout_ms": kafka.transaction_timeout_ms,
        "request_timeout_ms": kafka.request_timeout_ms,
        "connect_timeout_ms": kafka.request_timeout_ms,
        "replication": kafka.replication,
        "min_insync": kafka.min_insync,
        "security": security(kafka),
    }
    return patience.within(patience.FIRST_ANSWER_SECONDS, lambda: open_log(settings.broker, **options))


def security(kafka: KafkaSettings) -> Security:
    """What the settings say of protection, with the secrets that they name. Raises `LogUnavailable` where one cannot be read."""
    password = os.environ.get(PASSWORD_VARIABLE, "")
    if kafka.password_file:
        password = _secret(kafka.password_file, "kafka.password_file")
    if kafka.protocol.startswith("SASL") and not password:
        raise LogUnavailable(f"kafka.protocol = {kafka.protocol} needs a password: name kafka.password_file, or set {PASSWORD_VARIABLE}")
    return Security(
        protocol=kafka.protocol,
        ca_file=kafka.ca_file,
        cert_file=kafka.cert_file,
        key_file=kafka.key_file,
        key_password=_secret(kafka.key_password_file, "kafka.key_password_file") if kafka.key_password_file else "",
        check_hostname=kafka.check_hostname,
        mechanism=kafka.mechanism,
        username=kafka.username,
        password=password,
    )


def _secret(path: str, setting: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(SECRET_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LogUnavailable(f"{setting} = {path} cannot be read ({reason})") from error
