"""Structured logs on standard error: readable lines on a terminal, one JSON object a line elsewhere."""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

HIDDEN = "***"
_SECRET_NAME = re.compile(r"password|passwd|secret|token|api_?key|credential", re.IGNORECASE)
_SECRET_TEXT = re.compile(
    r"((?:password|passwd|secret|token|api_?key|credential)\w*[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&)}\]]+)", re.IGNORECASE
)
_SECRET_URL = re.compile(r"(\w://[^/\s:@]*:)[^/\s@]+(@)")
_DEEPEST = 8


def is_secret(name: str) -> bool:
    """Whether a value of this name must not be shown. The name of the file that holds a secret may be."""
    return _SECRET_NAME.search(name) is not None and not name.endswith("_file")


def masked_text(text: str) -> str:
    """``text`` without what follows ``password=`` and the like, and without the password of a URL."""
    return _SECRET_URL.sub(rf"\1{HIDDEN}\2", _SECRET_TEXT.sub(rf"\1{HIDDEN}", text))


def masked(value: Any, depth: int = 0) -> Any:  # noqa: ANN401 - whatever is logged
    """A copy of ``value`` without secrets: those under a key that names one, and those spelled out within a text."""
    if isinstance(value, str):
        return masked_text(value)
    if depth >= _DEEPEST:
        return value if isinstance(value, (int, float, bool, type(None))) else masked_text(str(value))
    if isinstance(value, dict):
        return {key: HIDDEN if isinstance(key, str) and is_secret(key) else masked(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [masked(item, depth + 1) for item in value]
    return value


def mask_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Processor of structlog that hides secrets."""
    kept = {key: value for key, value in event.items() if key.startswith("_")}  # structlog's own, such as the record
    return {**masked({key: value for key, value in event.items() if key not in kept}), **kept}


def configure(level: str = "info", format: Literal["auto", "console", "json"] = "auto", stream: TextIO | None = None) -> None:  # noqa: A002
    """Send all logs of this process, those of the standard library included, to ``stream`` (default: standard error).

    ``auto`` is ``console`` where the stream is a terminal and ``json`` elsewhere. Calling it again replaces the set-up.
    """
    stream = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()]
    terminal = stream.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        # Tracebacks become text here, so that no renderer below can add the values of local variables to them.
        structlog.processors.format_exc_info,
        mask_secrets,
    ]
    console = format == "console" or (format == "auto" and terminal)
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=terminal, pad_event_to=32) if console else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[
            *shared[:3],
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared[4:],
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
    logging.captureWarnings(capture=True)
    # A client's own chatter is of use only when something is being looked for. What it says at debug holds whole requests, and one of
    # them the password.
    logging.getLogger("kafka").setLevel(logging.CRITICAL if number > logging.DEBUG else logging.INFO)
    # What matplotlib says at debug is about its fonts.
    logging.getLogger("matplotlib").setLevel(max(number, logging.WARNING))
