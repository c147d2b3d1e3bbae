"""What a study may choose from: built-in templates that work, and worked examples that stay text."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.applications import Prompt
from millrace.errors import PromptError
from millrace.prompts.templates import BUILT_IN, CHAMPION, WorkedExample, choices, literal, with_examples
from millrace.releases.prompt import check_template, render


@dataclass(frozen=True)
class Chunk:
    title: str
    text: str


CHUNKS = [Chunk("parallelism", "At most 32 tasks."), Chunk("executor", "LocalExecutor.")]
TEMPLATE = "\n{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}{{ question }}"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_template_shows_every_chunk_and_ends_with_what_is_asked_for(name: str) -> None:
    check_template(BUILT_IN[name])
    message = render(BUILT_IN[name], "Why?", CHUNKS)
    assert all(chunk.text in message for chunk in CHUNKS)
    assert "Why?" in message.splitlines()[-1] or "Why?" in message.splitlines()[-2]


@pytest.mark.slow
@given(
    st.lists(
        st.builds(
            WorkedExample,
            st.text(alphabet=st.one_of(st.sampled_from("{}%#-' \n\r\"\\"), st.characters()), max_size=40),
            st.sampled_from(["{{ question }}", "{% raw %}", "{", "{{", "}}{", "{# note", "a\r\nb", "{{{% endraw %}"]),
        ),
        max_size=3,
    )
)
def test_worked_examples_are_shown_as_they_are_whatever_they_hold(examples: list[WorkedExample]) -> None:
    template = with_examples("{{ question }}\n{{ chunks | length }}", examples)
    check_template(template)
    message = render(template, "asked", [])
    assert message.endswith("asked\n0")
    for example in examples:
        for said in (example.question, example.answer):
            assert "\n".join(said.strip().splitlines()) in message


@given(st.text())
def test_a_literal_renders_as_its_text(text: str) -> None:
    shown = "\n".join(text.strip().splitlines())
    assert render(f"<{literal(text)}>" + "{{ question }}", "q", []) == f"<{shown}>q"


def test_an_example_that_the_template_shows_already_is_not_repeated() -> None:
    examples = [WorkedExample("What is [core] a?", "1"), WorkedExample("What is {{ b }}?", "2")]
    once = with_examples(TEMPLATE, examples)
    assert with_examples(once, examples) == once
    assert render(once, "Why?", CHUNKS).count("What is {{ b }}?") == 1


def test_no_examples_leave_a_template_as_it_is() -> None:
    assert with_examples(TEMPLATE, []) == TEMPLATE


def test_the_choices_are_the_champions_template_the_declared_ones_and_the_built_in_ones_each_once() -> None:
    declared = Prompt(template=TEMPLATE, variants={"same": TEMPLATE, "short": "{{ question }}"})
    found = choices(TEMPLATE, declared)
    assert list(found) == [CHAMPION, "short", *BUILT_IN]
    assert list(choices("{{ question }}!", declared)) == [CHAMPION, "declared", "short", *BUILT_IN]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ question", "template 'odd' can't be tried: the prompt template can't be parsed"),
        ("Answer!", "template 'odd' can't be tried: the prompt template does not use `question`"),
        ("{% if chunks %}{{ question }}{% endif %}", "template 'odd' can't be tried: .* drops the question: given no"),
    ],
)
def test_a_declared_template_that_can_not_work_is_named(template: str, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        choices(TEMPLATE, Prompt(template=TEMPLATE, variants={"odd": template}))
