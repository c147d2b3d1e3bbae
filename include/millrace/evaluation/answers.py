"""Two releases answer the same questions under the same conditions, so that their times can be compared.

Questions go in waves: one release answers a wave, as many questions at once as the other will, then the other
answers the same wave; who goes first alternates. So what else the machine does, and what one release leaves in a
cache that the other uses (two prompts on the same weights share an engine), falls on both alike. Each release
answers one question before the first wave, which isn't counted. Knows nothing of tables or verdicts.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from millrace.errors import EngineError, MillraceError, ReleaseError
from millrace.evaluation.comparison import Scores
from millrace.evaluation.sets import Example
from millrace.policies import Prices
from millrace.releases.pipeline import AnswerPipeline
from millrace.scoring.overlap import recall_at_k, token_f1

AT_ONCE = 8
"""Questions that a release answers together: what continuous batching is for."""
WARM_UP = "What are these documents about?"


@dataclass(frozen=True)
class Scored:
    """One release's answer to one example, and what it is worth."""

    answer: str
    quality: float
    retrieval: float
    seconds: float
    cost: float
    error: str = field(default="")
    """Why there is no answer; it then scores 0."""
    tokens: int = 0
    """Prompt and completion."""


@dataclass(frozen=True)
class Arm:
    """A loaded release and the index build that it searches."""

    name: str
    pipeline: AnswerPipeline
    build: str


def answer_both(
    champion: Arm, candidate: Arm, examples: Sequence[Example], prices: Prices
) -> tuple[list[Scored], list[Scored]]:
    """What both releases scored, in the order of `examples`.

    Raises:
        MillraceError: the champion can't answer an example: then nothing can be compared with it.
        RetrievalError: an index build can't be searched.
    """
    scored: dict[str, list[Scored]] = {champion.name: [], candidate.name: []}
    with ThreadPoolExecutor(AT_ONCE, "gate") as pool:
        for arm in (champion, candidate):
            _ask(arm, WARM_UP)
        for wave, start in enumerate(range(0, len(examples), AT_ONCE)):
            asked = examples[start : start + AT_ONCE]
            order = (champion, candidate) if wave % 2 == 0 else (candidate, champion)
            for arm in order:
                futures = [pool.submit(_answer, arm, example, prices) for example in asked]
                scored[arm.name] += [future.result() for future in futures]
    for example, answer in zip(examples, scored[champion.name], strict=True):
        if answer.error:
            raise MillraceError(
                f"the champion can't answer evaluation example {example.example_id}, so nothing can be compared "
                f"with it: {answer.error}"
            )
    return scored[champion.name], scored[candidate.name]


def as_scores(scored: Sequence[Scored]) -> Scores:
    """The columns that are compared."""
    columns = (
        np.array([getattr(one, name) for one in scored], dtype=np.float64)
        for name in ("quality", "retrieval", "seconds", "cost")
    )
    return Scores(*columns)


def _answer(arm: Arm, example: Example, prices: Prices) -> Scored:
    started = time.perf_counter()
    try:
        answer = arm.pipeline.answer(example.question, build=arm.build)
    except (EngineError, ReleaseError) as error:
        return Scored("", 0.0, 0.0, time.perf_counter() - started, 0.0, error=str(error))
    found = [hit.document_id for hit in answer.citations]
    return Scored(
        answer.text,
        token_f1(answer.text, example.answer),
        recall_at_k(found, [example.document_id], len(found)),
        answer.seconds,
        prices.answer(arm.pipeline.manifest.generator.name, answer.usage.prompt_tokens, answer.usage.completion_tokens),
        tokens=answer.usage.prompt_tokens + answer.usage.completion_tokens,
    )


def _ask(arm: Arm, question: str) -> None:
    try:
        arm.pipeline.answer(question, build=arm.build)
    except (EngineError, ReleaseError):
        return  # A release that can't answer shows it in the examples, where it counts.
