"""A gateway that really listens, over releases whose engine and retriever are small enough to be exact.

`Parrot` is a generator by another method: it says the prompt's question back, word by word, and breaks on command.
`Shelf` is a registry in memory. Everything between them and the client is what production runs.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
import uvicorn

from millrace.applications import Application, Generation
from millrace.engines.engine import Generated, Message
from millrace.errors import EngineError, ReleaseError, RetrievalError
from millrace.releases.manifest import Manifest, PromptVersion, RetrievalLineage, Weights
from millrace.releases.pipeline import AnswerPipeline
from millrace.releases.split import Split
from millrace.retrieval.search import Hit
from millrace.serving.gateway import create_app
from millrace.settings import Settings
from millrace.sources.event_log import Line, read_events

EVER = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


class Parrot:
    """Repeats the last line of the prompt. `breaks_after` words it fails; `pause` is between two words, in seconds."""

    context_tokens = 1000

    def __init__(self, *, breaks_after: int | None = None, pause: float = 0.0, prefix: str = "you asked") -> None:
        self.breaks_after = breaks_after
        self.pause = pause
        self.prefix = prefix
        self.generated = 0
        self.closed = False
        self.broken: str | None = None

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(message.content.split()) for message in messages)

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        stream = self.stream(messages, config)
        for _ in stream:
            pass
        return stream.result

    def stream(self, messages: Sequence[Message], config: Generation) -> "ParrotStream":
        if self.closed or self.broken:
            raise EngineError(self.broken or "the parrot is gone")
        self.generated += 1
        return ParrotStream(self, messages)

    def close(self) -> None:
        self.closed = True


class ParrotStream:
    def __init__(self, parrot: Parrot, messages: Sequence[Message]) -> None:
        self._parrot = parrot
        self._prompt_tokens = parrot.count_tokens(messages)
        self._words = [*parrot.prefix.split(), *messages[-1].content.splitlines()[-1].split()]
        self._said: list[str] = []
        self._reason: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self._said) == self._parrot.breaks_after:
            raise EngineError("the parrot choked")
        if self._reason is not None or len(self._said) == len(self._words):
            self._reason = self._reason or "stop"
            raise StopIteration
        time.sleep(self._parrot.pause)
        self._said.append(self._words[len(self._said)])
        return self._said[-1] + " "

    def close(self) -> None:
        self._reason = self._reason or "cancelled"

    @property
    def result(self) -> Generated:
        if self._reason is None:
            raise EngineError("not at its end")
        return Generated(" ".join(self._said), self._prompt_tokens, len(self._said), self._reason)


class Drawer:
    """Retrieves the same chunk for every question; without a build there is none."""

    def __init__(self, build: str | None = "build-1") -> None:
        self.published = build

    @property
    def build(self) -> str:
        if self.published is None:
            raise RetrievalError("no index build is published yet; run qa.refresh_embeddings")
        return self.published

    def search(self, question: str, k: int, build: str | None = None) -> list[Hit]:
        assert build
        return [Hit("chunk-1", "document-1", "A title", "Some text.", "file:///a", 0.9)][:k]


def a_release(
    engine: Parrot, drawer: Drawer, *, prompt_version: str = "1", template: str = "{{ question }}"
) -> AnswerPipeline:
    manifest = Manifest(
        application="qa",
        generator=Weights(name="parrot.gguf", sha256="0" * 64, bytes=1),
        prompt=PromptVersion(name="qa", version=prompt_version, template="{{ chunks[0].text }}\n" + template),
        retrieval=RetrievalLineage(lineage="l", embedding_model="none", chunks=1),
        generation=Generation(),
    )
    return AnswerPipeline(manifest, engine, drawer)


@dataclass
class Shelf:
    """Releases in memory. Put an exception in a release's place and loading it raises that."""

    published: Split | None = None
    pipelines: dict[str, AnswerPipeline | Exception] = field(default_factory=dict)
    reachable: bool = True
    unloaded: list[str] = field(default_factory=list)

    def split(self) -> Split | None:
        if not self.reachable:
            raise ReleaseError("MLflow at http://nowhere does not answer; start it")
        return self.published

    def versions(self) -> set[str]:
        if not self.reachable:
            raise ReleaseError("MLflow at http://nowhere does not answer; start it")
        return set(self.pipelines)

    def load(self, version: str) -> AnswerPipeline:
        found = self.pipelines[version]
        if isinstance(found, Exception):
            raise found
        return found

    def unload(self, version: str) -> None:
        self.unloaded.append(version)

    def close(self) -> None:
        pass


@dataclass
class Gateway:
    """A listening gateway and what stands behind it."""

    settings: Settings
    url: str
    shelf: Shelf
    drawer: Drawer
    client: httpx.Client

    def ask(self, question: str = "why is that?", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"model": "qa", "messages": [{"role": "user", "content": question}], "user": "ann"} | fields
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def rate(self, completion_id: str, rating: float = 1.0, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/feedback", json={"completion_id": completion_id, "rating": rating} | fields)

    def lines(self) -> list[Line]:
        folder = self.settings.event_log("qa")
        return list(read_events(folder, *EVER))

    def events(self, completion_id: str | None = None) -> list[Any]:
        found = [line.event for line in self.lines()]
        return [event for event in found if completion_id in (None, event.completion_id)]

    def wait_until(self, holds: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.02)

    def ready(self) -> bool:
        return self.client.get("/readyz").status_code == 200


@contextmanager
def listening(settings: Settings, application: Application, shelf: Shelf, drawer: Drawer) -> Iterator[Gateway]:
    """A gateway in a thread, stopped gracefully."""
    app = create_app(settings, [application], lambda *_: shelf)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.005)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    # No proxies, and no certificates: loading those takes longer than most tests.
    with httpx.Client(base_url=url, timeout=20, trust_env=False, verify=False) as client:
        yield Gateway(settings, url, shelf, drawer, client)
    server.should_exit = True
    thread.join()
