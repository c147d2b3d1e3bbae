"""Documents cut into passages that an embedder and a prompt can hold. Pure, but for the stage at the end.

A chunk is a span of its document's text, so that code and lists keep their lines; it carries the document's title,
without which "Default: 32" answers nothing.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from millrace.applications import Application, Chunking
from millrace.errors import RetrievalError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_DOCUMENTS
from millrace.settings import Settings

# Thai, Lao, Burmese, Khmer, Japanese and Chinese have no spaces: there a character is a word, as it is a token
# to embedders. Another run of characters without spaces may be a megabyte long; a "word" of it may not.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,64}}")


def chunk_documents(batches: Iterator[pa.RecordBatch], chunking: Chunking) -> Iterator[pa.RecordBatch]:
    """Rows of `silver/documents` → rows of `silver/chunks`, a batch for a batch."""
    for batch in batches:
        chunks = [chunk for document in batch.to_pylist() for chunk in _chunks(document, chunking)]
        yield pa.RecordBatch.from_pylist(chunks, schema=SILVER_CHUNKS.rows_schema)


def passages(text: str, chunking: Chunking) -> list[str]:
    """`text` as spans of at most `max_words` words; each begins with the last `overlap_words` of the one before.

    Every word is in at least one span; a text without words has none.
    """
    words = [(word.start(), word.end()) for word in _WORD.finditer(text)]
    step = chunking.max_words - chunking.overlap_words
    starts = range(0, max(len(words) - chunking.overlap_words, min(len(words), 1)), step)
    spans = [words[start : start + chunking.max_words] for start in starts]
    return [text[span[0][0] : span[-1][1]] for span in spans]


def refresh_chunks(settings: Settings, application: Application, *, run: str) -> dict[str, Any]:
    """Make `silver/chunks` equal to the chunks of `silver/documents`, on the engine that owns the table.

    Returns:
        Counts: `inserted`, `updated`, `deleted`; `version` of the chunks; `changed`.

    Raises:
        RetrievalError: there are no silver documents yet.
    """
    lake = Lake.of(settings, application.name)
    if not lake.exists(SILVER_DOCUMENTS):
        raise RetrievalError(f"{application.name}: {SILVER_DOCUMENTS.path} doesn't exist; ingest documents first")
    function = partial(chunk_documents, chunking=application.chunking)
    written = lake.transform(SILVER_DOCUMENTS, function, SILVER_CHUNKS, run=run)
    return written.counts | {"version": written.version, "changed": written.changed}


def _chunks(document: dict[str, Any], chunking: Chunking) -> Iterator[dict[str, Any]]:
    for position, text in enumerate(passages(document["text"], chunking)):
        carried = {name: document[name] for name in ("source", "uri", "section", "title")}
        yield {
            "chunk_id": content_hash(document["document_id"], position, text),
            "content_hash": content_hash(text, *carried.values()),
            "document_id": document["document_id"],
            "position": position,
            "text": text,
            **carried,
        }
