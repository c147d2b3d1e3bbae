"""From a template, a question and chunks to the text of one message. Templates are data: they run in a sandbox."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Probe:
    title: str
    text: str


_QUESTION = "Which of these, if any, does the option [section] name take, and since which version? " * 3 + "Why?"
"""What a template is tried with; long enough that one which cuts questions short is found out."""

_TRIED = tuple(tuple(_Probe(f"Title {n}", f"Text {n}.") for n in range(count)) for count in (0, 1, 3, 10))


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
    ReleaseError: the template can't be parsed, uses what it is not given, or drops the question: it doesn't use it,
        or renders a message that doesn't hold it, with or without chunks.
    """
    try:
        used = meta.find_undeclared_variables(_JINJA.parse(template))
    except TemplateError as error:
        said = str(error).rstrip(".")
        raise ReleaseError(f"the prompt template can't be parsed: {said}; correct the template") from None
    if "question" not in used:
        raise ReleaseError("the prompt template does not use `question`; every user would get the same answer")
    if unknown := sorted(used - _GIVEN):
        raise ReleaseError(f"the prompt template uses {', '.join(unknown)}; it is given only `question` and `chunks`")
    for chunks in _TRIED:
        try:
            message = render(template, _QUESTION, chunks)
        except ReleaseError:
            continue  # It wants other chunks than these; where it can't be rendered, no question is lost silently.
        if _QUESTION not in message:
            given = f"{len(chunks)} chunks" if chunks else "no chunks"
            raise ReleaseError(
                f"the prompt template drops the question: given {given} it renders {message[:80]!r}; "
                "put {{ question }} where it is always rendered, as it was asked"
            )
