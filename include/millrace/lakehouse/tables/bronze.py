"""As it arrived."""

import pyarrow as pa

from millrace.lakehouse.tables.declared import Table, flag, text, time

BRONZE_DOCUMENTS = Table(
    "bronze",
    "documents",
    (
        text("document_id"),
        text("version_hash"),  # of everything below but observed_at; key with document_id
        text("source"),
        text("uri"),
        text("section", nullable=True),
        text("title"),
        pa.field("content", pa.binary(), nullable=True),  # bytes as they arrived; null: deleted at the source
        flag("deleted"),
        time("observed_at"),
    ),
    key=("document_id", "version_hash", "observed_at"),
)

BRONZE_EVENTS = Table(
    "bronze",
    "events",
    (
        text("event_id"),
        text("kind"),  # accepted, completed, failed, feedback
        text("completion_id"),
        time("occurred_at"),
        pa.field("date", pa.date32(), nullable=False),
        text("payload"),  # the event's line as it was written, JSON
        text("segment"),  # of the event log, where the line was found
    ),
    key=("event_id",),
    partition_by=("date",),
)

BRONZE_QUESTIONS = Table(
    "bronze",
    "questions",
    (
        text("question_id"),
        text("question"),
        text("batch"),  # name under which it was submitted
        flag("simulated"),  # made up by a program
        time("asked_at"),
    ),
    key=("question_id",),
    retention_days=365,
)
