"""Drift: found where it is, rarely where it isn't, and not judged on a handful of users."""

from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_DRIFT_HOURLY
from millrace.monitoring.drift import DRIFTED, QUESTIONS, SAME, TOO_FEW, Compared, compare_window, measure_drift
from millrace.monitoring.observed import Exchange
from millrace.monitoring.windows import Window, as_text
from millrace.policies import Monitor
from millrace.settings import Settings
from tests.monitoring.silver import HOUR, NOON, exchange, write

WORDS = [f"word{n}" for n in range(400)]
WEEK = timedelta(days=7)


def asked(
    rng: np.random.Generator, users: int, *, words: float = 8, rate: float = 1.0, first: int = 0, vocabulary: int = 200
) -> list[Exchange]:
    """One exchange each of `users` users: question and answer about `words` long, seconds about 1/`rate`."""
    return [
        Exchange(
            completion_id=f"c{first + n}-{rng.integers(1 << 60)}",
            occurred_at=NOON,
            user=f"u{first + n}",
            simulated=True,
            question=" ".join(rng.choice(WORDS[:vocabulary], 1 + rng.poisson(words))),
            answer=" ".join(rng.choice(WORDS, 1 + rng.poisson(words))),
            state="completed",
            error=None,
            release_id="rel-1",
            release_version="1",
            index_build="b",
            rollout_id=None,
            pinned=False,
            fell_back=False,
            from_cache=False,
            prompt_tokens=1,
            completion_tokens=1,
            seconds=float(rng.exponential(1 / rate)),
            cost_usd=0.0,
        )
        for n in range(users)
    ]


def by_column(found: list[tuple[str, Compared]]) -> dict[str, Compared]:
    return {compared.column: compared for _, compared in found}


@pytest.mark.slow
def test_windows_without_drift_are_called_drifted_no_more_often_than_declared() -> None:
    """The declared rate here is 10 %, so that 300 windows can show it; the size asked for is none."""
    policy = Monitor(drift_error_rate=0.1, drift_size=0)
    rng = np.random.default_rng(7)
    everybody = asked(rng, 3000)
    drifted = 0
    for _ in range(300):
        drawn = [everybody[n] for n in rng.choice(len(everybody), 260, replace=False)]
        found = compare_window(drawn[:60], drawn[60:], policy)
        drifted += any(compared.verdict == DRIFTED for _, compared in found)
    # 10 % of 300 and three standard deviations.
    assert drifted <= 30 + 3 * 5.2
    assert drifted > 0, "a test that never calls anything drifted shows nothing"


@pytest.mark.parametrize(
    ("changed", "column"),
    [
        ({"words": 20}, "question_words"),
        ({"rate": 0.3}, "seconds"),
        ({"words": 20}, "answer_words"),
        ({"vocabulary": 400}, "question_new_words"),
    ],
)
def test_what_changed_is_found_by_name(changed: dict[str, Any], column: str) -> None:
    rng = np.random.default_rng(1)
    found = by_column(compare_window(asked(rng, 200, **changed), asked(rng, 1000, first=1000), Monitor()))
    assert found[column].verdict == DRIFTED
    assert found[column].adjusted is not None
    assert found[column].adjusted >= (found[column].p_value or 0)


@pytest.mark.slow
def test_a_distance_that_does_not_matter_is_no_drift_however_certain() -> None:
    rng = np.random.default_rng(2)
    policy = Monitor(drift_reference=5000)
    found = by_column(compare_window(asked(rng, 5000, rate=1.2), asked(rng, 5000, first=10_000), policy))
    assert found["seconds"].p_value is not None
    assert found["seconds"].p_value < 1e-6
    assert found["seconds"].verdict == SAME


def test_too_few_users_are_said_to_be_too_few_whatever_they_do() -> None:
    rng = np.random.default_rng(3)
    few = asked(rng, 10, words=50)
    found = compare_window(few * 20, asked(rng, 500, first=1000), Monitor())
    assert {compared.verdict for _, compared in found} == {TOO_FEW}
    assert by_column(found)["question_words"].users == 10, "one user counts once"


def test_a_new_release_has_nothing_to_be_compared_with_and_its_questions_have() -> None:
    rng = np.random.default_rng(4)
    new = [Exchange(**vars(one) | {"release_id": "rel-2"}) for one in asked(rng, 100)]
    found = compare_window(new, asked(rng, 500, first=1000), Monitor())
    assert {release: compared.verdict for release, compared in found} == {QUESTIONS: SAME, "rel-2": TOO_FEW}


def test_users_who_always_ask_the_same_are_no_drift() -> None:
    """Half of them gave the words that nothing of theirs is new to."""
    rng = np.random.default_rng(6)
    regulars = [
        Exchange(**vars(each) | {"question": f"what about topic{n} and its part{n}"})
        for n, each in enumerate(asked(rng, 200))
    ]
    again = [Exchange(**vars(each) | {"completion_id": f"again{n}"}) for n, each in enumerate(regulars)]
    found = by_column(compare_window(again, regulars, Monitor()))
    assert found["question_new_words"].verdict == SAME
    assert found["question_new_words"].users == 100


def test_a_cached_answer_says_nothing_of_seconds() -> None:
    rng = np.random.default_rng(5)
    cached = [Exchange(**vars(one) | {"from_cache": True, "seconds": 0.001}) for one in asked(rng, 200)]
    found = by_column(compare_window(cached, asked(rng, 500, first=1000), Monitor()))
    assert found["seconds"].verdict == TOO_FEW


@pytest.mark.slow
def test_a_window_is_compared_with_the_week_before_and_repeated_writes_nothing(
    lake: Lake, settings: Settings, qa: Application
) -> None:
    policy = qa.monitor.model_copy(update={"drift_minimum": 20})
    application = qa.model_copy(update={"monitor": policy})
    before = [exchange(NOON - HOUR * n, question="what is it", answer="it is") for n in range(1, 41)]
    older = [exchange(NOON - WEEK - HOUR * n, question="long ago " * 20) for n in range(1, 41)]
    pinned = [exchange(NOON - HOUR * n, question="pinned " * 20, pinned=True) for n in range(1, 41)]
    now = [exchange(NOON + timedelta(seconds=n), question="what is it now " * 5, answer="it is") for n in range(40)]
    write(lake, before + older + pinned + now)
    measured = {"windows": as_text([Window(NOON, NOON + HOUR)])}

    first = measure_drift(settings, application, measured, run="test", now=NOON + HOUR)

    assert first["changed"]
    rows = {row["column"]: row for row in lake.read(GOLD_DRIFT_HOURLY).to_pylist()}
    assert (rows["question_words"]["users"], rows["question_words"]["reference_users"]) == (40, 40)
    assert rows["question_words"]["verdict"] == DRIFTED
    assert rows["answer_words"]["verdict"] == SAME
    assert not measure_drift(settings, application, measured, run="again", now=NOON + HOUR)["changed"]


def test_a_window_that_is_not_over_is_not_compared_yet(lake: Lake, settings: Settings, qa: Application) -> None:
    write(lake, [exchange(NOON)])
    measured = {"windows": as_text([Window(NOON, NOON + HOUR)])}
    measure_drift(settings, qa, measured, run="test", now=NOON + HOUR / 2)
    assert not lake.exists(GOLD_DRIFT_HOURLY)
