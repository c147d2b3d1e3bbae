"""From a template, a question and chunks to the text of one message. Templates are data: they run in a sandbox."""

from collections.abc import Sequence
from typing import Protocol

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from millrace.errors import ReleaseError

_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=False)
_GIVEN = {"question", "chunks"}


class Chunk(Protocol):
    """What a template sees of a retrieved chunk."""

    @property
    def title(self) -> str: ...

    @property
    def text(self) -> str: ...


def render(template: str, question: str, chunks: Sequence[Chunk]) -> str:
    """The message, stripped of white space at both ends.

    Raises:
        ReleaseError: the template can't be parsed, or asks for something that isn't there.
    """
    try:
        return _JINJA.from_string(template).render(question=question, chunks=chunks).strip()
    except Exception as error:  # A template is an expression language: it can raise what Python can.
        raise ReleaseError(f"the prompt template can't be rendered: {error}; correct the template") from None


def check_template(template: str) -> None:
    """Raises:
    ReleaseError: the template can't be parsed, doesn't use the question, or uses what it is not given.
    """
    try:
        used = meta.find_undeclared_variables(_JINJA.parse(template))
    except TemplateError as error:
        raise ReleaseError(f"the prompt template can't be parsed: {error}; correct the template") from None
    if "question" not in used:
        raise ReleaseError("the prompt template does not use `question`; every user would get the same answer")
    if unknown := sorted(used - _GIVEN):
        raise ReleaseError(f"the prompt template uses {', '.join(unknown)}; it is given only `question` and `chunks`")
