"""What an application cost, by stage and by release: answers to users from silver, everything else from `ops/costs`.

Both tables of the result add up to the same total: what belongs to no release (embedding, a fine-tune that was never
registered) has a line of its own.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS, SILVER_EXCHANGES
from millrace.settings import Settings

SERVING = "serving"
NOBODY = "-"
"""Stands for the release of what belongs to none."""


@dataclass(frozen=True)
class Line:
    """One stage or one release."""

    name: str
    version: str
    """Of a release that answered; empty for a stage, and for a release that never did."""
    uses: int
    """Answers, and uses of a machine."""
    seconds: float
    """Of a machine; answers are paid by the token."""
    tokens: int
    cost_usd: float
    simulated: int
    """Of the answers, those to users that are programs."""


@dataclass(frozen=True)
class Costs:
    application: str
    since: datetime | None
    by_stage: list[Line]
    by_release: list[Line]
    total_usd: float


def costs(settings: Settings, application: Application, since: datetime | None = None) -> Costs:
    """Everything spent on `application`, or only since a moment (UTC where it has no zone)."""
    lake = Lake.of(settings, application.name)
    since = since.replace(tzinfo=UTC) if since is not None and since.tzinfo is None else since
    entries = [*_serving(lake, since), *_machines(lake, since)]
    versions = {entry["release"]: entry["version"] for entry in entries if entry["version"]}
    by_stage, by_release = _summed(entries, "stage", {}), _summed(entries, "release", versions)
    return Costs(application.name, since, by_stage, by_release, sum(line.cost_usd for line in by_stage))


def _serving(lake: Lake, since: datetime | None) -> list[dict[str, Any]]:
    columns = ["release_id", "release_version", "simulated", "prompt_tokens", "completion_tokens", "cost_usd"]
    where = None
    if since is not None:
        where = (pc.field("date") >= since.astimezone(UTC).date()) & (pc.field("occurred_at") >= since)
    rows = lake.read(SILVER_EXCHANGES, columns, where=where).group_by(["release_id", "release_version"])
    summed = rows.aggregate(
        [
            ("simulated", "sum"),
            ("prompt_tokens", "sum"),
            ("completion_tokens", "sum"),
            ("cost_usd", "sum"),
            ("cost_usd", "count"),
        ]
    )
    return [
        {
            "stage": SERVING,
            "release": row["release_id"],
            "version": row["release_version"],
            "uses": row["cost_usd_count"],
            "seconds": 0.0,
            "tokens": row["prompt_tokens_sum"] + row["completion_tokens_sum"],
            "cost_usd": row["cost_usd_sum"],
            "simulated": row["simulated_sum"],
        }
        for row in summed.to_pylist()
    ]


def _machines(lake: Lake, since: datetime | None) -> list[dict[str, Any]]:
    where = None if since is None else pc.field("at") >= since
    return [
        {
            "stage": row["stage"],
            "release": row["release_id"] or NOBODY,
            "version": "",
            "uses": 1,
            "seconds": row["seconds"],
            "tokens": row["tokens"],
            "cost_usd": row["cost_usd"],
            "simulated": 0,
        }
        for row in lake.read(OPS_COSTS, where=where).to_pylist()
    ]


def _summed(entries: list[dict[str, Any]], by: str, versions: Mapping[str, str]) -> list[Line]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        groups[entry[by]].append(entry)
    lines = [
        Line(
            name=name,
            version=versions.get(name, ""),
            **{
                key: sum(entry[key] for entry in those)
                for key in ("uses", "seconds", "tokens", "cost_usd", "simulated")
            },
        )
        for name, those in groups.items()
    ]
    return sorted(lines, key=lambda line: (-line.cost_usd, line.name))
