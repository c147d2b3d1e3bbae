"""What is made for a purpose: training and evaluation sets, answers of a batch, metrics."""

import pyarrow as pa

from millrace.lakehouse.tables.declared import Table, count, flag, number, text, time

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
        text("answer"),  # empty, like the prompt: its chunk was learnt, by an embedding model
        pa.field("chunk_ids", pa.list_(pa.string()), nullable=False),
        text("prompt"),  # rendered, as the generator sees it
    ),
    key=("training_set", "example_id"),
)

GOLD_PREFERENCE_EXAMPLES = Table(
    "gold",
    "preference_examples",
    (
        text("training_set"),  # hash of its examples
        text("example_id"),
        text("origin"),  # correction, ratings
        flag("simulated"),
        text("question"),
        text("chosen"),
        text("rejected"),
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
