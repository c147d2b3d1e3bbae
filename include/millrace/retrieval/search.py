"""A question in, the nearest chunks out. Follows the published index build; knows nothing of tables."""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from millrace.errors import RetrievalError
from millrace.retrieval.embed import Embedder
from millrace.retrieval.index import OpenBuild, current_build

OPEN_BUILDS = 2
"""Builds kept open: the published one, and one that a caller asks for by name."""


@dataclass(frozen=True)
class Hit:
    """One chunk that was found."""

    chunk_id: str
    document_id: str
    title: str
    text: str
    uri: str
    score: float
    """Cosine similarity."""


class Retriever:
    """Searches the index builds in `builds` (`index.builds_folder`). Thread-safe.

    A build that is published while this runs is used from the next search on; looking costs one `stat`.
    """

    def __init__(self, builds: Path, embedder: Embedder) -> None:
        self._builds = builds
        self._embedder = embedder
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._current: str | None = None
        self._open: OrderedDict[str, OpenBuild] = OrderedDict()

    @property
    def build(self) -> str:
        """The published build.

        Raises:
            RetrievalError: nothing is published.
        """
        try:
            status = os.stat(self._builds / "current.json")
        except FileNotFoundError:
            raise RetrievalError(f"no index build is published in {self._builds}; run refresh_embeddings") from None
        with self._lock:
            # Every publication renames a new file into place: another inode, another time.
            if self._current is None or self._seen != (status.st_ino, status.st_mtime_ns):
                self._current = current_build(self._builds)
                self._seen = (status.st_ino, status.st_mtime_ns)
            if self._current is None:
                raise RetrievalError(f"no index build is published in {self._builds}; run refresh_embeddings")
            return self._current

    def search(self, question: str, k: int, build: str | None = None) -> list[Hit]:
        """The `k` chunks nearest to `question`, best first, in `build` (None: the published one).

        Raises:
            RetrievalError: nothing is published, or there is no such build.
        """
        opened = self._opened(build or self.build)
        vector = self._embedder.embed([question])[0]
        return [
            Hit(
                chunk_id=payload["chunk_id"],
                document_id=payload["document_id"],
                title=payload["title"],
                text=payload["text"],
                uri=payload["uri"],
                score=score,
            )
            for score, payload in opened.nearest(vector.tolist(), k)
        ]

    def documents(self, build: str) -> set[str]:
        """Ids of the documents in `build`."""
        return self._opened(build).documents()

    def _opened(self, build: str) -> OpenBuild:
        with self._lock:
            if build not in self._open:
                self._open[build] = OpenBuild(self._builds, build)
                if len(self._open) > OPEN_BUILDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(build)
            return self._open[build]
