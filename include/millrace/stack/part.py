"""What a part of the stack is, as a value; which parts there are, and why, is the business of others."""

import http.client
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.settings import Settings


def nothing() -> None:
    """Most parts need no preparation."""


@dataclass(frozen=True)
class Part:
    """One process to run, or with `once` one program to complete before others start."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready: Callable[[float], bool]
    """Whether it works, given when (seconds since 1970) it was started. Answers within seconds."""
    after: tuple[str, ...] = ()
    """Parts that must work before it starts; they end after it."""
    prepare: Callable[[], None] = nothing
    deadline: float = 180.0
    """Seconds it may take to start."""
    once: bool = False
    done: Path | None = None
    """With `once`: written when the program has completed; where it is, nothing needs to be done."""
    url: str = ""
    """Where a person finds it."""
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    stop_main_only: bool = False


def get(settings: Settings, port: int, path: str) -> bytes | None:
    """The body of a 200, or None. No proxy is asked."""
    connection = http.client.HTTPConnection(settings.host, port, timeout=3)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.read() if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
