"""Settings that all tests share, and the real broker that those marked ``kafka`` use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.kafka_cluster import KafkaCluster

# The same examples in every run, and none that fails for being slow on a busy machine. To search further afield:
# make test ARGS="--hypothesis-profile=default".
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaCluster]:
    """One node of Apache Kafka for all tests of a session; each takes topics, groups and ids of its own. Nobody may stop it."""
    # Sessions as short as the tests need, and a cleaner that does not wait for its usual fifteen seconds.
    quick = {
        "group.min.session.timeout.ms": "200",
        "log.cleaner.backoff.ms": "200",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": "200",
    }
    with KafkaCluster(tmp_path_factory.mktemp("kafka"), settings=quick) as cluster:
        yield cluster
