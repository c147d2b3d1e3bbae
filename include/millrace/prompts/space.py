"""What a study may try: one point is a template with worked examples, a number of chunks and a generation config.

Pure. The champion's own point is always among the choices: it is where a study starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from millrace.applications import Generation, Optimize, Prompt
from millrace.prompts.templates import CHAMPION, WorkedExample, choices, with_examples
from millrace.releases.manifest import Manifest, PromptVersion

UNREGISTERED = "trial"
"""Version of a prompt that is only tried: it gets one when it becomes a release."""


@dataclass(frozen=True)
class Point:
    """One way to answer. The fields are the study's parameters."""

    template: str
    """Its name among the choices."""
    chunks: int
    few_shot: int
    """Worked examples before the template."""
    max_new_tokens: int
    temperature: float

    def __str__(self) -> str:
        warmth = f", temperature {self.temperature}" if self.temperature else ""
        return (
            f"{self.template}, {self.chunks} chunks, {self.few_shot} worked examples, "
            f"up to {self.max_new_tokens} tokens{warmth}"
        )


@dataclass(frozen=True)
class Space:
    """All points of a study, and how each becomes a release's manifest."""

    champion: Manifest
    start: Point
    templates: Mapping[str, str]
    examples: tuple[WorkedExample, ...]
    parameters: Mapping[str, tuple[Any, ...]]
    """Field of `Point` → its choices, in order."""

    def points(self) -> list[Point]:
        """All of them."""
        return [
            Point(**dict(zip(self.parameters, values, strict=True))) for values in product(*self.parameters.values())
        ]

    def template(self, point: Point) -> str:
        """The whole template of `point`, worked examples and all."""
        return with_examples(self.templates[point.template], self.examples[: point.few_shot])

    def manifest(self, point: Point) -> Manifest:
        """The champion as `point` has it, with a prompt that is only tried."""
        name = self.champion.prompt.name
        return at(self.champion, point, PromptVersion(name=name, version=UNREGISTERED, template=self.template(point)))

    def described(self) -> dict[str, Any]:
        """Everything that distinguishes this space from another, as JSON."""
        return {
            "champion": self.champion.release_id,
            "templates": dict(self.templates),
            "examples": [asdict(example) for example in self.examples],
            "parameters": {name: list(values) for name, values in self.parameters.items()},
        }


def at(champion: Manifest, point: Point, prompt: PromptVersion) -> Manifest:
    """The champion with `prompt`, and with the chunks and the generation config of `point`; made by this code."""
    return champion.changed(
        prompt=prompt,
        retrieval=champion.retrieval.model_copy(update={"chunks": point.chunks}),
        generation=Generation(max_new_tokens=point.max_new_tokens, temperature=point.temperature),
    )


def space_of(champion: Manifest, declared: Prompt, optimize: Optimize, examples: Sequence[WorkedExample]) -> Space:
    """The space that a declaration opens around a champion.

    Raises:
        PromptError: a declared template can't be used.
    """
    templates = choices(champion.prompt.template, declared)
    start = Point(
        template=CHAMPION,
        chunks=champion.retrieval.chunks,
        few_shot=0,
        max_new_tokens=champion.generation.max_new_tokens,
        temperature=champion.generation.temperature,
    )
    few_shot = [count for count in optimize.few_shot if count <= len(examples)]
    return Space(
        champion=champion,
        start=start,
        templates=templates,
        examples=tuple(examples),
        parameters={
            "template": tuple(templates),
            "chunks": _with(optimize.chunks, start.chunks),
            "few_shot": _with(few_shot, start.few_shot),
            "max_new_tokens": _with(optimize.max_new_tokens, start.max_new_tokens),
            "temperature": _with(optimize.temperature, start.temperature),
        },
    )


def _with(declared: Sequence[Any], start: Any) -> tuple[Any, ...]:
    return tuple(sorted({*declared, start}))
