"""A folder of notes as an application, and its whole way from files to a published index build."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import cursor_name, lineage_id
from millrace.settings import Settings

NOTES = {
    "granite.txt": "Granite is a rock that cools slowly, deep under the ground, so that its crystals grow large.",
    "bread.txt": "Bread rises because yeast turns sugar into gas, which the dough holds back in small bubbles.",
    "tides.txt": "The tides follow the moon, whose gravity pulls the water of the sea towards it.",
}


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    for name, text in NOTES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def application(qa: Application, notes: Path) -> Application:
    """`qa` over the notes alone."""
    sources = [{"kind": "text_folder", "path": str(notes)}]
    return Application.model_validate(qa.model_dump(mode="json") | {"sources": sources})


def chunked(settings: Settings, application: Application) -> dict[str, Any]:
    """Documents to chunks. Retrieval doesn't import sources; its tests may."""
    from millrace.sources.ingest import land_documents, refine_documents

    land_documents(settings, application, run="test")
    refine_documents(settings, application, run="test")
    return refresh_chunks(settings, application, run="test")


def vectors_without_a_model(lake: Lake, application: Application) -> None:
    """A vector for every chunk, made from its id: what embedding leaves behind, in milliseconds."""
    chunks = lake.read(SILVER_CHUNKS, ["chunk_id", "content_hash"]).to_pylist()
    lineage = lineage_id(application)
    rows = [
        {"lineage": lineage, "chunk_id": c["chunk_id"], "content_hash": c["content_hash"], "vector": vector_of(c)}
        for c in chunks
    ]
    table = pa.Table.from_pylist(rows, schema=SILVER_EMBEDDINGS.rows_schema)
    lake.merge(SILVER_EMBEDDINGS, table, run="test", delete_unmatched="true")
    version = lake.version(SILVER_CHUNKS)
    assert version is not None
    move_cursor(lake, cursor_name(lineage), SILVER_CHUNKS, version, run="test")


def vector_of(chunk: dict[str, Any]) -> list[float]:
    """A unit vector that depends on the chunk alone."""
    seed = int(content_hash(chunk["chunk_id"], chunk["content_hash"]), 16)
    vector = np.random.default_rng(seed).normal(size=384).astype(np.float32)
    return (vector / np.linalg.norm(vector)).tolist()
