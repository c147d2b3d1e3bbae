"""Airflow's configuration reference: one document an option, as prose that people and models can read.

`describe` writes the prose and `read_facts` reads the facts back out of it, so that questions with known answers
are derived from exactly what a user of the document sees. The reference is the YAML file that Airflow ships;
Airflow itself is not imported.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from millrace.applications import AirflowConfigSource
from millrace.errors import SourceError
from millrace.lakehouse.content import content_hash
from millrace.sources.document import Document

REFERENCE = "https://airflow.apache.org/docs/apache-airflow/stable/configurations-ref.html"


@dataclass(frozen=True)
class OptionFacts:
    """What the document of an option says of it. None: it says nothing."""

    section: str
    name: str
    type: str
    variable: str
    """Environment variable that sets the option."""
    default: str | None
    version_added: str | None
    example: str | None
    description: str
    """Plain sentences; may be empty."""


def read_airflow_config(source: AirflowConfigSource) -> Iterator[Document]:
    """The options of the declared sections, or of all, in the order of the reference.

    Raises:
        SourceError: Airflow isn't installed, its reference has another form, or a declared section isn't in it.
    """
    path = _reference_file()
    try:
        sections: dict[str, Any] = yaml.load(path.read_text(), yaml.CSafeLoader)
        options = [
            _facts(section, name, option)
            for section, declared in sections.items()
            for name, option in declared["options"].items()
            if not source.sections or section in source.sections
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"airflow_config: {path} is not the configuration reference it was: {error!r}") from error
    if unknown := sorted(set(source.sections) - set(sections)):
        raise SourceError(f"airflow_config: no section {', '.join(unknown)} in {path}; correct the declaration")
    for facts in options:
        yield Document(
            document_id=content_hash("airflow_config", facts.section, facts.name),
            source=source.kind,
            uri=f"{REFERENCE}#{facts.name.replace('_', '-')}",
            section=facts.section,
            title=f"[{facts.section}] {facts.name}",
            content=describe(facts).encode(),
        )


def describe(facts: OptionFacts) -> str:
    """The document: facts first, one a line, so that they stay in the first chunk of a long description."""
    lines = [
        f"The option {facts.name} is in the section [{facts.section}] and takes a value of type {facts.type}.",
        f"It is set by the environment variable {facts.variable}.",
    ]
    if facts.default is not None:
        lines.append(f"Default: {facts.default}")
    if facts.version_added is not None:
        lines.append(f"Added in version: {facts.version_added}")
    if facts.example is not None:
        lines.append(f"Example: {facts.example}")
    return "\n".join(lines) + f"\n\n{facts.description}".rstrip()


_DOCUMENT = re.compile(
    r"The option (?P<name>\S+) is in the section \[(?P<section>[^\]]+)\] and takes a value of type (?P<type>[^\n]+)\.\n"
    r"It is set by the environment variable (?P<variable>\S+)\."
    r"(?:\nDefault: (?P<default>[^\n]*))?"
    r"(?:\nAdded in version: (?P<version_added>[^\n]*))?"
    r"(?:\nExample: (?P<example>[^\n]*))?"
    r"(?:\n\n(?P<description>.*))?",
    re.DOTALL,
)


def read_facts(text: str) -> OptionFacts | None:
    """The inverse of `describe`; None if `text` was not written by it."""
    found = _DOCUMENT.fullmatch(text)
    if not found:
        return None
    return OptionFacts(**(found.groupdict() | {"description": found["description"] or ""}))


def plain(markup: str) -> str:
    """reStructuredText as plain text: roles, links, literals and directives reduced to what they show."""
    text = re.sub(r"`([^`<]+?)\s*<[^`>]+>`_{0,2}", r"\1", markup)
    text = re.sub(r":[a-z:]+:`~?([^`]+)`", r"\1", text)
    text = re.sub(r"`{1,2}([^`]+)`{1,2}_{0,2}", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"^\s*\.\. [\w-]+::.*\n?", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()


def _facts(section: str, name: str, option: dict[str, Any]) -> OptionFacts:
    return OptionFacts(
        section=section,
        name=name,
        type=str(option["type"]),
        variable=f"AIRFLOW__{section.upper()}__{name.upper()}",
        default=_one_line(option["default"]),
        version_added=_one_line(option["version_added"]),
        example=_one_line(option["example"]),
        description=plain(option["description"] or ""),
    )


def _one_line(value: object) -> str | None:
    return " ".join(str(value).split()) or None if value is not None else None


def _reference_file() -> Path:
    found = find_spec("airflow")
    if found is None or not found.submodule_search_locations:
        raise SourceError("airflow_config: Airflow is not installed here; install it, or remove the source")
    return Path(found.submodule_search_locations[0]) / "config_templates" / "config.yml"
