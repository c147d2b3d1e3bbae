"""Tokens on their way from the thread that computes them to the caller that reads text.

The engine's thread puts them on a queue, the caller takes them off and decodes. It does not know how they are computed.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from millrace.applications import Generation
from millrace.engines.engine import FinishReason, Generated
from millrace.errors import EngineError

_REPLACEMENT = "\ufffd"
"""What a character decodes to while some of its bytes are still to come."""


@dataclass
class Job:
    """One request, between its caller and the engine's thread."""

    prompt: Any
    config: Any
    tokens: "queue.SimpleQueue[list[int] | FinishReason | EngineError]" = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)


def require_room(prompt_tokens: int, config: Generation, context_tokens: int) -> None:
    """Raises:
    EngineError: the prompt and what `config` lets come after it don't fit the model's context.
    """
    if prompt_tokens + config.max_new_tokens > context_tokens:
        raise EngineError(
            f"a prompt of {prompt_tokens} tokens and {config.max_new_tokens} new ones don't fit the context of "
            f"{context_tokens}; shorten the prompt"
        )


class TokenStream:
    """One generation as it goes. Not for several threads, except `close`."""

    def __init__(self, job: Job, decode: Callable[[Sequence[int]], str], prompt_tokens: int) -> None:
        self._job = job
        self._decode = decode
        self._prompt_tokens = prompt_tokens
        self._ids: list[int] = []
        self._given = ""
        self._reason: FinishReason | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._reason is None:
            self._take()
            text = self._text()
            complete = text if self._reason else text.rstrip(_REPLACEMENT)
            if len(complete) > len(self._given):
                piece, self._given = complete[len(self._given) :], complete
                return piece
        raise StopIteration

    def drain(self) -> Generated:
        """Wait for the end without looking at the pieces. Returns the result."""
        while self._reason is None:
            self._take()
        return self.result

    def close(self) -> None:
        self._job.cancelled.set()
        # The engine's thread says "cancelled" after its current step; a reader in another thread hears it there.
        self._job.tokens.put("cancelled")

    @property
    def result(self) -> Generated:
        if self._reason is None:
            if not self._job.cancelled.is_set():
                raise EngineError("the stream is still running; read it to its end or close it")
            return self.drain()
        return Generated(self._text(), self._prompt_tokens, len(self._ids), self._reason)

    def _take(self) -> None:
        item = self._job.tokens.get()
        if isinstance(item, EngineError):
            raise item
        if isinstance(item, str):
            self._reason = item
        else:
            self._ids += item

    def _text(self) -> str:
        return self._decode(self._ids)
