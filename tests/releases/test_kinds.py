"""Releases of every kind through `mlflow.pyfunc.load_model`: one signature, side by side in one process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest
from typer.testing import CliRunner

from millrace.applications import Application
from millrace.cli import app
from millrace.errors import EngineError, SettingsError
from millrace.policies import Prices
from millrace.releases.declare import add_model, declare_release
from millrace.releases.loader import ReleaseLoader
from millrace.releases.manifest import HuggingFaceModel
from millrace.releases.registry import fetch_release, release_manifest, versions
from millrace.settings import Settings
from tests.releases.conftest import Answering

pytestmark = pytest.mark.model

QUESTIONS = pd.DataFrame({"question": ["How many task instances may run at the same time?", "What is the DAG folder?"]})
COLUMNS = ["answer", "citations", "prompt_tokens", "completion_tokens"]

Load = Callable[[str], mlflow.pyfunc.PyFuncModel]


@pytest.fixture
def load(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> Load:
    """As a user of plain MLflow does it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answering.settings.mlflow_url)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", answering.settings.mlflow_url)
    config = {"index_builds": str(answering.settings.index_builds(answering.application.name)), "threads": 2}
    return lambda version: mlflow.pyfunc.load_model(
        f"models:/{answering.application.name}/{version}", model_config=config
    )


@pytest.fixture(scope="session")
def added(answering: Answering, tiny_model: Path) -> str:
    """The version of a release with a Hugging Face directory."""
    return add_model(answering.settings, answering.application, tiny_model, name="tiny", run="test")["version"]


def test_a_hugging_face_directory_becomes_a_candidate_once(
    answering: Answering, added: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings, application = answering.settings, answering.application
    again = add_model(settings, application, tiny_model, name="tiny", run="test by ann")
    assert (again["version"], again["changed"]) == (added, False)
    manifest = release_manifest(settings, application, added)
    assert isinstance(manifest.generator, HuggingFaceModel)
    assert manifest.prompt.template == application.prompt.template
    tags = versions(settings, application)[added]
    assert (tags["millrace.state"], tags["millrace.origin"]) == ("candidate", "added")
    # As Hugging Face's cache keeps a model: every file a link, beside what is no part of it.
    (linked := tmp_path / "snapshot").mkdir()
    for file in tiny_model.iterdir():
        (linked / file.name).symlink_to(file)
    (linked / "training_args.bin").write_bytes(b"pickled")
    (linked / "README.md").unlink()
    other = add_model(settings, application, linked, name="tiny", run="test")
    assert other["changed"], "its licence went missing, so it is another release"
    folder = fetch_release(settings, application, other["version"])
    assert "training_args.bin" not in {path.name for path in folder.iterdir()}


@pytest.mark.long
def test_two_kinds_in_one_process_answer_by_one_signature_and_do_not_disturb_each_other(
    answering: Answering, added: str, load: Load
) -> None:
    weights, directory = load(answering.declared), load(added)
    assert weights.metadata.signature == directory.metadata.signature
    first = {name: model.predict(QUESTIONS) for name, model in (("weights", weights), ("directory", directory))}
    for answers in first.values():
        assert list(answers.columns) == COLUMNS
        assert answers["answer"].str.len().gt(0).all()
    assert first["weights"]["answer"].tolist() != first["directory"]["answer"].tolist()
    assert first["weights"]["citations"].map(list).tolist() == first["directory"]["citations"].map(list).tolist()
    third = load(answering.terse)
    assert third.predict(QUESTIONS)["answer"].tolist() != first["weights"]["answer"].tolist()
    for name, model in (("directory", directory), ("weights", weights)):
        pd.testing.assert_frame_equal(model.predict(QUESTIONS), first[name])

    loader = ReleaseLoader(answering.settings, answering.application)
    pipeline = loader.load(added)
    expected = [pipeline.answer(question).text for question in QUESTIONS["question"]]
    assert first["directory"]["answer"].tolist() == expected
    assert "".join(pipeline.stream(QUESTIONS["question"][0])) == expected[0]
    loader.close()


def test_a_file_that_was_put_beside_the_release_is_not_read(answering: Answering, added: str, tmp_path: Path) -> None:
    settings = answering.settings.model_copy(update={"home": tmp_path})
    folder = fetch_release(settings, answering.application, added)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"holds adapter_config\.json, which is no part of the release"):
        ReleaseLoader(settings, answering.application).load(added)


def test_what_can_not_answer_or_has_no_price_is_not_registered(
    answering: Answering, tiny_model: Path, tmp_path: Path
) -> None:
    settings, application = answering.settings, answering.application
    before = versions(settings, application)
    spoilt = shutil.copytree(tiny_model, tmp_path / "spoilt")
    (spoilt / "chat_template.jinja").unlink()
    with pytest.raises(EngineError, match="has no chat template"):
        add_model(settings, application, spoilt, name=None, run="test")
    named = Prices.model_validate({"models": {"gpt": {"prompt_million_tokens": 1, "completion_million_tokens": 1}}})
    with pytest.raises(SettingsError, match="generator 'model' has no price"):
        add_model(settings, application.model_copy(update={"prices": named}), tiny_model, name=None, run="test")
    assert versions(settings, application) == before


DECLARATION = """
name = "{name}"
description = "a test"
sources = [{{ kind = "python_topics", topics = ["if"] }}]
prompt = {{ template = "{{{{ question }}}}" }}
rollout = {{ steps = [{{ share = 0.5, margin = 0.3 }}] }}
"""


def test_a_person_adds_a_model(
    registry: Settings, application: Application, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (declared := tmp_path / "applications").mkdir()
    (declared / f"{application.name}.toml").write_text(DECLARATION.format(name=application.name))
    monkeypatch.setenv("MILLRACE_HOME", str(registry.home))
    monkeypatch.setenv("MILLRACE_MLFLOW_URI", registry.mlflow_uri)
    monkeypatch.setenv("MILLRACE_APPLICATIONS", str(declared))
    typed = ["release", "add", str(tiny_model), "--application", application.name]
    done = CliRunner().invoke(app, typed)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Candidate 1 (rel-")
    assert f"; {application.name}.evaluate_candidate is next." in done.stdout
    assert "which was registered before" in CliRunner().invoke(app, typed).stdout
    (tag,) = versions(registry, application).values()
    assert tag["millrace.registered_by"].startswith("millrace release add by ")
    refused = CliRunner().invoke(app, ["release", "add", str(declared), "--application", application.name])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
    assert "has no config.json" in refused.stderr


@pytest.mark.long
def test_the_base_model_as_a_directory_says_what_its_gguf_file_says(answering: Answering, model_folder: Path) -> None:
    settings, application = answering.settings, answering.application
    version = add_model(settings, application, model_folder, name="SmolLM2", run="test")["version"]
    declared = declare_release(settings, application, variant=None, run="test")["version"]
    loader = ReleaseLoader(settings, application)
    here, there = loader.load(declared), loader.load(version)
    for question in QUESTIONS["question"]:
        expected, answer = here.answer(question), there.answer(question)
        # The same weights in another engine, and nearly the same arithmetic.
        assert answer.text.split()[:3] == expected.text.split()[:3]
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
        assert there.answer(question).text == answer.text
    loader.close()
