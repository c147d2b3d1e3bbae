"""A question in, the nearest chunks out. Follows the published index build; knows nothing of tables."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from millrace.errors import RetrievalError
from millrace.retrieval.builds import Builds, OpenBuild
from millrace.retrieval.embed import Embedder

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
    """Searches the index builds of a lineage (`index.builds_of`). Thread-safe.

    A build that is published while this runs is used from the next search on; on a Qdrant server, within a second.
    """

    def __init__(self, builds: Builds, embedder: Embedder) -> None:
        self._builds = builds
        self._embedder = embedder
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._seen: object = None
        self._current: str | None = None
        self._open: OrderedDict[str, OpenBuild] = OrderedDict()

    @property
    def build(self) -> str:
        """The published build.

        Raises:
            RetrievalError: nothing is published, or the Qdrant server doesn't answer.
        """
        stamp = self._builds.stamp()  # before the pointer is read: what is published meanwhile is seen next time
        with self._lock:
            if self._current is not None and stamp is not None and stamp == self._seen:
                return self._current
        # Not under the lock: reading may be a request, and others needn't wait for it.
        pointer = self._builds.published()
        if pointer is None:
            raise RetrievalError(f"no index build is published in {self._builds.where}; run refresh_embeddings")
        with self._lock:
            self._current, self._seen = pointer.build, stamp
        return pointer.build

    def search(self, question: str, k: int, build: str | None = None) -> list[Hit]:
        """The `k` chunks nearest to `question`, best first, in `build` (None: the published one).

        Raises:
            RetrievalError: nothing is published, there is no such build, its vectors are another model's, or the Qdrant
                server doesn't answer.
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
        opened = self._known(build)
        if opened is None:
            # One at a time, or a build that was just published would be opened by everybody at once.
            with self._opening:
                opened = self._known(build)
                if opened is None:
                    opened = self._builds.open(build)
                    self._require_its_vectors(opened)
                    with self._lock:
                        self._open[build] = opened
                        if len(self._open) > OPEN_BUILDS:
                            self._open.popitem(last=False)
        return opened

    def _require_its_vectors(self, opened: OpenBuild) -> None:
        """Another model's vectors have the same length and would be compared without an error."""
        lineage = opened.manifest.lineage
        if not lineage.startswith(self._embedder.lineages):
            raise RetrievalError(
                f"index build {opened.manifest.build} has vectors of lineage {lineage}, and questions would be "
                f"embedded by the model of {self._embedder.lineages}*; search with the model of the release"
            )

    def _known(self, build: str) -> OpenBuild | None:
        with self._lock:
            if build in self._open:
                self._open.move_to_end(build)
            return self._open.get(build)
