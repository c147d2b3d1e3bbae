"""From tables to the report's entries: the journal, evaluations and exchanges of one turn of the loop.

Reads and summarises; decides nothing and draws nothing.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.demo.report_model import (
    AlertEntry,
    BatchEntry,
    BreachEntry,
    ChampionEntry,
    CostLine,
    Costs,
    CriterionEntry,
    DecisionEntry,
    EvidencePoint,
    ExampleEntry,
    GateEntry,
    GuardrailEntry,
    IntervalEntry,
    ReleaseMetrics,
    RolloutEntry,
    StudyEntry,
    TrialEntry,
)
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    GOLD_ANSWERS,
    GOLD_METRICS_HOURLY,
    OPS_ALERTS,
    OPS_BREACHES,
    OPS_EVALUATIONS,
    OPS_PROMPT_TRIALS,
    SILVER_EXCHANGES,
)
from millrace.monitoring import cost
from millrace.rollout.decisions import Decision
from millrace.scoring.bootstrap import mean_difference

ENDS = ("promote", "skip", "rollback")
WORST = 3


def read_evaluations(lake: Lake) -> list[dict[str, Any]]:
    """Rows of ops/evaluations, oldest first, their JSON parsed."""
    rows = lake.read(OPS_EVALUATIONS).sort_by("evaluated_at").to_pylist()
    return [row | {"criteria": json.loads(row["criteria"]), "examples": json.loads(row["examples"])} for row in rows]


def read_exchanges(lake: Lake, since: datetime) -> list[dict[str, Any]]:
    """Exchanges accepted since then, oldest first, without their texts."""
    texts = {"question", "answer", "citations", "error"}
    columns = [name for name in SILVER_EXCHANGES.rows_schema.names if name not in texts]
    rows = lake.read(SILVER_EXCHANGES, columns, where=pc.field("occurred_at") >= since)
    return rows.sort_by("occurred_at").to_pylist()


def gate_entry(row: dict[str, Any]) -> GateEntry:
    compared = [example for example in row["examples"] if "candidate" in example]
    names = ("evaluation_id", "evaluation_set", "evaluated_at", "champion", "candidate", "index_build", "passed")
    return GateEntry(
        **{name: row[name] for name in names},
        examples=len(compared),
        criteria=[CriterionEntry(**criterion) for criterion in row["criteria"]],
        worst=[
            ExampleEntry(
                question=example["question"],
                known_answer=example["answer"],
                champion_answer=example["champion"]["answer"],
                candidate_answer=example["candidate"]["error"] or example["candidate"]["answer"],
                champion_quality=example["champion"]["quality"],
                candidate_quality=example["candidate"]["quality"],
            )
            for example in compared[:WORST]
            if example["candidate"]["quality"] < example["champion"]["quality"]
        ],
    )


def champion_entries(
    versions: tuple[str | None, str | None], evaluations: Sequence[dict[str, Any]], application: Application
) -> tuple[ChampionEntry | None, ChampionEntry | None]:
    """Champion before and after, each with its score in the evaluation that compared them, else in its newest one."""
    together = [row for row in evaluations if {row["champion"], row["candidate"]} == set(versions)]
    before, after = (
        _champion(version, [*evaluations, *together], application) if version else None for version in versions
    )
    return before, after


def _champion(version: str, evaluations: Sequence[dict[str, Any]], application: Application) -> ChampionEntry:
    """The release with its score in the last of the evaluations that it was part of."""
    for row in reversed(evaluations):
        role = "champion" if row["champion"] == version else "candidate"
        scores = np.array([example[role]["quality"] for example in row["examples"] if role in example])
        if row[role] == version and scores.size:
            policy = application.gate
            found = mean_difference(np.zeros_like(scores), scores, policy.confidence, policy.resamples, seed=0)
            return ChampionEntry(
                version=version,
                release_id=row[f"{role}_release_id"],
                quality=IntervalEntry(estimate=found.estimate, low=found.low, high=found.high),
                examples=scores.size,
                evaluation_id=row["evaluation_id"],
            )
    return ChampionEntry(version=version, release_id=None, quality=None, examples=0, evaluation_id=None)


def champions(journal: Sequence[Decision], since: datetime) -> tuple[str | None, str | None]:
    """The champion when the run began (or the first one that it made), and the one now."""
    held = [(decision.decided_at, decision.champion) for decision in journal if decision.champion]
    if not held:
        return None, None
    before = [champion for at, champion in held if at < since]
    return (before[-1] if before else held[0][1]), held[-1][1]


def rollout_entries(
    journal: Sequence[Decision],
    evaluations: Sequence[dict[str, Any]],
    exchanges: Sequence[dict[str, Any]],
    application: Application,
    since: datetime,
) -> list[RolloutEntry]:
    """The rollouts in which something was decided since then, whole, oldest first."""
    return [
        _rollout(rollout_id, decisions, journal, evaluations, exchanges, application)
        for rollout_id, decisions in rollouts_since(journal, since).items()
    ]


def rollouts_since(journal: Sequence[Decision], since: datetime) -> dict[str, list[Decision]]:
    """Rollout id → all its decisions, for rollouts in which something was decided since then."""
    grouped: dict[str, list[Decision]] = {}
    for decision in journal:
        # While a rollout is on, a person may admit the next release: that decision is about another challenger.
        if decision.rollout_id and decision.kind != "admit":
            grouped.setdefault(decision.rollout_id, []).append(decision)
    return {rollout_id: decisions for rollout_id, decisions in grouped.items() if decisions[-1].decided_at >= since}


def _rollout(
    rollout_id: str,
    decisions: list[Decision],
    journal: Sequence[Decision],
    evaluations: Sequence[dict[str, Any]],
    exchanges: Sequence[dict[str, Any]],
    application: Application,
) -> RolloutEntry:
    first = decisions[0]
    end = next((d for d in decisions if d.kind in ENDS), None)
    admission = next(
        (d for d in reversed(journal[: first.sequence]) if d.kind == "admit" and d.challenger == first.challenger), None
    )
    reason = admission or first
    asked = [e["passed"] for e in evaluations if e["candidate"] == first.challenger]
    mine = [e for e in exchanges if e["rollout_id"] == rollout_id and not e["pinned"]]
    users = {e["user"] for e in mine}
    met = {e["user"] for e in mine if e["release_version"] == first.challenger}
    return RolloutEntry(
        rollout_id=rollout_id,
        champion=first.champion,
        challenger=first.challenger,
        started_at=first.decided_at,
        ended_at=end.decided_at if end else None,
        outcome=end.kind if end else "running",
        admitted=f"{reason.actor}: {reason.reason}",
        gate_passed=asked[-1] if asked else None,
        simulated=any(d.simulated for d in decisions) or any(e["simulated"] for e in mine),
        error_rate=application.rollout.error_rate,
        decisions=[_decision(d) for d in decisions],
        guardrails=_guardrails(decisions),
        users=len(users),
        users_on_challenger=len(met),
        share_on_challenger=len(met) / len(users) if users else 0.0,
    )


def _decision(decision: Decision) -> DecisionEntry:
    return DecisionEntry(
        sequence=decision.sequence,
        decided_at=decision.decided_at,
        kind=decision.kind,
        actor=decision.actor,
        reason=decision.reason,
        share=decision.share,
        epoch=decision.epoch,
        margin=decision.evidence.get("margin"),
        harm=decision.evidence.get("harm"),
        sample_ratio=decision.evidence.get("sample_ratio"),
    )


def _guardrails(decisions: Sequence[Decision]) -> list[GuardrailEntry]:
    points: dict[str, list[EvidencePoint]] = {}
    for decision in decisions:
        for name, found in decision.evidence.get("guardrails", {}).items():
            low, high = found["interval"] or (None, None)
            points.setdefault(name, []).append(
                EvidencePoint(
                    decided_at=decision.decided_at,
                    margin=decision.evidence["margin"],
                    champion_users=found["users"]["champion"],
                    challenger_users=found["users"]["challenger"],
                    champion_mean=found["mean"]["champion"],
                    challenger_mean=found["mean"]["challenger"],
                    estimate=found["estimate"],
                    low=low,
                    high=high,
                    bounds=found["bounds"],
                    harm=found["harm"],
                )
            )
    return [GuardrailEntry(name=name, points=found) for name, found in points.items()]


def study_entries(lake: Lake, application: Application, since: datetime) -> list[StudyEntry]:
    """The studies in which a trial ended since then, oldest first."""
    rows = lake.read(OPS_PROMPT_TRIALS).sort_by([("ended_at", "ascending")]).to_pylist()
    recent = dict.fromkeys(row["study"] for row in rows if row["ended_at"] >= since)
    return [_study([row for row in rows if row["study"] == study], application) for study in recent]


def _study(rows: list[dict[str, Any]], application: Application) -> StudyEntry:
    tried = sorted((row for row in rows if row["part"] == "search"), key=lambda row: int(row["trial"]))
    sheets = {row["trial"]: json.loads(row["scores"]) for row in rows if row["part"] == "held_out"}
    best = next((trial for trial in sheets if trial), None)
    start_f1 = best_f1 = difference = None
    if best is not None and sheets[0].keys() == sheets[best].keys():
        start, other = (np.array([sheets[trial][question] for question in sheets[0]]) for trial in (0, best))
        gate = application.gate
        found = mean_difference(start, other, gate.confidence, gate.resamples, seed=0)
        start_f1, best_f1 = float(start.mean()), float(other.mean())
        difference = IntervalEntry(estimate=found.estimate, low=found.low, high=found.high)
    return StudyEntry(
        study=rows[0]["study"],
        champion_release_id=rows[0]["champion_release_id"],
        trials=[_trial(row) for row in tried],
        tokens=sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows),
        best=best,
        held_out=len(sheets.get(0, {})),
        start_f1=start_f1,
        best_f1=best_f1,
        difference=difference,
    )


def _trial(row: dict[str, Any]) -> TrialEntry:
    chosen = json.loads(row["parameters"])
    return TrialEntry(
        **{name: row[name] for name in ("trial", "state", "questions", "token_f1", "why")},
        **{name: chosen[name] for name in ("template", "chunks", "few_shot")},
    )


def batch_entries(lake: Lake, since: datetime) -> list[BatchEntry]:
    """What each release answered on Spark since then."""
    rows = lake.read(GOLD_ANSWERS, where=pc.field("written_at") >= since).to_pylist()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["release_version"], row["mode"]), []).append(row)
    return [
        BatchEntry(
            version=version,
            mode=mode,
            answers=sum(row["error"] is None for row in those),
            errors=sum(row["error"] is not None for row in those),
            mean_seconds=sum(row["seconds"] for row in those) / len(those),
            tokens=sum(row["prompt_tokens"] + row["completion_tokens"] for row in those),
            cost_usd=sum(row["cost_usd"] for row in those),
        )
        for (version, mode), those in sorted(groups.items())
    ]


def release_metrics(lake: Lake, since: datetime) -> list[ReleaseMetrics]:
    """What the monitor measured of windows that ended since then."""
    where = (pc.field("date") >= since.date()) & (pc.field("interval_end") > since)
    rows = lake.read(GOLD_METRICS_HOURLY, where=where).to_pylist()
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["release_version"], row["release_id"]), []).append(row)
    return [_metrics(*key, those) for key, those in sorted(groups.items())]


def _metrics(version: str, release_id: str, rows: list[dict[str, Any]]) -> ReleaseMetrics:
    rated = sum(row["rated"] for row in rows)
    rating = sum(row["rated"] * row["rating_mean"] for row in rows if row["rated"])
    return ReleaseMetrics(
        version=version,
        release_id=release_id,
        windows=len({row["interval_start"] for row in rows}),
        **{name: sum(row[name] for row in rows) for name in ("exchanges", "simulated", "failed", "cost_usd")},
        rated=rated,
        rating_mean=rating / rated if rated else None,
        worst_p95_seconds=max((row["seconds_p95"] for row in rows if row["seconds_p95"] is not None), default=None),
    )


def breach_entries(lake: Lake, since: datetime) -> list[BreachEntry]:
    """Breaches that were found since then, oldest window first."""
    rows = lake.read(OPS_BREACHES, where=pc.field("at") >= since).sort_by("interval_start").to_pylist()
    names = ("interval_start", "interval_end", "bound", "value", "action", "reason", "simulated")
    return [BreachEntry(version=row["release_version"], **{name: row[name] for name in names}) for row in rows]


def alert_entries(platform: Lake, since: datetime) -> list[AlertEntry]:
    """Alerts that were raised since then, by the trouble they tell of."""
    rows = platform.read(OPS_ALERTS, where=pc.field("last_at") >= since).sort_by("since").to_pylist()
    names = ("title", "what", "since", "count")
    return [AlertEntry(sent=row["sent_at"] is not None, **{name: row[name] for name in names}) for row in rows]


def cost_lines(found: cost.Costs) -> Costs:
    return Costs(
        by_release=[CostLine(**vars(line)) for line in found.by_release],
        by_stage=[CostLine(**vars(line)) for line in found.by_stage],
        total_usd=found.total_usd,
    )
