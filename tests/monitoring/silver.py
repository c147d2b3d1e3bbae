"""Exchanges and ratings in silver, as ingestion writes them, with ids that the gateway would issue."""

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pyarrow as pa

from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.sources.completion_id import issue

KEY = b"test completion key"
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
NUMBERS = count()


def exchange(at: datetime, **fields: Any) -> dict[str, Any]:
    """One exchange that began at `at`, answered within a second unless `fields` say otherwise; every user asks once."""
    number = next(NUMBERS)
    row = {
        "completion_id": issue(KEY, "qa", at),
        "events_seen": 2,
        "state": "completed",
        "occurred_at": at,
        "completed_at": at + timedelta(seconds=1),
        "date": at.date(),
        "user": f"user-{number}",
        "simulated": True,
        "question": "What is the default of parallelism?",
        "answer": "It is 32.",
        "release_id": "rel-1",
        "release_version": "1",
        "index_build": "build",
        "prompt_version": "1",
        "rollout_id": None,
        "epoch": None,
        "arm": None,
        "assignment_probability": None,
        "pinned": False,
        "fell_back": False,
        "from_cache": False,
        "citations": [],
        "prompt_tokens": 100,
        "completion_tokens": 5,
        "seconds": 1.0,
        "cost_usd": 0.001,
        "error": None,
    }
    assert fields.keys() <= row.keys()
    row |= fields
    return row | {"content_hash": content_hash(repr(row))}


def rating(asked: dict[str, Any], at: datetime, value: float) -> dict[str, Any]:
    """What was said of an exchange at `at`."""
    kept = ("completion_id", "user", "simulated", "question", "answer", "release_id", "release_version", "index_build")
    row = {name: asked[name] for name in kept} | {
        "events_seen": 3,
        "occurred_at": at,
        "date": at.date(),
        "rating": value,
        "comment": None,
        "correction": None,
    }
    return row | {"content_hash": content_hash(repr(row))}


def write(lake: Lake, exchanges: list[dict[str, Any]], ratings: list[dict[str, Any]] | None = None) -> None:
    lake.merge(SILVER_FEEDBACK, pa.Table.from_pylist(ratings or [], schema=SILVER_FEEDBACK.rows_schema), run="test")
    lake.merge(SILVER_EXCHANGES, pa.Table.from_pylist(exchanges, schema=SILVER_EXCHANGES.rows_schema), run="test")
