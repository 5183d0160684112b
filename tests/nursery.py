"""A process that has everything imported and starts runs as children of its own, to be killed: importing takes longer than a small run.

Each line on its input is a run, as JSON: [settings, journal, role]. In lockstep it answers with the run's process id, "ready" as it
begins, "step" after each step, and "ended CODE", negative for the signal that killed it. A worker or a trainer says its process id alone,
and is not waited for: `ended` looks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, Literal, Self

from consumers import logs
from consumers.exits import Exit, exit_of
from consumers.live import run_worker
from consumers.lockstep import Progress
from consumers.settings import Settings
from consumers.stop import Stop
from consumers.system import System
from consumers.training import run_trainer
from tests.kafka_cluster import end_with_parent
from tests.small_runs import run

Role = Literal["lockstep", "worker", "trainer"]
ROOT = Path(__file__).resolve().parent.parent


class Nursery:
    """The test's side of it."""

    def __init__(self, log: Path | None = None) -> None:
        """``log`` gets what the processes say from information on; without it standard error gets errors."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery", "info" if log else "error"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Through a pipe, so that a process whose files may not grow can still speak.
            stderr=subprocess.PIPE if log else None,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        if log:
            threading.Thread(target=self._copy, args=(log,), daemon=True).start()

    def _copy(self, log: Path) -> None:
        assert self._process.stderr is not None
        with log.open("w") as file, self._process.stderr as said:
            for line in said:
                file.write(line)
                file.flush()

    def start(self, settings: Settings, journal: Path = Path(), role: Role = "lockstep") -> int:
        """Start a run; returns its process id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([settings.model_dump(mode="json", by_alias=True), str(journal), role]) + "\n")
        self._process.stdin.flush()
        return int(self.line())

    def line(self) -> str:
        """What it says next."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def end(self) -> int:
        """Wait for the run's end; returns its exit code."""
        while not (line := self.line()).startswith("ended"):
            assert line, "the nursery itself has ended"
        return int(line.split()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)


def ended(pid: int) -> int | None:
    """The exit code of a worker or trainer, negative for the signal that killed it; None while it runs. It needs Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    # Nobody waits for them, so that they stay as zombies: field 3 is the state, field 52 what a wait would say.
    return os.waitstatus_to_exitcode(int(fields[49])) if fields[0] == "Z" else None


def child(settings: dict[str, Any], journal: str, role: Role) -> None:
    """A run, from start to end."""
    end_with_parent()
    # The child says its own number, so that it stands before whatever else the child says.
    os.write(1, b"%d\n" % os.getpid())
    if role != "lockstep":
        with Stop() as stop, System(Settings.model_validate(settings)) as system:
            (run_worker if role == "worker" else run_trainer)(system, stop)
        return

    def tell(_: Progress) -> None:
        os.write(1, b"step\n")

    os.write(1, b"ready\n")
    run(Settings.model_validate(settings), Path(journal), on_step=tell)


if __name__ == "__main__":
    logs.configure("info" if sys.argv[1:] == ["info"] else "error")  # On standard error, away from the answers.
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            code: int = Exit.UNEXPECTED
            try:
                child(*order)
                code = 0
            except BaseException as error:  # noqa: BLE001 - of a process that is about to end
                code = exit_of(error)
                traceback.print_exc()
            finally:
                os._exit(code)
        if order[2] == "lockstep":
            os.write(1, b"ended %d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
