"""What a study of prompts can choose from: the champion's template, those declared, a few general ones, and worked
examples put before any of them as literal text.

Pure; knows no registry and no model.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from millrace.applications import Prompt
from millrace.errors import PromptError, ReleaseError
from millrace.releases.prompt import check_template

CHAMPION = "champion"

_PASSAGES = """\
{% for chunk in chunks %}{{ chunk.title }}
{{ chunk.text }}

{% endfor %}"""

BUILT_IN: Mapping[str, str] = {
    # No instruction and no labels: a small model goes on with whatever pattern it is shown ("Question: … Question: …").
    "built_in.plain": _PASSAGES + "{{ question }}",
    # An answer in the text's own words can be checked against it, and is short.
    "built_in.quote": _PASSAGES + "{{ question }} Quote the words of the text that answer it, and nothing else.",
    # Asked before and after: it is known what the passages are read for, and what was asked stands near the answer.
    "built_in.question_first": (
        "Question: {{ question }}\n\n"
        + _PASSAGES
        + "Using only the text above, answer in as few words as possible: {{ question }}"
    ),
    # Numbered and fenced off from the instruction, with a way out: for models that follow one.
    "built_in.passages": """\
Answer from these passages only. If they do not hold the answer, say that you do not know.

{% for chunk in chunks %}Passage {{ loop.index }}: {{ chunk.title }}
{{ chunk.text }}

{% endfor %}Question: {{ question }}
Short answer:""",
}
"""General ways to ask, by name; the order in which a study tries them."""


@dataclass(frozen=True)
class WorkedExample:
    """A question with its known answer, to be shown in a prompt."""

    question: str
    answer: str


def choices(champion: str, declared: Prompt) -> dict[str, str]:
    """Name → template, the champion's first; of equal texts only the first stays.

    Raises:
        PromptError: a declared template can't be used.
    """
    named = {CHAMPION: champion, "declared": declared.template, **declared.variants, **BUILT_IN}
    chosen: dict[str, str] = {}
    for name, template in named.items():
        if template in chosen.values():
            continue
        try:
            check_template(template)
        except ReleaseError as error:
            raise PromptError(f"template {name!r} can't be tried: {error}") from None
        chosen[name] = template
    return chosen


def with_examples(template: str, examples: Sequence[WorkedExample]) -> str:
    """`template` with worked examples before it, as text that Jinja leaves alone; those that it shows already (an
    earlier study's best is the champion of the next) are not repeated."""
    blocks = [f"Question: {literal(example.question)}\nAnswer: {literal(example.answer)}\n" for example in examples]
    shown = [block for block in blocks if block not in template]
    return "\n".join(["Questions and good answers:\n", *shown, template.lstrip("\n")]) if shown else template


def literal(text: str) -> str:
    """Jinja source that renders as `text` (white space at both ends and line ends aside: they become one kind)."""
    # `{` begins Jinja's marks; one at the end might begin one together with what follows.
    text = "\n".join(text.strip().splitlines())
    return re.sub(r"\{(?=[{%#]|\Z)", "{{ '{' }}", text)
