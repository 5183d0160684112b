from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consumers.stop import Stop

ROOT = Path(__file__).parent.parent

LOOP = """
import sys, time
from consumers.stop import Stop
with Stop() as stop:
    ready = "ready\\n"
    while not stop:
        # In the step, or a signal that comes before it would find none in hand.
        print(end=ready, flush=True)
        ready = ""
        {body}
    print("finished", flush=True)
    {end}
"""


def stopped(body: str, end: str, *signals: int) -> tuple[int, str, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(body=body, end=end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    first, *others = signals
    process.send_signal(first)
    told = process.stderr.readline()  # two signals sent at once may arrive as one
    for number in others:
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, told + err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_in_hand_finish(number: int) -> None:
    code, out, err = stopped("time.sleep(0.5)", "pass", number)
    assert (code, out) == (0, "finished\n")
    assert "once more" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_process_at_once(number: int) -> None:
    code, out, _ = stopped("time.sleep(60)", "pass", number, number)
    assert (code, out) == (128 + number, "")


def test_waiting_ends_with_the_signal() -> None:
    assert stopped("stop.wait(60)", "pass", signal.SIGTERM)[:2] == (0, "finished\n")


def test_unfinished_work_ends_with_the_signals_code() -> None:
    body = "from consumers import cli; cli.app = lambda **_: stop.unfinished(); sys.exit(cli.execute([]))"
    code, _, err = stopped("stop.wait(60)", body, signal.SIGTERM)
    assert code == 143
    assert "SIGTERM" in err


def test_stop_gives_the_handlers_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop() as stop:
        assert not stop
        assert stop.wait(0) is False
        stop.ask()
        stop.ask()
        assert stop
        assert stop.wait(60) is True
        stop.unfinished()  # nobody sent a signal: the work was done
    stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
