"""INT, TERM and HUP as exceptions that never arrive where they would leave something half-done.

`with Interrupts() as interrupts:` turns the first signal into KeyboardInterrupt (INT) or SystemExit (the others),
raised at once, or, inside `interrupts.held()`, when that block ends. It does not know what is being protected.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """The signals of the main thread while this is entered; in another thread it does nothing."""

    def __init__(self) -> None:
        self.count = 0
        """Signals received. From the second on, whoever waits politely should stop waiting."""
        self._holds = 0
        self._pending: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                self._before[one] = signal.signal(one, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
        self._holds = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the block ends."""
        self.hold()
        try:
            yield
        finally:
            self._holds -= 1
        self.raise_pending()

    def hold(self) -> None:
        """Signals wait until this is left: what comes now is the end."""
        self._holds += 1

    def raise_pending(self) -> None:
        """Raise what waited, if anything did and nothing holds it any more."""
        if self._pending is not None and not self._holds:
            pending, self._pending = self._pending, None
            raise _exception(pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        # The first signal starts the way out; a second one on that way must not cut it short.
        if self.count > 1:
            return
        if self._holds:
            self._pending = signal.Signals(number)
        else:
            raise _exception(signal.Signals(number))


def _exception(received: signal.Signals) -> BaseException:
    return KeyboardInterrupt() if received is signal.SIGINT else SystemExit(128 + received)
