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


class TrialEntry(Entry):
    """One way to answer that a study of prompts tried."""

    trial: int
    """0: the champion's own."""
    template: str
    chunks: int
    few_shot: int
    state: str
    questions: int
    token_f1: float | None
    why: str


class StudyEntry(Entry):
    """A study of prompts, on development questions only."""

    study: str
    champion_release_id: str
    trials: list[TrialEntry]
    tokens: int
    best: int | None
    """The trial that was compared with the champion's own on held-out questions; None: no trial scored more."""
    held_out: int
    start_f1: float | None
    best_f1: float | None
    difference: IntervalEntry | None
    """On the held-out questions, best minus start."""


class BatchEntry(Entry):
    """Questions in a table that a release answered on Spark."""

    version: str
    mode: str
    answers: int
    errors: int
    mean_seconds: float
    tokens: int
    cost_usd: float


class ReleaseMetrics(Entry):
    """What the monitor measured of a release, its windows added up."""

    version: str
    release_id: str
    windows: int
    exchanges: int
    simulated: int
    failed: int
    rated: int
    rating_mean: float | None
    worst_p95_seconds: float | None
    """Of its windows."""
    cost_usd: float


class BreachEntry(Entry):
    """A bound of the policy that a window broke for certain."""

    version: str
    """`-`: users' questions, which no release makes."""
    interval_start: datetime
    interval_end: datetime
    bound: str
    value: float
    action: str
    reason: str
    simulated: bool


class AlertEntry(Entry):
    title: str
    what: str
    since: datetime
    count: int
    sent: bool
    """Whether an address took it; otherwise it is only in the log."""


class CostLine(Entry):
    """One stage, or one release."""

    name: str
    version: str
    uses: int
    """Answers, and uses of a machine."""
    simulated: int
    """Of the answers, those to users that are programs."""
    seconds: float
    """Of a machine; answers are paid by the token."""
    tokens: int
    cost_usd: float


class Costs(Entry):
    """As `millrace cost` says it; both lists add up to the same."""

    by_release: list[CostLine]
    by_stage: list[CostLine]
    total_usd: float


class Machine(Entry):
    cores: int
    memory_bytes: int
    memory_peak_bytes: int | None
    """Of everything that the stack ran; None: nobody measured it."""
    platform: str
    python: str


class Report(Entry):
    """One turn of the loop. Everything that rests on users rests on simulated ones where `simulated_users` says so."""

    format: Literal[2] = 2
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
    batches: list[BatchEntry]
    studies: list[StudyEntry]
    metrics: list[ReleaseMetrics]
    breaches: list[BreachEntry]
    alerts: list[AlertEntry]
    costs: Costs
    machine: Machine
    code_version: str
