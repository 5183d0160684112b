"""Small runs of the real system: settings of little cost, a made-up stream with garbage in it, and lockstep over them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from consumers import lockstep
from consumers.opening import connect, topics_of
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from consumers.versions import Versions
from consumers.worker import Worker
from streaming.events import Interaction
from streaming.journal import Journal
from streaming.log import Message
from streaming.partitioner import partition_of

T0 = 880_000_000_000
MICRO_BATCH = 16

SMALL: dict[str, Any] = {
    "threads": 1,
    "metrics": {"enabled": False},
    "topics": {"partitions": 1},
    "worker": {"micro_batch": MICRO_BATCH, "support_size": 4},
    "trainer": {"meta_update": 8, "snapshot_every": 40},
    "rehearsal": {"users": 3, "query": 2},
    "model": {"embedding_size": 4, "memory_rows": 3},
    "schema": {
        "user": {"job": {"kind": "categorical"}},
        "item": {"id": {"kind": "id"}, "genre": {"kind": "multivalued", "max_values": 2}},
    },
}


def small(log: Path, /, **sections: Any) -> Settings:  # noqa: ANN401 - whatever a section may hold
    """Settings of a small run over the embedded log at ``log``; ``sections`` add to them."""
    merged: dict[str, Any] = {"broker": f"embedded:{log}"}
    for name, value in (SMALL | sections).items():
        merged[name] = SMALL.get(name, {}) | value if isinstance(value, dict) else value
    return Settings.model_validate(merged)


def packed(**fields: Any) -> bytes:  # noqa: ANN401 - whatever a sender may put there
    """An interaction as MessagePack, with ``fields`` in place of right ones."""
    return msgspec.msgpack.encode({"user": "ann", "item": "i1", "rating": 3.0, "timestamp": T0} | fields)


BROKEN: list[tuple[str, bytes | None, bytes | None]] = [
    ("empty", b"ann", None),
    ("not-decodable", b"ann", b"\xc1\xc1"),
    ("not-decodable", b"ann", b'{"user": "ann"'),
    ("not-a-map", b"ann", b"\x93\x01\x02\x03"),
    ("missing-field", b"ann", msgspec.msgpack.encode({"user": "ann", "item": "i1", "rating": 3.0})),
    ("wrong-type", b"ann", packed(rating="4")),
    ("rating-off-scale", b"ann", packed(rating=float("nan"))),
    ("rating-off-scale", b"ann", packed(rating=6.0)),
    ("timestamp-out-of-range", b"ann", packed(timestamp=-62_135_596_800_000)),
    ("bad-id", b"ann", packed(item="")),
    ("invalid-utf8", b"ann", packed().replace(b"i1", b"\xff\xfe")),
    ("wrong-key", b"bob", packed()),
    ("wrong-key", None, packed()),
]
"""Why a record is no event, and the record's key and value; all belong to partition 0 of 1."""


class Stream:
    """A made-up stream: messages for `interactions`, and for each of them the reason why it is none, None for a valid event."""

    def __init__(self, n: int, *, seed: int = 1, garbage: float = 0.06, users: int = 40, items: int = 60, partitions: int = 1) -> None:
        dice = random.Random(seed)
        self.messages: list[Message] = []
        self.reasons: list[str | None] = []
        user = "u0"
        for number in range(n):
            if dice.random() < garbage:
                reason, key, value = dice.choice(BROKEN)
                place = 0 if key is None else partition_of(key, partitions)
                if partitions > 1 and dice.random() < 0.2:
                    reason, key, value, place = "wrong-partition", b"ann", packed(), (partition_of(b"ann", partitions) + 1) % partitions
                self.messages.append(Message("interactions", key, value, place))
                self.reasons.append(reason)
                continue
            # Streams come in bursts, and the last users appear late.
            if dice.random() < 0.4:
                user = f"u{dice.randrange(1 + min(users - 1, number * users // n + 3))}"
            event = Interaction(user, f"i{int(items * dice.random() ** 2)}", float(dice.randint(1, 5)), T0 + 1000 * number)
            self.messages.append(message(event))
            self.reasons.append(None)
        self.profiles = [profile("users", f"u{n}", {"job": dice.choice("abc")}) for n in range(0, users, 2)]
        self.profiles += [profile("items", f"i{n}", {"genre": dice.sample(["x", "y", "z"], 2)}) for n in range(0, items, 2)]


def message(event: Interaction) -> Message:
    """An event as a message to `interactions`."""
    return Message("interactions", event.user.encode(), msgspec.msgpack.encode(event))


def profile(topic: str, key: str, features: dict[str, Any] | None) -> Message:
    """A profile as a message; None drops it."""
    return Message(topic, key.encode(), None if features is None else msgspec.msgpack.encode({"features": features}))


def fill(settings: Settings, messages: Sequence[Message]) -> list[int]:
    """Append to the log, which is made if it does not exist; returns the offsets."""
    with connect(settings, create=True) as log:
        log.create(topics_of(settings).values())
        return log.append(messages)


@contextmanager
def run_and_keep(settings: Settings) -> Iterator[tuple[System, Worker]]:
    """Lockstep until every interaction that is in the log is scored; the system and its worker as they then are."""
    with Stop() as stop, System(settings) as system:
        kept: list[Worker] = []
        original = system.worker

        def worker(versions: Versions | None = None) -> Worker:
            kept.append(original(versions))
            return kept[-1]

        system.worker = worker  # type: ignore[method-assign]
        lockstep.run(system, stop, until_end=True)
        yield system, kept[0]


def run(settings: Settings, journal: Path | None = None, on_step: Callable[[lockstep.Progress], None] = lambda _: None) -> None:
    """Lockstep until every interaction that is in the log is scored."""
    with Stop() as stop, System(settings) as system:
        if journal is None:
            lockstep.run(system, stop, until_end=True, on_step=on_step)
            return
        with Journal(journal) as written:
            lockstep.run(system, stop, until_end=True, journal=written, on_step=on_step)
