"""Which questions a study works with: development questions only, in three parts that share no document.

Examples to show, questions to search with, questions held out for the comparison at the end. A document is in the same
part every time, whatever others there are. Pure.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from millrace.errors import PromptError
from millrace.lakehouse.content import content_hash
from millrace.prompts.templates import WorkedExample
from millrace.scoring.duplicates import near_duplicates
from millrace.sources.questions import Question

LEAST = 8
"""Questions to search with, questions held out, and documents that these are about, below which nothing can be told
apart."""

SHOWN_FROM = 5
"""Of so many documents, about one is for worked examples."""


@dataclass(frozen=True)
class Development:
    """The questions of a study."""

    examples: tuple[WorkedExample, ...]
    """To be shown in prompts; as different from each other as possible, so that the first few say most."""
    search: tuple[Question, ...]
    held_out: tuple[Question, ...]
    seen: int
    """How many of `search` and `held_out` the champion was trained on: it knows them whatever the prompt."""


def choose_development(
    questions: Sequence[Question], trained_on: Collection[str], *, examples: int, search: int, held_out: int
) -> Development:
    """At most so many of each, those that the champion was not trained on first.

    Args:
        questions: as `derive_questions` gives them. Those for evaluation and live traffic, and what is nearly one of
            them, are left out.
        trained_on: questions in the champion's training set.

    Raises:
        PromptError: too few.
    """
    kept_out = [question.question for question in questions if question.split != "training"]
    candidates = [question for question in questions if question.split == "training"]
    near = near_duplicates([question.question for question in candidates], kept_out)
    candidates = [question for position, question in enumerate(candidates) if position not in near]
    trained = frozenset(trained_on)

    def order(question: Question) -> tuple[bool, str]:
        return question.question in trained, content_hash("development", question.question_id)

    # Whole documents go to one part: two questions on one option would tell about each other.
    # By its name alone: examples that the champion shows stay examples, however the documents change.
    part = {one.document_id: int(content_hash("part", one.document_id), 16) % SHOWN_FROM for one in candidates}
    shown, *others = (
        sorted((q for q in candidates if part[q.document_id] in places), key=order) for places in ((0,), (1, 3), (2, 4))
    )
    found = Development(
        tuple(WorkedExample(q.question, q.answer) for q in _different(shown, examples)),
        tuple(others[0][:search]),
        tuple(others[1][:held_out]),
        seen=sum(q.question in trained for q in (*others[0][:search], *others[1][:held_out])),
    )
    if min(len(found.search), len(found.held_out)) < LEAST:
        raise PromptError(
            f"the documents give {len(candidates)} development questions: {len(found.search)} to search with and "
            f"{len(found.held_out)} held out, {LEAST} of each are needed; ingest more documents, or name fewer "
            "sections in [questions]"
        )
    return found


def _different(questions: Sequence[Question], count: int) -> list[Question]:
    """`count` questions, each as unlike those before it as possible, by the words of question and answer."""
    words = {q.question_id: frozenset(f"{q.question} {q.answer}".lower().split()) for q in questions}
    chosen: list[Question] = []
    left = list(questions)

    def likeness(question: Question) -> float:
        ours = words[question.question_id]
        theirs = [words[other.question_id] for other in chosen]
        return max((len(ours & other) / len(ours | other) for other in theirs), default=0.0)

    while left and len(chosen) < count:
        chosen.append(min(left, key=likeness))  # of equals the first
        left.remove(chosen[-1])
    return chosen
