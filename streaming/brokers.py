"""Opening the log that the setting ``broker`` names."""

from __future__ import annotations

from typing import Any

from streaming.embedded import EmbeddedLog
from streaming.errors import LogUnavailable
from streaming.log import Log


def open_log(url: str, **options: Any) -> Log:  # noqa: ANN401 - each broker checks its own.
    """Open the log at ``url``: ``embedded:PATH`` or ``kafka:HOST:PORT,...``.

    ``options`` are those of the broker: the keyword arguments of `EmbeddedLog`, or the fields of `KafkaOptions`.
    Raises `LogUnavailable` for a broker that is not known, does not answer, or whose file is not a log.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedLog(rest, **options)
    if scheme == "kafka" and rest:
        # Only who uses Kafka loads its client.
        from streaming.kafka import KafkaLog, KafkaOptions

        return KafkaLog(rest, KafkaOptions(**options))
    raise LogUnavailable(f"broker {url!r} is not known: the setting broker takes embedded:PATH or kafka:HOST:PORT,...")
