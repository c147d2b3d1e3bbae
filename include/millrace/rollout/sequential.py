"""Tests that may be looked at after every user: exactly valid at any sample size, however often one looks.

Pure numpy. It knows users in order, each with a bounded outcome, an arm and the known probability of that arm; it
does not know where they come from nor what is decided. Leading axes are independent samples (simulations).

The pseudo-outcome X_t = (Y_t − m_t)·(A_t/p_t − (1−A_t)/(1−p_t)), with m_t the mean of outcomes before t, has the
effect (challenger − champion) as its mean given the past. A gambler who bets against "the effect is at least θ" has
the wealth Π(1 + c·(θ − X_t)/(U_t − θ)), U_t ≥ X_t the largest value that X_t can take: never negative, a
supermartingale under the hypothesis, so by Ville's inequality it ever reaches 1/α with probability at most α. The
mean over a few fractions c is such a wealth too. Every user carries the p_t of the epoch in which they came: that is
the stratification; only cohorts of the same epoch are ever compared. The hypotheses speak of every user: "at no
moment is the effect below θ".

Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS B 2023; Waudby-Smith, Wu, Ramdas,
Karampatziakis & Mineiro, Anytime-valid off-policy inference for contextual bandits, 2022; Lindon & Malek, Anytime-
valid inference for multinomial count data, NeurIPS 2022; Manski, Nonparametric bounds on treatment effects, 1990.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import lgamma, log, log1p
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FRACTIONS = (0.0625, 0.125, 0.25, 0.5, 0.95)
"""Of the largest safe bet. Small ones find small effects; below 1, so that no wealth is ever lost entirely."""
BISECTIONS = 20
"""Halvings of [−1, 1]: the ends of a confidence sequence are exact, outwards, to 2e-6."""
PRIOR_USERS = 100.0
"""Weight of the sample-ratio test's prior, in users: how near to the declared ratio it expects a false one."""


@dataclass(frozen=True)
class Sample:
    """Users in the order in which their outcomes closed; arrays of one shape, users on the last axis."""

    outcome: Floats
    """In [0, 1]."""
    challenger: NDArray[np.bool_]
    probability: Floats
    """With which this user was assigned to the challenger, in (0, 1)."""

    def __post_init__(self) -> None:
        if not self.outcome.shape == self.challenger.shape == self.probability.shape:
            raise ValueError("outcomes, arms and probabilities must have one shape")
        if not (np.all(self.outcome >= 0) and np.all(self.outcome <= 1)):
            raise ValueError("outcomes must lie in [0, 1]")
        if not (np.all(self.probability > 0) and np.all(self.probability < 1)):
            raise ValueError("assignment probabilities must lie strictly between 0 and 1")

    def __len__(self) -> int:
        return int(self.outcome.shape[-1])

    def mirrored(self) -> Self:
        """The sample in which better is worse: the effect changes its sign."""
        return type(self)(1 - self.outcome, self.challenger, self.probability)


def pseudo_outcomes(sample: Sample) -> tuple[Floats, Floats]:
    """X_t of every user, and the largest value that X_t could have taken given the past."""
    seen = np.arange(len(sample))
    centre = (0.5 + np.cumsum(sample.outcome, -1) - sample.outcome) / (1 + seen)
    p = sample.probability
    x = (sample.outcome - centre) * np.where(sample.challenger, 1 / p, -1 / (1 - p))
    return x, np.maximum((1 - centre) / p, centre / (1 - p))


def log_wealth_below(sample: Sample, effect: float = 0.0) -> Floats:
    """Log wealth after each user of who bets that the effect is below `effect`; fair if it is at least that.

    Args:
        effect: θ in (−1, 1).
    """
    x, largest = pseudo_outcomes(sample)
    return _log_wealth(x, largest, effect)


def log_wealth_above(sample: Sample, effect: float = 0.0) -> Floats:
    """Log wealth after each user of who bets that the effect is above `effect`; fair if it is at most that."""
    return log_wealth_below(sample.mirrored(), -effect)


def log_wealth_apart(sample: Sample) -> Floats:
    """Log wealth after each user of who bets that the arms differ, half on each side; fair if they don't."""
    return log_mean([log_wealth_below(sample), log_wealth_above(sample)])


def log_mean(wealths: Iterable[Floats]) -> Floats:
    """Log of the mean of wealths, given and returned in logs: a bet spread over several gamblers."""
    stacked = np.stack(tuple(wealths))
    highest = stacked.max(0)
    return np.asarray(highest + np.log(np.exp(stacked - highest).mean(0)))


def log_peak(wealth: Floats) -> Floats:
    """The highest log wealth so far, the 0 of the start included: what was shown once stays shown (Ville)."""
    return np.max(wealth, axis=-1, initial=0.0)


def confidence_sequence(sample: Sample, error_rate: float) -> tuple[float, float]:
    """The interval that holds the effect, at this moment and all others at once, with probability 1 − `error_rate`.

    One sample (no leading axes). Two one-sided sequences, each at half the error, intersected over time; each is
    the set of θ whose bet has never reached 2/α. The wealth grows with θ, so the ends are found by bisection.
    """
    threshold = log(2 / error_rate)
    x, largest = pseudo_outcomes(sample)
    high = _lowest_excluded(lambda effect: bool(log_peak(_log_wealth(x, largest, effect)) >= threshold))
    x, largest = pseudo_outcomes(sample.mirrored())
    low = -_lowest_excluded(lambda effect: bool(log_peak(_log_wealth(x, largest, effect)) >= threshold))
    return low, high


def estimate(sample: Sample) -> float | None:
    """Difference of the arms' means, epoch by epoch, weighted by how much each epoch tells; None: nothing to compare.

    Epochs are told apart by their probability. For reading: decisions rest on the bets above.
    """
    weights, differences = [], []
    for p in np.unique(sample.probability):
        epoch = sample.probability == p
        new, old = sample.outcome[epoch & sample.challenger], sample.outcome[epoch & ~sample.challenger]
        if new.size and old.size:
            weights.append(new.size * old.size / (new.size + old.size))
            differences.append(new.mean() - old.mean())
    return float(np.average(differences, weights=weights)) if weights else None


def log_sample_ratio(counts: Iterable[tuple[int, int, float]]) -> float:
    """Log wealth of who bets that users are not assigned as declared.

    Args:
        counts: per epoch the users in the challenger, those in the champion, and the challenger's probability.

    A Beta prior around each epoch's declared probability against that probability itself (Lindon & Malek 2022);
    epochs multiply, because each bet is fair given the ones before.
    """
    total = 0.0
    for new, old, p in counts:
        a, b = PRIOR_USERS * p, PRIOR_USERS * (1 - p)
        total += _log_beta(a + new, b + old) - _log_beta(a, b) - new * log(p) - old * log1p(-p)
    return total


def worst_cases(sample: Sample, answered: NDArray[np.bool_]) -> tuple[Sample, Sample]:
    """The sample with the silent filled in: as badly for the challenger as can be, and as well as can be.

    The effect lies between those of the two, whatever the silent would have said (Manski 1990); the low end of the
    first one's confidence sequence and the high end of the second's bound it, sampling error included.

    Args:
        sample: everybody; the outcome of who did not answer is ignored.
        answered: of the sample's shape.
    """
    badly = np.where(answered, sample.outcome, ~sample.challenger)
    well = np.where(answered, sample.outcome, sample.challenger)
    return Sample(badly, sample.challenger, sample.probability), Sample(well, sample.challenger, sample.probability)


def _log_wealth(x: Floats, largest: Floats, effect: float) -> Floats:
    # Where the largest value is θ itself, any value below it refutes the hypothesis: the bet is merely very large.
    unit = (effect - x) / np.maximum(largest - effect, 1e-9)
    return log_mean(np.cumsum(np.log1p(fraction * unit), -1) for fraction in FRACTIONS)


def _lowest_excluded(excluded: Callable[[float], bool]) -> float:
    """The lowest θ in [−1, 1] that is excluded, found from above; 1 if none is."""
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if excluded(middle) else (middle, high)
    return high


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
