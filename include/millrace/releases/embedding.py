"""A release's embedding model: that of the package that its manifest names, or the fine-tuned one that it brings.

Knows the disk only.
"""

from pathlib import Path

from millrace.releases.manifest import Manifest
from millrace.releases.package import EMBEDDING
from millrace.retrieval.embed import Embedder, Lineage


def release_lineage(manifest: Manifest, folder: Path) -> Lineage:
    """What the release in a local folder searches."""
    retrieval = manifest.retrieval
    return Lineage(retrieval.lineage, retrieval.embedding_model, folder / EMBEDDING if retrieval.tuned else None)


def open_embedder(manifest: Manifest, folder: Path, *, cache: Path, threads: int) -> Embedder:
    """What embeds questions for the release in a local folder. Raises as `Embedder`."""
    lineage = release_lineage(manifest, folder)
    return Embedder(lineage.model, cache, threads, lineage.tuned)
