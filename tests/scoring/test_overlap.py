import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.scoring.overlap import exact_match, ndcg, normalised_words, recall_at_k, token_f1

TEXT = st.text(alphabet="abc the.,'-AB \n", max_size=40)
IDS = st.lists(st.sampled_from("abcdefgh"), max_size=8, unique=True)


def test_case_punctuation_and_articles_do_not_count() -> None:
    assert normalised_words("The  answer, is:\nan `Egg`!") == ["answer", "is", "egg"]
    assert exact_match("The Egg.", "egg") == 1
    assert exact_match("egg the hen", "hen egg") == 0


def test_f1_is_that_of_squad() -> None:
    # 2 common of 4 and 3 words: precision 1/2, recall 2/3.
    assert token_f1("red green blue white", "green blue black") == pytest.approx(
        2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3)
    )
    assert token_f1("yes yes yes", "yes") == pytest.approx(0.5)


def test_an_empty_answer_scores_nothing_against_a_text() -> None:
    assert token_f1("", "egg") == token_f1("egg", " the ") == 0
    assert token_f1("", "a") == 1


@given(TEXT, TEXT)
def test_f1_is_symmetric_between_zero_and_one_and_one_for_a_match(left: str, right: str) -> None:
    assert token_f1(left, right) == token_f1(right, left)
    assert 0 <= token_f1(left, right) <= 1
    assert token_f1(left, left) == 1
    assert exact_match(left, right) <= token_f1(left, right)


def test_recall_counts_what_was_found_among_the_first() -> None:
    assert recall_at_k(["x", "a", "b"], {"a", "b"}, 2) == 0.5
    assert recall_at_k(["x", "a", "b"], {"a", "b"}, 3) == 1
    assert recall_at_k([], {"a"}, 5) == 0


def test_ndcg_discounts_by_rank() -> None:
    assert ndcg(["x", "a"], {"a"}, 5) == pytest.approx(1 / math.log2(3))
    assert ndcg(["a", "x", "b"], {"a", "b"}, 5) == pytest.approx((1 + 1 / 2) / (1 + 1 / math.log2(3)))
    assert ndcg(["a", "a"], {"a"}, 5) == 1


@given(IDS, st.sets(st.sampled_from("abcdefgh")), st.integers(1, 8))
def test_retrieval_scores_stay_between_zero_and_one_and_grow_with_a_better_order(
    found: list[str], relevant: set[str], k: int
) -> None:
    better = sorted(found, key=lambda item: item not in relevant)
    for score in (recall_at_k, ndcg):
        assert 0 <= score(found, relevant, k) <= score(better, relevant, k) <= 1
    assert recall_at_k(found, relevant, k) <= recall_at_k(found, relevant, k + 1)
