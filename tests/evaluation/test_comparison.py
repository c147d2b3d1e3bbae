"""The gate's criteria: what passes, what is refused, and with which words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from millrace.applications import Gate
from millrace.errors import MillraceError
from millrace.evaluation.comparison import Scores, compare
from millrace.scoring.bootstrap import ratio_of_means

POLICY = Gate(resamples=500)
FEW = budget(max_examples=40, deadline=None)

positive = st.floats(0.001, 1000)
pairs = st.integers(5, 40).flatmap(lambda n: st.tuples(*[arrays(float, n, elements=positive)] * 2))


def scores(quality: np.ndarray, seconds: np.ndarray | None = None) -> Scores:
    n = len(quality)
    return Scores(quality, np.ones(n), np.ones(n) if seconds is None else seconds, np.full(n, 1e-5))


@FEW
@given(pairs, st.integers(0, 3))
def test_a_release_compared_with_itself_passes_every_criterion(values, seed):
    arm = Scores(values[0] / 1000, (values[1] > 500) * 1.0, *values)
    criteria = compare(arm, arm, Gate(resamples=200, quality_margin=0, retrieval_margin=0, latency_ratio=1), seed=seed)
    assert all(c.passed for c in criteria), criteria
    assert [(c.low, c.estimate, c.high) for c in criteria[:2]] == [(0, 0, 0)] * 2
    assert [(c.low, c.estimate, c.high) for c in criteria[2:]] == [(1, 1, 1)] * 2


def test_a_worse_release_is_refused_with_the_numbers_in_the_sentence():
    good, bad = scores(np.tile([0.8, 0.6], 30)), scores(np.tile([0.5, 0.4], 30), seconds=np.full(60, 2.0))
    quality, retrieval, latency, cost = compare(good, bad, POLICY, seed=0)
    assert (quality.passed, retrieval.passed, latency.passed, cost.passed) == (False, True, False, True)
    assert "from 0.700 to 0.450" in quality.why
    assert "does not exclude a loss worse than 0.02" in quality.why
    assert latency.estimate == 2
    assert "reaches beyond 1.5" in latency.why


def test_a_small_loss_within_the_margin_passes_only_once_enough_examples_exclude_a_larger_one():
    rng = np.random.default_rng(3)
    policy = Gate(resamples=1000, quality_margin=0.05)
    verdicts = []
    for n in (8, 400):
        loss = rng.normal(-0.01, 0.1, n)
        verdicts.append(compare(scores(np.full(n, 0.5)), scores(0.5 + loss), policy, seed=0)[0].passed)
    assert verdicts == [False, True]


def test_several_questions_of_one_document_tell_no_more_than_one_of_each():
    rng = np.random.default_rng(5)
    once = [scores(rng.random(40), rng.random(40) + 1) for _ in range(2)]
    asked = [scores(np.repeat(one.quality, 5), np.repeat(one.seconds, 5)) for one in once]
    documents = [f"d{n // 5}" for n in range(200)]
    told = [
        [(c.low, c.estimate, c.high) for c in compare(*arms, POLICY, seed=0, documents=of)]
        for arms, of in ((once, None), (asked, documents), (asked, None))
    ]
    assert told[1] == [pytest.approx(interval) for interval in told[0]]
    assert told[2][0][0] > told[1][0][0], "as if they were 200"


def test_of_too_few_documents_questions_are_drawn():
    rng = np.random.default_rng(6)
    arms = [scores(rng.random(40)) for _ in range(2)]
    assert compare(*arms, POLICY, seed=0, documents=["a", "b"] * 20) == compare(*arms, POLICY, seed=0)


def test_prices_of_nothing_cost_the_same_and_something_instead_of_nothing_is_refused():
    nothing, something = np.zeros(10), np.ones(10)
    assert ratio_of_means(nothing, nothing, 0.95, 100, 0).high == 1
    assert ratio_of_means(nothing, something, 0.95, 100, 0).low == pytest.approx(1e9)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_a_time_that_cannot_be_is_refused(value):
    with pytest.raises(MillraceError, match="finite and not negative"):
        ratio_of_means(np.ones(6), np.array([1, 1, 1, 1, 1, value]), 0.95, 100, 0)


def test_too_few_or_unequal_examples_are_refused():
    with pytest.raises(MillraceError, match="at least 5"):
        compare(scores(np.ones(4)), scores(np.ones(4)), POLICY, seed=0)
    with pytest.raises(MillraceError, match="same examples"):
        compare(scores(np.ones(6)), scores(np.ones(7)), POLICY, seed=0)
