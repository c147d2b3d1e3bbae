"""Questions whose answers a model can learn: documents' own, and what users said the answer should have been. And those
that nobody may train on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_EVALUATION_EXAMPLES
from millrace.releases.pipeline import MAX_QUESTION
from millrace.scoring.overlap import normalised_words
from millrace.sources.questions import Question

LOW_RATING = 0.5
"""An answer rated below this was wrong, so that its correction is worth learning."""
MAX_CORRECTION = 1000
"""Characters. A longer correction is an essay, not an answer."""


@dataclass(frozen=True)
class Asked:
    """A question whose answer is known, before it has a prompt."""

    question: str
    answer: str
    origin: Literal["document", "correction", "teacher"]
    simulated: bool
    section: str | None
    document_id: str | None
    """The document that holds the answer; None: nobody knows which."""

    @property
    def example_id(self) -> str:
        return content_hash(self.question, self.answer)


def known_answers(derived: Iterable[Question]) -> list[Asked]:
    """The training questions that documents answer."""
    return [
        Asked(q.question, q.answer, "document", False, q.section, q.document_id)
        for q in derived
        if q.split == "training"
    ]


def corrections(feedback: pa.Table) -> Iterator[Asked]:
    """What users said the answer should have been: the latest for each question."""
    latest: dict[str, Asked] = {}
    for row in feedback.sort_by([("occurred_at", "ascending"), ("completion_id", "ascending")]).to_pylist():
        correction, question = (row["correction"] or "").strip(), row["question"].strip()
        if row["rating"] >= LOW_RATING or not 0 < len(correction) <= MAX_CORRECTION:
            continue
        if 0 < len(question) <= MAX_QUESTION:
            latest[same_words(question)] = Asked(question, correction, "correction", row["simulated"], None, None)
    yield from latest.values()


def held_out_questions(lake: Lake, derived: Iterable[Question]) -> list[str]:
    """What the gate asks, or may ask."""
    asked = {question.question for question in derived if question.split == "evaluation"}
    return sorted(asked | set(lake.read(GOLD_EVALUATION_EXAMPLES, ["question"])["question"].to_pylist()))


def same_words(text: str) -> str:
    """The same for what differs in case and punctuation only."""
    return " ".join(normalised_words(text)) or text
