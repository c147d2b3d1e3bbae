"""A stream whose pieces somebody else makes, and the reader pulls: over HTTP, or out of a chain.

It knows when to hang up and from which thread. Where pieces come from is its children's business.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

from millrace.engines.engine import FinishReason, Generated
from millrace.errors import EngineError


class PulledStream(ABC):
    """One answer as it arrives. Not for several threads, except `close`."""

    def __init__(self) -> None:
        self._text = ""
        self._reason: FinishReason | None = None
        self._ended = False
        self._reading = threading.Lock()
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            with self._reading:
                if self._cancelled.is_set():
                    self._cancel()
                if self._ended:
                    raise StopIteration
                piece = self._take()
                if piece is None:
                    self._ended = True
                    raise StopIteration
                self._text += piece
            if piece:
                return piece

    def close(self) -> None:
        self._cancelled.set()
        # Where another thread is reading, it hangs up itself, after the piece that it waits for.
        if self._reading.acquire(blocking=False):
            try:
                self._cancel()
            finally:
                self._reading.release()

    @property
    def result(self) -> Generated:
        with self._reading:
            if self._cancelled.is_set():
                self._cancel()
            if not self._ended:
                raise EngineError("the stream is still running; read it to its end or close it")
        return self._generated(self._text, self._reason or "stop")

    def _cancel(self) -> None:
        """Hang up: nobody shall generate for whoever is gone."""
        if not self._ended:
            self._ended, self._reason = True, "cancelled"
            self._hang_up()

    @abstractmethod
    def _take(self) -> str | None:
        """The next piece, which may be empty; None: there are no more. May set `_reason`."""

    @abstractmethod
    def _hang_up(self) -> None: ...

    @abstractmethod
    def _generated(self, text: str, reason: FinishReason) -> Generated: ...
