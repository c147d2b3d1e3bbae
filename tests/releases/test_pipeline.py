from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import EngineError, ReleaseError, RetrievalError
from millrace.releases.loader import ReleaseLoader
from millrace.releases.pipeline import MAX_QUESTION, AnswerPipeline, _stripped, checked_question
from tests.releases.conftest import Answering

QUESTION = "How many task instances may the scheduler run at the same time?"


@pytest.fixture(scope="module")
def pipeline(answering: Answering) -> Iterator[AnswerPipeline]:
    loader = ReleaseLoader(answering.settings, answering.application)
    yield loader.load(answering.declared)
    loader.close()


@given(st.lists(st.text(alphabet="ab \n", max_size=4)))
def test_streamed_pieces_are_the_stripped_whole(pieces: list[str]) -> None:
    assert "".join(_stripped(iter(pieces))) == "".join(pieces).strip()
    assert all(_stripped(iter(pieces)))


@pytest.mark.parametrize(
    ("question", "said"), [("", "is empty"), (" \n\t", "is empty"), ("x" * (MAX_QUESTION + 1), "4001 characters")]
)
def test_a_question_that_can_not_be_answered_is_refused(question: str, said: str) -> None:
    with pytest.raises(ReleaseError, match=said):
        checked_question(question)


@pytest.mark.model
def test_an_answer_names_all_that_it_takes_to_repeat_it(pipeline: AnswerPipeline, answering: Answering) -> None:
    answer = pipeline.answer(f"  {QUESTION}\n")
    assert answer.text == answer.text.strip() != ""
    assert answer.release_id == pipeline.release_id
    assert answer.index_build == answering.build
    assert len(answer.citations) == 2
    assert answer.usage.prompt_tokens > 50
    assert 0 < answer.usage.completion_tokens <= 48
    assert answer.seconds > 0
    again = pipeline.answer(QUESTION, build=answering.build)
    assert (again.text, again.citations, again.usage) == (answer.text, answer.citations, answer.usage)


@pytest.mark.model
def test_a_stream_gives_the_same_answer_and_its_account_at_the_end(pipeline: AnswerPipeline) -> None:
    whole = pipeline.answer(QUESTION)
    stream = pipeline.stream(QUESTION)
    with pytest.raises(EngineError, match="still running"):
        _ = stream.answer
    assert "".join(stream) == whole.text == stream.answer.text
    assert (stream.answer.citations, stream.answer.usage) == (whole.citations, whole.usage)
    assert stream.answer.seconds == stream.answer.seconds > 0


@pytest.mark.model
def test_a_stream_that_is_closed_accounts_for_what_there_was(pipeline: AnswerPipeline) -> None:
    stream = pipeline.stream(QUESTION)
    first = next(stream)
    stream.close()
    assert stream.answer.finish_reason == "cancelled"
    assert stream.answer.text.startswith(first.strip())
    assert stream.answer.citations


@pytest.mark.model
def test_chunks_that_do_not_fit_are_dropped_from_the_end_and_counted(pipeline: AnswerPipeline) -> None:
    every = pipeline.prepare(QUESTION)
    assert (len(every.hits), every.dropped) == (2, 0)
    long = "Why is it so that words go on and on? " * 104
    many = pipeline.manifest.model_copy(
        update={"retrieval": pipeline.manifest.retrieval.model_copy(update={"chunks": 30})}
    )
    prepared = AnswerPipeline(many, pipeline.engine, pipeline.retriever).prepare(long[:MAX_QUESTION])
    assert 0 < len(prepared.hits) < 30
    assert len(prepared.hits) + prepared.dropped == 30
    assert pipeline.engine.count_tokens(prepared.messages) <= 2048
    assert list(prepared.hits) == pipeline.retriever.search(prepared.question, 30)[: len(prepared.hits)]
    with pytest.raises(ReleaseError, match="tokens with its prompt, 2048 fit"):
        pipeline.prepare("🜛🜚" * (MAX_QUESTION // 2))


@pytest.mark.model
def test_an_index_build_that_is_not_there_is_named(pipeline: AnswerPipeline) -> None:
    with pytest.raises(RetrievalError, match="no-such-build"):
        pipeline.answer(QUESTION, build="no-such-build")
