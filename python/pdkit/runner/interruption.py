"""Signals that ask for an end, as something to look at rather than something to catch."""

import signal
import time
from types import FrameType

POLL_S = 0.25


class Interruption:
    """Remembers SIGINT, SIGTERM and SIGHUP instead of raising, so that no child is lost between two statements.

    A SIGHUP that is ignored, as nohup has it, stays ignored. To be used in the main thread; any thread may look.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested_by: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.requested_by is not None

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.requested_by = self.requested_by or signal.Signals(number)

    def __enter__(self) -> "Interruption":
        self._previous = {
            number: signal.signal(number, self._remember)
            for number in self.SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Sleeps, or returns early once interrupted."""
        deadline = time.monotonic() + seconds
        while not self and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
