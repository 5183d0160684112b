"""Fills and watches topics for `benchmarks.end_to_end`: an event in at a stated rate, its score out, and the time between.

A program of its own that knows nothing of Coldstream but the fields of its records, in an environment of its own with librdkafka's
client, whose cost an event is a tenth of a Python client's: it shares the cores with what is measured. It prints what it saw as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import confluent_kafka as kafka
import msgpack

QUEUED = 400_000


def lines(path: Path) -> list[list[str]]:
    """Rows of a tab-separated file, its header left out."""
    with path.open(encoding="utf-8") as file:
        next(file)
        return [line.rstrip("\n").split("\t") for line in file]


def events(data: Path) -> Iterator[tuple[bytes, bytes]]:
    """MovieLens-100K in order of time, again and again, with new users each time: cold ones keep coming, as in the demo."""
    rows = sorted(lines(data / "ml-100k.inter"), key=lambda row: float(row[3]))
    turn = 0
    while True:
        for user, item, rating, seconds in rows:
            name = f"{turn}-{user}"
            value = {"user": name, "item": item, "rating": float(rating), "timestamp": int(float(seconds)) * 1000}
            yield name.encode(), msgpack.packb(value)
        turn += 1


def profiles(data: Path, turns: int) -> Iterator[tuple[str, bytes, bytes]]:
    """Profiles of items, and of the users of so many turns: topic, key, value."""
    for number, _title, year, classes in (row[:4] for row in lines(data / "ml-100k.item")):
        features: dict[str, Any] = {"class": classes.split()}
        if year.isdigit():
            features["release_year"] = float(year)
        yield "items", number.encode(), msgpack.packb({"features": features})
    for user, age, gender, occupation, zip_code in (row[:5] for row in lines(data / "ml-100k.user")):
        features = {"age": float(age), "gender": gender, "occupation": occupation, "zip_code": zip_code}
        for turn in range(turns):
            yield "users", f"{turn}-{user}".encode(), msgpack.packb({"features": features})


def producer(broker: str) -> kafka.Producer:
    """A producer that places keys as Java's does."""
    return kafka.Producer(
        {
            "bootstrap.servers": broker,
            "partitioner": "murmur2_random",
            # As Java's clients have it by default, and librdkafka's. Less costs the broker, which shares the cores, a request an event.
            "linger.ms": 5,
            "enable.idempotence": True,
            "queue.buffering.max.messages": QUEUED,
            "log_level": 3,  # Of what it only warns of it tries again by itself.
        }
    )


class Watch(threading.Thread):
    """Reads scores as a read_committed consumer does, and notes when each event's came."""

    def __init__(self, broker: str, data: Path, partitions: int, room: int) -> None:
        super().__init__(daemon=True)
        # Of all turns alike, and each user rates an item once.
        self._ratings = {(user, item): float(rating) for user, item, rating, _ in lines(data / "ml-100k.inter")}
        self.errors = array("d")
        self.count = 0
        self.twice = 0
        self.seen = [array("d", bytes(8 * room)) for _ in range(partitions)]
        self.done = threading.Event()
        self._consumer = kafka.Consumer(
            {
                "bootstrap.servers": broker,
                "group.id": "watch",
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 20,
                "auto.offset.reset": "earliest",
            }
        )
        ends = [self._consumer.get_watermark_offsets(kafka.TopicPartition("scores", p), timeout=10)[1] for p in range(partitions)]
        self._consumer.assign([kafka.TopicPartition("scores", p, end) for p, end in enumerate(ends)])

    def run(self) -> None:
        """Until `done`."""
        while not self.done.is_set():
            for message in self._consumer.consume(500, timeout=0.02):
                if message.error():
                    raise kafka.KafkaException(message.error())
                now = time.monotonic()
                record = msgpack.unpackb(message.value())
                if record.get("source") is None:
                    continue
                _, partition, offset = record["source"]
                if self.seen[partition][offset]:
                    self.twice += 1
                    continue
                self.seen[partition][offset] = now
                self.errors.append(record["score"] - self._ratings[record["user"].partition("-")[2], record["item"]])
                self.count += 1
        self._consumer.close()

    def require_alive(self) -> None:
        """Raises SystemExit where it failed: what it had not seen by then would count as not scored."""
        if not self.is_alive():
            raise SystemExit("the scores could not be read")

    def found(self) -> dict[str, Any]:
        """What it saw: how many scores, how many of them twice, and how far from the ratings they were, all of them."""
        count = max(1, len(self.errors))
        mae, rmse = sum(map(abs, self.errors)) / count, math.sqrt(sum(error * error for error in self.errors) / count)
        return {"scored": self.count, "twice": self.twice, "mae": mae, "rmse": rmse}


def fill(broker: str, data: Path, count: int, turns: int) -> dict[str, Any]:
    """Put the profiles of so many turns and ``count`` events into the topics, as fast as they are taken."""
    client = producer(broker)
    for topic, key, value in profiles(data, turns):
        client.produce(topic, value, key)
        client.poll(0)
    client.flush(60)
    began = time.monotonic()
    for number, (key, value) in enumerate(events(data)):
        if number == count:
            break
        while True:
            try:
                client.produce("interactions", value, key)
                break
            except BufferError:
                client.poll(0.1)
        client.poll(0)
    if client.flush(120):
        raise SystemExit("the broker did not take all events")
    return {"events": count, "seconds": time.monotonic() - began}


def drain(broker: str, data: Path, partitions: int, count: int, seconds: float) -> dict[str, Any]:
    """Watch the scores of ``count`` events that are in the log already; says how many were scored by each second."""
    watch = Watch(broker, data, partitions, count)
    watch.start()
    tell("ready")
    marks = [(0.0, 0)]
    began = time.monotonic()
    while watch.count < count and time.monotonic() - began < seconds:
        watch.require_alive()
        time.sleep(0.25)
        marks.append((time.monotonic() - began, watch.count))
    watch.done.set()
    watch.join()
    return watch.found() | {"marks": marks}


def offer(broker: str, data: Path, partitions: int, rate: float, seconds: float) -> dict[str, Any]:
    """Send events at ``rate`` for ``seconds`` while watching the scores; the topic must be empty.

    Latency is from the event's hand-over to the producer to its score's arrival here. ``marks``: at each second, how many were sent
    and how many scored.
    """
    count = int(rate * seconds)
    watch = Watch(broker, data, partitions, count)
    watch.start()
    sent = array("d")
    places: dict[int, tuple[int, int]] = {}

    def delivered(number: int, error: kafka.KafkaError | None, message: kafka.Message) -> None:
        if error is not None:
            raise SystemExit(f"event {number} was not taken: {error}")
        places[number] = message.partition(), message.offset()

    client = producer(broker)
    source = events(data)
    order = [next(source) for _ in range(count)]
    tell("ready")
    marks: list[tuple[float, int, int]] = []
    began = time.monotonic()
    number = 0
    while number < count:
        now = time.monotonic()
        while number < count and began + number / rate <= now:
            key, value = order[number]
            client.produce("interactions", value, key, on_delivery=partial(delivered, number))
            sent.append(time.monotonic())
            number += 1
        client.poll(0)
        if not marks or now - marks[-1][0] - began >= 1:
            marks.append((now - began, number, watch.count))
        time.sleep(0.001)
    client.flush(60)
    last = time.monotonic()
    while watch.count < count and time.monotonic() - last < 60:
        watch.require_alive()
        time.sleep(0.1)
    caught_up = time.monotonic() - last
    watch.done.set()
    watch.join()
    if len(places) < count:
        raise SystemExit(f"only {len(places):,} of {count:,} events were taken")
    scored = [watch.seen[partition][offset] for partition, offset in (places[number] for number in range(count))]
    waits = [(at - began, 1000 * (seen - at)) for at, seen in zip(sent, scored, strict=True) if seen]
    late = max(at - (began + number / rate) for number, at in enumerate(sent))
    return watch.found() | {
        "sent": count,
        "caught_up_seconds": caught_up,
        "sent_late_seconds": late,
        "marks": marks,
        "latency_ms": percentiles([wait for at, wait in waits if at >= min(30.0, seconds / 4)]),
        "latency_by_10_s": by_ten(waits),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """Median, 90th, 99th percentile and largest of values."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0))
    }


def by_ten(waits: list[tuple[float, float]]) -> list[float]:
    """The 99th percentile of each ten seconds."""
    groups: dict[int, list[float]] = {}
    for at, wait in waits:
        groups.setdefault(int(at // 10), []).append(wait)
    return [percentiles(groups[group])["p99"] for group in sorted(groups)]


def tell(word: str) -> None:
    """Say how far this is, a line at a time."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("fill", "drain", "offer"))
    parser.add_argument("--broker", required=True)
    parser.add_argument("--data", type=Path, default=Path("data/ml-100k"))
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--turns", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.what == "fill":
        found = fill(chosen.broker, chosen.data, chosen.count, chosen.turns)
    elif chosen.what == "drain":
        found = drain(chosen.broker, chosen.data, chosen.partitions, chosen.count, chosen.seconds)
    else:
        found = offer(chosen.broker, chosen.data, chosen.partitions, chosen.rate, chosen.seconds)
    times = os.times()
    tell(json.dumps(found | {"processor_seconds": times.user + times.system}))


if __name__ == "__main__":
    main()
