"""Two releases answer under the same conditions: the order of waves, what isn't counted, what a failure is worth.

The pipelines are real; the generator is a few lines that say what they are told, because what is tested is who is
asked when. A real generator answers in test_gate.py.
"""

import threading
from collections.abc import Sequence

import pytest

from millrace.applications import Generation
from millrace.engines.engine import Generated, Message
from millrace.errors import EngineError, MillraceError
from millrace.evaluation.answers import AT_ONCE, WARM_UP, Arm, answer_both, as_scores
from millrace.evaluation.sets import Example
from millrace.policies import Prices
from millrace.releases.manifest import Manifest, PromptVersion, RetrievalLineage, Weights
from millrace.releases.pipeline import AnswerPipeline
from millrace.retrieval.search import Hit

EXAMPLES = [Example(f"e{i}", "core", f"question {i}", f"answer {i}", f"d{i}") for i in range(2 * AT_ONCE + 3)]
PRICES = Prices(prompt_million_tokens=1, completion_million_tokens=2)


class Asked:
    """Who was asked what, in order."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def __call__(self, who: str, question: str) -> None:
        with self._lock:
            self.log.append((who, question))


class Repeating:
    """An engine that answers `answer 7` to `question 7`; `fails` are the questions on which it breaks."""

    context_tokens = 8192

    def __init__(self, name: str, asked: Asked, fails: Sequence[str] = ()) -> None:
        self._name, self._asked, self._fails = name, asked, fails

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return 10

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        question = messages[0].content
        self._asked(self._name, question)
        if question in self._fails:
            raise EngineError("the engine is broken")
        return Generated(question.replace("question", "answer"), 10, 5, "stop")


class OneDocument:
    """A retriever that finds the document of every even question."""

    build = "build"

    def search(self, question: str, k: int, build: str | None = None) -> list[Hit]:
        assert build == "build"
        number = question.removeprefix("question ")
        found = f"d{number}" if number.isdigit() and int(number) % 2 == 0 else "another"
        return [Hit("chunk", found, "title", "text", "uri", 1.0)]


def arm(name: str, asked: Asked, fails: Sequence[str] = ()) -> Arm:
    manifest = Manifest(
        application="qa",
        generator=Weights(name=f"{name}.gguf", sha256="0" * 64, bytes=1),
        prompt=PromptVersion(name="p", version="1", template="{{ question }}"),
        retrieval=RetrievalLineage(lineage="l", embedding_model="m", chunks=1),
        generation=Generation(),
    )
    return Arm(name, AnswerPipeline(manifest, Repeating(name, asked, fails), OneDocument()), "build")


def test_every_question_is_asked_once_of_both_in_waves_that_alternate_who_is_first():
    asked = Asked()
    answer_both(arm("champion", asked), arm("candidate", asked), EXAMPLES, PRICES)
    assert asked.log[:2] == [("champion", WARM_UP), ("candidate", WARM_UP)]
    counted = asked.log[2:]
    for name in ("champion", "candidate"):
        assert sorted(q for who, q in counted if who == name) == sorted(e.question for e in EXAMPLES)
    first, second, third = AT_ONCE, AT_ONCE, 3
    turns = [
        ("champion", first),
        ("candidate", first),
        ("candidate", second),
        ("champion", second),
        ("champion", third),
        ("candidate", third),
    ]
    expected = [who for who, wave in turns for _ in range(wave)]
    assert [who for who, _ in counted] == expected


def test_an_answer_is_scored_against_what_is_known_and_against_the_document_that_holds_it():
    asked = Asked()
    champion, candidate = answer_both(arm("champion", asked), arm("candidate", asked), EXAMPLES, PRICES)
    scores = as_scores(champion)
    assert (scores.quality == 1).all()
    assert list(scores.retrieval) == [float(i % 2 == 0) for i in range(len(EXAMPLES))]
    assert scores.cost == pytest.approx(20e-6)
    assert (scores.seconds > 0).all()
    assert [one.answer for one in candidate] == [example.answer for example in EXAMPLES]


def test_a_candidate_that_fails_scores_nothing_there_and_the_reason_is_kept():
    asked = Asked()
    _, candidate = answer_both(arm("champion", asked), arm("candidate", asked, ["question 4"]), EXAMPLES, PRICES)
    assert (candidate[4].quality, candidate[4].retrieval, candidate[4].error) == (0, 0, "the engine is broken")
    assert [i for i, one in enumerate(candidate) if one.error] == [4]


def test_a_champion_that_fails_ends_the_comparison():
    asked = Asked()
    with pytest.raises(MillraceError, match="champion can't answer evaluation example e4"):
        answer_both(arm("champion", asked, ["question 4"]), arm("candidate", asked), EXAMPLES, PRICES)
