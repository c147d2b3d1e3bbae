"""What the report says, as data: `report.json` is exactly this. Knows neither tables nor HTML.

Times are UTC; costs are US dollars; shares are 0 to 1. `simulated` marks what rests on users that are programs.
"""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StageEntry(Entry):
    name: str
    state: str
    """`done`, `nothing new`, `refused` (by the gate or the rollout: work done), `failed`, `running`, `waiting`."""
    seconds: float
    detail: str


class PaceDifference(Entry):
    """A number of the declaration that this pace changes."""

    field: str
    standard: str
    now: str


class IntervalEntry(Entry):
    estimate: float
    low: float
    high: float


class ChampionEntry(Entry):
    """A release that answered everybody, and its mean token-F1 in the gate's evaluation, if there was one."""

    version: str
    release_id: str | None
    quality: IntervalEntry | None
    """With the bootstrap interval of this one mean; the paired difference is in the gate's criterion."""
    examples: int
    evaluation_id: str | None


class CriterionEntry(Entry):
    name: str
    measure: Literal["difference", "ratio", "count"]
    champion: float | None
    candidate: float
    estimate: float
    low: float
    high: float
    bound: float
    passed: bool
    why: str


class ExampleEntry(Entry):
    """An evaluation question that lost most."""

    question: str
    known_answer: str
    champion_answer: str
    candidate_answer: str
    champion_quality: float
    candidate_quality: float


class GateEntry(Entry):
    evaluation_id: str
    evaluation_set: str
    evaluated_at: datetime
    champion: str
    candidate: str
    examples: int
    index_build: str
    passed: bool
    criteria: list[CriterionEntry]
    worst: list[ExampleEntry]


class DecisionEntry(Entry):
    sequence: int
    decided_at: datetime
    kind: str
    actor: str
    reason: str
    share: float
    """Of the challenger, from this decision on."""
    epoch: int | None
    margin: float | None
    """Harm that had to be excluded at this share; None: the decision rests on no evidence."""
    harm: float | None
    """Evidence (e-value) that the challenger is worse; 1/error_rate rolls back."""
    sample_ratio: float | None
    """Evidence (e-value) that users are not assigned as declared."""


class EvidencePoint(Entry):
    """What a decision knew of one guardrail: challenger minus champion, on a scale where more is better."""

    decided_at: datetime
    margin: float
    champion_users: int
    challenger_users: int
    champion_mean: float | None
    challenger_mean: float | None
    estimate: float | None
    low: float | None
    """Ends of the confidence sequence, each wrong at any time with probability error_rate; None: not comparable."""
    high: float | None
    bounds: tuple[float, float] | None
    """Instead of an interval, where who answers differs between the arms: whatever the silent would have said."""
    harm: float


class GuardrailEntry(Entry):
    name: str
    points: list[EvidencePoint]


class RolloutEntry(Entry):
    rollout_id: str
    champion: str | None
    challenger: str | None
    started_at: datetime
    ended_at: datetime | None
    outcome: str
    """Kind of the decision that ended it; `running` if none did."""
    admitted: str
    """Why it may run: who let it out, and why."""
    gate_passed: bool | None
    """What the gate said of the challenger; None: it was not asked."""
    simulated: bool
    error_rate: float
    """With which a harmless challenger is ever rolled back, or a harmful one ever advanced."""
    decisions: list[DecisionEntry]
    guardrails: list[GuardrailEntry]
    users: int
    """Different users who asked during the rollout."""
    users_on_challenger: int
    share_on_challenger: float


class ReleaseCost(Entry):
    version: str
    release_id: str
    answers: int
    simulated_answers: int
    prompt_tokens: int
    completion_tokens: int
    mean_seconds: float | None
    cost_usd: float


class StageCost(Entry):
    stage: str
    basis: str
    cost_usd: float


class Costs(Entry):
    by_release: list[ReleaseCost]
    by_stage: list[StageCost]

    @property
    def total(self) -> float:
        return sum(stage.cost_usd for stage in self.by_stage)


class Machine(Entry):
    cores: int
    memory_bytes: int
    memory_peak_bytes: int | None
    """Of everything that the stack ran; None: nobody measured it."""
    platform: str
    python: str


class Report(Entry):
    """One turn of the loop. Everything that rests on users rests on simulated ones where `simulated_users` says so."""

    format: Literal[1] = 1
    application: str
    description: str
    environment: str
    pace: str
    headline: str
    simulated_users: bool
    started_at: datetime
    finished_at: datetime
    pace_differences: list[PaceDifference]
    stages: list[StageEntry]
    champion_before: ChampionEntry | None
    champion_after: ChampionEntry | None
    gates: list[GateEntry]
    rollouts: list[RolloutEntry]
    costs: Costs
    machine: Machine
    code_version: str
