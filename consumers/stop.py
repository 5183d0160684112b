"""Stopping on Ctrl-C and SIGTERM: the first asks, and the step in hand is finished; the second ends the process at once."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Work was stopped by a signal before it was done; what had been done is committed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} before the work was done; the same command goes on from here")
        self.signal = number


class Stop:
    """True once the process has been asked to stop. Make it in the main thread; as a context manager it takes its handlers back.

    ::

        with Stop() as stop:
            while not stop:
                work.step()

    A second signal ends the process without waiting, with exit code 128 + its number. This is safe at any moment: what is not committed
    does not count.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The number of the signal that asked, None until then."""
        self._asked = False
        # A pipe wakes `wait`: a lock or event must not be touched from a signal handler.
        self._wake, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._asked:
            os._exit(128 + number)
        self.signal = number
        self.ask()
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(2, b"stopping after the step in hand; once more to end at once\n")

    def ask(self) -> None:
        """Ask to stop, as a signal would; for tests, and for loops that found their end."""
        if not self._asked:
            self._asked = True
            os.write(self._tell, b"x")

    def __bool__(self) -> bool:
        return self._asked

    def wait(self, seconds: float) -> bool:
        """Sleep for ``seconds`` or until asked to stop, and return whether asked."""
        if not self._asked:
            select.select([self._wake], [], [], seconds)
        return self._asked

    def unfinished(self) -> None:
        """Say that the loop ended with work left over: raises `Interrupted` if a signal was the reason."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def close(self) -> None:
        """Give the signals back to whoever had them. Closing twice does nothing."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            os.close(self._wake)
            os.close(self._tell)
        self._before = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
