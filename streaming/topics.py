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


def topics(prefix: str = "", partitions: int = 8) -> dict[str, Topic]:
    """Return every topic by its plain name; `Topic.name` has the ``prefix`` before it.

    ``partitions`` (at least 1) is that of the topics in `COPARTITIONED`, fixed when they are made. How long topics that are not compacted
    are kept is a matter of settings (`consumers.opening.topics_of`); here they are kept for ever. Raises ValueError for less than
    one partition.
    """
    if partitions < 1:
        raise ValueError(f"partitions is {partitions}, it must be at least 1")

    def kept(name: str, count: int) -> Topic:
        return Topic(prefix + name, count, "delete", None, None, MAX_RECORD_BYTES)

    def compacted(name: str, count: int) -> Topic:
        # So long a removal is remembered, and so long may a reader stay away.
        return Topic(prefix + name, count, "compact", 7 * DAY_MS, None, MAX_RECORD_BYTES)

    return {
        "interactions": kept("interactions", partitions),
        # A null is all that says that somebody is to be forgotten, however long the worker that is to do it stays away.
        "users": compacted("users", partitions)._replace(retention_ms=None),
        # Every worker reads all items, so partitions would only cost: with one, a single offset says how far a worker has read.
        "items": compacted("items", 1),
        "requests": kept("requests", partitions),
        "scores": kept("scores", partitions),
        "support": compacted("support", partitions),
        "updates": kept("updates", partitions),
        "model": kept("model", 1),
        "snapshots": compacted("snapshots", 1),
        "dead-letters": kept("dead-letters", 1),
        "sent-back": compacted("sent-back", 1),
        "replays": compacted("replays", 1),
        "trainer-lock": kept("trainer-lock", 1),
    }
