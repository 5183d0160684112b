"""From settings to what they describe: the log, the topics in it, the endpoint for metrics and health."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from consumers.logs import masked_text
from streaming.brokers import open_log
from streaming.deadletters import LETTER_BYTES
from streaming.errors import LogUnavailable
from streaming.readonly import ReadOnlyLog
from streaming.risks import require_alike
from streaming.topics import topics

if TYPE_CHECKING:
    from consumers.settings import Settings
    from streaming.health import Health
    from streaming.log import Log, Topic
    from streaming.metrics import Metrics


INTERACTION_BYTES = 32
"""Of an encoded support set, what an interaction takes beside its item: rating, time and three heads."""

REST_BYTES = 2048
"""What a score or a support set takes beside ids and interactions: names of fields and of a topic, numbers."""


def connect(settings: Settings, *, create: bool = False, read_only: bool = False) -> Log:
    """Open the log that the settings name; whoever calls closes it.

    An embedded log that does not exist is made only if ``create``. One that is ``read_only`` cannot be changed through what is returned.
    Raises `LogUnavailable`.
    """
    log = _open(settings, create=create, read_only=read_only)
    return ReadOnlyLog(log) if read_only else log


def _open(settings: Settings, *, create: bool, read_only: bool) -> Log:
    kind, _, place = settings.broker.partition(":")
    if kind == "kafka":
        # Only who uses Kafka loads its client.
        from consumers import kafka

        return kafka.connect(settings)
    path = Path(place)
    new = not path.exists()
    if not create and new:
        raise LogUnavailable(f"broker = {settings.broker}: there is no log; `coldstream topics create` makes one")
    if read_only:
        return open_log(settings.broker, read_only=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LogUnavailable(f"broker = {settings.broker}: the folder {path.parent} cannot be made ({error.strerror})") from error
    log = open_log(settings.broker, durability=settings.log.durability, session_timeout_ms=settings.log.session_timeout_ms)
    if new:  # Whoever misspelt a path is told.
        structlog.get_logger("coldstream").info("a new log was made", path=place)
    return log


@contextlib.contextmanager
def endpoint(settings: Settings, metrics: Metrics, health: Health) -> Iterator[None]:
    """Serve metrics and health while the block runs, unless ``metrics.enabled`` is off, and log where.

    An error that leaves the block is told to ``health`` first. Raises `EndpointError` if the port cannot be had.
    """
    from streaming.health import Endpoint

    with contextlib.ExitStack() as stack:
        if settings.metrics.enabled:
            server = stack.enter_context(Endpoint(metrics.registry, health, settings.metrics.host, settings.metrics.port))
            structlog.get_logger("coldstream").info("serving metrics and health", url=server.url, port=server.port)
        try:
            yield
        except BaseException as error:
            health.fail(f"{type(error).__name__}: {masked_text(str(error))}")
            raise


def require_topics(log: Log, wanted: Iterable[Topic]) -> None:
    """Raise `TopicMismatch` where a topic of the log is another than wanted, so that users would be looked for where they are not."""
    there = log.topics()
    for topic in wanted:
        if (found := there.get(topic.name)) is not None:
            require_alike(topic, found.partitions, found.cleanup)


def topics_of(settings: Settings) -> dict[str, Topic]:
    """Every topic by its plain name, with the prefix, partitions, retention and sizes of the settings."""
    kept = settings.topics.retention_ms
    retention = {
        "interactions": kept.interactions,
        "scores": kept.scores,
        "requests": kept.requests,
        "dead-letters": kept.dead_letters,
    }
    sizes = {"updates": settings.topics.updates_bytes, "model": settings.topics.model_bytes}
    made, least = {}, least_bytes(settings)
    for name, topic in topics(settings.topic_prefix, settings.topics.partitions).items():
        if name in retention:
            topic = topic._replace(retention_ms=retention[name] or None)  # noqa: PLW2901
        elif name in sizes:
            # By size alone: how far back they reach is a matter of disk, not of days.
            topic = topic._replace(retention_bytes=sizes[name])  # noqa: PLW2901
        # What a valid event leads to, and the letter of one that is not, must find room, or the stream would stop there.
        made[name] = topic._replace(max_record_bytes=max(settings.topics.max_record_bytes, least.get(name, 0)))
    return made


def least_bytes(settings: Settings) -> dict[str, int]:
    """The largest records that events within the limits lead to, in topics whose records are not cut into chunks."""
    user = item = settings.limits.max_id_bytes
    support = settings.worker.support_size * (item + INTERACTION_BYTES) + user
    return {"dead-letters": LETTER_BYTES, "support": support + REST_BYTES, "scores": 2 * user + item + REST_BYTES}
