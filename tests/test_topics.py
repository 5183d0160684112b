"""The contract of topics, against the table of the design."""

from __future__ import annotations

import pytest

from streaming.kafka.topics import to_configs
from streaming.topics import COPARTITIONED, topics

CLEANUP = {
    "interactions": "delete",
    "users": "compact",
    "items": "compact",
    "requests": "delete",
    "scores": "delete",
    "support": "compact",
    "updates": "delete",
    "model": "delete",
    "snapshots": "compact",
    "dead-letters": "delete",
    "sent-back": "compact",
    "replays": "compact",
    "trainer-lock": "delete",
}


def test_every_topic_is_kept_as_the_design_says() -> None:
    assert {name: topic.cleanup for name, topic in topics().items()} == CLEANUP


def test_topics_of_users_share_their_partitions_and_the_others_have_one() -> None:
    for name, topic in topics(partitions=5).items():
        assert topic.partitions == (5 if name in COPARTITIONED else 1), name


def test_the_prefix_is_in_the_name_and_not_in_the_key() -> None:
    for name, topic in topics("test.").items():
        assert topic.name == f"test.{name}"


def test_removals_are_remembered_for_a_week_and_nothing_is_dropped_unless_settings_say_so() -> None:
    for name, topic in topics().items():
        # Of a user a removal is all that says who is to be forgotten.
        assert topic.retention_ms == (7 * 24 * 3600 * 1000 if topic.cleanup == "compact" and name != "users" else None), name
        assert topic.retention_bytes is None
        assert topic.max_record_bytes == 1_000_000


@pytest.mark.parametrize("record", [1_000_000, 67_108_864])
def test_on_kafka_what_is_compacted_is_cut_into_small_segments_that_hold_the_largest_record(record: int) -> None:
    for topic in topics().values():
        configs = to_configs(topic._replace(max_record_bytes=record), 0)
        if topic.cleanup == "compact":
            assert 64 << 20 <= int(configs["segment.bytes"]) <= 256 << 20
            assert int(configs["segment.bytes"]) > int(configs["max.message.bytes"])
        else:
            assert "segment.bytes" not in configs


@pytest.mark.parametrize(("kept", "segment"), [(1 << 20, 64 << 20), (1 << 30, 128 << 20), (1 << 40, 1 << 30)])
def test_on_kafka_what_is_kept_by_size_goes_by_segments_that_are_a_part_of_it(kept: int, segment: int) -> None:
    configs = to_configs(topics()["updates"]._replace(retention_bytes=kept), 0)
    assert (configs["retention.bytes"], configs["segment.bytes"]) == (str(kept), str(segment))
    assert to_configs(topics()["requests"]._replace(retention_ms=86_400_000), 0)["segment.ms"] == str(3 * 3_600_000)
    assert "segment.ms" not in to_configs(topics()["scores"], 0), "what is kept for ever may have Kafka's own"


def test_no_partitions_are_refused() -> None:
    with pytest.raises(ValueError, match="partitions is 0"):
        topics(partitions=0)
