"""``make demo-kafka``: the demo on a real Apache Kafka of its own, which ends with it, however it ends.

``python -m tests.kafka_demo ARGUMENTS`` is ``coldstream demo --broker kafka:... ARGUMENTS``. The broker belongs to a second process, the
keeper, which ends it once its standard input does: so too when this one is killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from consumers.cli import execute
from tests.kafka_cluster import ROOT, BrokerFailed, KafkaCluster

FOLDER = ROOT / ".kafka"
KEEP = "--keep-broker"


def main(arguments: list[str]) -> int:
    """Run the demo beside its broker; the exit code is the demo's."""
    sys.stdout.write("starting Apache Kafka (the first time, Maven fetches it)\n")
    sys.stdout.flush()
    # In a session of its own: Ctrl-C asks the demo to stop, and only then the broker goes.
    with subprocess.Popen(
        [sys.executable, "-m", "tests.kafka_demo", KEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT
    ) as keeper:
        assert keeper.stdout is not None
        try:
            broker = keeper.stdout.readline().decode().strip()
        except KeyboardInterrupt:
            return 130
        if not broker:
            return 1
        sys.stdout.write(f'broker = "{broker}"\n')
        return execute(["demo", "--broker", broker, *arguments])


def keep() -> int:
    """Start a broker, tell where, and end it with the standard input."""
    FOLDER.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir=FOLDER))
    try:
        with KafkaCluster(folder, heap_mb=512) as cluster:
            sys.stdout.write(f"{cluster.url}\n")
            sys.stdout.flush()
            while os.read(0, 4096):
                pass
    except BrokerFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(keep() if sys.argv[1:] == [KEEP] else main(sys.argv[1:]))
