"""The generator as an installed LangChain chain, found by the name of its entry point; a release holds only parameters.

A chain's package names a factory in the group `millrace.chains`: `(parameters: dict) -> Runnable`. The runnable takes
messages and gives text or a message, and lets a release say how to generate by two configurable fields,
`max_new_tokens` and `temperature` (LangChain's `configurable_fields`): one that has none of them would ignore a
release's, so it is refused. Usage is what the chat models inside report, all of them. Models, addresses and keys are
the chain's business. It does not know what a release is.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from millrace.applications import Generation
from millrace.engines.chat import plain
from millrace.engines.engine import FinishReason, Generated, Message, finish_reason
from millrace.engines.estimate import estimated_prompt, estimated_tokens
from millrace.engines.pulled_stream import PulledStream
from millrace.errors import EngineError

if TYPE_CHECKING:
    from langchain_core.callbacks import BaseCallbackHandler

GROUP = "millrace.chains"
FIELDS = ("max_new_tokens", "temperature")
"""Configurable fields that a chain must have."""
SAID_UNDER = ("finish_reason", "stop_reason", "stopReason", "done_reason")
"""Where integrations keep why a model ended: OpenAI and Google, Anthropic, Bedrock, Ollama."""


@dataclass(frozen=True)
class InstalledChain:
    """A chain that is installed here, not made yet."""

    name: str
    package: str
    version: str
    entry: EntryPoint


def installed_chain(name: str, *, wanted: str = "the package that brings it") -> InstalledChain:
    """The chain whose entry point is called `name`.

    Args:
        wanted: what to install where there is none.

    Raises:
        EngineError: no installed package has one, or several have.
    """
    known = entry_points(group=GROUP)
    # A package that is on the path twice is one.
    found = {entry.dist.name: entry for entry in known.select(name=name) if entry.dist is not None}
    if not found:
        names = ", ".join(sorted(known.names)) or "none"
        raise EngineError(
            f"chain {name!r} is not installed here: no package has an entry point of that name in group {GROUP} "
            f"(there are: {names}); pip install {wanted}"
        )
    if len(found) > 1:
        raise EngineError(f"chain {name!r} is brought by {' and '.join(sorted(found))}; uninstall all but one")
    ((package, entry),) = found.items()
    assert entry.dist is not None
    return InstalledChain(name, package, entry.dist.version, entry)


class LangChainEngine:
    """A chain, made.

    Args:
        name: of its entry point.
        package: that must bring it.
        version: of that package: another one is other code.
        parameters: what the factory is given.
        context_tokens: most that prompt and completion may have together.

    Raises:
        EngineError: that chain isn't installed in that version, can't be made, or would ignore how to generate.
    """

    def __init__(
        self, name: str, package: str, version: str, parameters: Mapping[str, Any], *, context_tokens: int
    ) -> None:
        self.name = name
        self._context_tokens = context_tokens
        self._chain = _made(name, package, version, parameters)
        self._closed = False

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    @property
    def broken(self) -> str | None:
        """A call that fails leaves the next one alone."""
        return None

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """An estimate, rather too high: what a chain makes of messages nobody knows."""
        return estimated_prompt(messages)

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        watcher = _watcher()
        with _told(self.name):
            text = _text(self._asked().invoke(_turns(messages), _configured(config, watcher)))
        return _generated(messages, text, watcher, watcher.reason)

    def stream(self, messages: Sequence[Message], config: Generation) -> "LangChainStream":
        watcher = _watcher()
        with _told(self.name):
            pieces = self._asked().stream(_turns(messages), _configured(config, watcher))
        return LangChainStream(self.name, messages, pieces, watcher)

    def close(self) -> None:
        self._closed = True

    def _asked(self) -> Any:
        if self._closed:
            raise EngineError(f"the engine of {self.name} is closed; load the release again")
        return self._chain


class LangChainStream(PulledStream):
    def __init__(self, name: str, messages: Sequence[Message], pieces: Iterator[Any], watcher: Any) -> None:
        super().__init__()
        self._name = name
        self._messages = messages
        self._pieces = pieces
        self._watcher = watcher

    def _take(self) -> str | None:
        with _told(self._name):
            piece = next(self._pieces, None)
            if piece is not None:
                return _text(piece)
        self._reason = self._watcher.reason
        return None

    def _hang_up(self) -> None:
        with _told(self._name):
            self._pieces.close()  # type: ignore[attr-defined]

    def _generated(self, text: str, reason: FinishReason) -> Generated:
        return _generated(self._messages, text, self._watcher, reason)


def _made(name: str, package: str, version: str, parameters: Mapping[str, Any]) -> Any:
    try:
        from langchain_core.runnables import Runnable
    except ImportError:
        raise EngineError(
            f"chain {name!r} needs langchain-core, which is not installed here; pip install 'millrace[langchain]' "
            f"{package}=={version}"
        ) from None
    chain = installed_chain(name, wanted=f"{package}=={version}")
    if (chain.package, chain.version) != (package, version):
        raise EngineError(
            f"chain {name!r} must be that of {package}=={version}, here it is {chain.package}=={chain.version}; "
            f"pip install {package}=={version}, or register a release with the one that is here"
        )
    with _told(name):
        made = chain.entry.load()(dict(parameters))
    if not isinstance(made, Runnable):
        raise EngineError(f"chain {name!r}: {chain.entry.value} gave {type(made).__name__}, not a Runnable")
    missing = [field for field in FIELDS if field not in {spec.id for spec in made.config_specs}]
    if missing:
        raise EngineError(
            f"chain {name!r} has no configurable field {' nor '.join(missing)}, so what a release says of it would be "
            "ignored; give its model one (configurable_fields)"
        )
    return made


def _turns(messages: Sequence[Message]) -> list[Any]:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    kinds = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}
    return [kinds[message.role](content=plain(message.content)) for message in messages]


def _configured(config: Generation, watcher: "BaseCallbackHandler") -> Any:
    fields = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    return {"callbacks": [watcher], "configurable": fields}


def _text(given: Any) -> str:
    if isinstance(given, str):
        return given
    content = getattr(given, "content", None)
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # blocks: text among tool calls, images, reasoning
        return "".join(block if isinstance(block, str) else block.get("text", "") for block in content)
    raise EngineError(f"the chain gave {type(given).__name__}; its last step must give text or a message")


def _watcher() -> Any:
    """Hears what each chat model of one call used, and how the last of them ended."""
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.outputs import LLMResult

    class Watcher(BaseCallbackHandler):  # type: ignore[misc]
        prompt_tokens = 0
        completion_tokens = 0
        reason: FinishReason = "stop"

        def on_llm_end(self, response: LLMResult, **_: Any) -> None:
            for generation in (one for several in response.generations for one in several):
                message = getattr(generation, "message", None)
                usage = getattr(message, "usage_metadata", None) or {}
                self.prompt_tokens += usage.get("input_tokens", 0)
                self.completion_tokens += usage.get("output_tokens", 0)
                said = getattr(message, "response_metadata", {})
                self.reason = finish_reason(next((said[name] for name in SAID_UNDER if said.get(name)), None))

    return Watcher()


def _generated(messages: Sequence[Message], text: str, watcher: Any, reason: FinishReason) -> Generated:
    """With the models' counts, or, where they said none, with ours."""
    return Generated(
        text,
        watcher.prompt_tokens or estimated_prompt(messages),
        watcher.completion_tokens or estimated_tokens(text),
        reason,
    )


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever a chain raises, as one sentence."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # its code is not ours
        reason = " ".join(str(error).split())[:300]
        raise EngineError(f"chain {name!r} failed: {type(error).__name__}: {reason}") from error
