"""The generator behind HTTP: any server that speaks OpenAI's chat completions, such as vLLM.

Retries and time limits are those of the `openai` client. Two things are vLLM's own, and used where they are there:
`/tokenize`, which counts a prompt exactly, and LoRA adapters that are loaded while the server runs
(`/v1/load_lora_adapter`; it needs `--enable-lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`). It does not know what a
release is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from millrace.applications import Generation
from millrace.engines.chat import plain
from millrace.engines.engine import FinishReason, Generated, Message, finish_reason
from millrace.engines.estimate import estimated_prompt, estimated_tokens
from millrace.engines.pulled_stream import PulledStream
from millrace.errors import EngineError
from millrace.secret_sources import NO_SECRET, hide

if TYPE_CHECKING:
    from openai import OpenAI

_SECONDS = 120.0
"""Between two pieces of an answer, at most."""
_CONNECT_SECONDS = 5.0
_NO_SUCH_THING = (404, 405, 501)
CONTEXT_TOKENS = 4096
"""Assumed where a server does not say how much its model reads."""


@dataclass(frozen=True)
class Upstream:
    """A server, as the deployment names it."""

    url: str
    """With its `/v1`."""
    api_key: SecretStr = NO_SECRET
    """Asked before every request, so that a rotated one counts from the next on."""

    def client(self) -> "OpenAI":
        """
        Raises:
            EngineError: the deployment names no server.
        """
        from openai import OpenAI, Timeout

        if not self.url:
            raise EngineError("this release's model is on a server: set MILLRACE_UPSTREAM_URL (http://host:port/v1)")
        return OpenAI(
            base_url=self.url,
            api_key=lambda: self.api_key.get_secret_value() or "none",
            timeout=Timeout(_SECONDS, connect=_CONNECT_SECONDS),
        )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: a folder as peft saves it, which the server must see at the same path."""

    name: str
    """What the server calls it; the model to ask for."""
    folder: Path


def context_of(upstream: Upstream, model: str) -> int:
    """Tokens that `model` reads, as the server says, else `CONTEXT_TOKENS`.

    Raises:
        EngineError: the server doesn't answer, or has no such model.
    """
    from openai import BadRequestError, NotFoundError

    with upstream.client() as client, _told(upstream):
        there = {one.id: one for one in client.models.list()}
        if model in there:
            said = (there[model].model_extra or {}).get("max_model_len")
            return said if isinstance(said, int) else CONTEXT_TOKENS
        # Not every server lists all that it has: one token proves it.
        try:
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": "?"}], max_tokens=1)
        except (NotFoundError, BadRequestError) as error:
            raise EngineError(
                f"{upstream.url} has no model {model!r} ({_reason(error, upstream)}); it lists "
                f"{', '.join(sorted(there)) or 'none'}"
            ) from None
    return CONTEXT_TOKENS


def load_adapter(upstream: Upstream, adapter: Adapter) -> None:
    """Have the server load `adapter`, unless it has.

    Raises:
        EngineError: it doesn't answer, or can't.
    """
    from openai import APIStatusError

    with upstream.client() as client, _told(upstream):
        if adapter.name in {one.id for one in client.models.list()}:
            return
        wanted = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
        try:
            client.post("/load_lora_adapter", cast_to=str, body=wanted)
        except APIStatusError as error:
            # Somebody else may have been first.
            if adapter.name not in {one.id for one in client.models.list()}:
                raise EngineError(
                    f"{upstream.url} can't load the adapter in {adapter.folder}: {_reason(error, upstream)}; it must "
                    "see that folder and let adapters be loaded (vLLM: --enable-lora, "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)"
                ) from None


def unload_adapter(upstream: Upstream, name: str) -> None:
    """Have the server forget an adapter; it may have done so already.

    Raises:
        EngineError: it doesn't answer.
    """
    from openai import APIStatusError

    with upstream.client() as client, _told(upstream):
        try:
            client.post("/unload_lora_adapter", cast_to=str, body={"lora_name": name})
        except APIStatusError:
            if name in {one.id for one in client.models.list()}:
                raise


class UpstreamEngine:
    """A model that a server has, with an adapter of ours or without.

    Args:
        model: what the server calls it.
        context_tokens: most that prompt and completion may have together.
        adapter: loaded now, and again whenever the server has forgotten it.

    Raises:
        EngineError: the server doesn't answer, or has no such model or can't load the adapter.
    """

    def __init__(self, upstream: Upstream, model: str, *, context_tokens: int, adapter: Adapter | None = None) -> None:
        self._upstream = upstream
        self._client = upstream.client()
        self._adapter = adapter
        self._context_tokens = context_tokens
        self._tokenizes = True
        context_of(upstream, model)
        if adapter:
            load_adapter(upstream, adapter)
        self._asked = adapter.name if adapter else model
        self._closed = False

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    @property
    def broken(self) -> str | None:
        """A server that comes back answers."""
        return None

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """As the server counts; where it can't say, an estimate that is rather too high."""
        with _told(self._upstream):
            counted = self._counted(messages) if self._tokenizes else None
        if counted is not None:
            return counted
        return estimated_prompt(messages)

    def _counted(self, messages: Sequence[Message]) -> int | None:
        """What `/tokenize` says; None, for good, where the server has no such thing."""
        from openai import APIStatusError

        body = {"model": self._asked, "messages": _wire(messages)}
        for again in (False, True):
            try:
                answer = self._client.post(f"{self._root}/tokenize", cast_to=object, body=body)
                return int(answer["count"])  # type: ignore[index]
            except APIStatusError as error:
                if error.status_code not in _NO_SUCH_THING:
                    raise
                # An adapter that was forgotten is no reason to guess for ever.
                if again or not self._restored(error):
                    break
            except (TypeError, KeyError, ValueError):
                break
        self._tokenizes = False
        return None

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        with _told(self._upstream):
            answer = self._create(messages, config, stream=False)
        if not answer.choices:
            raise EngineError(f"{self._asked} at {self._upstream.url} gave no answer: its list of choices is empty")
        choice = answer.choices[0]
        text = choice.message.content or ""
        return _generated(self, messages, text, answer.usage, finish_reason(choice.finish_reason))

    def stream(self, messages: Sequence[Message], config: Generation) -> "UpstreamStream":
        with _told(self._upstream):
            return UpstreamStream(self, messages, self._create(messages, config, stream=True))

    def close(self) -> None:
        """Other processes may use the adapter: it stays where it is."""
        self._closed = True
        self._client.close()

    @property
    def _root(self) -> str:
        return self._upstream.url.rstrip("/").removesuffix("/v1")

    def _create(self, messages: Sequence[Message], config: Generation, *, stream: bool) -> Any:
        from openai import APIStatusError

        if self._closed:
            raise EngineError(f"the engine of {self._asked} is closed; load the release again")
        wanted: dict[str, Any] = {
            "model": self._asked,
            "messages": _wire(messages),
            "max_tokens": config.max_new_tokens,
            "temperature": config.temperature,
        }
        if stream:
            wanted |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            return self._client.chat.completions.create(**wanted)
        except APIStatusError as error:
            if self._restored(error):
                return self._client.chat.completions.create(**wanted)
            raise

    def _restored(self, error: Any) -> bool:
        """Whether what failed may be tried again: the server was started anew and had forgotten the adapter."""
        if self._adapter is None or error.status_code != 404:
            return False
        load_adapter(self._upstream, self._adapter)
        return True


class UpstreamStream(PulledStream):
    def __init__(self, engine: UpstreamEngine, messages: Sequence[Message], chunks: Any) -> None:
        super().__init__()
        self._engine = engine
        self._messages = messages
        self._chunks = chunks
        self._usage: Any = None

    def _take(self) -> str | None:
        with _told(self._engine._upstream):
            chunk = next(self._chunks, None)
        if chunk is None:
            # Without a last word from the server, the connection may have ended in the middle.
            self._reason = self._reason or "length"
            return None
        self._usage = chunk.usage or self._usage
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        if choice.finish_reason:
            self._reason = finish_reason(choice.finish_reason)
        return str(choice.delta.content or "")

    def _hang_up(self) -> None:
        self._chunks.close()

    def _generated(self, text: str, reason: FinishReason) -> Generated:
        return _generated(self._engine, self._messages, text, self._usage, reason)


def _generated(
    engine: UpstreamEngine, messages: Sequence[Message], text: str, usage: Any, reason: FinishReason
) -> Generated:
    """With the server's counts, or, where it said none, with ours."""
    if usage is not None:
        return Generated(text, usage.prompt_tokens, usage.completion_tokens, reason)
    return Generated(text, engine.count_tokens(messages), estimated_tokens(text), reason)


def _wire(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": plain(message.content)} for message in messages]


@contextmanager
def _told(upstream: Upstream) -> Iterator[None]:
    """The client's errors as one sentence."""
    from httpx2 import HTTPError
    from openai import APIError, APIStatusError, AuthenticationError, PermissionDeniedError

    try:
        yield
    except (APIError, HTTPError) as error:
        reason = _reason(error, upstream)
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            said = f"refuses the key: {reason}; set MILLRACE_UPSTREAM_API_KEY"
        elif isinstance(error, APIStatusError):
            said = f"refused with status {error.status_code}: {reason}"
        else:
            said = f"doesn't answer: {reason}; is the server of MILLRACE_UPSTREAM_URL up?"
        raise EngineError(f"{upstream.url} {said}") from None


def _reason(error: Exception, upstream: Upstream) -> str:
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return hide(" ".join(str(said or error).split()), upstream.api_key)[:300]
