"""An engine small enough to be exact, and a study around it.

`Reader` is a generator by another method: it looks into the prompt. How well it answers depends on what a study can
choose, by rules that a test can compute: it reads the answer from a chunk that holds it, always if it is told to copy,
now and then if not.
"""

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from millrace.applications import Generation, Optimize, Prompt
from millrace.engines.engine import Generated, Message
from millrace.errors import EngineError
from millrace.prompts.space import Point, Space, space_of
from millrace.prompts.study import Ask, Trial
from millrace.prompts.templates import WorkedExample
from millrace.releases.manifest import Manifest, PromptVersion, RetrievalLineage, Weights
from millrace.releases.pipeline import AnswerPipeline
from millrace.retrieval.search import Hit
from millrace.sources.questions import Question

PLAIN = "{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}Question: {{ question }}"
COPY = "Copy the answer.\n" + PLAIN
LOST = "Look around.\n" + PLAIN
BROKEN = "{{ chunks[7].text }}{{ question }}"

BUILD = "build"


class Reader:
    """Says the answer from a chunk if the prompt lets it, else something beside the point. Counts words as tokens.

    `breaks_after` so many answers it fails for good, as a killed process would.
    """

    context_tokens = 4000

    def __init__(self, breaks_after: int | None = None) -> None:
        self.answered = 0
        self.breaks_after = breaks_after
        self._lock = threading.Lock()

    def count_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(message.content.split()) for message in messages)

    def generate(self, messages: Sequence[Message], config: Generation) -> Generated:
        with self._lock:
            if self.answered == self.breaks_after:
                raise EngineError("the reader is gone")
            self.answered += 1
        prompt = messages[0].content
        number = int(re.findall(r"number (\d+)", prompt)[-1])
        known = f"fact {number} is {number * number}"
        # Without an instruction it reads every fourth only; told to look around, none.
        reads = known in prompt and ("Copy" in prompt or (number % 4 == 0 and "Look" not in prompt))
        text = str(number * number) if reads else "it depends"
        return Generated(text, len(prompt.split()), len(text.split()), "stop")

    def close(self) -> None:
        pass


class Facts:
    """A retriever that has the right chunk second for odd numbers, first for even ones."""

    build = BUILD

    def search(self, question: str, k: int, build: str | None = None) -> list[Hit]:
        assert build == BUILD
        number = int(question.split()[-1].rstrip("?"))
        texts = [f"fact {number} is {number * number}.", "Nothing to see here."]
        hits = [Hit(f"c{n}", f"d{n}", "title", text, "uri", 1.0) for n, text in enumerate(texts)]
        return (hits if number % 2 == 0 else hits[::-1])[:k]


def asked(first: int, count: int) -> list[Question]:
    return [
        Question(f"q{n}", f"What is number {n}?", str(n * n), f"d{n}", "core", "training")
        for n in range(first, first + count)
    ]


SEARCH = asked(100, 16)
HELD_OUT = asked(200, 24)


def a_champion(template: str = PLAIN, chunks: int = 1) -> Manifest:
    return Manifest(
        application="qa",
        generator=Weights(name="reader.gguf", sha256="0" * 64, bytes=1),
        prompt=PromptVersion(name="qa.prompt", version="1", template=template),
        retrieval=RetrievalLineage(lineage="l", embedding_model="m", chunks=chunks),
        generation=Generation(),
    )


def a_space(optimize: Optimize, champion: Manifest | None = None, **variants: str) -> Space:
    examples = [WorkedExample(q.question, q.answer) for q in asked(300, 2)]
    return space_of(champion or a_champion(), Prompt(template=PLAIN, variants=variants), optimize, examples)


def answering(space: Space, reader: Reader) -> Callable[[Point], Ask]:
    def prepare(point: Point) -> Ask:
        pipeline = AnswerPipeline(space.manifest(point), reader, Facts())
        return lambda question: pipeline.answer(question, build=BUILD)

    return prepare


@dataclass
class Kept:
    """Trials as they were kept, in order."""

    trials: list[Trial] = field(default_factory=list)

    def __call__(self, trial: Trial) -> None:
        self.trials.append(trial)
