"""The contract of topics: their names and settings, in one place (docs/contract.md has the prose)."""

from __future__ import annotations

from streaming.log import Topic

MAX_RECORD_BYTES = 1_000_000
"""What a record's key and value may take together, in every topic. Larger values are cut by `streaming.chunks`."""

DAY_MS = 24 * 60 * 60 * 1000

COPARTITIONED = ("interactions", "requests", "users", "support", "updates", "scores")
"""Topics in which the same partition holds the same users."""


POSITION_KEY = b"\0position"
"""The key of a partition's position record in ``support``: no user has it, since no id holds control characters."""


def topics(
    prefix: str = "",
    partitions: int = 8,
    *,
    retention_ms: int | None = 7 * DAY_MS,
    model_retention_ms: int | None = 7 * DAY_MS,
    model_retention_bytes: int | None = 1 << 30,
    null_retention_ms: int | None = 7 * DAY_MS,
) -> dict[str, Topic]:
    """Return every topic by its plain name; `Topic.name` has the ``prefix`` before it.

    ``partitions`` (at least 1) is that of the topics in `COPARTITIONED`, fixed when they are made. ``retention_ms`` is how long
    interactions, requests, scores and dead letters are kept, ``model_retention_ms`` and ``model_retention_bytes`` (per partition) bound
    updates and model, which are large and needed only until a snapshot covers them; ``null_retention_ms`` is how long a compacted
    topic remembers a removal, and so how long a reader may stay away. None is without bound. Raises ValueError for less than one partition.
    """
    if partitions < 1:
        raise ValueError(f"partitions is {partitions}, it must be at least 1")

    def by_time(name: str, count: int) -> Topic:
        return Topic(prefix + name, count, "delete", retention_ms, None, MAX_RECORD_BYTES)

    def by_size(name: str, count: int) -> Topic:
        return Topic(prefix + name, count, "delete", model_retention_ms, model_retention_bytes, MAX_RECORD_BYTES)

    def compacted(name: str, count: int) -> Topic:
        return Topic(prefix + name, count, "compact", null_retention_ms, None, MAX_RECORD_BYTES)

    return {
        "interactions": by_time("interactions", partitions),
        "users": compacted("users", partitions),
        # Every worker reads all items, so partitions would only cost: with one, a single offset says how far a worker has read.
        "items": compacted("items", 1),
        "requests": by_time("requests", partitions),
        "scores": by_time("scores", partitions),
        "support": compacted("support", partitions),
        "updates": by_size("updates", partitions),
        "model": by_size("model", 1),
        "snapshots": compacted("snapshots", 1),
        "dead-letters": by_time("dead-letters", 1),
        "sent-back": compacted("sent-back", 1),
        "replays": compacted("replays", 1),
        "trainer-lock": by_time("trainer-lock", 1),
    }
