"""What every generator can do, and the values that go in and come out.

It does not know how text is generated (`openvino.py`), nor what the messages ask for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from millrace.applications import Generation

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]
WHOLE = {"stop", "end_turn", "stop_sequence", "eos", "eos_token", "complete", "completed", "tool_calls", "tool_use"}
"""What servers call the end of an answer that is whole, in lower case."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Generated:
    """A complete generation. Token counts are the generator's own.

    `finish_reason`: `stop` (the generator ended its turn), `length` (`max_new_tokens` reached), `cancelled`.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason


def finish_reason(said: object) -> FinishReason:
    """What a server's reason is called here; None: it says none. Whatever else ends an answer, a filter or a request
    that was aborted, is a length, too: the answer isn't whole."""
    return "stop" if said is None or str(said).lower() in WHOLE else "length"


class Stream(Protocol):
    """Pieces of text as they are generated. Closing it before its end cancels the generation."""

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...

    def close(self) -> None:
        """Stop generating; safe at any time, also twice."""

    @property
    def result(self) -> Generated:
        """What was generated: everything after the last piece, or what there was when it was closed.

        Raises:
            EngineError: the stream is neither exhausted nor closed.
        """
        ...


class Engine(Protocol):
    """A loaded generator. Thread-safe; concurrent calls are computed together."""

    @property
    def context_tokens(self) -> int:
        """Most tokens that prompt and completion may have together."""
        ...

    @property
    def broken(self) -> str | None:
        """Why it will never answer again, though nobody closed it; None: it will."""
        ...

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of `messages` as a prompt, chat template included."""
        ...

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        """Generate to the end.

        Raises:
            EngineError: the prompt doesn't fit the context, or the engine is closed or broken.
        """
        ...

    def stream(self, messages: Sequence[Message], config: Generation) -> Stream:
        """Start generating; raises as `generate` does."""
        ...

    def close(self) -> None:
        """Cancel what is running and free the memory. Nothing can be generated afterwards."""
        ...
