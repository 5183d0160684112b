"""``python -m consumers.tied worker ...`` is ``coldstream worker ...``, tied to whoever started it by standard input.

Once that ends, be it because the other end was killed, the command is asked to stop as by SIGTERM, and soon after ended. Unlike a signal
at a parent's death, a pipe works on every system and whatever thread made the process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

GRACE_SECONDS = 5.0


def main() -> None:
    """Run the command line of this process, tied."""
    from consumers.cli import execute

    tie()
    sys.exit(execute())


def tie(told: Callable[[], object] = lambda: None) -> None:
    """Tie this process; ``told`` is called when whoever started it writes to it."""
    threading.Thread(target=_hold_on, args=(told,), name="tied", daemon=True).start()


def _hold_on(told: Callable[[], object]) -> None:
    while os.read(0, 4096):
        told()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
