"""What a breach that asks for re-embedding gets: nothing that was embedded is taken on trust.

A lineage fixes model and chunker, so the same chunk has the same vector, and embedding it again changes nothing (a
build that could change under its name would not repeat its answers). What can be wrong is what was kept: vectors
that are missing, stale, left over, or not what the model gives. The first three are mended, the last is refused.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.cursors import forget_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval.embed import Lineage, cursor_name, declared_lineage, embedded_text, refresh_embeddings
from millrace.settings import Settings

SAMPLE = 256
"""Chunks embedded anew and compared."""
SAME = 0.999
"""Cosine: processors round differently, a model that changed is far from this."""


def reembed(
    settings: Settings, application: Application, *, run: str, lineage: Lineage | None = None
) -> dict[str, Any]:
    """Compare every chunk with every vector, embed what is missing or stale, and forget what is left over, whatever
    the change feed and the cursor say; before that, embed a sample anew and compare it with what was kept.

    Args:
        lineage: None: the declared one.

    Returns: as `refresh_embeddings`, and `verified`: how many vectors were compared.

    Raises:
        RetrievalError: a vector is not what the model gives now, there are no chunks, or the model can't be opened.
    """
    lake = Lake.of(settings, application.name)
    lineage = lineage or declared_lineage(application)
    verified = _verify(lake, settings, lineage)
    forget_cursor(lake, cursor_name(lineage.id), SILVER_CHUNKS, run=run)
    return refresh_embeddings(settings, application, run=run, lineage=lineage) | {"verified": verified}


def _verify(lake: Lake, settings: Settings, lineage: Lineage) -> int:
    chunks = lake.read(SILVER_CHUNKS, ["chunk_id", "content_hash", "title", "text"]).to_pylist()
    sample = {row["chunk_id"]: row for row in sorted(chunks, key=lambda row: content_hash(row["chunk_id"]))[:SAMPLE]}
    kept = lake.read(SILVER_EMBEDDINGS, ["chunk_id", "content_hash", "vector"], where=pc.field("lineage") == lineage.id)
    kept = kept.filter(pc.is_in(kept["chunk_id"], pa.array(list(sample), pa.string())))
    vectors = {
        row["chunk_id"]: row["vector"]
        for row in kept.to_pylist()
        if row["content_hash"] == sample[row["chunk_id"]]["content_hash"]
    }
    if not vectors:
        return 0
    anew = lineage.open(settings).embed([embedded_text(sample[one]["title"], sample[one]["text"]) for one in vectors])
    stored = np.array(list(vectors.values()), dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (anew * stored).sum(axis=1) / np.linalg.norm(stored, axis=1)
    wrong = [one for one, value in zip(vectors, cosine, strict=True) if not value >= SAME]
    if wrong:
        raise RetrievalError(
            f"{len(wrong)} of {len(vectors)} vectors of {lineage.id} that were compared are not what "
            f"{lineage.model} gives now (chunk {wrong[0]} for one): they were damaged, or the "
            f"model's files changed under its version; delete this lineage's rows of {SILVER_EMBEDDINGS.path} and its "
            "index builds, and run this again"
        )
    return len(vectors)
