"""Versions of a prompt in a real registry: listed with who met them, compared, and tried on a question."""

from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.errors import PromptError, ReleaseError, RetrievalError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES
from millrace.prompts.versions import diff, find_version, list_versions, try_template
from millrace.releases.manifest import Manifest
from millrace.releases.prompt_registry import register_prompt
from millrace.settings import Settings

FIRST = "{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}\nQuestion: {{ question }}\nAnswer:"
SECOND = FIRST.replace("Answer:", "Answer in one word:")


def test_versions_are_listed_with_how_many_exchanges_they_answered(
    registry: Settings, application: Application
) -> None:
    assert list_versions(registry, application) == []
    for template in (FIRST, SECOND, FIRST):
        register_prompt(registry, application, template, run=f"run of {len(template)}")
    name = f"{application.name}.prompt"
    _exchanges(registry, application, [f"{name}/1", f"{name}/2", f"{name}/1", "other.prompt/1"])
    found = list_versions(registry, application)
    assert [(one.version, one.template, one.exchanges) for one in found] == [(1, FIRST, 2), (2, SECOND, 1)]
    assert found[1].registered_by == f"run of {len(SECOND)}"
    assert abs((datetime.now(UTC) - found[1].created_at).total_seconds()) < 600


def test_a_difference_reads_as_a_unified_diff_of_the_whole_templates(
    registry: Settings, application: Application
) -> None:
    for template in (FIRST, SECOND):
        register_prompt(registry, application, template, run="test")
    name = f"{application.name}.prompt"
    assert diff(registry, application, 1, 2).splitlines() == [
        f"--- {name}/1",
        f"+++ {name}/2",
        "@@ -1,4 +1,4 @@",
        " {% for chunk in chunks %}{{ chunk.text }}",
        " {% endfor %}",
        " Question: {{ question }}",
        "-Answer:",
        "+Answer in one word:",
    ]
    assert diff(registry, application, 2, 2) == ""


def test_a_version_that_is_not_there_is_told_with_those_that_are(registry: Settings, application: Application) -> None:
    with pytest.raises(PromptError, match="has no version 1; there are none; a version is made when a release is"):
        find_version(registry, application, 1)
    register_prompt(registry, application, FIRST, run="test")
    with pytest.raises(PromptError, match=rf"prompt {application.name}\.prompt has no version 7; there are 1"):
        diff(registry, application, 1, 7)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ question", "the prompt template can't be parsed"),
        ("Say hello.", "does not use `question`"),
        ("{{ chunks }}{% if chunks %}{{ question }}{% endif %}", "drops the question"),
    ],
)
def test_a_template_that_can_not_be_used_is_not_tried(
    settings: Settings, application: Application, template: str, said: str
) -> None:
    with pytest.raises(ReleaseError, match=said):
        try_template(settings, application, template, "Why?")


def test_without_a_champion_nobody_can_answer(registry: Settings, application: Application) -> None:
    with pytest.raises(PromptError, match="has no champion whose generator could answer; admit a release first"):
        try_template(registry, application, FIRST, "Why?", answer=True)


@pytest.mark.model
def test_without_an_index_build_nothing_is_rendered(
    registry: Settings, application: Application, champion: tuple[str, Manifest]
) -> None:
    with pytest.raises(RetrievalError, match="no index build is published"):
        try_template(registry, application, FIRST, "Why?")


def _exchanges(settings: Settings, application: Application, prompts: list[str]) -> None:
    now = datetime.now(UTC)
    rows: list[dict[str, Any]] = [
        {field.name: _something(field, now) for field in SILVER_EXCHANGES.columns}
        | {"completion_id": f"c{number}", "prompt_version": prompt}
        for number, prompt in enumerate(prompts)
    ]
    table = pa.Table.from_pylist(rows, schema=SILVER_EXCHANGES.rows_schema)
    Lake.of(settings, application.name).merge(SILVER_EXCHANGES, table, run="test")


def _something(field: pa.Field, now: datetime) -> Any:
    """A value that the column takes."""
    kinds = {"string": "", "int64": 0, "double": 0.0, "bool": True, "date32[day]": date.today()}
    if field.nullable:
        return None
    if pa.types.is_list(field.type):
        return []
    return kinds.get(str(field.type), now)
