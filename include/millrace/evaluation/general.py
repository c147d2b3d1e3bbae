"""What a generator knows beside the application's documents: a fixed set of general questions, with known answers.

A fine-tune learns the documents' answers and may unlearn others, which no question about the documents shows. So the
generators of both releases are asked alone: no retrieval, no prompt of the application, greedily, a few tokens. Each
question comes after a few answered ones (Brown et al., 2020, arXiv:2005.14165, §3.2), so that both answer as shortly:
else a fine-tune that has only learnt to be brief would seem to know more. Equal generators know equally much, and a
chain answers as its code says: they are not asked. It does not know where the releases come from.
"""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from millrace.applications import Gate, Generation
from millrace.engines.engine import Engine, Message
from millrace.errors import EngineError, MillraceError
from millrace.evaluation.answers import AT_ONCE, Arm
from millrace.evaluation.comparison import Criterion, compare_general
from millrace.policies import Prices, TokenPrice
from millrace.releases.manifest import Chain, Manifest
from millrace.scoring.overlap import normalised_words

QUESTIONS = Path(__file__).with_name("general_questions.toml")
GENERATION = Generation(max_new_tokens=24, temperature=0)
ANSWERED = (
    ("What is the capital of Greece?", "Athens"),
    ("What is the opposite of wet?", "dry"),
    ("How many legs does a bird have?", "2"),
    ("Complete the saying: Time is", "money"),
)
"""Turns before each question."""
SHOWN = 3
"""Lost answers that the criterion names."""


@dataclass(frozen=True)
class GeneralQuestion:
    question: str
    answers: tuple[str, ...]
    """Any of them will do."""

    def score(self, said: str) -> float:
        """1 where `said` holds the words of an answer, one after the other, else 0.

        Where the question itself holds them, `said` must be nothing else: repeating the question is no answer.
        """
        words = normalised_words(said)
        wanted = [normalised_words(answer) for answer in self.answers]
        asked = normalised_words(self.question)
        if any(_holds(asked, answer) for answer in wanted):
            return float(words in wanted)
        return float(any(_holds(words, answer) for answer in wanted))


@dataclass(frozen=True)
class GeneralAnswer:
    """What a generator said to a general question, and what that is worth."""

    said: str
    score: float
    tokens: int
    """Prompt and completion."""
    cost: float
    """US dollars."""
    error: str = ""
    """Why there is no answer; it then scores 0."""


def general_questions() -> tuple[GeneralQuestion, ...]:
    """The set, in the order of its file."""
    topics = tomllib.loads(QUESTIONS.read_text())
    return tuple(
        GeneralQuestion(question, (answers,) if isinstance(answers, str) else tuple(answers))
        for topic in topics.values()
        for question, answers in topic.items()
    )


def general_set_id(questions: Sequence[GeneralQuestion]) -> str:
    """Of the questions with their answers and how they are asked: other ids are other measurements."""
    asked = [[[one.question, *one.answers] for one in questions], ANSWERED, GENERATION.model_dump(mode="json")]
    return f"general-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}"


def messages_of(question: GeneralQuestion) -> list[Message]:
    before = [(Message("user", asked), Message("assistant", answer)) for asked, answer in ANSWERED]
    return [message for pair in before for message in pair] + [Message("user", question.question)]


def why_not_asked(champion: Manifest, candidate: Manifest) -> str | None:
    """Why these two are not asked general questions; None: they are."""
    if champion.generator.identity == candidate.generator.identity:
        return "the candidate generates with what the champion does, so it knows what the champion knows"
    for name, manifest in (("champion", champion), ("candidate", candidate)):
        if isinstance(manifest.generator, Chain):
            return f"the {name} is a chain, which answers as its code says: no general questions were asked"
    return None


def ask_general(
    champion: Arm, candidate: Arm, questions: Sequence[GeneralQuestion], prices: Prices, policy: Gate, *, seed: int
) -> tuple[Criterion, list[GeneralAnswer]]:
    """The gate's criterion, and all answers of both that it rests on: none where there was nothing to ask.

    Raises:
        MillraceError: the champion can't answer a question: then nothing can be compared with it.
    """
    if why := why_not_asked(champion.pipeline.manifest, candidate.pipeline.manifest):
        return Criterion("general", "count", None, 0, 0, 0, 0, 0, True, why), []
    ours, theirs = (
        answer_general(arm.pipeline.engine, questions, prices.of(arm.pipeline.manifest.generator.name))
        for arm in (champion, candidate)
    )
    for question, answer in zip(questions, ours, strict=True):
        if answer.error:
            raise MillraceError(
                f"the champion can't answer general question {question.question!r}, so nothing can be compared with "
                f"it: {answer.error}"
            )
    before, after = (np.array([answer.score for answer in answers]) for answers in (ours, theirs))
    criterion = compare_general(before, after, policy, seed=seed)
    told = f"{len(questions)} questions, set {general_set_id(questions)}{_lost(questions, ours, theirs)}"
    return replace(criterion, why=f"{criterion.why} ({told})"), [*ours, *theirs]


def answer_general(engine: Engine, questions: Sequence[GeneralQuestion], price: TokenPrice) -> list[GeneralAnswer]:
    """What a generator says to each question."""
    with ThreadPoolExecutor(AT_ONCE, "general") as pool:
        return list(pool.map(partial(_answer, engine, price), questions))


def _answer(engine: Engine, price: TokenPrice, question: GeneralQuestion) -> GeneralAnswer:
    try:
        generated = engine.generate(messages_of(question), GENERATION)
    except EngineError as error:
        return GeneralAnswer("", 0.0, 0, 0.0, error=str(error))
    return GeneralAnswer(
        generated.text.strip(),
        question.score(generated.text),
        generated.prompt_tokens + generated.completion_tokens,
        price.answer(generated.prompt_tokens, generated.completion_tokens),
    )


def _lost(questions: Sequence[GeneralQuestion], ours: Sequence[GeneralAnswer], theirs: Sequence[GeneralAnswer]) -> str:
    """The first answers that the champion had and the candidate has not."""
    lost = [
        f"{question.question!r} → {answer.error or answer.said!r}"
        for question, before, answer in zip(questions, ours, theirs, strict=True)
        if answer.score < before.score
    ]
    return f"; {len(lost)} lost, such as {', '.join(lost[:SHOWN])}" if lost else ""


def _holds(words: Sequence[str], wanted: Sequence[str]) -> bool:
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words) - len(wanted) + 1))
