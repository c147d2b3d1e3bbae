"""What a rollout's evidence leads to, and how seldom wrongly."""

import json
from math import log
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.applications import Rollout
from millrace.rollout.evidence import Evidence, Exposed
from millrace.rollout.judgement import Judgement, judge, log_harm


def evidence(
    users: int,
    *,
    effect: float = 0.0,
    share: float = 0.25,
    seed: int = 0,
    met: float | None = None,
    answer: tuple[float, float] = (0.9, 0.9),
    success: tuple[float, float] = (1.0, 1.0),
    fast: tuple[float, float] = (1.0, 1.0),
) -> Evidence:
    """One epoch of users; pairs are for (champion, challenger); `met`: the share that really met the challenger."""
    rng = np.random.default_rng(seed)
    challenger = rng.random(users) < (met or share)
    rating = np.clip(rng.normal(np.where(challenger, 0.5 + effect, 0.5), 0.3), 0, 1)
    rating[rng.random(users) > np.where(challenger, answer[1], answer[0])] = np.nan
    new = int(challenger.sum())
    return Evidence(
        epoch=np.ones(users, np.int64),
        challenger=challenger,
        probability=np.full(users, share),
        rating=rating,
        success=(rng.random(users) < np.where(challenger, success[1], success[0])).astype(float),
        fast=(rng.random(users) < np.where(challenger, fast[1], fast[0])).astype(float),
        exposed=(Exposed(1, share, users - new, new),),
        simulated=True,
    )


def judged(found: Evidence, policy: Rollout, overruled: frozenset[str] = frozenset()) -> Judgement:
    judgement = judge(found, policy.steps[0], 1, policy, overruled)
    assert json.loads(json.dumps(judgement.summary, allow_nan=False)) == judgement.summary
    return judgement


@pytest.mark.parametrize("users", [0, 1, 2, 10])
def test_with_hardly_any_user_it_holds(users: int, policy: Rollout) -> None:
    assert judged(evidence(users), policy).kind == "hold"


@pytest.mark.parametrize(
    ("kind", "said", "how"),
    [
        ("rollback", "quality", {"effect": -0.4}),
        ("rollback", "success", {"success": (1.0, 0.5)}),
        ("rollback", "latency", {"fast": (1.0, 0.5)}),
        ("advance", "harm worse than 0.4 is excluded", {"effect": 0.2}),
        ("advance", "harm worse than 0.4 is excluded", {}),
        ("freeze", "not assigned as declared", {"met": 0.45}),
        ("freeze", "who rates differs", {"answer": (0.9, 0.5)}),
        # A broken comparison is found before what it seems to show.
        ("freeze", "who rates differs", {"answer": (0.9, 0.5), "effect": -0.4}),
    ],
)
def test_each_finding_leads_to_its_decision(kind: str, said: str, how: dict[str, Any], policy: Rollout) -> None:
    judgement = judged(evidence(600, **how), policy)
    assert judgement.kind == kind
    assert said in judgement.reason


def test_no_advance_before_enough_users_closed_in_each_arm_of_this_epoch(policy: Rollout) -> None:
    found = evidence(600, effect=0.2)
    judgement = judge(found, policy.steps[0], 2, policy)
    assert judgement.kind == "hold"
    assert "0 and 0 closed users in this epoch, 10 needed in each arm" in judgement.reason


def test_where_who_rates_differs_the_report_gives_bounds_instead_of_a_number(policy: Rollout) -> None:
    quality = judged(evidence(600, answer=(0.9, 0.5)), policy).summary["guardrails"]["quality"]
    assert quality["estimate"] is None
    assert quality["interval"] is None
    low, high = quality["bounds"]
    assert low < 0 < high


def test_what_a_person_overruled_freezes_no_more_and_still_advances_by_bounds_only(policy: Rollout) -> None:
    assert judged(evidence(600, answer=(0.9, 0.4)), policy, frozenset({"response"})).kind == "hold"
    assert judged(evidence(2000, answer=(0.95, 0.75)), policy, frozenset({"response"})).kind == "advance"
    assert judged(evidence(600, met=0.45), policy, frozenset({"sample_ratio"})).kind == "advance"


def test_a_harmless_candidate_is_seldom_rolled_back_on_any_guardrail_together() -> None:
    runs, error = 300, 0.05
    shown = [
        log_harm(evidence(400, seed=seed, success=(0.8, 0.8), fast=(0.7, 0.7))) >= log(1 / error)
        for seed in range(runs)
    ]
    assert np.mean(shown) <= error + 3 * np.sqrt(error * (1 - error) / runs)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.integers(0, 300), st.floats(-0.5, 0.5), st.sampled_from([0.01, 0.25, 0.5]), st.integers(0, 5))
def test_any_evidence_is_judged_and_can_be_kept_as_json(users: int, effect: float, share: float, seed: int) -> None:
    policy = Rollout.model_validate({"steps": [{"share": share, "margin": 0.3}], "minimum_users": 2})
    judgement = judged(evidence(users, effect=effect, share=share, seed=seed), policy)
    low, high = judgement.summary["guardrails"]["quality"]["interval"] or (-1, 1)
    assert -1 <= low < high <= 1
