"""Every Delta table of an application, declared once: schema, key, partitioning, change feed, retention.

Knows names and types; how a table is committed is the engines' business (`lake.py`).
Times are UTC microseconds. `simulated` marks what no person did or said.
"""

from millrace.lakehouse.tables.bronze import BRONZE_DOCUMENTS, BRONZE_EVENTS, BRONZE_QUESTIONS
from millrace.lakehouse.tables.declared import (
    FEATURES,
    PROVENANCE,
    TIME,
    VECTOR,
    Table,
    count,
    flag,
    number,
    text,
    time,
)
from millrace.lakehouse.tables.gold import (
    GOLD_ANSWERS,
    GOLD_DRIFT_HOURLY,
    GOLD_EVALUATION_EXAMPLES,
    GOLD_METRICS_HOURLY,
    GOLD_PREFERENCE_EXAMPLES,
    GOLD_TRAINING_EXAMPLES,
)
from millrace.lakehouse.tables.ops import (
    OPS_ALERTS,
    OPS_AUDIT,
    OPS_BREACHES,
    OPS_COSTS,
    OPS_CURSORS,
    OPS_DECISIONS,
    OPS_ENVIRONMENT,
    OPS_ERASURES,
    OPS_EVALUATIONS,
    OPS_PROMOTIONS,
    OPS_PROMPT_TRIALS,
    PLATFORM,
    QUARANTINE_FEEDBACK,
)
from millrace.lakehouse.tables.silver import (
    SILVER_CHUNKS,
    SILVER_DOCUMENTS,
    SILVER_EMBEDDINGS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)

__all__ = [
    "BRONZE_DOCUMENTS",
    "BRONZE_EVENTS",
    "BRONZE_QUESTIONS",
    "FEATURES",
    "GOLD_ANSWERS",
    "GOLD_DRIFT_HOURLY",
    "GOLD_EVALUATION_EXAMPLES",
    "GOLD_METRICS_HOURLY",
    "GOLD_PREFERENCE_EXAMPLES",
    "GOLD_TRAINING_EXAMPLES",
    "OPS_ALERTS",
    "OPS_AUDIT",
    "OPS_BREACHES",
    "OPS_COSTS",
    "OPS_CURSORS",
    "OPS_DECISIONS",
    "OPS_ENVIRONMENT",
    "OPS_ERASURES",
    "OPS_EVALUATIONS",
    "OPS_PROMOTIONS",
    "OPS_PROMPT_TRIALS",
    "PLATFORM",
    "PROVENANCE",
    "QUARANTINE_FEEDBACK",
    "SILVER_CHUNKS",
    "SILVER_DOCUMENTS",
    "SILVER_EMBEDDINGS",
    "SILVER_EXCHANGES",
    "SILVER_FEEDBACK",
    "TABLES",
    "TIME",
    "VECTOR",
    "Table",
    "count",
    "flag",
    "number",
    "text",
    "time",
]

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
        GOLD_PREFERENCE_EXAMPLES,
        GOLD_EVALUATION_EXAMPLES,
        GOLD_ANSWERS,
        OPS_DECISIONS,
        OPS_EVALUATIONS,
        OPS_PROMOTIONS,
        OPS_PROMPT_TRIALS,
        OPS_CURSORS,
        OPS_ALERTS,
        OPS_AUDIT,
        OPS_ERASURES,
        OPS_ENVIRONMENT,
        QUARANTINE_FEEDBACK,
        GOLD_METRICS_HOURLY,
        GOLD_DRIFT_HOURLY,
        OPS_BREACHES,
        OPS_COSTS,
    )
}
"""Path (`layer/name`) → table."""
