"""Evaluation sets: questions with known answers that nobody trains on, frozen, so that two gates mean the same.

A set's id is the hash of its examples. Another corpus gives another set with another id; the old one stays, with
every evaluation that refers to it. Knows nothing of releases, and nothing of what is done with a set.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.errors import MillraceError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_EVALUATION_EXAMPLES, SILVER_DOCUMENTS
from millrace.settings import Settings
from millrace.sources.questions import Question, derive_questions


@dataclass(frozen=True)
class Example:
    """One question of a set. `example_id` is the question's id."""

    example_id: str
    section: str | None
    question: str
    answer: str
    document_id: str
    """The document that holds the answer."""


def freeze_evaluation_set(settings: Settings, application: Application, *, run: str) -> str:
    """The id of the evaluation set that the current documents give, written if it wasn't there.

    Raises:
        MillraceError: the documents give no evaluation question.
    """
    lake = Lake.of(settings, application.name)
    questions = derive_questions(lake.read(SILVER_DOCUMENTS), application)
    chosen = sample([q for q in questions if q.split == "evaluation"], application.gate.max_examples)
    if not chosen:
        raise MillraceError(
            f"application {application.name!r}: the documents give {len(questions)} questions, none for evaluation; "
            "ingest documents first, or name sections that exist in [questions] evaluation_sections"
        )
    set_id = evaluation_set_id(chosen)
    rows = [{"evaluation_set": set_id} | asdict(example) for example in chosen]
    lake.merge(
        GOLD_EVALUATION_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_EVALUATION_EXAMPLES.rows_schema), run=run
    )
    return set_id


def read_evaluation_set(lake: Lake, set_id: str) -> list[Example]:
    """The examples of a frozen set, in the order of their ids.

    Raises:
        MillraceError: there is no such set, or its examples are no longer those that its id was made from.
    """
    columns = ["example_id", "section", "question", "answer", "document_id"]
    rows = lake.read(GOLD_EVALUATION_EXAMPLES, columns, where=pc.field("evaluation_set") == set_id)
    examples = [Example(**row) for row in rows.sort_by("example_id").to_pylist()]
    if not examples or evaluation_set_id(examples) != set_id:
        raise MillraceError(
            f"evaluation set {set_id} has {len(examples)} examples in gold/evaluation_examples and they don't give "
            "its id; freeze a set with freeze_evaluation_set and use the id that it returns"
        )
    return examples


def sample(questions: Sequence[Question], size: int) -> list[Example]:
    """At most `size` examples, each section in proportion to its questions, the same ones every time.

    Within a section the order is that of a hash, so a corpus that grows keeps most of its examples.
    """
    sections: dict[str | None, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: _hash(q.question_id)):
        sections[question.section].append(question)
    # Each section's questions, spread evenly over 0 to 1: the lowest `size` are in proportion.
    spread = [
        ((rank + 0.5) / len(members), _hash(question.question_id), question)
        for members in sections.values()
        for rank, question in enumerate(members)
    ]
    chosen = [question for _, _, question in sorted(spread, key=lambda item: item[:2])[:size]]
    return sorted(
        (Example(q.question_id, q.section, q.question, q.answer, q.document_id) for q in chosen),
        key=lambda example: example.example_id,
    )


def evaluation_set_id(examples: Sequence[Example]) -> str:
    """`set-` and 16 hexadecimal digits, of the examples whatever their order."""
    content = sorted(json.dumps(asdict(example), sort_keys=True) for example in examples)
    return f"set-{_hash(json.dumps(content))[:16]}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
