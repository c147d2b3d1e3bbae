"""Every Delta table of an application, declared once: schema, key, partitioning, change feed, retention.

Knows names and types; how a table is committed is the engines' business (`lake.py`).
Times are UTC microseconds. `simulated` marks what no person did or said.
"""

from dataclasses import dataclass, field

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")
VECTOR = pa.list_(pa.float32())

PROVENANCE = (
    pa.field("written_by", pa.string(), nullable=False),  # the run that wrote the row
    pa.field("code_version", pa.string(), nullable=False),
    pa.field("written_at", TIME, nullable=False),
)


FEATURES = frozenset({"appendOnly", "invariants", "checkConstraints", "changeDataFeed"})
"""Delta features that both engines write and read. Others, deletion vectors and column mapping among them, one of
the two refuses or reads wrong."""


@dataclass(frozen=True)
class Table:
    """One declared table. `columns` excludes provenance, which every table has (`schema` includes it)."""

    layer: str
    name: str
    columns: tuple[pa.Field, ...]
    key: tuple[str, ...]
    partition_by: tuple[str, ...] = ()
    change_feed: bool = False
    retention_days: int = 30
    constraints: dict[str, str] = field(default_factory=dict)
    """Name → SQL condition that every row satisfies."""
    features: frozenset[str] = FEATURES
    """Delta features that the table may carry; one with another is refused."""

    @property
    def path(self) -> str:
        return f"{self.layer}/{self.name}"

    @property
    def schema(self) -> pa.Schema:
        """All columns, provenance last."""
        return pa.schema([*self.columns, *PROVENANCE])

    @property
    def rows_schema(self) -> pa.Schema:
        """What a stage hands in: the columns without provenance."""
        return pa.schema(self.columns)


def text(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.string(), nullable=nullable)


def number(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.float64(), nullable=nullable)


def count(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.int64(), nullable=nullable)


def flag(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, pa.bool_(), nullable=nullable)


def time(name: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, TIME, nullable=nullable)


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

GOLD_TRAINING_EXAMPLES = Table(
    "gold",
    "training_examples",
    (
        text("training_set"),  # hash of its examples
        text("example_id"),
        text("origin"),  # document, correction
        flag("simulated"),
        text("section", nullable=True),
        text("question"),
        text("answer"),
        pa.field("chunk_ids", pa.list_(pa.string()), nullable=False),
        text("prompt"),  # rendered, as the generator sees it
    ),
    key=("training_set", "example_id"),
)

GOLD_EVALUATION_EXAMPLES = Table(
    "gold",
    "evaluation_examples",
    (
        text("evaluation_set"),  # hash of its examples; frozen once written
        text("example_id"),
        text("section", nullable=True),
        text("question"),
        text("answer"),
        text("document_id"),  # the document that holds the answer
    ),
    key=("evaluation_set", "example_id"),
)

GOLD_ANSWERS = Table(
    "gold",
    "answers",
    (
        text("question_id"),
        text("release_id"),
        text("release_version"),
        text("index_build"),
        text("question"),
        text("answer", nullable=True),  # null: there is none, see error
        pa.field("citations", pa.list_(pa.string()), nullable=False),  # chunk ids, best first
        text("finish_reason", nullable=True),
        count("prompt_tokens"),
        count("completion_tokens"),
        number("seconds"),  # others were answered at the same time
        number("cost_usd"),  # of its tokens
        text("error", nullable=True),
        text("mode"),  # batch, stream
    ),
    key=("question_id", "release_id"),
    partition_by=("release_id",),
    retention_days=365,
)

OPS_DECISIONS = Table(
    "ops",
    "decisions",
    (
        count("sequence"),  # 0, 1, 2 …, no gaps
        time("decided_at"),
        text("kind"),  # see rollout/decisions.py
        text("actor"),
        text("reason"),
        text("rollout_id", nullable=True),
        count("epoch", nullable=True),
        text("champion", nullable=True),  # release version
        text("challenger", nullable=True),
        number("share"),  # of traffic that the challenger gets from now on
        text("evidence"),  # JSON
        flag("simulated"),  # rests on simulated users
    ),
    key=("sequence",),
    retention_days=3650,
)

OPS_EVALUATIONS = Table(
    "ops",
    "evaluations",
    (
        text("evaluation_id"),  # hash of set, champion, candidate and index build
        text("evaluation_set"),
        text("champion"),
        text("candidate"),
        text("candidate_release_id"),
        text("champion_release_id"),
        text("index_build"),
        flag("passed"),
        text("criteria"),  # JSON: list of criterion, value, interval, bound, passed
        text("examples"),  # JSON: per example scores of both, worst first
        time("evaluated_at"),
    ),
    key=("evaluation_id",),
    retention_days=3650,
)

OPS_PROMPT_TRIALS = Table(
    "ops",
    "prompt_trials",
    (
        text("study"),  # hash of champion, index build, questions, choices and budgets
        text("part"),  # search; held_out: the start or the best, on questions that no trial was chosen by
        count("trial"),  # 0: the champion's own prompt and configuration
        text("parameters"),  # JSON
        text("template"),  # whole, worked examples and all
        text("state"),  # complete, pruned, failed
        count("questions"),  # answered
        number("token_f1", nullable=True),  # mean over them; null: none was answered
        count("prompt_tokens"),
        count("completion_tokens"),
        number("seconds"),
        text("scores"),  # JSON: question id → token-F1
        text("why"),
        text("champion_release_id"),
        text("index_build"),
        time("ended_at"),
    ),
    key=("study", "part", "trial"),
)

OPS_CURSORS = Table(
    "ops",
    "cursors",
    (text("reader"), text("table"), count("version")),
    key=("reader", "table"),
)

OPS_ALERTS = Table(
    "ops",
    "alerts",
    (
        text("title"),
        text("content_hash"),
        text("what"),  # as it was said last
        text("source"),
        text("runbook"),
        time("since"),
        time("last_at"),
        count("count"),
        time("sent_at", nullable=True),  # when it last reached somebody
    ),
    key=("title",),
)

QUARANTINE_FEEDBACK = Table(
    "quarantine",
    "feedback",
    (
        text("item_id"),  # event id, or segment and offset of a line that can't be read
        text("reason"),
        text("payload"),  # the line as it was found, replayable
        text("segment"),
        time("found_in"),  # start of the data interval
    ),
    key=("item_id",),
)

GOLD_METRICS_HOURLY = Table(
    "gold",
    "metrics_hourly",
    (
        pa.field("date", pa.date32(), nullable=False),
        time("interval_start"),  # of the window, an hour unless the policy says otherwise
        time("interval_end"),
        text("release_id"),
        text("index_build"),  # empty where the index could not be read
        text("release_version"),
        text("content_hash"),
        count("exchanges"),
        count("simulated"),  # exchanges; these and the counts below
        count("pinned"),
        count("failed"),
        count("left_early"),  # the caller left before the end
        count("unfinished"),  # accepted, and no end of them has arrived
        count("fell_back"),
        count("from_cache"),
        count("errors"),  # with an error that is not the caller's leaving
        count("rated"),  # by now, within a week of the exchange
        number("feedback_rate", nullable=True),  # rated / completed
        number("rating_mean", nullable=True),
        number("seconds_mean", nullable=True),  # of completed exchanges, cached ones too
        number("seconds_p50", nullable=True),
        number("seconds_p95", nullable=True),
        count("prompt_tokens"),
        count("completion_tokens"),
        number("cost_usd"),
    ),
    key=("date", "interval_start", "interval_end", "release_id", "index_build"),
    partition_by=("date",),
    retention_days=365,
)

GOLD_DRIFT_HOURLY = Table(
    "gold",
    "drift_hourly",
    (
        pa.field("date", pa.date32(), nullable=False),
        time("interval_start"),
        time("interval_end"),
        text("release_id"),  # -: users' questions, which no release makes
        text("column"),
        text("content_hash"),
        count("users"),  # in the window, one exchange each
        count("reference_users"),
        number("statistic", nullable=True),  # Kolmogorov-Smirnov distance; null: too few
        number("p_value", nullable=True),
        number("adjusted", nullable=True),  # p-value after Benjamini-Hochberg over the window
        text("verdict"),  # drifted, same, too few
        flag("simulated"),
    ),
    key=("date", "interval_start", "interval_end", "release_id", "column"),
    partition_by=("date",),
    retention_days=365,
)

OPS_BREACHES = Table(
    "ops",
    "breaches",
    (
        pa.field("date", pa.date32(), nullable=False),  # of the window
        text("breach_id"),  # hash of window, release and bound
        time("interval_start"),
        time("interval_end"),
        text("release_id"),  # -: users' questions
        text("release_version"),
        text("metric"),
        text("bound"),
        number("value"),
        text("action"),  # alert, retrain, reembed, rollback
        text("reason"),
        flag("simulated"),  # rests on simulated users
        time("at"),  # when it was found
    ),
    key=("date", "breach_id"),
    partition_by=("date",),
    retention_days=3650,
)

OPS_COSTS = Table(
    "ops",
    "costs",
    (
        text("cost_id"),
        text("content_hash"),
        text("stage"),  # embedding, training, evaluation, optimisation, batch
        text("subject"),  # what it was spent on: lineage, fine-tune, evaluation, study, question table
        text("release_id", nullable=True),
        number("seconds"),  # of a machine
        count("tokens"),
        number("cost_usd"),
        time("at"),
    ),
    key=("cost_id",),
    retention_days=3650,
)

TABLES: dict[str, Table] = {
    table.path: table
    for table in (
        BRONZE_DOCUMENTS,
        BRONZE_EVENTS,
        BRONZE_QUESTIONS,
        SILVER_DOCUMENTS,
        SILVER_CHUNKS,
        SILVER_EMBEDDINGS,
        SILVER_EXCHANGES,
        SILVER_FEEDBACK,
        GOLD_TRAINING_EXAMPLES,
        GOLD_EVALUATION_EXAMPLES,
        GOLD_ANSWERS,
        OPS_DECISIONS,
        OPS_EVALUATIONS,
        OPS_PROMPT_TRIALS,
        OPS_CURSORS,
        OPS_ALERTS,
        QUARANTINE_FEEDBACK,
        GOLD_METRICS_HOURLY,
        GOLD_DRIFT_HOURLY,
        OPS_BREACHES,
        OPS_COSTS,
    )
}
"""Path (`layer/name`) → table."""
