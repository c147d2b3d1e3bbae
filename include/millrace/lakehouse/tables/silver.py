"""Clean, keyed, users as pseudonyms."""

import pyarrow as pa

from millrace.lakehouse.tables.declared import VECTOR, Table, count, flag, number, text, time

SILVER_DOCUMENTS = Table(
    "silver",
    "documents",
    (
        text("document_id"),
        text("content_hash"),
        text("source"),
        text("uri"),
        text("section", nullable=True),
        text("title"),
        text("text"),
    ),
    key=("document_id",),
    change_feed=True,
)

SILVER_CHUNKS = Table(
    "silver",
    "chunks",
    (
        text("chunk_id"),  # hash of document, position and content
        text("content_hash"),
        text("document_id"),
        count("position"),
        text("source"),
        text("uri"),
        text("section", nullable=True),
        text("title"),
        text("text"),
    ),
    key=("chunk_id",),
    change_feed=True,
)

SILVER_EMBEDDINGS = Table(
    "silver",
    "embeddings",
    (
        text("lineage"),
        text("chunk_id"),
        text("content_hash"),
        pa.field("vector", VECTOR, nullable=False),
    ),
    key=("lineage", "chunk_id"),
    change_feed=True,
)

SILVER_EXCHANGES = Table(
    "silver",
    "exchanges",
    (
        text("completion_id"),
        text("content_hash"),
        count("events_seen"),
        text("state"),  # accepted (never completed), completed, failed
        time("occurred_at"),  # of the accepted event
        time("completed_at", nullable=True),
        pa.field("date", pa.date32(), nullable=False),
        text("user"),  # keyed pseudonym
        flag("simulated"),
        text("question"),
        text("answer", nullable=True),
        text("release_id"),
        text("release_version"),
        text("index_build"),
        text("prompt_version"),
        text("rollout_id", nullable=True),
        count("epoch", nullable=True),
        text("arm", nullable=True),  # champion, challenger; null: pinned by the caller, or no rollout
        number("assignment_probability", nullable=True),  # of the challenger
        flag("pinned"),
        flag("fell_back"),  # the champion answered because the challenger failed
        flag("from_cache"),
        pa.field("citations", pa.list_(pa.string()), nullable=False),  # chunk ids
        count("prompt_tokens"),
        count("completion_tokens"),
        number("seconds", nullable=True),
        number("cost_usd"),
        text("error", nullable=True),
    ),
    key=("completion_id",),
    partition_by=("date",),
    change_feed=True,
)

SILVER_FEEDBACK = Table(
    "silver",
    "feedback",
    (
        text("completion_id"),
        text("content_hash"),
        count("events_seen"),
        time("occurred_at"),  # of the last feedback event on this completion
        pa.field("date", pa.date32(), nullable=False),
        text("user"),
        flag("simulated"),
        number("rating"),
        text("comment", nullable=True),
        text("correction", nullable=True),
        text("question"),
        text("answer", nullable=True),
        text("release_id"),
        text("release_version"),
        text("index_build"),
    ),
    key=("completion_id",),
    partition_by=("date",),
    change_feed=True,
    constraints={"rating_in_range": "rating >= 0 AND rating <= 1"},
)
