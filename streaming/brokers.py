"""Opening the log that the setting ``broker`` names."""

from __future__ import annotations

from typing import Any

from streaming.embedded import EmbeddedLog
from streaming.errors import LogUnavailable
from streaming.log import Log


def open_log(url: str, **options: Any) -> Log:  # noqa: ANN401 - each broker checks its own.
    """Open the log at ``url``: ``embedded:PATH`` today.

    ``options`` are the keyword arguments of the broker's class, such as ``durability`` and ``session_timeout_ms`` of `EmbeddedLog`.
    Raises `LogUnavailable` for a broker that is not known, does not answer, or whose file is not a log.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedLog(rest, **options)
    if scheme == "kafka":
        raise LogUnavailable(f"broker {url!r}: Apache Kafka comes with the Kafka release; this version has embedded:PATH only")
    raise LogUnavailable(f"broker {url!r} is not known: the setting broker takes embedded:PATH")
