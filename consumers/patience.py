"""What a process does while its broker is gone: wait, ever longer, and say so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import structlog

from streaming.errors import BrokerUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumers.stop import Stop

T = TypeVar("T")

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 10.0
FIRST_ANSWER_SECONDS = 60.0
"""How long a process that starts waits for a broker that may be starting too."""

CALM_SECONDS = 30.0
"""After so long without trouble the next wait is a short one again."""

logger = structlog.get_logger()


class Patience:
    """Waits between tries, each twice as long as the one before, up to ten seconds."""

    def __init__(self) -> None:
        self._pause = FIRST_SECONDS
        self._last = time.monotonic()

    def wait(self, error: BrokerUnreachable, stop: Stop | None = None) -> None:
        """Say what is wrong, and return when it is time to try again, or at once when the process is to stop."""
        if time.monotonic() - self._last > CALM_SECONDS + self._pause:
            self._pause = FIRST_SECONDS
        logger.warning("the broker does not answer; waiting", retry_in_seconds=self._pause, error=str(error))
        (time.sleep if stop is None else stop.wait)(self._pause)
        self._pause = min(2 * self._pause, LONGEST_SECONDS)
        self._last = time.monotonic()

    def until(self, stop: Stop, make: Callable[[], T]) -> T | None:
        """What ``make`` returns once a broker answers; None when the process is to stop before."""
        while not stop:
            try:
                return make()
            except BrokerUnreachable as error:
                self.wait(error, stop)
        return None


def within(seconds: float, make: Callable[[], T]) -> T:
    """What ``make`` returns once a broker answers. Raises its `BrokerUnreachable` where that takes longer than ``seconds``."""
    patience, deadline = Patience(), time.monotonic() + seconds
    while True:
        try:
            return make()
        except BrokerUnreachable as error:
            if time.monotonic() >= deadline:
                raise
            patience.wait(error)
