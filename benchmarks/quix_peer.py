"""What a user might build instead with quixstreams: exactly once, a state for each user that keeps the last 20 interactions.

It learns nothing: the score is the mean of the user's last ratings. Run in an environment of its own, see `benchmarks.end_to_end`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import msgpack
from quixstreams import Application, State, message_context
from quixstreams.models import BytesDeserializer, BytesSerializer

KEPT = 20


def main() -> None:
    """Run until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--state", required=True)
    parser.add_argument("--commit-interval", type=float, default=5.0, help="seconds; 5 is quixstreams' own")
    chosen = parser.parse_args()
    logging.getLogger("quixstreams").setLevel(logging.WARNING)
    app = Application(
        broker_address=chosen.broker,
        consumer_group="quix",
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        commit_interval=chosen.commit_interval,
        state_dir=chosen.state,
        auto_create_topics=True,
        loglevel="WARNING",
    )
    interactions = app.topic("interactions", value_deserializer=BytesDeserializer())
    scores = app.topic("scores", value_serializer=BytesSerializer())

    def score(value: bytes, state: State) -> bytes:
        event: dict[str, Any] = msgpack.unpackb(value)
        kept = state.get("last", [])
        mean = sum(rating for _, rating, _ in kept) / len(kept) if kept else 3.5
        kept = [*kept, [event["item"], event["rating"], event["timestamp"]]][-KEPT:]
        state.set("last", kept)
        at = message_context()
        source = [at.topic, at.partition, at.offset]
        scored: bytes = msgpack.packb({"user": event["user"], "item": event["item"], "score": mean, "source": source})
        return scored

    frame = app.dataframe(interactions)
    frame.apply(score, stateful=True).to_topic(scores)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    app.run()


if __name__ == "__main__":
    main()
