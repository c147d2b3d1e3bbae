"""One release answering: question → chunks → prompt → text, citations, usage.

It is given a loaded engine and a retriever; it does not know the registry, HTTP or who asks. Pure apart from
what those two do, and thread-safe if they are.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from millrace.engines.engine import Engine, Generated, Message, Stream
from millrace.errors import ReleaseError
from millrace.releases.manifest import Manifest
from millrace.releases.prompt import check_template, render
from millrace.retrieval.search import Hit, Retriever

MAX_QUESTION = 4000
"""Characters. A question is one thing to find; a longer text would push every chunk out of the prompt."""

MAX_PROMPT_TOKENS = 2048
"""Longer prompts are cut (chunks dropped), so that one exchange can't hold a processor for minutes."""


@dataclass(frozen=True)
class Prepared:
    """A question ready to be answered, and what it was prepared from."""

    question: str
    messages: tuple[Message, ...]
    hits: tuple[Hit, ...]
    """In the prompt, best first: the citations of the answer."""
    dropped: int
    """Hits that did not fit into the prompt."""
    index_build: str


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answer:
    """An answer and what it takes to repeat it: release and index build."""

    text: str
    citations: tuple[Hit, ...]
    usage: Usage
    release_id: str
    index_build: str
    finish_reason: str
    dropped_chunks: int
    seconds: float
    """From the question to the last token."""


class AnswerStream:
    """An answer's text, piece by piece; `answer` once exhausted. Closing it early cancels the generation."""

    def __init__(self, pipeline: "AnswerPipeline", prepared: Prepared, stream: Stream, started: float) -> None:
        self.prepared = prepared
        self._pipeline = pipeline
        self._stream = stream
        self._started = started
        self._pieces = _stripped(stream)
        self._ended: float | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self._ended = self._ended or time.perf_counter()
            raise

    def close(self) -> None:
        """Stop generating; safe at any time, also twice, also from another thread."""
        self._ended = self._ended or time.perf_counter()
        self._stream.close()

    @property
    def answer(self) -> Answer:
        """Everything after the last piece, or what there was when the stream was closed.

        Raises:
            EngineError: the stream is neither exhausted nor closed.
        """
        generated = self._stream.result
        return self._pipeline._answer(self.prepared, generated, (self._ended or time.perf_counter()) - self._started)


class AnswerPipeline:
    """A loaded release."""

    def __init__(self, manifest: Manifest, engine: Engine, retriever: Retriever) -> None:
        check_template(manifest.prompt.template)
        self.manifest = manifest
        self.release_id = manifest.release_id
        self.engine = engine
        self.retriever = retriever

    def prepare(self, question: str, *, build: str | None = None) -> Prepared:
        """Search, and render as many of the found chunks as fit the generator's context, best first.

        Args:
            question: what a person asks; white space around it is ignored.
            build: the index build to search; None: the current one.

        Raises:
            ReleaseError: the question is empty or longer than `MAX_QUESTION` characters, or does not fit the
                context even without chunks.
            RetrievalError: there is no index build.
        """
        question = checked_question(question)
        build = build or self.retriever.build
        hits = self.retriever.search(question, self.manifest.retrieval.chunks, build)
        room = min(self.engine.context_tokens - self.manifest.generation.max_new_tokens, MAX_PROMPT_TOKENS)
        for kept in range(len(hits), -1, -1):
            messages = (Message("user", render(self.manifest.prompt.template, question, hits[:kept])),)
            tokens = self.engine.count_tokens(messages)
            if tokens <= room:
                return Prepared(question, messages, tuple(hits[:kept]), len(hits) - kept, build)
        raise ReleaseError(f"the question takes {tokens} tokens with its prompt, {room} fit; ask a shorter one")

    def answer(self, question: str, *, build: str | None = None) -> Answer:
        """The whole answer; raises as `prepare` and the engine do."""
        started = time.perf_counter()
        prepared = self.prepare(question, build=build)
        generated = self.engine.generate(prepared.messages, self.manifest.generation)
        return self._answer(prepared, generated, time.perf_counter() - started)

    def stream(self, question: str, *, build: str | None = None) -> AnswerStream:
        """The same answer in pieces. Raises before the first piece as `answer` does."""
        started = time.perf_counter()
        prepared = self.prepare(question, build=build)
        return AnswerStream(self, prepared, self.engine.stream(prepared.messages, self.manifest.generation), started)

    def _answer(self, prepared: Prepared, generated: Generated, seconds: float) -> Answer:
        return Answer(
            text=generated.text.strip(),
            citations=prepared.hits,
            usage=Usage(generated.prompt_tokens, generated.completion_tokens),
            release_id=self.release_id,
            index_build=prepared.index_build,
            finish_reason=generated.finish_reason,
            dropped_chunks=prepared.dropped,
            seconds=seconds,
        )


def checked_question(question: str) -> str:
    """`question` without the white space around it.

    Raises:
        ReleaseError: it is empty or too long.
    """
    question = question.strip()
    if not question:
        raise ReleaseError("the question is empty; ask something")
    if len(question) > MAX_QUESTION:
        raise ReleaseError(f"the question has {len(question)} characters, at most {MAX_QUESTION} are read; shorten it")
    return question


def _stripped(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces without white space before the first and after the last word, as `str.strip` of the whole."""
    waiting, begun = "", False
    for piece in pieces:
        waiting += piece
        if not begun:
            waiting = waiting.lstrip()
        ready = waiting.rstrip()
        if ready:
            begun = True
            yield ready
            waiting = waiting[len(ready) :]
