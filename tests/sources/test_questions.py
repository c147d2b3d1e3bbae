from itertools import product

import pyarrow as pa
import pytest

from millrace.applications import Application, load_application
from millrace.lakehouse.tables import SILVER_DOCUMENTS
from millrace.settings import Settings
from millrace.sources.questions import MAX_ANSWER_WORDS, derive_questions, first_sentence
from millrace.sources.reading import read_source


def silver(application: Application) -> pa.Table:
    """What refining makes of an application's sources, without a lake."""
    rows = [
        {
            "document_id": document.document_id,
            "content_hash": document.version_hash,
            "source": document.source,
            "uri": document.uri,
            "section": document.section,
            "title": document.title,
            "text": document.content.decode(),
        }
        for source in application.sources
        for document in read_source(source)
    ]
    return pa.Table.from_pylist(rows, schema=SILVER_DOCUMENTS.rows_schema)


@pytest.fixture(scope="module")
def reference() -> Application:
    """The application that ships."""
    return load_application(Settings(), "qa")


@pytest.fixture(scope="module")
def documents(reference: Application) -> pa.Table:
    return silver(reference)


def test_the_reference_application_has_enough_questions_in_each_split(
    documents: pa.Table, reference: Application
) -> None:
    splits = [question.split for question in derive_questions(documents, reference)]
    assert splits.count("training") >= 120
    assert splits.count("evaluation") >= 60
    assert splits.count("live") >= 150


def test_every_answer_stands_in_its_document(documents: pa.Table, reference: Application) -> None:
    texts = {row["document_id"]: " ".join(row["text"].split()) for row in documents.to_pylist()}
    for question in derive_questions(documents, reference):
        assert question.answer.rstrip(".") in texts[question.document_id]
        assert 1 <= len(question.answer.split()) <= MAX_ANSWER_WORDS


def test_the_order_of_the_documents_changes_nothing(documents: pa.Table, reference: Application) -> None:
    backwards = documents.take(list(range(documents.num_rows))[::-1])
    assert derive_questions(backwards, reference) == derive_questions(documents, reference)


def test_no_question_has_nearly_the_same_words_in_another_split(documents: pa.Table, reference: Application) -> None:
    questions = derive_questions(documents, reference)
    words = {question.question_id: set(question.question.lower().split()) for question in questions}
    assert len(words) == len(questions) == len({question.question for question in questions})
    evaluation = [words[q.question_id] for q in questions if q.split == "evaluation"]
    others = [words[q.question_id] for q in questions if q.split != "evaluation"]
    assert max(len(a & b) / len(a | b) for a, b in product(evaluation, others)) < 0.85


def test_other_documents_yield_no_questions(reference: Application) -> None:
    topics = reference.model_copy(update={"sources": reference.sources[1:]})
    assert derive_questions(silver(topics), reference) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("One thing. Another.", "One thing."),
        ("Set in airflow.cfg for version 2.0 of it. Next", "Set in airflow.cfg for version 2.0 of it."),
        ("Choose one, e.g. Local or another. Next.", "Choose one, e.g. Local or another."),
        ("Without an end\n\nnext paragraph", "Without an end."),
        ("Broken\nover lines.\nNext line.", "Broken over lines."),
        ("", ""),
    ],
)
def test_the_first_sentence_ends_where_a_reader_ends_it(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence
