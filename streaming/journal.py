"""The run journal: what a run did with its time, kept outside the log.

A line is appended before each step, outside the step's transaction, so that work which a kill undid, and which was then done again, is
counted too. Everything else in a report comes from the log alone.

The file holds one JSON object a line, each with ``kind``, ``run`` (an id of the process's run) and ``elapsed`` (seconds of monotonic
time since the run was started):

    {"kind":"start","run":"9f2c…","elapsed":0.0,"started_at":1764000000000}
    {"kind":"step","run":"9f2c…","elapsed":1.25,"started_at":1764000001250,"partition":0,"from":0,"to":16,"events":16}
    {"kind":"stages","run":"9f2c…","elapsed":9.1,"seconds":{"adapt":3.2}}          totals of this run so far
    {"kind":"attention","run":"9f2c…","elapsed":9.1,"payload":{…}}                 a note
    {"kind":"end","run":"9f2c…","elapsed":12.5}

Each line is handed to the operating system at once, which survives a kill of the process; none is synced to disk. A line that a crash
tore is passed over by the reader and counted.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import msgspec

from streaming.errors import LogFull, SourceError

if TYPE_CHECKING:
    from types import TracebackType

_KINDS = frozenset({"start", "step", "stages", "end"})
_LONGEST_LINE = 1 << 20


class Journal:
    """Appends the lines of one run. Open it when processing starts, and close it when the last step is done; between them lies its time.

    Several processes may append to one file: lines carry the run's id.
    Raises `LogFull` when the disk is full, `OSError` for a file that cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.run = secrets.token_hex(8)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = self.path.open("ab")
        if _ends_torn(self.path):
            self._append(b"\n")
        self._opened = time.monotonic()
        self._write("start", started_at=_now_ms())

    def step(self, partition: int, start: int, end: int, events: int) -> None:
        """Say that the step over the interactions ``start`` to ``end`` (exclusive) of a partition begins now, with ``events`` events."""
        # Written without json: this is on the path of every step.
        line = (
            f'{{"kind":"step","run":"{self.run}","elapsed":{time.monotonic() - self._opened:.6f},"started_at":{_now_ms()},'
            f'"partition":{int(partition)},"from":{int(start)},"to":{int(end)},"events":{int(events)}}}\n'
        )
        self._append(line.encode())

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Write down the seconds spent in each stage since this run's start. Later lines replace earlier ones of the run."""
        self._write("stages", seconds={stage: round(float(total), 6) for stage, total in seconds.items()})

    def note(self, kind: str, payload: Mapping[str, Any]) -> None:
        """Write down anything else under a ``kind`` of the caller's.

        Raises `ValueError` for a kind of the journal's own and for a payload over 1 MB or with NaN.
        """
        if kind in _KINDS:
            raise ValueError(f"{kind!r} is a kind of line of the journal's own")
        self._write(kind, payload=payload)

    def close(self) -> None:
        """End the run. Closing twice does nothing."""
        if self._file is not None:
            self._write("end")
            self._file.close()
            self._file = None

    def _write(self, kind: str, **fields: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
        line = {"kind": kind, "run": self.run, "elapsed": round(time.monotonic() - self._opened, 6), **fields}
        text = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        if len(text) > _LONGEST_LINE:
            raise ValueError(f"a journal line of kind {kind!r} has {len(text)} bytes, more than {_LONGEST_LINE}")
        self._append(text)

    def _append(self, line: bytes) -> None:
        if self._file is None:
            raise ValueError(f"the run journal {self.path} is closed")
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LogFull(f"run journal {self.path}: {error.strerror}") from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(slots=True)
class History:
    """What a journal says of all its runs.

    ``runs`` is 1 + restarts. ``events_processed`` counts an event every time a step took it up. ``seconds`` is the sum over the runs of
    the time from the run's start to its last line: time between runs is no part of it, nor is the step in which a run was killed.
    ``stages`` is the sum over the runs of the seconds of each stage. ``notes`` are the payloads of other lines by kind, in order.
    """

    runs: int = 0
    events_processed: int = 0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    torn_lines: int = 0


class _Line(msgspec.Struct):
    kind: str
    run: str
    elapsed: float
    events: int = 0
    seconds: dict[str, float] = {}
    payload: dict[str, Any] = {}


def read_journal(path: Path | str) -> History:
    """Read a journal, also while it is being written. Raises `SourceError` for a file that does not exist or cannot be read."""
    history, decoder = History(), msgspec.json.Decoder(_Line)
    elapsed: dict[str, float] = {}
    stages: dict[str, dict[str, float]] = {}
    try:
        with Path(path).open("rb") as lines:
            while text := lines.readline(_LONGEST_LINE):
                if not text.strip():
                    continue
                try:
                    line = decoder.decode(text)
                except msgspec.MsgspecError:
                    history.torn_lines += 1
                    continue
                elapsed[line.run] = max(elapsed.get(line.run, 0.0), line.elapsed)
                match line.kind:
                    case "start":
                        history.runs += 1
                    case "step":
                        history.events_processed += line.events
                    case "stages":
                        stages[line.run] = line.seconds
                    case "end":
                        pass
                    case other:
                        history.notes.setdefault(other, []).append(line.payload)
    except OSError as error:
        raise SourceError(f"run journal {path}: {error.strerror}") from error
    history.seconds = sum(elapsed.values())
    for totals in stages.values():
        for stage, seconds in totals.items():
            history.stages[stage] = history.stages.get(stage, 0.0) + seconds
    return history


def _ends_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
