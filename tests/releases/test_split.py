from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import ReleaseError
from millrace.releases.split import BUCKETS, Split, assign, bucket

USERS = st.text(max_size=30)
SALTS = st.text(max_size=10)
SHARES = st.floats(0, 1)


def split(share: float, salt: str = "salt", challenger: str | None = "2") -> Split:
    return Split(sequence=4, rollout_id="rollout", epoch=1, champion="1", challenger=challenger, share=share, salt=salt)


@given(SHARES, SALTS, st.integers(0), st.none() | st.text())
def test_a_split_survives_its_json(share: float, salt: str, sequence: int, rollout: str | None) -> None:
    one = Split(sequence=sequence, rollout_id=rollout, champion=None, challenger="7", share=share, salt=salt)
    assert Split.model_validate_json(one.model_dump_json()) == one


@given(USERS, SALTS, SHARES)
def test_the_same_user_always_gets_the_same(user: str, salt: str, share: float) -> None:
    assert assign(split(share, salt), user) == assign(split(share, salt), user)
    assert 0 <= bucket(salt, user) < BUCKETS


@given(USERS, SALTS, SHARES, SHARES)
def test_who_met_the_challenger_keeps_it_while_the_share_grows(user: str, salt: str, one: float, other: float) -> None:
    less, more = sorted((one, other))
    if assign(split(less, salt), user).arm == "challenger":
        assert assign(split(more, salt), user).arm == "challenger"


@given(USERS, SALTS, SHARES)
def test_the_stated_probability_is_that_of_the_buckets(user: str, salt: str, share: float) -> None:
    assignment = assign(split(share, salt), user)
    assert assignment.probability == pytest.approx(share, abs=0.5 / BUCKETS)
    assert (assignment.arm == "challenger") == (bucket(salt, user) < round(assignment.probability * BUCKETS))
    assert assignment.version == ("2" if assignment.arm == "challenger" else "1")


@given(USERS, SHARES)
def test_without_a_challenger_or_a_share_everybody_gets_the_champion(user: str, share: float) -> None:
    alone = assign(split(share, challenger=None), user)
    assert (alone.version, alone.arm, alone.probability, alone.epoch) == ("1", None, 0, None)
    nobody = assign(split(0), user)
    assert (nobody.version, nobody.arm, nobody.probability) == ("1", "champion", 0)
    assert assign(split(1), user).arm == "challenger"


def test_buckets_are_uniform_over_users() -> None:
    users, cells = 100_000, 100
    counts = Counter(bucket("salt", f"user {number}") * cells // BUCKETS for number in range(users))
    expected = users / cells
    chi_square = sum((counts[cell] - expected) ** 2 / expected for cell in range(cells))
    assert chi_square < 149  # 0.999 quantile of χ² with 99 degrees of freedom


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5])
def test_a_share_of_users_meets_the_challenger_within_sampling_error(share: float) -> None:
    users = 20_000
    met = sum(assign(split(share), f"user {number}").arm == "challenger" for number in range(users))
    assert abs(met / users - share) < 4 * (share * (1 - share) / users) ** 0.5


def test_another_salt_draws_independently() -> None:
    users = [f"user {number}" for number in range(20_000)]
    first = {user for user in users if assign(split(0.25, "first"), user).arm == "challenger"}
    both = sum(assign(split(0.25, "second"), user).arm == "challenger" for user in first)
    assert abs(both / len(first) - 0.25) < 4 * (0.25 * 0.75 / len(first)) ** 0.5


def test_without_a_champion_nobody_is_assigned() -> None:
    with pytest.raises(ReleaseError, match="no release is champion yet"):
        assign(Split(sequence=0, champion=None), "user")


def test_a_split_of_an_unknown_format_or_with_an_impossible_share_is_refused() -> None:
    for wrong in ('{"format": 2, "sequence": 1, "champion": "1"}', '{"sequence": 1, "champion": "1", "share": 1.5}'):
        with pytest.raises(ValueError):
            Split.model_validate_json(wrong)
