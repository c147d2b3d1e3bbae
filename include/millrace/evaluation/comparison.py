"""Two releases answered the same questions: is the second one good enough? Paired bootstrap, pure.

Knows scores per example and the policy's margins. Knows nothing of where answers come from, of releases or of
tables (`gate.py` does), and looks once: a test that is looked at again and again belongs to the rollout.

An interval is the bias-corrected and accelerated bootstrap (BCa; Efron & Tibshirani, *An Introduction to the
Bootstrap*, 1993, §14.3): examples are drawn with replacement, both releases' scores together, so that the
difficulty of an example cancels. Its quantiles are widened for small samples as by a t distribution (Hesterberg,
*What Teachers Should Know About the Bootstrap*, The American Statistician 69(4), 2015, §5.3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from millrace.applications import Gate
from millrace.errors import MillraceError

Floats = npt.NDArray[np.float64]
MINIMUM_EXAMPLES = 5
"""Fewer decide nothing: the interval's small-sample correction doesn't hold either."""

LARGEST_RATIO = 1e9
"""Stands for infinity, which JSON doesn't have."""

NORMAL = NormalDist()


@dataclass(frozen=True)
class Scores:
    """What one release scored, one entry an example, in the same order for both releases."""

    quality: Floats
    """Token-F1 against the known answer, 0 to 1."""
    retrieval: Floats
    """1 where the document that holds the answer was among the chunks of the prompt, else 0."""
    seconds: Floats
    cost: Floats
    """US dollars."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Criterion:
    """One thing that the gate asks, and the answer. JSON-able by `dataclasses.asdict`."""

    name: str
    measure: Literal["difference", "ratio", "count"]
    champion: float | None
    """Mean over the examples; None where the question doesn't apply to the champion."""
    candidate: float
    estimate: float
    """Candidate minus champion, or candidate divided by champion, of the means."""
    low: float
    high: float
    bound: float
    """What the interval's near end must reach (difference) or its far end must not exceed (ratio, count)."""
    passed: bool
    why: str


def mean_difference(champion: Floats, candidate: Floats, confidence: float, resamples: int, seed: int) -> Interval:
    """Mean of candidate minus champion, with its BCa interval. Swapping the arms mirrors it at 0.

    Args:
        champion: (n,) scores; `candidate` the same examples in the same order.
        confidence: of the two-sided interval, e.g. 0.95.
        seed: of the resampling; the same seed gives the same interval.
    """
    difference = candidate - champion
    return _bca(difference[:, None], lambda means: means[..., 0], confidence, resamples, seed)


def ratio_of_means(champion: Floats, candidate: Floats, confidence: float, resamples: int, seed: int) -> Interval:
    """Candidate's mean divided by champion's, with its BCa interval. Swapping the arms inverts it.

    Both nothing: the ratio is 1. Champion nothing and candidate something: it is `LARGEST_RATIO`.

    Raises:
        MillraceError: a value is negative or not finite.
    """
    both = np.stack([champion, candidate], axis=1)
    if not np.isfinite(both).all() or (both < 0).any():
        raise MillraceError("seconds and costs must be finite and not negative; a ratio of means needs a scale from 0")

    def log_ratio(means: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(means[..., 1]) - np.log(means[..., 0])
        return np.clip(np.nan_to_num(logs, nan=0.0), -np.log(LARGEST_RATIO), np.log(LARGEST_RATIO))

    on_log = _bca(both, log_ratio, confidence, resamples, seed)
    return Interval(*(float(np.exp(value)) for value in (on_log.estimate, on_log.low, on_log.high)))


def compare(champion: Scores, candidate: Scores, policy: Gate, *, seed: int) -> list[Criterion]:
    """The gate's criteria, in the order in which people care.

    Raises:
        MillraceError: too few examples to decide on, or the two releases answered different numbers of them.
    """
    sizes = {len(values) for scores in (champion, candidate) for values in vars(scores).values()}
    if len(sizes) > 1 or min(sizes) < MINIMUM_EXAMPLES:
        raise MillraceError(
            f"a comparison needs the same examples in both arms and at least {MINIMUM_EXAMPLES} of them, got "
            f"{sorted(sizes)}; name more evaluation sections in the application's [questions]"
        )
    return [
        _no_loss("quality", champion.quality, candidate.quality, policy.quality_margin, policy, seed),
        _no_loss("retrieval", champion.retrieval, candidate.retrieval, policy.retrieval_margin, policy, seed),
        _no_excess("latency", champion.seconds, candidate.seconds, policy.latency_ratio, policy, seed, "s", 1),
        _no_excess("cost", champion.cost, candidate.cost, policy.cost_ratio, policy, seed, "$ a million answers", 1e6),
    ]


def _no_loss(name: str, champion: Floats, candidate: Floats, margin: float, policy: Gate, seed: int) -> Criterion:
    found = mean_difference(champion, candidate, policy.confidence, policy.resamples, seed)
    passed = found.low >= -margin
    why = (
        f"{name} went from {champion.mean():.3f} to {candidate.mean():.3f}; the {policy.confidence:.0%} interval of "
        f"the difference, {found.low:+.3f} to {found.high:+.3f}, "
        f"{'excludes' if passed else 'does not exclude'} a loss worse than {margin:g}"
    )
    return Criterion(
        name,
        "difference",
        _mean(champion),
        _mean(candidate),
        found.estimate,
        found.low,
        found.high,
        -margin,
        passed,
        why,
    )


def _no_excess(
    name: str, champion: Floats, candidate: Floats, bound: float, policy: Gate, seed: int, unit: str, scale: float
) -> Criterion:
    found = ratio_of_means(champion, candidate, policy.confidence, policy.resamples, seed)
    passed = found.high <= bound
    why = (
        f"{name} went from {champion.mean() * scale:.3g} to {candidate.mean() * scale:.3g} {unit}; the "
        f"{policy.confidence:.0%} interval of the ratio, {found.low:.2f} to {found.high:.2f}, "
        f"{'stays within' if passed else 'reaches beyond'} {bound:g}"
    )
    return Criterion(
        name, "ratio", _mean(champion), _mean(candidate), found.estimate, found.low, found.high, bound, passed, why
    )


def _mean(values: Floats) -> float:
    return float(values.mean())


def _bca(
    values: Floats, statistic: Callable[[Floats], Floats], confidence: float, resamples: int, seed: int
) -> Interval:
    """BCa interval of a smooth function of column means.

    Args:
        values: (n, columns), one row an example.
        statistic: (..., columns) means → (...) statistics.
    """
    n = len(values)
    estimate = float(statistic(values.mean(axis=0)))
    if (values == values[0]).all():
        return Interval(estimate, estimate, estimate)
    # How often each example is drawn, for each resample: (resamples, n), rows summing to n.
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    replicates = np.sort(statistic(draws @ values / n))
    below = (np.searchsorted(replicates, estimate, "left") + np.searchsorted(replicates, estimate, "right")) / 2
    bias = NORMAL.inv_cdf(min(max(below / resamples, 0.5 / resamples), 1 - 0.5 / resamples))
    left_out = statistic((values.sum(axis=0) - values) / (n - 1))
    influence = left_out.mean() - left_out
    # Acceleration has no scale; in units of the largest influence its powers stay within what a float holds.
    influence /= np.abs(influence).max() or 1.0
    spread = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    reach = _widened((1 - confidence) / 2, n)
    low, high = (NORMAL.cdf(bias + (bias + z) / max(1 - acceleration * (bias + z), 1e-9)) for z in (-reach, reach))
    return Interval(estimate, _quantile(replicates, low), _quantile(replicates, high))


def _quantile(ordered: Floats, level: float) -> float:
    return float(ordered[round(level * (len(ordered) - 1))])


def _widened(tail: float, n: int) -> float:
    """Normal quantile whose use in a bootstrap of `n` examples gives what a t interval would reach (Hesterberg 2015);
    t by the expansion of Abramowitz & Stegun 26.7.5, good to 0.01 from 4 degrees of freedom on."""
    z, v = NORMAL.inv_cdf(1 - tail), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return t * (n / v) ** 0.5
