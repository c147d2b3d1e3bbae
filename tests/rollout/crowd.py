"""Rows of silver as ingestion writes them, so that evidence is collected from real Delta tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.releases.split import Split, assign

START = datetime(2026, 11, 24, 12, tzinfo=UTC)


def exchange(
    completion_id: str,
    user: str,
    at: float,
    *,
    arm: str | None = "challenger",
    epoch: int | None = 1,
    probability: float | None = 0.25,
    rollout_id: str | None = "r1",
    **fields: Any,
) -> dict[str, Any]:
    """One exchange, `at` seconds after START, answered within a second unless `fields` say otherwise."""
    occurred = START + timedelta(seconds=at)
    row = {
        "completion_id": completion_id,
        "content_hash": completion_id,
        "events_seen": 2,
        "state": "completed",
        "occurred_at": occurred,
        "completed_at": occurred + timedelta(seconds=1),
        "date": occurred.date(),
        "user": user,
        "simulated": True,
        "question": "What is it?",
        "answer": "It.",
        "release_id": "r",
        "release_version": "2" if arm == "challenger" else "1",
        "index_build": "b",
        "prompt_version": "1",
        "rollout_id": rollout_id,
        "epoch": epoch,
        "arm": arm,
        "assignment_probability": probability,
        "pinned": False,
        "fell_back": False,
        "from_cache": False,
        "citations": [],
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "seconds": 1.0,
        "cost_usd": 0.0,
        "error": None,
    }
    assert fields.keys() <= row.keys()
    return row | fields


def rating(completion_id: str, user: str, at: float, value: float, **fields: Any) -> dict[str, Any]:
    """The last rating of one exchange, given `at` seconds after START."""
    occurred = START + timedelta(seconds=at)
    return {
        "completion_id": completion_id,
        "content_hash": f"{completion_id}-{value}-{at}",
        "events_seen": 3,
        "occurred_at": occurred,
        "date": occurred.date(),
        "user": user,
        "simulated": True,
        "rating": value,
        "comment": None,
        "correction": None,
        "question": "What is it?",
        "answer": "It.",
        "release_id": "r",
        "release_version": "2",
        "index_build": "b",
    } | fields


def write(lake: Lake, exchanges: Sequence[dict[str, Any]], ratings: Sequence[dict[str, Any]] = ()) -> None:
    lake.merge(SILVER_FEEDBACK, pa.Table.from_pylist(list(ratings), schema=SILVER_FEEDBACK.rows_schema), run="test")
    lake.merge(SILVER_EXCHANGES, pa.Table.from_pylist(list(exchanges), schema=SILVER_EXCHANGES.rows_schema), run="test")


@dataclass
class Crowd:
    """Users who ask once each through a split, and all rate by the version that they meet (mean by version, sd 0.1)."""

    lake: Lake
    means: dict[str, float]
    come: int = 0

    def visit(self, split: Split, users: int, *, answer_rate: dict[str, float] | None = None) -> None:
        """`users` come, two a second; a last exchange, pinned, lets all their windows close."""
        rng = np.random.default_rng(self.come)
        exchanges, ratings = [], []
        for _ in range(users):
            self.come += 1
            name, at = f"u{self.come}", self.come / 2
            met = assign(split, name)
            exchanges.append(
                exchange(
                    f"c{self.come}",
                    name,
                    at,
                    arm=met.arm,
                    epoch=met.epoch,
                    probability=met.probability,
                    rollout_id=met.rollout_id,
                    release_version=met.version,
                )
            )
            if rng.random() < (answer_rate or {}).get(met.version, 1.0):
                value = float(np.clip(rng.normal(self.means[met.version], 0.1), 0, 1))
                ratings.append(rating(f"c{self.come}", name, at + 3, value, release_version=met.version))
        later = self.come / 2 + 1000
        exchanges.append(
            exchange(f"late{self.come}", "late", later, arm=None, epoch=None, probability=None, pinned=True)
        )
        write(self.lake, exchanges, ratings)
