"""What users showed of a rollout: one bounded outcome per user, from first exposure to the end of a fixed window.

Reads `silver/exchanges` and `silver/feedback` and knows nothing of tests or decisions. The unit is a user's first
exchange in the rollout that followed the split (not pinned): its arm, its epoch and its assignment probability are
the user's for good. The user's outcomes close once, `window_seconds` after it:

- *quality*: mean rating that the user had given by then to exchanges of the same arm and epoch (so that an arm's
  users are not cut off where others go on); users who rated nothing are left out, and counted by *response*;
- *success*: the first exchange was completed by its own release (a user who left before the end says nothing of it);
- *latency*: the first exchange ended within the latency budget;
- *response*: the user rated anything.

A user counts as closed once something that happened after the window has been ingested; closed users stand in the
order of their closing, so a later look adds users at the end and changes none.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from millrace.applications import Rollout
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_EVENTS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.rollout.sequential import Sample
from millrace.sources.event_log import CLIENT_LEFT, Feedback, parse_event

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FIRST = [
    "completion_id",
    "user",
    "occurred_at",
    "completed_at",
    "epoch",
    "arm",
    "assignment_probability",
    "state",
    "error",
    "fell_back",
    "seconds",
    "simulated",
]


@dataclass(frozen=True)
class Exposed:
    """Users met so far in one epoch, their outcomes closed or not."""

    epoch: int
    probability: float
    champion: int
    challenger: int


@dataclass(frozen=True)
class Evidence:
    """One entry per closed user, in order of closing. `rating` is NaN where the user rated nothing."""

    epoch: Ints
    challenger: Bools
    probability: Floats
    rating: Floats
    success: Floats
    fast: Floats
    exposed: tuple[Exposed, ...]
    simulated: bool
    as_of: datetime | None = None
    """Everything that happened before was ingested; None: nothing happened yet."""

    @property
    def answered(self) -> Bools:
        return ~np.isnan(self.rating)

    def quality(self) -> Sample:
        answered = self.answered
        return Sample(self.rating[answered], self.challenger[answered], self.probability[answered])

    def everybody(self) -> Sample:
        """Ratings, 0 where there is none."""
        return Sample(np.nan_to_num(self.rating), self.challenger, self.probability)

    def successes(self) -> Sample:
        return Sample(self.success, self.challenger, self.probability)

    def latency(self) -> Sample:
        return Sample(self.fast, self.challenger, self.probability)

    def responses(self) -> Sample:
        return Sample(self.answered.astype(np.float64), self.challenger, self.probability)

    def closed_in(self, epoch: int) -> tuple[int, int]:
        """Closed users of one epoch: in the champion, in the challenger."""
        here = self.epoch == epoch
        return int(np.sum(here & ~self.challenger)), int(np.sum(here & self.challenger))


def collect_evidence(lake: Lake, policy: Rollout, rollout_id: str, *, as_of: datetime | None = None) -> Evidence:
    """Everything known of the rollout at the Lakehouse's present state.

    Args:
        as_of: users whose window ends later are not closed; None: the newest moment of any exchange in silver.
            (Ingestion writes an interval's feedback before its exchanges, so by then all ratings are there.)
    """
    as_of = as_of or _newest(lake)
    exchanges = lake.read(
        SILVER_EXCHANGES,
        FIRST,
        where=(pc.field("rollout_id") == rollout_id)
        & ~pc.field("pinned")
        & pc.field("arm").is_valid()
        & (pc.field("assignment_probability") > 0)
        & (pc.field("assignment_probability") < 1),
    ).sort_by([("occurred_at", "ascending"), ("completion_id", "ascending")])
    first: dict[str, dict[str, Any]] = {}
    visits: dict[str, list[dict[str, Any]]] = {}
    for exchange in exchanges.to_pylist():
        met = first.setdefault(exchange["user"], exchange)
        if (exchange["arm"], exchange["epoch"]) == (met["arm"], met["epoch"]):
            visits.setdefault(exchange["user"], []).append(exchange)
    # A window must leave time for the answer itself.
    window = timedelta(seconds=max(policy.window_seconds, policy.latency_budget_seconds))
    closed = sorted(
        (user for user in first if as_of is not None and first[user]["occurred_at"] + window < as_of),
        key=lambda user: (first[user]["occurred_at"], user),
    )
    closing = {visit["completion_id"]: first[user]["occurred_at"] + window for user in closed for visit in visits[user]}
    ratings, simulated = _ratings(lake, closing)
    outcomes = [_outcome(first[user], visits[user], ratings, window, policy) for user in closed]
    columns = np.array(outcomes, dtype=np.float64).reshape(-1, 3).T
    return Evidence(
        epoch=np.array([first[user]["epoch"] for user in closed], dtype=np.int64),
        challenger=np.array([first[user]["arm"] == "challenger" for user in closed], dtype=np.bool_),
        probability=np.array([first[user]["assignment_probability"] for user in closed], dtype=np.float64),
        rating=columns[0],
        success=columns[1],
        fast=columns[2],
        exposed=_exposed(list(first.values())),
        simulated=simulated or any(exchange["simulated"] for exchange in first.values()),
        as_of=as_of,
    )


def _outcome(
    first: dict[str, Any],
    visits: list[dict[str, Any]],
    ratings: dict[str, float],
    window: timedelta,
    policy: Rollout,
) -> tuple[float, float, float]:
    """Rating (NaN: none), success, fast, as they stood when the window closed."""
    given = [ratings[visit["completion_id"]] for visit in visits if visit["completion_id"] in ratings]
    ended = first["completed_at"] is not None and first["completed_at"] <= first["occurred_at"] + window
    own = first["state"] == "completed" and not first["fell_back"]
    left = first["state"] == "failed" and first["error"] == CLIENT_LEFT
    seconds = first["seconds"]
    fast = ended and seconds is not None and seconds <= policy.latency_budget_seconds
    return (
        float(np.mean(given)) if given else float("nan"),
        float(ended and (own or left)),
        float(fast and (own or left or first["fell_back"])),
    )


def _ratings(lake: Lake, closing: dict[str, datetime]) -> tuple[dict[str, float], bool]:
    """Completion → its rating as it stood when its user's window closed; and whether any of it is simulated.

    Silver holds the last rating. Of an answer that was rated again after the closing, bronze knows what was said
    before: a closed outcome must not change.
    """
    found = lake.read(SILVER_FEEDBACK, ["completion_id", "occurred_at", "rating", "simulated"])
    found = found.filter(pc.is_in(found["completion_id"], pa.array(list(closing), pa.string())))
    ratings: dict[str, float] = {}
    again = []
    for row in found.to_pylist():
        if row["occurred_at"] <= closing[row["completion_id"]]:
            ratings[row["completion_id"]] = row["rating"]
        else:
            again.append(row["completion_id"])
    if again:
        said = lake.read(BRONZE_EVENTS, ["completion_id", "kind", "occurred_at", "payload"]).filter(
            (pc.field("kind") == "feedback") & pc.field("completion_id").isin(again)
        )
        for row in said.sort_by("occurred_at").to_pylist():
            event = parse_event(row["payload"])
            if row["occurred_at"] <= closing[row["completion_id"]] and _valid(event):
                ratings[row["completion_id"]] = event.rating  # type: ignore[union-attr,assignment]
    return ratings, bool(pc.any(found["simulated"]).as_py())


def _valid(event: object) -> bool:
    return isinstance(event, Feedback) and event.rating is not None and 0 <= event.rating <= 1


def _exposed(first: list[dict[str, Any]]) -> tuple[Exposed, ...]:
    counts: dict[tuple[int, float], list[int]] = {}
    for exchange in first:
        count = counts.setdefault((exchange["epoch"], exchange["assignment_probability"]), [0, 0])
        count[exchange["arm"] == "challenger"] += 1
    return tuple(Exposed(epoch, p, old, new) for (epoch, p), (old, new) in sorted(counts.items()))


def _newest(lake: Lake) -> datetime | None:
    times = lake.read(SILVER_EXCHANGES, ["occurred_at", "completed_at"])
    newest = [pc.max(column).as_py() for column in times.columns]
    return max((moment.astimezone(UTC) for moment in newest if moment is not None), default=None)
