"""What a rollout's evidence says: freeze, roll back, advance or hold, with its reason and numbers.

Pure: evidence and policy in, one judgement out. It does not know the journal, nor how a share changes.

Error rates. *Rolling back* a candidate that harms nothing: the mean of the three bets on harm (quality, success,
latency) is itself a fair bet if there is no harm, so it ever reaches 1/error_rate with probability at most
error_rate. *Advancing* a candidate that does more harm than a step's margin: to get past the first such step its
own guardrail must be refuted at error_rate, so the probability is at most error_rate over all steps together. Each
end of an interval here is wrong, ever, with probability error_rate; the low one is what an advance goes by.
"""

from dataclasses import dataclass, replace
from math import exp, log
from typing import Any, Literal

import numpy as np

from millrace.applications import Rollout, Step
from millrace.rollout.evidence import Evidence
from millrace.rollout.sequential import (
    Sample,
    confidence_sequence,
    estimate,
    log_mean,
    log_peak,
    log_sample_ratio,
    log_wealth_apart,
    log_wealth_below,
    worst_cases,
)

FREEZE_ERROR = 0.001
"""Probability of ever freezing a rollout whose users are assigned as declared, and again of ever freezing one in whose
arms users rate alike: a freeze costs a person's time, so it takes more evidence than a decision."""
LARGEST = 1e12
"""Evidence beyond is reported as this much."""


@dataclass(frozen=True)
class Guardrail:
    """One outcome, compared. `bounds` replace estimate and interval where who answers differs between the arms."""

    name: str
    champion: int
    challenger: int
    champion_mean: float | None
    challenger_mean: float | None
    estimate: float | None
    low: float | None
    high: float | None
    log_harm: float
    """Peak log wealth of the bet that the challenger is worse."""
    bounds: tuple[float, float] | None = None

    def excludes(self, margin: float) -> bool:
        """Whether harm worse than `margin` is excluded."""
        low = self.low if self.bounds is None else self.bounds[0]
        return low is not None and low > -margin


@dataclass(frozen=True)
class Judgement:
    """What to do now, and why; `summary` is JSON for the journal."""

    kind: Literal["freeze", "rollback", "advance", "hold"]
    reason: str
    summary: dict[str, Any]


def judge(
    evidence: Evidence, step: Step, epoch: int, policy: Rollout, overruled: frozenset[str] = frozenset()
) -> Judgement:
    """The first that applies: a broken comparison freezes, harm rolls back, excluded harm advances, else hold.

    Args:
        overruled: causes (`sample_ratio`, `response`) of freezes that a person has lifted in this rollout. Where the
            response differs, an advance still goes by the bounds.
    """
    ratio = log_sample_ratio((e.challenger, e.champion, e.probability) for e in evidence.exposed)
    responses = evidence.responses()
    response = log_peak(log_wealth_apart(responses)).item()
    unequal = response >= log(1 / FREEZE_ERROR)
    samples = {"quality": evidence.quality(), "success": evidence.successes(), "latency": evidence.latency()}
    guardrails = [_guardrail(name, sample, policy.error_rate) for name, sample in samples.items()]
    if unequal:
        guardrails[0] = _bounded(guardrails[0], evidence, policy.error_rate)
    harm = log_harm(evidence, unequal=unequal)
    summary = _summary(evidence, guardrails, step, harm, ratio, response, responses)

    if ratio >= log(1 / FREEZE_ERROR) and "sample_ratio" not in overruled:
        return Judgement(
            "freeze",
            f"users are not assigned as declared (evidence {_evidence(ratio):.3g}, frozen at "
            f"{1 / FREEZE_ERROR:.0f}): {_counts(evidence)}; look for lost exchanges, then resume or roll back",
            summary | {"cause": "sample_ratio"},
        )
    if unequal and "response" not in overruled:
        return Judgement(
            "freeze",
            f"who rates differs between the arms ({_rates(responses)}), so ratings can't be compared: the difference "
            f"lies in {_interval(guardrails[0])}; find out why, then resume or roll back",
            summary | {"cause": "response"},
        )
    if harm >= log(1 / policy.error_rate):
        worst = max(guardrails, key=lambda g: g.log_harm)
        return Judgement("rollback", f"the challenger is worse: {_said(worst)}", summary)
    open_ones = [g for g in guardrails if not g.excludes(step.margin)]
    few = min(evidence.closed_in(epoch)) < policy.minimum_users
    if not open_ones and not few:
        said = ", ".join(_said(g) for g in guardrails)
        return Judgement("advance", f"harm worse than {step.margin:g} is excluded: {said}", summary)
    why = [f"{_said(g)}, harm of {step.margin:g} not excluded" for g in open_ones]
    if few:
        old, new = evidence.closed_in(epoch)
        why.append(f"{old} and {new} closed users in this epoch, {policy.minimum_users} needed in each arm")
    return Judgement("hold", "; ".join(why), summary)


def log_harm(evidence: Evidence, *, unequal: bool = False) -> float:
    """Peak log wealth of who spreads a bet on harm over quality, success and latency, as users close one by one.

    Args:
        unequal: who rates differs; the bet on quality then allows the silent challenger's users the best ratings.
    """
    if unequal:
        quality = log_wealth_below(worst_cases(evidence.everybody(), evidence.answered)[1])
    else:
        answered = np.cumsum(evidence.answered)
        quality = np.concatenate(([0.0], log_wealth_below(evidence.quality())))[answered]
    others = [log_wealth_below(sample) for sample in (evidence.successes(), evidence.latency())]
    return log_peak(log_mean([quality, *others])).item()


def _guardrail(name: str, sample: Sample, error_rate: float) -> Guardrail:
    low, high = confidence_sequence(sample, 2 * error_rate)
    new, old = sample.outcome[sample.challenger], sample.outcome[~sample.challenger]
    return Guardrail(
        name,
        champion=old.size,
        challenger=new.size,
        champion_mean=float(old.mean()) if old.size else None,
        challenger_mean=float(new.mean()) if new.size else None,
        estimate=estimate(sample),
        low=low,
        high=high,
        log_harm=log_peak(log_wealth_below(sample)).item(),
    )


def _bounded(quality: Guardrail, evidence: Evidence, error_rate: float) -> Guardrail:
    badly, well = worst_cases(evidence.everybody(), evidence.answered)
    return replace(
        quality,
        estimate=None,
        low=None,
        high=None,
        log_harm=log_peak(log_wealth_below(well)).item(),
        bounds=(confidence_sequence(badly, 2 * error_rate)[0], confidence_sequence(well, 2 * error_rate)[1]),
    )


def _summary(
    evidence: Evidence,
    guardrails: list[Guardrail],
    step: Step,
    harm: float,
    ratio: float,
    response: float,
    responses: Sample,
) -> dict[str, Any]:
    return {
        "as_of": evidence.as_of.isoformat() if evidence.as_of else None,
        "simulated": evidence.simulated,
        "margin": step.margin,
        "epochs": [
            {
                "epoch": e.epoch,
                "probability": e.probability,
                "exposed": {"champion": e.champion, "challenger": e.challenger},
                "closed": dict(zip(("champion", "challenger"), evidence.closed_in(e.epoch), strict=True)),
            }
            for e in evidence.exposed
        ],
        "guardrails": {
            g.name: {
                "users": {"champion": g.champion, "challenger": g.challenger},
                "mean": {"champion": g.champion_mean, "challenger": g.challenger_mean},
                "estimate": g.estimate,
                "interval": None if g.low is None else [g.low, g.high],
                "bounds": None if g.bounds is None else list(g.bounds),
                "harm": _evidence(g.log_harm),
            }
            for g in guardrails
        },
        "harm": _evidence(harm),
        "sample_ratio": _evidence(ratio),
        "response": {
            "rate": {
                "champion": _mean(responses.outcome[~responses.challenger]),
                "challenger": _mean(responses.outcome[responses.challenger]),
            },
            "evidence": _evidence(response),
        },
    }


def _evidence(log_wealth: float) -> float:
    """Wealth against the hypothesis, per 1 put in: an e-value."""
    return min(exp(min(log_wealth, 700.0)), LARGEST)


def _mean(values: Any) -> float | None:
    return float(values.mean()) if values.size else None


def _said(g: Guardrail) -> str:
    known = "" if g.estimate is None else f" {g.estimate:+.3f}"
    return f"{g.name}{known} {_interval(g)} on {g.champion} and {g.challenger} users"


def _interval(g: Guardrail) -> str:
    low, high = g.bounds or (g.low, g.high)
    return f"[{low:+.3f}, {high:+.3f}]"


def _counts(evidence: Evidence) -> str:
    return ", ".join(
        f"{e.challenger} of {e.champion + e.challenger} where {e.probability:g} was declared" for e in evidence.exposed
    )


def _rates(responses: Sample) -> str:
    old, new = (_mean(responses.outcome[arm]) for arm in (~responses.challenger, responses.challenger))
    return f"{old or 0:.0%} in the champion, {new or 0:.0%} in the challenger"
