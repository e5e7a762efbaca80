"""SIGINT and SIGTERM as something to look at rather than something to catch."""

import signal
import time

POLL_S = 0.25


class Interruption:
    """Remembers SIGINT and SIGTERM instead of raising, so that no child is lost between two statements."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested_by: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.requested_by is not None

    def _remember(self, number, _frame):
        self.requested_by = self.requested_by or signal.Signals(number)

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float):
        """Sleeps, or returns early once interrupted."""
        deadline = time.monotonic() + seconds
        while not self and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
