"""What an index build is, and what a place that keeps the builds of one lineage can do.

`library.py` (folders, Qdrant Edge in this process) and `service.py` (a collection on a Qdrant server) are the two
places; `index.py` chooses. This module knows neither, nor Delta.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

FORMAT = 1
KEPT = 3
"""Newest builds that are kept beside those that are referenced."""
PAYLOAD = ("chunk_id", "document_id", "title", "text", "uri", "section")
"""What a search returns of a chunk."""


class BuildManifest(BaseModel):
    """What a build was made from. It is written last: a build that has one is whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    build: str
    lineage: str
    chunks_version: int
    embeddings_version: int
    chunks: int
    documents: int
    content_sha: str
    """Hash of all chunk ids and content hashes."""
    built_at: datetime
    run: str


class Published(BaseModel):
    """The pointer to the published build."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    build: str
    previous: str | None
    published_at: datetime


class OpenBuild(Protocol):
    """A build that can be searched. Thread-safe."""

    @property
    def manifest(self) -> BuildManifest: ...

    def nearest(self, vector: list[float], k: int) -> list[tuple[float, dict[str, Any]]]:
        """The `k` nearest chunks, best first: cosine similarity and payload (`PAYLOAD`)."""
        ...

    def documents(self) -> set[str]:
        """Ids of all documents with a chunk in the build."""
        ...


class Builds(Protocol):
    """The index builds of one lineage. Whatever can't be done is a RetrievalError of one sentence."""

    @property
    def where(self) -> str:
        """The place, for a person."""
        ...

    def make(self, manifest: BuildManifest, points: pa.Table) -> bool:
        """Make a build, unless it is there; killed anywhere, the next call completes it.

        Args:
            points: a row per chunk, in order of `chunk_id`: columns `PAYLOAD`, `content_hash`, `vector`.

        Returns:
            Whether it was made.
        """
        ...

    def manifest(self, build: str) -> BuildManifest:
        """What `build` was made from.

        Raises:
            RetrievalError: there is no such build, or another version of Millrace made it.
        """
        ...

    def manifests(self) -> list[BuildManifest]:
        """Of every build that is there and that this code can read, oldest first."""
        ...

    def publish(self, build: str) -> bool:
        """Make `build` the published one, at once for everybody who looks; the published one becomes the previous
        one. Publishing that again is the way back.

        Returns:
            Whether the pointer moved.

        Raises:
            RetrievalError: there is no such build.
        """
        ...

    def published(self) -> Published | None:
        """The pointer as it is now; None: nothing was published."""
        ...

    def stamp(self) -> object:
        """Costs next to nothing. As long as it is the same, nobody needs to look at `published` again."""
        ...

    def open(self, build: str) -> OpenBuild:
        """
        Raises:
            RetrievalError: it isn't there, or holds fewer chunks than it was made from.
        """
        ...

    def collect(self, keep: str) -> list[str]:
        """Delete what `superfluous` says. Returns what went."""
        ...

    def changed_at(self) -> datetime | None:
        """When a build was made or published last; None: never, as far as one can see."""
        ...

    def remove(self) -> None:
        """Delete everything. Not for a lineage that a release needs or that is being built."""
        ...


def current(builds: Builds) -> str | None:
    """The published build; None: there is none."""
    pointer = builds.published()
    return pointer.build if pointer else None


def superfluous(manifests: Iterable[BuildManifest], pointer: Published | None, keep: str) -> list[str]:
    """All but the newest builds; never `keep`, the published one, nor the one before it."""
    referenced = {keep, pointer.build, pointer.previous} if pointer else {keep}
    unreferenced = [one.build for one in sorted(manifests, key=lambda m: m.built_at) if one.build not in referenced]
    return unreferenced[:-KEPT]
