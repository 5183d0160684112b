"""What about a topic would lose data: the rules of any broker, and those of Apache Kafka on a real one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from kafka.admin import KafkaAdminClient

from consumers.cli import execute
from streaming.brokers import open_log
from streaming.log import Topic
from streaming.risks import risks
from tests.kafka_cluster import KafkaCluster

TABLE = Topic("table", 2, "compact", 1000, None, 5000)
STREAM = Topic("stream", 2, "delete", 1000, 1000, 5000)


def found(wanted: Topic, existing: Topic | None) -> list[str]:
    return [risk.setting for risk in risks([wanted], {} if existing is None else {existing.name: existing})]


@pytest.mark.parametrize("topic", [TABLE, STREAM])
def test_what_is_as_it_should_be_or_better_is_no_risk(topic: Topic) -> None:
    assert found(topic, topic) == []
    assert found(topic, topic._replace(retention_ms=None, retention_bytes=None, max_record_bytes=6000)) == []
    assert found(topic, topic._replace(retention_ms=2000)) == []


@pytest.mark.parametrize(
    ("wanted", "existing", "settings"),
    [
        (TABLE, None, ["topic"]),
        (TABLE, TABLE._replace(partitions=3), ["partitions"]),
        (TABLE, TABLE._replace(cleanup="delete"), ["cleanup"]),
        (STREAM, STREAM._replace(cleanup="compact"), ["cleanup"]),
        (STREAM, STREAM._replace(retention_ms=999, retention_bytes=999), ["retention_ms", "retention_bytes"]),
        (STREAM._replace(retention_ms=None), STREAM, ["retention_ms"]),
        (TABLE, TABLE._replace(retention_ms=10, max_record_bytes=4999), ["retention_ms", "max_record_bytes"]),
    ],
)
def test_what_would_lose_data_is_named(wanted: Topic, existing: Topic | None, settings: list[str]) -> None:
    assert found(wanted, existing) == settings


def test_the_command_names_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--set", f"broker=embedded:{tmp_path / 'log.db'}", "--set", "topics.partitions=2"]
    assert execute(["topics", "create", *flags]) == 0
    capfd.readouterr()
    assert execute(["topics", "check", *flags]) == 0
    assert capfd.readouterr().out.strip() == "no setting of any topic would lose data"
    assert execute(["topics", "check", *flags, "--set", "topics.partitions=3"]) == 2
    assert "partitions" in capfd.readouterr().out


@pytest.mark.kafka
def test_what_only_kafka_can_get_wrong(kafka_broker: KafkaCluster) -> None:
    name = f"r-{uuid.uuid4().hex[:8]}"
    wrong = {
        "cleanup.policy": "compact,delete",
        "message.timestamp.type": "CreateTime",
        "unclean.leader.election.enable": "true",
        "max.message.bytes": "2000000",
        "delete.retention.ms": "5000",
    }
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker.url.removeprefix("kafka:"))
    admin.create_topics({name: {"num_partitions": 2, "replication_factor": 1, "configs": wrong}}, wait_for_metadata=True)
    admin.close()
    with open_log(kafka_broker.url) as log:
        settings = {risk.setting for risk in log.risks([TABLE._replace(name=name)])}
        assert settings == {"replication", "message.timestamp.type", "unclean.leader.election.enable", "cleanup.policy"}
        made = TABLE._replace(name=f"{name}-made")
        log.create([made])
        assert {risk.setting for risk in log.risks([made])} == {"replication"}
