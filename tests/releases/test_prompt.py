from dataclasses import dataclass

import pytest

from millrace.applications import load_application
from millrace.errors import ReleaseError
from millrace.releases.prompt import check_template, render
from millrace.settings import Settings


@dataclass(frozen=True)
class Chunk:
    title: str
    text: str


CHUNKS = [Chunk("Title", "Some text."), Chunk("Other", "More.")]


def test_a_template_sees_the_question_and_the_chunks() -> None:
    template = "{% for chunk in chunks %}{{ chunk.title }}: {{ chunk.text }}\n{% endfor %}\n{{ question }}  \n"
    assert render(template, "Why <b>&</b>?", CHUNKS) == "Title: Some text.\nOther: More.\n\nWhy <b>&</b>?"


def test_a_question_is_data_and_never_a_template() -> None:
    assert render("{{ question }}", "{{ 7 * 7 }} {% for %}", []) == "{{ 7 * 7 }} {% for %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ question", "can't be parsed"),
        ("no question", "does not use `question`"),
        ("{{ question }} {{ user }}", "uses user;"),
        ("Be brief.{# {{ question }} #}", "does not use `question`"),
        ("{% if question %}Hello.{% endif %}", "drops the question: given no chunks it renders 'Hello.'"),
        ("{% if chunks %}{{ question }}{% endif %}!", "drops the question: given no chunks it renders '!'"),
        ("{% if chunks | length < 3 %}{{ question }}{% endif %}", "drops the question: given 3 chunks"),
        ("{{ question[:100] }}", "drops the question"),
        ("{{ question | upper }}", "drops the question"),
    ],
)
def test_a_template_that_can_not_work_is_refused(template: str, said: str) -> None:
    with pytest.raises(ReleaseError, match=said):
        check_template(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ chunks[9].text }} {{ question }}",
        "{{ question.__class__.__mro__ }}",
        "{{ question }}{{ chunks.append(1) }}",
        "{{ question / 0 }}",
        "{{ question }}{{ chunks[0].author }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_of_its_sandbox_is_an_error_in_one_sentence(template: str) -> None:
    check_template(template)
    with pytest.raises(ReleaseError, match="can't be rendered"):
        render(template, "why?", CHUNKS)


def test_the_declared_templates_work(settings: Settings) -> None:
    prompt = load_application(settings, "qa").prompt
    for template in (prompt.template, *prompt.variants.values()):
        check_template(template)
        assert "why?" in render(template, "why?", CHUNKS)
