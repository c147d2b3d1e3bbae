"""Questions with known answers, derived from documents whose text alone determines the answer.

Today these are the options of Airflow's configuration reference: what an option does, its default, the version
that added it. Documents of other kinds yield nothing: no answer to them is known to be
right. The same rows give the same questions, in the same words and the same split, everywhere.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from millrace.applications import Application
from millrace.applications import Questions as Sections
from millrace.lakehouse.content import content_hash
from millrace.sources.airflow_config import OptionFacts, read_facts

Split = Literal["training", "evaluation", "live"]

MAX_ANSWER_WORDS = 30

WORDINGS: dict[str, tuple[str, ...]] = {
    "purpose": (
        "What does the option [{section}] {name} do?",
        "What is [{section}] {name} for?",
        "Explain the setting [{section}] {name}.",
    ),
    "default": (
        "What is the default of [{section}] {name}?",
        "Which value does [{section}] {name} have by default?",
        "If nobody sets [{section}] {name}, what is its value?",
    ),
    "version": (
        "Which version of Airflow added [{section}] {name}?",
        "Since which version does Airflow have [{section}] {name}?",
        "In which version was the option [{section}] {name} added?",
    ),
}
"""Kind of question → ways to ask it; a hash of option and kind chooses one."""


@dataclass(frozen=True)
class Question:
    """A question whose answer is known, and the document that holds it."""

    question_id: str
    question: str
    answer: str
    """At most 30 words, as a person would answer."""
    document_id: str
    section: str | None
    split: Split


def derive_questions(documents: pa.Table, application: Application) -> list[Question]:
    """All questions that rows of `silver/documents` answer, in the order of their ids.

    An option whose name occurs in sections of different splits is left out: two questions that differ only in
    the section's name would put almost the same words on both sides.
    """
    options = [
        (row, facts)
        for row in documents.select(["document_id", "source", "section", "text"]).to_pylist()
        if row["source"] == "airflow_config" and (facts := read_facts(row["text"]))
    ]
    splits: defaultdict[str, set[Split]] = defaultdict(set)
    for _, facts in options:
        splits[facts.name].add(split_of(facts.section, application.questions))
    found = [
        question
        for row, facts in options
        if len(splits[facts.name]) == 1
        for question in _questions(row, facts, application.questions)
    ]
    return sorted(found, key=lambda question: question.question_id)


def split_of(section: str | None, declared: Sections) -> Split:
    """Where the questions of a section belong."""
    if section in declared.evaluation_sections:
        return "evaluation"
    return "live" if section in declared.live_sections else "training"


def first_sentence(text: str) -> str:
    """The first sentence of plain text, its whitespace joined; it ends with a full stop."""
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip(), maxsplit=1)[0].split())
    # A full stop inside e.g. a version or `airflow.cfg` is not followed by a capital letter.
    sentence = re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z\"'(\[])", paragraph, maxsplit=1)[0]
    return sentence.rstrip(" .:;") + "." if sentence else ""


def _questions(row: dict[str, Any], facts: OptionFacts, declared: Sections) -> Iterator[Question]:
    for kind, answer in _answers(facts):
        wordings = WORDINGS[kind]
        chosen = int(content_hash(facts.section, facts.name, kind), 16) % len(wordings)
        question = wordings[chosen].format(section=facts.section, name=facts.name)
        yield Question(
            question_id=content_hash(row["document_id"], question, answer),
            question=question,
            answer=answer,
            document_id=row["document_id"],
            section=row["section"],
            split=split_of(facts.section, declared),
        )


def _answers(facts: OptionFacts) -> Iterator[tuple[str, str]]:
    """Kind and answer of everything that can be asked of one option."""
    purpose = first_sentence(facts.description)
    if 4 <= len(purpose.split()) <= MAX_ANSWER_WORDS:
        yield "purpose", purpose
    # A long default (a template, a format, JSON) is nothing that a person would recite.
    if facts.default is not None and len(facts.default) <= 40 and len(facts.default.split()) <= 3:
        yield "default", facts.default
    if facts.version_added is not None:
        yield "version", facts.version_added
