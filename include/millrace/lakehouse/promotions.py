"""The journal of promotions between environments: who let a release in, and how it came, one row a step, never changed.

It knows its table; what a step does is `environments/promotion.py`'s.
"""

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_PROMOTIONS

Way = Literal["models", "code"]
Step = Literal[
    "approved",  # a person lets it into this environment
    "rejected",  # a person does not
    "copied",  # its bytes and evidence are here: a candidate
    "rebuilding",  # the stage that makes it again was asked to
]


@dataclass(frozen=True)
class Promotion:
    """What is to come into this environment, and how."""

    promotion_id: str
    source: str
    """The environment that it is from."""
    source_version: str
    release_id: str
    way: Way
    commit: str | None
    """Of the code that made it; None: it doesn't say."""
    recipe: str | None = None
    """What makes it again here, as JSON; None: it is copied."""


def note_step(
    lake: Lake, promotion: Promotion, step: Step, *, actor: str, reason: str, run: str, version: str | None = None
) -> None:
    """Append a step, unless the journal has it: who took it first, stays.

    Args:
        actor: a person's name, or the part of Millrace that acts.
        version: of the release here, where it was copied.
    """
    row = asdict(promotion) | {
        "step": step,
        "at": datetime.now(UTC),
        "actor": actor,
        "reason": reason,
        "version": version,
    }
    lake.merge(OPS_PROMOTIONS, pa.Table.from_pylist([row], schema=OPS_PROMOTIONS.rows_schema), run=run)


def read_steps(lake: Lake, promotion_id: str) -> dict[str, dict[str, Any]]:
    """Step → its row."""
    rows = lake.read(OPS_PROMOTIONS, where=pc.field("promotion_id") == promotion_id).to_pylist()
    return {row["step"]: row for row in rows}
