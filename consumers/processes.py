"""`coldstream` commands as processes of their own, and what can be seen of each from outside: its endpoint and its log."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from prometheus_client import ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from consumers.layers import PASSWORD_VARIABLE, PREFIX
from streaming.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

STOP_SECONDS = 15.0
ANSWER_SECONDS = 2.0
MAX_ANSWER_BYTES = 4 << 20
RATE_SECONDS = 5.0
"""Over how long a rate is taken."""


class ProcessEnded(StreamError):
    """A process that was still needed has ended. ``code`` is its exit code, or minus the number of the signal that killed it."""

    def __init__(self, process: Process) -> None:
        super().__init__(f"{process.name} {process.ending}{f': {process.said}' if process.said else ''}; all it said is in {process.path}")
        self.code = process.code or 0


@dataclass(slots=True)
class Seen:
    """What an endpoint said last. ``lag`` is by partition, ``stages`` and ``processor`` are seconds by stage since the process began."""

    ready: bool = False
    state: str = "starting"
    events: int = 0
    updates: int = 0
    lag: dict[int, int] = field(default_factory=dict)
    mae: float = math.nan
    version: float = math.nan
    memory: float = math.nan
    attention: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    commits: int = 0


class Rate:
    """How fast a count has grown of late."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def update(self, count: int) -> None:
        """Take in the count as it is now."""
        now = time.monotonic()
        self._points.append((now, count))
        while len(self._points) > 2 and now - self._points[1][0] > RATE_SECONDS:
            self._points.popleft()

    def per_second(self) -> float:
        """Its growth a second over the last few seconds."""
        (began, first), (now, last) = self._points[0], self._points[-1]
        return (last - first) / (now - began) if now > began else 0.0


class Process:
    """One `coldstream` command, started at once, which ends with this process however that ends (see `consumers.tied`).

    All it says goes to ``path``. In a session of its own: Ctrl-C on the terminal is for this process, which then stops it.
    """

    def __init__(self, name: str, arguments: Sequence[str], path: Path) -> None:
        self.name = name
        self.path = path
        self.said = ""
        """The last line of its log that was a warning, an error, or no entry of a log."""
        self.seen = Seen()
        self.rate = Rate()
        self._url = ""
        self._rest = b""
        with path.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "consumers.tied", *arguments],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        self._log = path.open("rb")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """None while it runs, then its exit code, or minus the number of the signal that killed it."""
        return self._process.poll()

    @property
    def ending(self) -> str:
        """How it ended, in words; empty while it runs."""
        match self.code:
            case None:
                return ""
            case code if code < 0:
                return f"was killed by {signal.Signals(-code).name}"
            case code:
                return f"ended with exit code {code}"

    def look(self) -> None:
        """Read on in its log, and ask its endpoint, where it has one. What does not answer is as it was."""
        self._read_log()
        if self.code is not None:
            self.seen.ready, self.seen.state, self.seen.lag = False, self.ending, {}
        elif self._url:
            # A process in the middle of a long step answers a moment later.
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                self._ask()
        else:
            self.seen.memory = memory_of(self.pid)

    def _read_log(self) -> None:
        self._rest += self._log.read()
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            entry = _entry(line)
            if entry is None:
                self.said = line.decode(errors="replace").strip() or self.said
            elif entry.get("event") == "serving metrics and health":
                self._url = str(entry["url"])
            elif entry.get("level") in ("warning", "error", "critical"):
                self.said = str(entry.get("event"))

    def _ask(self) -> None:
        conditions = json.loads(self._get("/readyz"))["conditions"]
        failing = [f"{name.replace('_', ' ')}: {condition['detail']}" for name, condition in conditions.items() if not condition["ok"]]
        self.seen = seen_in(self._get("/metrics").decode())
        self.seen.ready, self.seen.state = not failing, failing[0] if failing else "ready"
        self.rate.update(self.seen.events or self.seen.updates)

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read(MAX_ANSWER_BYTES)

    def ask_to_stop(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self.code is None:
            self._process.terminate()

    def close(self) -> None:
        """Wait until it has ended, and end it where that takes too long. Closing twice does nothing."""
        self.ask_to_stop()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None  # noqa: S101 - it was made with one
        self._process.stdin.close()
        if not self._log.closed:
            self._read_log()
            self._log.close()


def environment() -> dict[str, str]:
    """The environment of a process whose settings stand in a file: what its variables would say is there, below flags that must win."""
    return {key: value for key, value in os.environ.items() if not key.startswith(PREFIX) or key == PASSWORD_VARIABLE}


class Processes:
    """Processes that end together. A context manager; leaving it ends all."""

    def __init__(self) -> None:
        self._all: list[Process] = []

    def add(self, process: Process) -> Process:
        """Take one in."""
        self._all.append(process)
        return process

    def close(self) -> None:
        """Ask all at once to stop, and wait for them. Closing twice does nothing."""
        for process in self._all:
            process.ask_to_stop()
        for process in self._all:
            process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def memory_of(pid: int) -> float:
    """Resident memory in bytes, NaN where the system does not tell."""
    collected = ProcessCollector(pid=lambda: pid, registry=None).collect()
    return next((s.value for family in collected for s in family.samples if s.name == "process_resident_memory_bytes"), math.nan)


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line of a log as its entry, None where it is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def seen_in(text: str) -> Seen:
    """What a page of metrics says of a process."""
    seen = Seen()
    for name, labels, value in _samples(text):
        match name:
            case "coldstream_events_total":
                seen.events += int(value)
            case "coldstream_meta_updates_total":
                seen.updates += int(value)
            case "coldstream_lag_events":
                seen.lag[int(labels["partition"])] = int(value)
            case "coldstream_running_error" if labels == {"earlier": "all", "metric": "mae"}:
                seen.mae = value
            case "coldstream_model_version":
                seen.version = value
            case "process_resident_memory_bytes":
                seen.memory = value
            case "coldstream_attention_spread":
                seen.attention[labels["over"]] = value
            case "coldstream_step_stage_seconds_sum":
                seen.stages[labels["stage"]] = value
            case "coldstream_stage_processor_seconds_total":
                seen.processor[labels["stage"]] = value
            case "coldstream_commits_total":
                seen.commits = int(value)
            case _:
                pass
    return seen


def _samples(text: str) -> Iterable[tuple[str, dict[str, str], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value
