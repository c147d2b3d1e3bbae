"""Chunks to vectors: an in-process embedder, and the stage that embeds what the change feed says is new.

Vectors are kept per lineage (embedding model and chunker), so that a new lineage grows beside the old one.
Where the model comes from is `embedding_model.py`'s business; what searches the vectors is `index.py`'s; which lineages
are searched, and so kept up to date, is known to those who know releases.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application, Chunking
from millrace.errors import FeedGone, RetrievalError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.costs import Cost, cost_id, record_cost
from millrace.lakehouse.cursors import forget_cursor, move_cursor, read_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval.embedding_model import (
    CONVERSION,
    converted_model,
    forget_converted,
    model_folder,
    model_version,
    weights_sha256,
)
from millrace.settings import Settings

log = logging.getLogger("millrace.retrieval")

DIMENSIONS = 384
BATCH_TOKENS = 4096
"""Tokens, padding included, that one inference takes."""
COMMIT_CHUNKS = 512
"""Vectors between commits: what a killed run has to embed again."""
_TUNED = "tuned-"
"""Begins the lineages of fine-tuned models."""


class Embedder:
    """Opens `model`, a package that carries a sentence-transformers model. Thread-safe; one inference at a time.

    Computes in 32-bit floats, so that a text's vector doesn't depend on what the processor can round to.

    Args:
        model: name of the package.
        cache: folder for the converted model, shared between processes.
        threads: how many an inference may use.
        tuned: folder with the model that was fine-tuned from the package's, to be opened instead.

    Raises:
        RetrievalError: the package isn't installed, or there is no model that can be opened.
    """

    def __init__(self, model: str, cache: Path, threads: int, tuned: Path | None = None) -> None:
        import openvino
        from tokenizers import Tokenizer

        folder = tuned or model_folder(model)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            limit = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        except Exception as error:  # tokenizers raises nothing narrower
            again = f"fetch the release of {folder} again" if tuned else f"reinstall {model}"
            raise RetrievalError(f"{folder}: the tokenizer can't be read: {error}; {again}") from error
        self._tokenizer.enable_truncation(limit)
        self._tokenizer.no_padding()
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(threads),
        }
        sha256 = weights_sha256(folder)
        self.lineages = _prefix(model, sha256 if tuned else None)
        """What the names of the lineages of its vectors begin with."""
        compiled = openvino.Core().compile_model(converted_model(folder, sha256, cache), "CPU", options)
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of `texts`, in their order: shape (n, 384), unit length. Long texts are cut at the model's limit."""
        vectors: npt.NDArray[np.float32] = np.empty((len(texts), DIMENSIONS), np.float32)
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        for rows in _batches([len(ids) for ids in tokens]):
            width = max(len(tokens[row]) for row in rows)
            ids = np.zeros((len(rows), width), np.int64)
            mask = np.zeros((len(rows), width), np.int64)
            for i, row in enumerate(rows):
                ids[i, : len(tokens[row])] = tokens[row]
                mask[i, : len(tokens[row])] = 1
            with self._lock:
                vectors[rows] = self._request.infer({"input_ids": ids, "attention_mask": mask})[0]
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> int:
        """What `texts` take of the model, each cut at its limit."""
        return sum(len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts)))


@dataclass(frozen=True)
class Lineage:
    """Vectors that can be compared, and what makes more of them."""

    id: str
    model: str
    """Package of the embedding model."""
    tuned: Path | None = None
    """Folder with the model that was fine-tuned from it; None: as the package has it."""

    def open(self, settings: Settings) -> Embedder:
        """Raises as `Embedder`."""
        return Embedder(self.model, settings.cache, settings.threads, self.tuned)


def lineage_name(model: str, chunking: Chunking, tuned: str | None = None) -> str:
    """What must be equal for vectors to be comparable: embedding model, its version, and the chunker.

    Args:
        tuned: SHA-256 of the weights of a model that was fine-tuned from the package's.

    Raises:
        RetrievalError: the model's package isn't installed.
    """
    made = tuned or model_version(model)
    parts = content_hash(model, made, CONVERSION, chunking.max_words, chunking.overlap_words)
    return f"{_prefix(model, tuned)}{parts[:12]}"


def declared_lineage(application: Application) -> Lineage:
    """Of the package's model that the application declares. Raises as `lineage_name`."""
    model = application.retrieval.embedding_model
    return Lineage(lineage_name(model, application.chunking), model)


def lineage_id(application: Application) -> str:
    """Of the declared lineage. Raises as `lineage_name`."""
    return declared_lineage(application).id


def embedded_text(title: str, text: str) -> str:
    """What is embedded of a chunk: its title belongs to it."""
    return f"{title}\n{text}"


def cursor_name(lineage: str) -> str:
    """Reader under which `ops/cursors` keeps how far the chunks were embedded."""
    return f"embeddings/{lineage}"


def refresh_embeddings(
    settings: Settings, application: Application, *, run: str, lineage: Lineage | None = None
) -> dict[str, Any]:
    """Embed what changed among the chunks since the last run, forget what was removed, then move the cursor.

    Killed anywhere, it goes on: a chunk whose vector is there is not embedded again, and the cursor moves last.

    Args:
        lineage: None: the declared one.

    Returns:
        Counts: `embedded`, `deleted`; `lineage`; `chunks_version`, up to which all is embedded; `changed`.

    Raises:
        RetrievalError: there are no chunks yet, or the model can't be opened.
    """
    lake = Lake.of(settings, application.name)
    lineage = lineage or declared_lineage(application)
    reader = cursor_name(lineage.id)
    version = lake.version(SILVER_CHUNKS)  # before the feed is read: what comes later is read again, not missed
    if version is None:
        raise RetrievalError(f"{application.name}: {SILVER_CHUNKS.path} doesn't exist; ingest documents first")
    since = read_cursor(lake, reader, SILVER_CHUNKS)
    known = _known(lake, lineage.id)
    upserts, removed = _changes(lake, since, known)
    new = [chunk for chunk in upserts if known.get(chunk["chunk_id"]) != chunk["content_hash"]]
    if new:
        embedder = lineage.open(settings)
        for start in range(0, len(new), COMMIT_CHUNKS):
            _embed(lake, lineage.id, embedder, new[start : start + COMMIT_CHUNKS], application, run)
            log.info("%s: embedded %d of %d chunks", application.name, min(start + COMMIT_CHUNKS, len(new)), len(new))
    _forget(lake, lineage.id, sorted(removed), run)
    if since is None or version > since:
        move_cursor(lake, reader, SILVER_CHUNKS, version, run=run)
    return {
        "embedded": len(new),
        "deleted": len(removed),
        "lineage": lineage.id,
        "chunks_version": version,
        "changed": bool(new or removed),
    }


def forget_lineage(lake: Lake, lineage: str, cache: Path, *, run: str) -> None:
    """Delete all vectors of a lineage that nobody searches any more, and a fine-tuned model from the cache. Made again,
    they are the same."""
    if lineage.startswith(_TUNED):
        forget_converted(lineage.removeprefix(_TUNED), cache)
    forget_cursor(lake, cursor_name(lineage), SILVER_CHUNKS, run=run)
    if lake.exists(SILVER_EMBEDDINGS):
        nothing = SILVER_EMBEDDINGS.rows_schema.empty_table()
        lake.merge(SILVER_EMBEDDINGS, nothing, run=run, delete_unmatched=f"target.lineage = '{lineage}'")


def _prefix(model: str, tuned: str | None) -> str:
    return f"{_TUNED}{tuned[:16]}-" if tuned else f"{model}-"


def _known(lake: Lake, lineage: str) -> dict[str, str]:
    """Chunk → content hash of its vector in this lineage."""
    rows = lake.read(SILVER_EMBEDDINGS, ["chunk_id", "content_hash"], where=pc.field("lineage") == lineage)
    return dict(zip(rows["chunk_id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True))


def _changes(lake: Lake, since: int | None, known: dict[str, str]) -> tuple[list[dict[str, Any]], set[str]]:
    """Chunks that may need a vector, and those whose vector must go."""
    try:
        feed = lake.changes(SILVER_CHUNKS, since)
    except FeedGone as error:
        log.warning("%s; comparing all chunks with all vectors instead", error)
        since = None
        feed = lake.changes(SILVER_CHUNKS, None)
    upserted = feed.filter(pc.equal(feed["change"], "upsert"))
    if since is None:
        gone = known.keys() - set(upserted["chunk_id"].to_pylist())
    else:
        deleted = feed.filter(pc.equal(feed["change"], "delete"))
        gone = known.keys() & set(deleted["chunk_id"].to_pylist())
    return upserted.select(["chunk_id", "content_hash", "title", "text"]).to_pylist(), set(gone)


def _embed(
    lake: Lake, lineage: str, embedder: Embedder, chunks: list[dict[str, Any]], application: Application, run: str
) -> None:
    texts = [embedded_text(chunk["title"], chunk["text"]) for chunk in chunks]
    started = time.perf_counter()
    vectors = embedder.embed(texts)
    seconds = time.perf_counter() - started
    record_cost(
        lake,
        Cost(
            cost_id("embedding", lineage, uuid.uuid4().hex),
            "embedding",
            lineage,
            seconds=seconds,
            tokens=embedder.count_tokens(texts),
            cost_usd=application.prices.machine("embedding", seconds),
        ),
        run=run,
    )
    rows = pa.Table.from_pydict(
        {
            "lineage": [lineage] * len(chunks),
            "chunk_id": [chunk["chunk_id"] for chunk in chunks],
            "content_hash": [chunk["content_hash"] for chunk in chunks],
            "vector": list(vectors),
        },
        schema=SILVER_EMBEDDINGS.rows_schema,
    )
    lake.merge(SILVER_EMBEDDINGS, rows, run=run)


def _forget(lake: Lake, lineage: str, chunk_ids: list[str], run: str) -> None:
    nothing = SILVER_EMBEDDINGS.rows_schema.empty_table()
    for start in range(0, len(chunk_ids), COMMIT_CHUNKS):
        ids = ", ".join(f"'{chunk_id}'" for chunk_id in chunk_ids[start : start + COMMIT_CHUNKS])
        condition = f"target.lineage = '{lineage}' AND target.chunk_id IN ({ids})"
        lake.merge(SILVER_EMBEDDINGS, nothing, run=run, delete_unmatched=condition)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers, longest first, in groups that fill `BATCH_TOKENS` with little padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
