"""The exchanges of a window as silver has them, each with the rating that it got: what metrics and bounds rest on.

Reads the partitions of the windows' days and the ratings of the week after, and nothing older.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_DECISIONS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.monitoring.windows import LATEST_RATING, Window
from millrace.sources.event_log import CLIENT_LEFT


@dataclass(frozen=True)
class Exchange:
    """The columns of `silver/exchanges` that are watched."""

    completion_id: str
    occurred_at: datetime
    user: str
    simulated: bool
    question: str
    answer: str | None
    state: str
    error: str | None
    release_id: str
    release_version: str
    index_build: str
    rollout_id: str | None
    pinned: bool
    fell_back: bool
    from_cache: bool
    prompt_tokens: int
    completion_tokens: int
    seconds: float | None
    cost_usd: float
    rating: float | None = None
    """None: nobody rated it, within a week."""
    challenger: str | None = None
    """Where `fell_back`: the version that should have answered, if the journal knows the rollout."""

    @property
    def completed(self) -> bool:
        return self.state == "completed"

    @property
    def left(self) -> bool:
        """The caller was gone before the end: nobody's fault."""
        return self.state == "failed" and self.error == CLIENT_LEFT

    @property
    def failed(self) -> bool:
        return self.state == "failed" and not self.left


COLUMNS = [name for name in Exchange.__dataclass_fields__ if name not in ("rating", "challenger")]


def read_exchanges(lake: Lake, window: Window) -> list[Exchange]:
    """Exchanges that began in `window` (or any span of time, however many days), by time and id, without ratings."""
    day, at = pc.field("date"), pc.field("occurred_at")
    last = (window.end - timedelta(microseconds=1)).date()
    where = (day >= window.date) & (day <= last) & (at >= window.start) & (at < window.end)
    rows = lake.read(SILVER_EXCHANGES, COLUMNS, where=where)
    ordered = rows.sort_by([("occurred_at", "ascending"), ("completion_id", "ascending")])
    return [Exchange(**row) for row in ordered.to_pylist()]


def read_windows(lake: Lake, day: date, windows: Sequence[Window]) -> dict[Window, list[Exchange]]:
    """The exchanges of each of these windows of one `day`, with their ratings and who should have answered."""
    spanned = Window(min(window.start for window in windows), max(window.end for window in windows))
    exchanges = read_exchanges(lake, spanned)
    ratings = _ratings(lake, day, exchanges)
    challengers = _challengers(lake, {one.rollout_id for one in exchanges if one.fell_back})
    known = [
        replace(
            one,
            rating=ratings.get(one.completion_id),
            challenger=challengers.get(one.rollout_id) if one.fell_back else None,
        )
        for one in exchanges
    ]
    return {window: [one for one in known if window.start <= one.occurred_at < window.end] for window in windows}


def _challengers(lake: Lake, rollouts: set[str | None]) -> dict[str | None, str]:
    if not rollouts:
        return {}
    asked = pc.field("rollout_id").isin(sorted(one for one in rollouts if one)) & pc.field("challenger").is_valid()
    rows = lake.read(OPS_DECISIONS, ["rollout_id", "challenger"], where=asked)
    return dict(zip(rows["rollout_id"].to_pylist(), rows["challenger"].to_pylist(), strict=True))


def _ratings(lake: Lake, day: date, exchanges: Sequence[Exchange]) -> dict[str, float]:
    if not exchanges:
        return {}
    said = pc.field("date")
    found = lake.read(
        SILVER_FEEDBACK,
        ["completion_id", "occurred_at", "rating"],
        where=(said >= day) & (said <= day + LATEST_RATING + timedelta(days=1)),
    )
    asked = {exchange.completion_id: exchange.occurred_at for exchange in exchanges}
    found = found.filter(pc.is_in(found["completion_id"], pa.array(sorted(asked), pa.string())))
    return {
        row["completion_id"]: row["rating"]
        for row in found.to_pylist()
        if row["occurred_at"] - asked[row["completion_id"]] <= LATEST_RATING
    }
