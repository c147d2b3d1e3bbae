"""The laws of a sample, which every table that is sampled rests on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from millrace.policies import Sample

SHARES = st.floats(0.001, 1)


@given(st.text(), SHARES, SHARES)
def test_a_larger_share_holds_the_smaller_one(key: str, one: float, other: float) -> None:
    small, large = (Sample(share=share) for share in sorted((one, other)))
    assert large.takes(key, "source/s") or not small.takes(key, "source/s")
    assert Sample(share=1).takes(key, "source/s")


@given(st.text(), SHARES)
def test_a_stratum_is_taken_by_its_own_share(key: str, share: float) -> None:
    sample = Sample(share=share, strata={"rating/bad": 1, "rating/none": 0})
    assert sample.takes(key, "rating/bad")
    assert not sample.takes(key, "rating/none")
    assert sample.takes(key, "rating/good") == Sample(share=share).takes(key, "section/x")
    assert sample.takes(key, "rating/none", "rating/bad")


def test_the_share_is_the_share_and_another_salt_takes_others() -> None:
    keys = [f"key {number}" for number in range(10_000)]
    first, second = (
        {key for key in keys if Sample(share=0.2, salt=salt).takes(key, "source/s")} for salt in ("1", "2")
    )
    assert len(first) == pytest.approx(2000, abs=200)  # five standard deviations
    assert len(first & second) == pytest.approx(400, abs=100)
    # For good: these very keys, on every machine and by every later version.
    assert [key for key in keys[:40] if key in first] == [
        f"key {number}" for number in (0, 1, 2, 6, 8, 19, 20, 23, 26, 36)
    ]


def test_a_stratum_that_there_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="rating/terrible"):
        Sample(strata={"rating/terrible": 0.5})
