"""`millrace prompt …` as a person types it, against a real registry."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from millrace.applications import Application
from millrace.cli import app
from millrace.releases.prompt_registry import register_prompt
from millrace.settings import Settings

DECLARATION = """
name = "{name}"
description = "a test"
sources = [{{ kind = "python_topics", topics = ["if"] }}]
prompt = {{ template = "{{{{ question }}}}" }}
rollout = {{ steps = [{{ share = 0.5, margin = 0.3 }}] }}
"""


@pytest.fixture
def typed(registry: Settings, application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Types `millrace prompt <words> --application <application>`."""
    declared = tmp_path / "applications"
    declared.mkdir()
    (declared / f"{application.name}.toml").write_text(DECLARATION.format(name=application.name))
    monkeypatch.setenv("MILLRACE_HOME", str(registry.home))
    monkeypatch.setenv("MILLRACE_MLFLOW_URI", registry.mlflow_uri)
    monkeypatch.setenv("MILLRACE_APPLICATIONS", str(declared))

    def type_(*words: str) -> Result:
        return CliRunner().invoke(app, ["prompt", *words, "--application", application.name])

    return type_


def test_versions_are_listed_and_compared(registry: Settings, application: Application, typed) -> None:
    for template in ("Be brief.\n{{ question }}", "Be exact.\n{{ question }}"):
        register_prompt(registry, application, template, run="test")
    listed = typed("list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["1", "2"]
    assert "0 exchanges  registered by test" in listed[0]
    assert {"-Be brief.", "+Be exact."} <= set(typed("diff", "1", "2").stdout.splitlines())
    assert typed("diff", "2", "2").stdout == "Versions 2 and 2 are the same.\n"


def test_what_can_not_be_done_is_one_sentence_and_exit_status_1(typed, tmp_path: Path) -> None:
    (tmp_path / "bad.j2").write_text("{{ question")
    (tmp_path / "drops.j2").write_text("{% if chunks %}{{ question }}{% endif %}")
    for words, said in (
        (("diff", "1", "2"), "has no version 1; there are none"),
        (("try", "Why?", "--version", "3"), "has no version 3; there are none"),
        (("try", "Why?", "--template", str(tmp_path / "bad.j2")), "the prompt template can't be parsed"),
        (("try", "Why?", "--template", str(tmp_path / "drops.j2")), "the prompt template drops the question"),
        (("try", "Why?", "--template", str(tmp_path / "none.j2")), "can't be read as a template"),
    ):
        result = typed(*words)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
        assert said in result.stderr


def test_without_a_champion_there_is_nothing_to_optimise(typed) -> None:
    result = typed("optimize", "--trials", "2")
    assert (result.exit_code, result.stdout) == (0, "there is no champion whose prompt could be optimised\n")
