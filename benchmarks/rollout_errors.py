"""How many users meet a bad release before it is rolled back, and how often a good one is rolled back by mistake.

Simulates whole rollouts with the functions that the controller uses, beside the peer that most teams have: "roll back
when the mean of the last W ratings falls below a threshold", its window and threshold tuned on simulated harmless
candidates to the same rate of false alarms (which nobody can do in earnest: it takes knowing the ratings' law).

    python benchmarks/rollout_errors.py [--runs 300] [--seed 0]

Ratings are Beta-distributed, champion's mean 0.7, standard deviation 0.3, everybody rates; a look every 10 users.
"""

import argparse
import time
from dataclasses import dataclass
from math import log

import numpy as np

from millrace.applications import Rollout
from millrace.rollout.sequential import Sample, log_mean, log_wealth_above, log_wealth_below

STEPS = [(0.01, 0.30), (0.05, 0.20), (0.25, 0.10), (0.50, 0.05)]
DEMO = [(0.25, 0.40), (0.50, 0.30)]
LOOK = 10
MOST_USERS = 200_000
WINDOWS = (5, 10, 20, 50, 100, 200)
PEER_HORIZON = 4_000
"""Ratings after which a peer's rollout that raised no alarm is over."""


def ratings(rng: np.random.Generator, mean: float, size: int, sd: float = 0.3) -> np.ndarray:
    """Beta-distributed ratings with this mean, and this standard deviation where [0, 1] leaves room for it."""
    mean = min(max(mean, 0.02), 0.98)
    sd = min(sd, 0.9 * np.sqrt(mean * (1 - mean)))
    weight = mean * (1 - mean) / sd**2 - 1
    return rng.beta(mean * weight, (1 - mean) * weight, size)


@dataclass(frozen=True)
class End:
    """How one rollout ended, after how many users in all, and how many of them met the challenger."""

    kind: str
    users: int
    exposed: int
    step_users: tuple[int, ...]
    """Users that each completed step took."""


def rollout(policy: Rollout, effect: float, rng: np.random.Generator, mean: float = 0.7) -> End:
    """One rollout of a candidate with this effect on ratings and no other, by the controller's rules."""
    threshold = log(1 / policy.error_rate)
    outcome, challenger, probability = np.empty(0), np.empty(0, bool), np.empty(0)
    now, taken = 0, []
    for step in policy.steps:
        began = now
        while True:
            block = int(max(200, 10 / step.share))
            met = rng.random(block) < step.share
            outcome = np.concatenate(
                (outcome, np.where(met, ratings(rng, mean + effect, block), ratings(rng, mean, block)))
            )
            challenger = np.concatenate((challenger, met))
            probability = np.concatenate((probability, np.full(block, step.share)))
            quality = Sample(outcome, challenger, probability)
            always = Sample(np.ones_like(outcome), challenger, probability)  # success, and within the latency budget
            harm = log_mean([log_wealth_below(quality), *[log_wealth_below(always)] * 2]) >= threshold
            excluded = np.ones_like(harm)
            for sample in (quality, always):
                excluded &= np.maximum.accumulate(log_wealth_above(sample, -step.margin)) >= threshold
            new, old = np.cumsum(challenger[began:]), np.cumsum(~challenger[began:])
            enough = np.minimum(new, old) >= policy.minimum_users
            looks = np.arange(now + LOOK, outcome.size + 1, LOOK) - 1
            harmed, passed = np.maximum.accumulate(harm)[looks], excluded[looks] & enough[looks - began]
            if (harmed | passed).any():
                first = int((harmed | passed).argmax())
                now = int(looks[first]) + 1
                taken.append(now - began)
                if harmed[first]:
                    return End("rollback", now, int(challenger[:now].sum()), tuple(taken))
                # Who would have come after the decision comes in the next epoch instead.
                outcome, challenger, probability = outcome[:now], challenger[:now], probability[:now]
                break
            now = int(looks[-1]) + 1
            if now > MOST_USERS:
                return End("undecided", now, int(challenger.sum()), tuple(taken))
    return End("promote", now, int(challenger.sum()), tuple(taken))


def rolling_means(effect: float, window: int, runs: int, rng: np.random.Generator) -> np.ndarray:
    """Mean of the last `window` challenger ratings after each rating from the `window`-th on; a row a run."""
    total = np.cumsum(ratings(rng, 0.7 + effect, runs * PEER_HORIZON).reshape(runs, -1), axis=1)
    total = np.concatenate((np.zeros((runs, 1)), total), axis=1)
    return (total[:, window:] - total[:, :-window]) / window


def peer(effect: float, window: int, threshold: float, runs: int, rng: np.random.Generator) -> tuple[float, float]:
    """Share of runs with an alarm, and mean number of exposed users until it (or the horizon)."""
    below = rolling_means(effect, window, runs, rng) < threshold
    exposed = np.where(below.any(1), below.argmax(1) + window, PEER_HORIZON)
    return float(below.any(1).mean()), float(exposed.mean())


def policy(steps: list[tuple[float, float]], minimum: int) -> Rollout:
    return Rollout.model_validate(
        {"steps": [{"share": s, "margin": m} for s, m in steps], "minimum_users": minimum, "error_rate": 0.05}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    runs, began = arguments.runs, time.perf_counter()
    rng = np.random.default_rng(arguments.seed)

    print(f"shares 1/5/25/50 %, margins 0.30/0.20/0.10/0.05, error rate 5 %, {runs} runs each")
    thresholds = {w: float(np.quantile(rolling_means(0, w, 2000, rng).min(1), 0.05)) for w in WINDOWS}
    print(f"{'effect':>7} {'rolled back':>12} {'promoted':>9} {'exposed: mean':>14} {'median':>7} {'90 %':>6}", end="")
    print(f" {'users: mean':>12} {'threshold peer: exposed':>24} {'ratio':>6}")
    for effect in (-0.4, -0.2, -0.1, -0.05, 0.0):
        ends = [rollout(policy(STEPS, 20), effect, rng) for _ in range(runs)]
        exposed = np.array([end.exposed for end in ends])
        share = {kind: np.mean([end.kind == kind for end in ends]) for kind in ("rollback", "promote")}
        line = f"{effect:>+7.2f} {share['rollback']:>12.1%} {share['promote']:>9.1%} {exposed.mean():>14.0f}"
        line += (
            f" {np.median(exposed):>7.0f} {np.quantile(exposed, 0.9):>6.0f} {np.mean([e.users for e in ends]):>12.0f}"
        )
        if effect:
            alarms = {w: peer(effect, w, thresholds[w], 500, rng) for w in WINDOWS}
            best = min(alarms, key=lambda w: alarms[w][1])
            line += f" {alarms[best][1]:>11.0f} (best W {best:>3}) {alarms[best][1] / exposed.mean():>5.1f}x"
        else:
            line += "   (false alarms of the peer: 5 % by its tuning)"
        print(line, flush=True)

    print(f"\ndemo pace: shares 25/50 %, margins 0.4/0.3, 10 users in each arm; {runs} runs; users until the decision")
    for effect, mean in ((-0.4, 0.7), (0.3, 0.3), (0.1, 0.3), (0.0, 0.5), (0.0, 0.7)):
        ends = [rollout(policy(DEMO, 10), effect, rng, mean) for _ in range(runs)]
        promoted = [end for end in ends if end.kind == "promote"]
        back = [end for end in ends if end.kind == "rollback"]
        line = f"champion's mean {mean:.1f}, effect {effect:+.2f}: "
        if promoted:
            steps = np.array([end.step_users for end in promoted])
            line += (
                f"promoted {len(promoted) / runs:.0%} after {steps[:, 0].mean():.0f} + {steps[:, 1].mean():.0f} users"
            )
            line += f" (90 %: {np.quantile(steps.sum(1), 0.9):.0f}) "
        if back:
            users = np.array([end.users for end in back])
            line += f"rolled back {len(back) / runs:.0%} after {users.mean():.0f} users"
            line += f" (90 %: {np.quantile(users, 0.9):.0f}), {np.mean([end.exposed for end in back]):.0f} exposed"
        print(line, flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
