"""Evaluation sets from real documents, in a real Delta table."""

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from millrace.applications import Application, Questions
from millrace.errors import MillraceError
from millrace.evaluation.sets import evaluation_set_id, freeze_evaluation_set, read_evaluation_set, sample
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_EVALUATION_EXAMPLES
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from millrace.sources.questions import Question

questions = st.lists(
    st.builds(
        Question,
        question_id=st.uuids().map(str),
        question=st.text(min_size=1, max_size=5),
        answer=st.just("yes"),
        document_id=st.just("d"),
        section=st.sampled_from(["a", "b", "c", None]),
        split=st.just("evaluation"),
    ),
    max_size=60,
    unique_by=lambda q: q.question_id,
)


@budget(max_examples=50, deadline=None)
@given(questions, st.integers(1, 40), st.randoms())
def test_a_sample_is_the_same_in_any_order_and_takes_each_section_in_proportion(found, size, chance):
    chosen = sample(found, size)
    shuffled = list(found)
    chance.shuffle(shuffled)
    assert chosen == sample(shuffled, size)
    assert len(chosen) == min(size, len(found))
    for section in {q.section for q in found}:
        due = sum(q.section == section for q in found) * len(chosen) / len(found)
        # Three other sections may each be rounded against this one.
        assert abs(sum(example.section == section for example in chosen) - due) <= 2


@budget(max_examples=30, deadline=None)
@given(questions.filter(bool), st.randoms())
def test_the_id_of_a_set_depends_on_its_examples_and_not_on_their_order(found, chance):
    examples = sample(found, 100)
    shuffled = list(examples)
    chance.shuffle(shuffled)
    assert evaluation_set_id(examples) == evaluation_set_id(shuffled)
    assert evaluation_set_id(examples) != evaluation_set_id(examples[1:])


@pytest.mark.slow
def test_freezing_again_writes_nothing_and_a_changed_corpus_gives_a_new_set_beside_the_old_one(
    settings: Settings, qa: Application, lake: Lake
):
    _ingest(settings, qa)
    first = freeze_evaluation_set(settings, qa, run="one")
    version = lake.version(GOLD_EVALUATION_EXAMPLES)
    assert freeze_evaluation_set(settings, qa, run="two") == first
    assert lake.version(GOLD_EVALUATION_EXAMPLES) == version
    examples = read_evaluation_set(lake, first)
    assert {example.section for example in examples} == {"triggerer"}

    grown = qa.model_copy(
        update={
            "sources": (qa.sources[0].model_copy(update={"sections": ("core", "triggerer", "smtp")}),),
            "questions": Questions(evaluation_sections=("triggerer", "smtp")),
        }
    )
    _ingest(settings, grown)
    second = freeze_evaluation_set(settings, grown, run="three")
    assert second != first
    assert {example.section for example in read_evaluation_set(lake, second)} == {"triggerer", "smtp"}
    assert read_evaluation_set(lake, first) == examples


def test_no_documents_and_no_evaluation_question_are_said_in_one_sentence(settings: Settings, qa: Application):
    with pytest.raises(MillraceError, match="0 questions, none for evaluation; ingest documents first"):
        freeze_evaluation_set(settings, qa, run="test")
    _ingest(settings, qa)
    nowhere = qa.model_copy(update={"questions": Questions(evaluation_sections=("nowhere",))})
    with pytest.raises(MillraceError, match="name sections that exist"):
        freeze_evaluation_set(settings, nowhere, run="test")


def test_a_set_that_is_not_there_is_refused(lake: Lake):
    with pytest.raises(MillraceError, match="set-1 has 0 examples"):
        read_evaluation_set(lake, "set-1")


def _ingest(settings: Settings, application: Application) -> None:
    land_documents(settings, application, run="test")
    refine_documents(settings, application, run="test")
