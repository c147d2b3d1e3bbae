"""The laws that hold for all scores, and the coverage that an interval claims."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from millrace.scoring.bootstrap import mean_difference, ratio_of_means

FEW = budget(max_examples=40, deadline=None)

shares = st.floats(0, 1)
positive = st.floats(0.001, 1000)
sizes = st.integers(5, 40)


def both(elements: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    return sizes.flatmap(lambda n: st.tuples(arrays(float, n, elements=elements), arrays(float, n, elements=elements)))


@FEW
@given(both(shares), st.integers(0, 3))
@example((np.zeros(5), np.array([0, *[1.45e-154] * 4])), 0)  # whose squares and cubes vanish
def test_swapping_the_arms_mirrors_the_interval_of_the_difference(values, seed):
    ours = mean_difference(*values, 0.95, 500, seed)
    swapped = mean_difference(*reversed(values), 0.95, 500, seed)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx(
        (-swapped.estimate, -swapped.high, -swapped.low), abs=1e-9
    )


@FEW
@given(both(positive), st.integers(0, 3))
def test_swapping_the_arms_inverts_the_interval_of_the_ratio(values, seed):
    ours = ratio_of_means(*values, 0.95, 500, seed)
    swapped = ratio_of_means(*reversed(values), 0.95, 500, seed)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx(
        (1 / swapped.estimate, 1 / swapped.high, 1 / swapped.low)
    )


@FEW
@given(both(shares), st.integers(0, 3))
def test_the_interval_lies_within_the_differences_and_the_same_seed_repeats_it(values, seed):
    found = mean_difference(*values, 0.95, 500, seed)
    differences = values[1] - values[0]
    assert differences.min() - 1e-9 <= found.low <= found.high <= differences.max() + 1e-9
    assert found == mean_difference(*values, 0.95, 500, seed)


@pytest.mark.slow
@pytest.mark.parametrize("draw", ["normal", "skewed"])
def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100(draw):
    rng = np.random.default_rng(7)
    held = 0
    for seed in range(400):
        hard = rng.uniform(0, 1, 30)  # how hard an example is: common to both arms
        noise = rng.normal(0.1, 0.2, 30) if draw == "normal" else rng.exponential(0.1, 30)
        found = mean_difference(hard, hard + noise, 0.95, 400, seed)
        held += found.low <= 0.1 <= found.high
    # Binomial(400, 0.95) is above 0.918 in 99.7 % of the cases; skewed samples of 30 fall short a little more.
    assert held / 400 >= (0.92 if draw == "normal" else 0.89)


@pytest.mark.slow
def test_the_interval_of_a_ratio_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(12)
    held = 0
    for seed in range(1000):
        tokens = rng.gamma(4, 10, 40)  # how long an answer is: common to both arms
        champion, candidate = tokens * rng.gamma(20, 0.05, 40), 1.3 * tokens * rng.gamma(20, 0.05, 40)
        found = ratio_of_means(champion, candidate, 0.95, 300, seed)
        held += found.low <= 1.3 <= found.high
    # A t interval of the linearised ratio holds it 94.6 times in 100 here; a bootstrap of 40 loses about one more.
    assert held / 1000 >= 0.92


def test_pairing_takes_out_how_hard_an_example_is():
    rng = np.random.default_rng(1)
    hard = rng.uniform(0, 1, 60)
    paired = mean_difference(hard, hard + 0.05 + rng.normal(0, 0.01, 60), 0.95, 2000, 0)
    shuffled = mean_difference(hard, rng.permutation(hard) + 0.05, 0.95, 2000, 0)
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)
