"""A program cut down with kill -9, again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def cut_down(command: Sequence[str], chance: random.Random, times: int = 4) -> None:
    """Start the command and kill it after some of the lines it prints, ``times`` times; it must never come to its "sent"."""
    inside = 0
    for _ in range(times):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 80)):
            process.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        inside += "sent" not in process.stdout.read()
        process.stdout.close()
        process.wait()
    assert inside == times, "a kill that came too late shows nothing"
