"""`millrace index`, as a person types it."""

import getpass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from millrace.applications import Application
from millrace.cli import app
from millrace.environments.audit import search
from millrace.lakehouse.lake import Lake
from millrace.retrieval.index import build_index, builds_of, declared_builds
from millrace.settings import Settings
from tests.retrieval.conftest import chunked, vectors_without_a_model
from tests.retrieval.places import write_note
from tests.retrieval.stand_in import StandIn

pytestmark = pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")


@pytest.fixture
def application(settings: Settings, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Application:
    """Declared in a file, with the home in the environment."""
    from millrace.applications import load_application

    declarations = tmp_path / "applications"
    declarations.mkdir()
    (declarations / "notes.toml").write_text(
        f"""
        name = "notes"
        description = "a few notes"
        sources = [{{ kind = "text_folder", path = "{notes}" }}]
        prompt.template = "{{{{ chunks[0].text }}}} {{{{ question }}}}"
        rollout.steps = [{{ share = 0.25, margin = 0.3 }}, {{ share = 0.5, margin = 0.2 }}]
        """
    )
    monkeypatch.setenv("MILLRACE_HOME", str(settings.home))
    monkeypatch.setenv("MILLRACE_APPLICATIONS", str(declarations))
    monkeypatch.setenv("MILLRACE_SPARK_TABLES", "[]")
    return load_application(settings.model_copy(update={"applications": declarations}), "notes")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["index", *arguments, "-a", "notes"])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("place", ["library", "socket"])
def test_builds_are_listed_and_the_one_before_is_published_again(
    settings: Settings, application: Application, notes: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    stand_in = StandIn(keys={"a key": "m"})
    if place == "socket":
        monkeypatch.setenv("MILLRACE_QDRANT_URL", stand_in.url)
        monkeypatch.setenv("MILLRACE_QDRANT_API_KEY", "a key")
        settings = Settings.model_validate(
            settings.model_dump() | {"qdrant_url": stand_in.url, "qdrant_api_key": "a key"}
        )
    assert run("back") == (1, f"notes: nothing is published in {where(settings, application)}, so there is no way back")
    first = published(settings, application)
    write_note(notes, "Bread falls when the oven opens.")
    second = published(settings, application)
    status, said = run("list")
    assert status == 0
    assert said.index(f"{first} ") < said.index(f"{second} ")
    assert said.endswith(f"3 chunks of 3 documents published in {where(settings, application)}")
    assert run("back") == (0, f"Published {first} of notes; before it was {second}.")
    assert "documents published" in run("list")[1].partition(second)[0]
    told = [(one["actor"], one["outcome"], one["resource"].rpartition("/")[2]) for one in search(settings)]
    assert told == [(f"person/{getpass.getuser()}", "back", first)]
    other = builds_of(settings, application.name, "other").where
    assert run("back", "--lineage", "other") == (1, f"notes: nothing is published in {other}, so there is no way back")
    stand_in.stop()
    if place == "socket":
        status, said = run("list")
        assert status == 1
        assert said.startswith(f"Qdrant at {stand_in.url} doesn't answer (")


def where(settings: Settings, application: Application) -> str:
    return declared_builds(settings, application).where


def published(settings: Settings, application: Application) -> str:
    chunked(settings, application)
    vectors_without_a_model(Lake.of(settings, application.name), application)
    build = build_index(settings, application, run="test")["build"]
    declared_builds(settings, application).publish(build)
    return build
