"""What was spent beside answers to users, one row of `ops/costs` each time a machine was used.

Killed work costs again when it is repeated, so a cost has an id of its own and is written before the result that it
paid for; work that finds its result costs nothing and writes nothing. Here money is recorded; prices are the
application's (`Prices`), and what exchanges cost is theirs (`silver/exchanges`).
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS
from millrace.policies import Stage


@dataclass(frozen=True)
class Cost:
    """One use of a machine. `seconds` of it, `tokens` read and written by a model, `cost_usd` for both."""

    cost_id: str
    """Equal for the same use only: `cost_id` makes one of stage, subject and what tells uses apart."""
    stage: Stage
    subject: str
    """What it was spent on: a lineage, a fine-tune, an evaluation, a study, a table of questions."""
    seconds: float
    tokens: int
    cost_usd: float
    release_id: str | None = None
    """The release that it was spent on; None: not one release's, or not known yet (`attribute_cost`)."""


def cost_id(stage: Stage, subject: str, *use: str) -> str:
    """The id of one use: `use` is what tells it from others of the same subject, a run and a moment for instance."""
    return content_hash(stage, subject, *use)


def record_cost(lake: Lake, cost: Cost, *, run: str) -> bool:
    """Write `cost` unless it is there.

    Returns: whether it was written.
    """
    if _read(lake, cost.cost_id):
        return False
    return _write(lake, cost, datetime.now(UTC), run)


def attribute_cost(lake: Lake, known_id: str, release_id: str, *, run: str) -> bool:
    """Say on which release a recorded cost was spent; nothing happens where it is said already, or nothing recorded.

    Returns: whether it was written.
    """
    rows = _read(lake, known_id)
    if not rows or rows[0]["release_id"] == release_id:
        return False
    names = ("cost_id", "stage", "subject", "seconds", "tokens", "cost_usd")
    spent = Cost(**{name: rows[0][name] for name in names}, release_id=release_id)
    return _write(lake, spent, rows[0]["at"], run)


def _read(lake: Lake, known_id: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = lake.read(OPS_COSTS, where=pc.field("cost_id") == known_id).to_pylist()
    return rows


def _write(lake: Lake, cost: Cost, at: datetime, run: str) -> bool:
    row = vars(cost) | {"at": at, "content_hash": content_hash(cost.cost_id, cost.release_id)}
    return lake.merge(OPS_COSTS, pa.Table.from_pylist([row], schema=OPS_COSTS.rows_schema), run=run).changed
