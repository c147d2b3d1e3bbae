"""How much better one thing scored than another on the same examples, with an interval. Paired bootstrap, pure.

An interval is the bias-corrected and accelerated bootstrap (BCa; Efron & Tibshirani, *An Introduction to the
Bootstrap*, 1993, §14.3): examples are drawn with replacement, both sides' scores together, so that the difficulty of
an example cancels; where examples come in groups that fail together, as questions about one document do, groups are
drawn. Its quantiles are widened for small samples as by a t distribution (Hesterberg, *What Teachers
Should Know About the Bootstrap*, The American Statistician 69(4), 2015, §5.3). It looks once: a test that is looked
at again and again belongs to the rollout.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from millrace.errors import MillraceError

Floats = npt.NDArray[np.float64]

LARGEST_RATIO = 1e9
"""Stands for infinity, which JSON doesn't have."""

NORMAL = NormalDist()


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval."""

    estimate: float
    low: float
    high: float


def mean_difference(
    champion: Floats,
    candidate: Floats,
    confidence: float,
    resamples: int,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of candidate minus champion, with its BCa interval. Swapping the arms mirrors it at 0.

    Args:
        champion: (n,) scores; `candidate` the same examples in the same order.
        confidence: of the two-sided interval, e.g. 0.95.
        seed: of the resampling; the same seed gives the same interval.
        groups: (n,) which group each example is of; None: each is one.
    """
    values = np.stack([candidate - champion, np.ones(len(champion))], axis=1)
    return _bca(_summed(values, groups), lambda means: means[..., 0] / means[..., 1], confidence, resamples, seed)


def ratio_of_means(
    champion: Floats,
    candidate: Floats,
    confidence: float,
    resamples: int,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """Candidate's mean divided by champion's, with its BCa interval. Swapping the arms inverts it.

    Args as `mean_difference`.

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

    on_log = _bca(_summed(both, groups), log_ratio, confidence, resamples, seed)
    return Interval(*(float(np.exp(value)) for value in (on_log.estimate, on_log.low, on_log.high)))


def _summed(values: Floats, groups: Sequence[Hashable] | None) -> Floats:
    """(n, columns) → (groups, columns)."""
    if groups is None:
        return values
    positions = {group: position for position, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(positions), values.shape[1]))
    np.add.at(sums, [positions[group] for group in groups], values)
    return sums


def _bca(
    values: Floats, statistic: Callable[[Floats], Floats], confidence: float, resamples: int, seed: int
) -> Interval:
    """BCa interval of a smooth function of column means.

    Args:
        values: (n, columns), one row an example, or a group's sum.
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
