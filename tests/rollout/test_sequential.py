"""The statistics, held to their promises by simulation and to ville's independent implementation."""

import numpy as np
import pytest
import ville
from hypothesis import given
from hypothesis import strategies as st

from millrace.rollout.sequential import (
    Sample,
    confidence_sequence,
    estimate,
    log_peak,
    log_sample_ratio,
    log_wealth_above,
    log_wealth_apart,
    log_wealth_below,
    pseudo_outcomes,
    worst_cases,
)

ERROR = 0.05
RUNS = 400
CHANCE = 3 * np.sqrt(ERROR * (1 - ERROR) / RUNS)
"""Three standard errors of a simulated rate of 5 %."""


def ratings(effect: float, runs: int, users: int, shares: tuple[float, ...] = (0.25, 0.5), seed: int = 0) -> Sample:
    """Two-point ratings (the widest there are) with mean 0.6 in the champion; users come share after share."""
    rng = np.random.default_rng(seed)
    probability = np.broadcast_to(np.repeat(shares, users // len(shares)), (runs, users))
    challenger = rng.random((runs, users)) < probability
    good = rng.random((runs, users)) < np.where(challenger, 0.6 + effect, 0.6)
    return Sample(np.where(good, 0.9, 0.1), challenger, np.ascontiguousarray(probability))


def two_point(effect: float) -> float:
    """The mean difference of ratings that `effect` (a difference of chances) means."""
    return 0.8 * effect


def test_a_harmless_candidate_is_seldom_shown_as_harmful_however_often_one_looks() -> None:
    wealth = log_wealth_below(ratings(0.0, RUNS, 1500), 0.0)
    assert np.mean(log_peak(wealth) >= np.log(1 / ERROR)) <= ERROR + CHANCE


@pytest.mark.slow
def test_harm_as_large_as_the_margin_is_seldom_excluded_however_often_one_looks() -> None:
    wealth = log_wealth_above(ratings(-0.25, RUNS, 1500), -two_point(0.25))
    assert np.mean(log_peak(wealth) >= np.log(1 / ERROR)) <= ERROR + CHANCE


@pytest.mark.parametrize("effect", [-0.4, -0.2])
def test_harm_is_shown_in_the_end(effect: float) -> None:
    wealth = log_wealth_below(ratings(effect, 100, 1500), 0.0)
    assert np.mean(log_peak(wealth) >= np.log(1 / ERROR)) > 0.97


def test_the_confidence_sequence_covers_the_effect_at_all_times() -> None:
    sample = ratings(0.2, RUNS, 800)
    effect = two_point(0.2)
    missed = np.maximum(log_peak(log_wealth_below(sample, effect)), log_peak(log_wealth_above(sample, effect)))
    assert np.mean(missed >= np.log(2 / ERROR)) <= ERROR + CHANCE
    one = Sample(sample.outcome[0], sample.challenger[0], sample.probability[0])
    low, high = confidence_sequence(one, ERROR)
    # The ends are where the bets cross the threshold, not merely near there.
    for end, outside, wealth in ((low, -1e-5, log_wealth_above), (high, 1e-5, log_wealth_below)):
        assert log_peak(wealth(one, end + outside)) >= np.log(2 / ERROR)
        assert log_peak(wealth(one, end - outside)) < np.log(2 / ERROR)


@pytest.mark.slow
def test_the_expected_wealth_never_exceeds_what_was_put_in() -> None:
    sample = ratings(0.0, 20_000, 40)
    for wealth in (log_wealth_below(sample), log_wealth_above(sample), log_wealth_apart(sample)):
        paid = np.exp(wealth[:, -1])
        assert paid.mean() <= 1 + 4 * paid.std() / np.sqrt(paid.size)


def test_pseudo_outcomes_and_intervals_agree_with_ville() -> None:
    sample = ratings(-0.3, 1, 600, shares=(0.5,))
    one = Sample(sample.outcome[0], sample.challenger[0], sample.probability[0])
    oracle = ville.BettingABTest(propensity=0.5, alpha=ERROR).fit(one.outcome, one.challenger.astype(float))
    x, largest = pseudo_outcomes(one)
    # ville starts from the same 1/2 and then forgets it; after a few users the centres are one.
    assert np.mean(x) == pytest.approx(oracle.estimate_[-1], abs=0.02)
    assert np.all(x <= largest + 1e-12)
    low, high = confidence_sequence(one, ERROR)
    oracle_low, oracle_high = oracle.interval()
    assert max(low, oracle_low) < two_point(-0.3) < min(high, oracle_high)
    assert high - low < oracle_high - oracle_low
    assert abs((low + high) - (oracle_low + oracle_high)) / 2 < 0.05


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.booleans(), st.sampled_from([0.01, 0.25, 0.5, 0.9])), min_size=1, max_size=40
    ),
    st.floats(-0.999, 0.998),
)
def test_wealth_is_finite_monotone_in_the_hypothesis_and_mirrored(
    users: list[tuple[float, bool, float]], effect: float
) -> None:
    outcome, challenger, probability = (np.array(column) for column in zip(*users, strict=True))
    sample = Sample(outcome.astype(float), challenger, probability)
    below = log_wealth_below(sample, effect)
    assert np.all(np.isfinite(below))
    assert np.all(log_wealth_below(sample, effect + 0.001) >= below - 1e-9)
    np.testing.assert_allclose(log_wealth_above(sample.mirrored(), -effect), below)
    low, high = confidence_sequence(sample, ERROR)
    assert -1 <= low < high <= 1


@pytest.mark.slow
@given(st.integers(0, 30), st.integers(1, 30))
def test_an_interval_only_ever_shrinks(first: int, more: int) -> None:
    sample = ratings(0.1, 1, first + more, shares=(0.25,), seed=first * 100 + more)
    low, high = confidence_sequence(
        Sample(*(a[0] for a in (sample.outcome, sample.challenger, sample.probability))), 0.1
    )
    early = Sample(*(a[0, :first] for a in (sample.outcome, sample.challenger, sample.probability)))
    early_low, early_high = confidence_sequence(early, 0.1)
    assert early_low - 1e-5 <= low < high <= early_high + 1e-5


@pytest.mark.slow
def test_the_sample_ratio_test_keeps_quiet_when_the_ratio_is_kept_and_speaks_when_not() -> None:
    rng = np.random.default_rng(1)
    quiet = 0
    for _ in range(RUNS):
        first, second = np.cumsum(rng.random(1000) < 0.05), np.cumsum(rng.random(1000) < 0.5)
        looks = [log_sample_ratio([(first[n], n + 1 - first[n], 0.05)]) for n in range(0, 1000, 20)]
        looks += [
            log_sample_ratio([(first[-1], 1000 - first[-1], 0.05), (second[n], n + 1 - second[n], 0.5)])
            for n in range(0, 1000, 20)
        ]
        quiet += max(looks) < np.log(20)
    assert quiet / RUNS >= 1 - ERROR - CHANCE
    assert log_sample_ratio([]) == 0
    assert log_sample_ratio([(330, 670, 0.25)]) > np.log(1000)
    assert log_sample_ratio([(50, 1950, 0.01)]) > np.log(1000)


def test_epochs_are_compared_within_never_pooled() -> None:
    # Everybody became happier between the epochs; within each the arms are equal. Pooled, the challenger would shine.
    challenger = np.array([True] * 10 + [False] * 90 + [True] * 50 + [False] * 50)
    outcome = np.array([0.2] * 100 + [0.8] * 100)
    sample = Sample(outcome, challenger, np.repeat([0.1, 0.5], 100))
    assert estimate(sample) == pytest.approx(0.0)
    assert outcome[challenger].mean() - outcome[~challenger].mean() > 0.2


def test_the_worst_cases_enclose_the_effect_whatever_the_silent_would_have_said() -> None:
    rng = np.random.default_rng(2)
    challenger = rng.random(2000) < 0.5
    everything = Sample(rng.random(2000), challenger, np.full(2000, 0.5))
    # Only who is content answers, and fewer of the challenger's: what is heard is no fair picture.
    answered = (everything.outcome > 0.3) & (rng.random(2000) < np.where(challenger, 0.6, 0.9))
    badly, well = worst_cases(everything, answered)
    low, high = confidence_sequence(badly, ERROR)[0], confidence_sequence(well, ERROR)[1]
    whole, lowest, highest = (estimate(sample) for sample in (everything, badly, well))
    assert whole is not None
    assert lowest is not None
    assert highest is not None
    assert low < lowest < whole < highest < high
    silent = (~answered[challenger]).mean() + (~answered[~challenger]).mean()
    assert highest - lowest == pytest.approx(silent)
    assert confidence_sequence(worst_cases(everything, np.ones(2000, bool))[0], ERROR) == pytest.approx(
        confidence_sequence(everything, ERROR)
    )


@pytest.mark.parametrize(
    ("outcome", "probability"), [(1.1, 0.5), (float("nan"), 0.5), (0.5, 0.0), (0.5, 1.0), (0.5, float("nan"))]
)
def test_what_is_out_of_range_is_refused(outcome: float, probability: float) -> None:
    with pytest.raises(ValueError, match="must lie"):
        Sample(np.array([outcome]), np.array([True]), np.array([probability]))
