"""Registered releases as loaded pipelines in this process.

Releases with the same weights share one engine, and with the same embedding model one embedder. Loading one release
never waits for another that is loaded, nor holds up answers.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from millrace.applications import Application
from millrace.engines.engine import Engine
from millrace.releases.embedding import open_embedder
from millrace.releases.generator import open_engine, upstream_of
from millrace.releases.manifest import Manifest
from millrace.releases.package import read_release
from millrace.releases.pipeline import AnswerPipeline
from millrace.releases.registry import fetch_release
from millrace.retrieval.embed import Embedder
from millrace.retrieval.index import builds_of
from millrace.retrieval.search import Retriever
from millrace.settings import Settings

T = TypeVar("T")


@dataclass
class _Entry(Generic[T]):
    value: Future[T] = field(default_factory=Future)
    users: set[str] = field(default_factory=set)


class _Shared(Generic[T]):
    """Values by key, each made once and kept while somebody uses it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry[T]] = {}

    def get(self, key: str, user: str, make: Callable[[], T]) -> T:
        """The value of `key`, made by the first who asks; others who ask meanwhile wait, and fail with the first."""
        with self._lock:
            first = key not in self._entries
            entry = self._entries.setdefault(key, _Entry())
            entry.users.add(user)
        if first:
            try:
                entry.value.set_result(make())
            except BaseException as error:
                with self._lock:
                    del self._entries[key]
                entry.value.set_exception(error)
        return entry.value.result()

    def leave(self, user: str) -> T | None:
        """`user` needs its value no longer; the value, if nobody else does. Waits while it is being made."""
        with self._lock:
            found = [(key, entry) for key, entry in self._entries.items() if user in entry.users]
        for key, entry in found:
            if entry.value.exception() is not None:
                continue
            with self._lock:
                entry.users.discard(user)
                if not entry.users and self._entries.get(key) is entry:
                    del self._entries[key]
                    return entry.value.result()
        return None

    def users(self) -> set[str]:
        with self._lock:
            return {user for entry in self._entries.values() for user in entry.users}


class ReleaseLoader:
    """Loads an application's releases. Thread-safe."""

    def __init__(self, settings: Settings, application: Application) -> None:
        self.settings = settings
        self.application = application
        self._pipelines: _Shared[AnswerPipeline] = _Shared()
        self._engines: _Shared[Engine] = _Shared()
        self._embedders: _Shared[Embedder] = _Shared()

    def load(self, version: str) -> AnswerPipeline:
        """The pipeline of `version`; loaded once, kept until `unload`.

        Raises:
            ReleaseError: it isn't registered, its bytes are not what was registered, or MLflow doesn't answer.
            EngineError: its weights can't be loaded, or its model's server doesn't answer.
            RetrievalError: its embedding model can't be loaded.
            SettingsError: the declaration has no price for its generator.
        """
        return self._pipelines.get(version, version, lambda: self._open(version))

    def unload(self, version: str) -> None:
        """Forget `version`; closes its engine, with what runs on it, when no other loaded release uses it."""
        if self._pipelines.leave(version) is not None:
            self._leave_parts(version)

    def close(self) -> None:
        """Unload everything."""
        for version in self._pipelines.users():
            self.unload(version)

    def _open(self, version: str) -> AnswerPipeline:
        folder = fetch_release(self.settings, self.application, version)
        manifest = read_release(folder)
        self.application.prices.of(manifest.generator.name)
        retrieval = manifest.retrieval
        try:
            model = retrieval.tuned_sha256 or retrieval.embedding_model
            embedder = self._embedders.get(model, version, lambda: self._embedder(manifest, folder))
            engine = self._engines.get(manifest.generator.identity, version, lambda: self._engine(manifest, folder))
            builds = builds_of(self.settings, self.application.name, retrieval.lineage)
            return AnswerPipeline(manifest, engine, Retriever(builds, embedder))
        except BaseException:
            self._leave_parts(version)
            raise

    def _leave_parts(self, version: str) -> None:
        engine = self._engines.leave(version)
        if engine is not None:
            engine.close()
        self._embedders.leave(version)

    def _engine(self, manifest: Manifest, folder: Path) -> Engine:
        return open_engine(
            manifest.generator,
            folder,
            upstream=upstream_of(self.settings),
            threads=self.settings.threads,
            cache_gb=self.settings.engine_cache_gb,
        )

    def _embedder(self, manifest: Manifest, folder: Path) -> Embedder:
        return open_embedder(manifest, folder, cache=self.settings.cache, threads=self.settings.threads)
