"""The questions of a study: none that the gate or live traffic asks, in parts that share no document."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import PromptError
from millrace.prompts.development import LEAST, choose_development
from millrace.sources.questions import Question, Split

WORDINGS = ("What does {} do?", "What is the default of {}?", "Which version added {}?")


def questions(documents: int, split: Split = "training", first: int = 0) -> list[Question]:
    return [
        Question(f"q{n}.{k}", wording.format(f"option_{n}"), f"answer {n} {k}", f"d{n}", "core", split)
        for n in range(first, first + documents)
        for k, wording in enumerate(WORDINGS)
    ]


def of(found: Sequence[Question]) -> set[str]:
    return {question.document_id for question in found}


@pytest.mark.slow
@given(st.integers(20, 60), st.integers(0, 4), st.integers(LEAST, 40), st.integers(LEAST, 40))
def test_the_parts_share_no_document_and_are_the_same_every_time(
    documents: int, examples: int, search: int, held_out: int
) -> None:
    asked = questions(documents)
    found = choose_development(asked, (), examples=examples, search=search, held_out=held_out)
    assert len(found.examples) == examples
    assert len(found.search) <= search
    assert len(found.held_out) <= held_out
    assert not of(found.search) & of(found.held_out)
    shown = {question.document_id for question in asked if question.question in {e.question for e in found.examples}}
    assert not shown & (of(found.search) | of(found.held_out))
    again = choose_development(asked[::-1], (), examples=examples, search=search, held_out=held_out)
    assert again == found


@pytest.mark.slow
@given(st.integers(30, 60), st.integers(1, 20))
def test_what_a_prompt_shows_is_never_asked_however_the_documents_grow(documents: int, more: int) -> None:
    before, after = (
        choose_development(questions(count), (), examples=200, search=200, held_out=200)
        for count in (documents, documents + more)
    )
    assert {shown.question for shown in before.examples} <= {shown.question for shown in after.examples}
    assert of(before.search) <= of(after.search)


def test_nothing_for_evaluation_or_live_traffic_nor_nearly_the_same_is_asked() -> None:
    asked = [*questions(30), *questions(10, "evaluation", 30), *questions(10, "live", 40)]
    near = Question("near", "what DOES option_31 do", "answer", "d99", "core", "training")
    found = choose_development([*asked, near], (), examples=4, search=200, held_out=200)
    chosen = [q.question for q in (*found.search, *found.held_out)] + [example.question for example in found.examples]
    assert {q.split for q in (*found.search, *found.held_out)} == {"training"}
    assert len(chosen) > 60
    assert near.question not in chosen
    kept_out = {q.question for q in asked if q.split != "training"}
    assert not kept_out & set(chosen)


def test_what_the_champion_was_trained_on_comes_last_and_is_counted() -> None:
    asked = questions(30)
    trained = {question.question for question in asked if question.question_id.endswith((".0", ".1"))}
    found = choose_development(asked, trained, examples=2, search=8, held_out=14)
    assert not trained & {question.question for question in found.search}
    # One question of each document is new to the champion.
    new = len({question.document_id for question in found.held_out})
    assert found.seen == 14 - new > 0
    assert sum(question.question in trained for question in found.held_out) == 14 - new


def test_worked_examples_are_of_different_kinds() -> None:
    found = choose_development(questions(60), (), examples=3, search=10, held_out=10)
    assert len({example.question.split()[1] for example in found.examples}) == 3


def test_too_few_questions_are_refused_with_their_number() -> None:
    with pytest.raises(PromptError, match="the documents give 12 development questions: 6 to search with and 6 held"):
        choose_development(questions(4), (), examples=1, search=20, held_out=20)
