"""What of the demo needs no model: filling the topics, what the peers make of the events, the report.

Where there is a core to spare, a process of its own does it (`Beside`): the topics are filled while this one loads torch, the peers learn
while events are scored. What comes of it is the same.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import typer

from consumers import logs
from consumers.demo_files import COLUMNS, Files, require_data
from consumers.inspection import as_toml, effective, public
from consumers.opening import connect, topics_of
from consumers.processes import STOP_SECONDS, environment
from consumers.replayer import replay
from consumers.tied import tie
from streaming.errors import StreamError
from streaming.journal import read_journal
from streaming.report import build_report, read_report, write_report
from streaming.sources import interaction_source, profile_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from consumers.layers import Loaded
    from consumers.settings import Settings
    from consumers.stop import Stop
    from streaming.log import Log
    from streaming.peers import Scores
    from streaming.report import Report
    from streaming.scored import RunReader
    from streaming.sources import Source

FILLED, REPORTED = "filled", "reported"
"""The lines by which the process beside says how far it is."""

LOOK_SECONDS = 0.05
READ_ON_SECONDS = 2.0
"""Between two looks at the scores that have come: so few are left to read at the end."""


def fill(log: Log, settings: Settings, data: Path, stop: Callable[[], bool] = lambda: False) -> bool:
    """Fill users, items and interactions, the last in order of time; False if stopped. What an earlier run sent is not sent again."""
    limits, topics = settings.event_limits(), topics_of(settings)
    log.create(topics.values())
    sources: dict[str, Source] = {
        "users": profile_source(data / "ml-100k.user", id_column="user_id", limits=limits),
        "items": profile_source(data / "ml-100k.item", id_column="item_id", limits=limits),
        "interactions": interaction_source(data / "ml-100k.inter", columns=COLUMNS, timestamps="s", limits=limits),
    }
    for into, source in sources.items():
        result = replay(
            log,
            source,
            topics,
            into=into,  # type: ignore[arg-type]  # the keys above are the topics
            group=settings.group_id,
            batch=5000,
            sort_by_time=source.timed,
            stop=stop,
        )
        if not result.done:
            return False
    return True


def report_on(log: Log, settings: Settings, out: Path, peers: Scores | None = None, reader: RunReader | None = None) -> Report:
    """Report on the run whose journal is in ``out``, and leave the report there.

    ``peers`` are what the peers made of its events, ``reader`` is one that has read some of it.
    """
    report = build_report(
        log,
        public(settings),
        read_journal(Files.under(out).journal),
        limits=settings.event_limits(),
        prefix=settings.topic_prefix,
        peers=peers,
        reader=reader,
    )
    write_report(report, out)
    return report


class BesideEnded(StreamError):
    """The process beside has ended before its work was done, and has said why. ``code`` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the process beside ended with exit code {code}")
        self.code = code


def keep_settings(loaded: Loaded, out: Path) -> Path:
    """Leave the settings of a demo where `coldstream report --config` and others find them."""
    config = out / "settings.toml"
    config.write_text(as_toml(effective(loaded)), encoding="utf-8")
    return config


class Beside:
    """The process beside, started at once, which ends with this one however that ends. A context manager; leaving it ends the process.

    Raises `SourceError` where the data is not there.
    """

    def __init__(self, config: Path, data: Path, out: Path) -> None:
        require_data(data)
        self._out = out
        # In a session of its own: Ctrl-C on the terminal is for this process, which then stops it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "consumers.demo_beside", str(config), str(data), str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # What lies in a buffer of this process, no look at the pipe tells of.
            env=environment(),
            start_new_session=True,
        )

    def filled(self, stop: Stop) -> None:
        """Wait until the topics are filled, or this process is asked to stop. Raises `BesideEnded`."""
        self._wait(stop, FILLED)

    def report(self, stop: Stop) -> Report | None:
        """Have it report on the run, whose log and journal are closed; None if stopped before it is done. Raises `BesideEnded`."""
        assert self._process.stdin is not None  # noqa: S101 - it was made with one
        with contextlib.suppress(BrokenPipeError):  # It has ended, which shows where it is waited for.
            self._process.stdin.write(b"\n")
        self._wait(stop, REPORTED)
        return None if stop else read_report(Files.under(self._out).report)

    def _wait(self, stop: Stop, line: str) -> None:
        """Wait until it says this line."""
        assert self._process.stdout is not None  # noqa: S101 - it was made with one
        while not stop:
            if select.select([self._process.stdout], [], [], LOOK_SECONDS)[0]:
                said = self._process.stdout.readline().decode()
                if not said:
                    raise BesideEnded(self._process.wait())
                # Whatever else comes there is no answer: a library may print something.
                if said.rstrip() == line:
                    return

    def close(self) -> None:
        """Ask it to stop, and end it where that takes too long. Closing twice does nothing."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None  # noqa: S101 - it was made with both
            pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def main(config: Path, data: Path, out: Path) -> None:
    """Be the process beside: fill, say so in a line, learn what the peers make of it, and report once a line asks for it."""
    from consumers.layers import load
    from streaming.peers import peer_scores
    from streaming.scored import RunReader

    asked = threading.Event()
    tie(asked.set)
    settings = load(config, [], {}).settings
    logs.configure(settings.log_level, settings.log_format)
    with connect(settings, create=True) as log:
        # A signal ends it at once, wherever it is: what is not committed does not count.
        fill(log, settings, data)
        typer.echo(FILLED)
        limits = settings.event_limits()
        with RunReader(log, limits, settings.topic_prefix) as reader:
            reader.read_on()
            peers = peer_scores(reader.events(), (limits.rating_min, limits.rating_max))
            from streaming import plots  # noqa: F401  loaded while there is time

            while not asked.wait(READ_ON_SECONDS):
                reader.read_on()
            report_on(log, settings, out, peers, reader)
    typer.echo(REPORTED)


if __name__ == "__main__":
    from consumers.cli import explained

    sys.exit(explained(lambda: main(*map(Path, sys.argv[1:]))))
