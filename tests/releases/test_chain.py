"""A release whose generator is the example's LangChain chain: registered, loaded, answering as any other."""

import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest

from millrace.applications import Application
from millrace.engines.upstream import Upstream
from millrace.errors import EngineError
from millrace.releases.card import licences
from millrace.releases.declare import add_chain
from millrace.releases.generator import open_engine
from millrace.releases.loader import ReleaseLoader
from millrace.releases.manifest import Chain, Manifest, PromptVersion, declared_manifest, read_manifest
from millrace.releases.pyfunc import load_config
from millrace.releases.registry import fetch_release, release_manifest, versions
from millrace.releases.requirements import locked, requirements
from tests.engines.chains import PACKAGE, install
from tests.engines.servers import Served
from tests.releases.conftest import Answering

pytestmark = pytest.mark.model

QUESTION = "What is the DAG folder?"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = install(tmp_path_factory.mktemp("packages"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def parameters(package: Path, model_server: Served, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("OPENAI_BASE_URL", model_server.upstream.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    return {"model": model_server.model, "instruction": "Answer in one short sentence."}


def a_chain(application: Application, **parameters: str) -> Manifest:
    prompt = PromptVersion(name="qa.prompt", version="1", template="{{ question }}")
    generator = Chain(
        name="concise", package=PACKAGE, package_version="1.0.0", parameters=dict(parameters), context_tokens=1024
    )
    return declared_manifest(application, generator, prompt, "minilm-1")


def test_an_installed_chain_becomes_a_candidate_that_holds_its_parameters_and_answers_through_mlflow(
    answering: Answering, parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, application = answering.settings, answering.application
    ask = {"parameters": parameters, "context_tokens": 1500, "run": "test"}
    added = add_chain(settings, application, "concise", **ask)
    assert added["changed"]
    assert not add_chain(settings, application, "concise", **ask)["changed"]
    manifest = release_manifest(settings, application, added["version"])
    assert manifest.generator == Chain(
        name="concise", package=PACKAGE, package_version="1.0.0", parameters=parameters, context_tokens=1500
    )
    folder = fetch_release(settings, application, added["version"])
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
    assert versions(settings, application)[added["version"]]["millrace.origin"] == "added"

    loader = ReleaseLoader(settings, application)
    pipeline = loader.load(added["version"])
    expected = pipeline.answer(QUESTION)
    assert expected.text
    assert expected.citations
    assert expected.usage.completion_tokens > 0
    assert "".join(pipeline.stream(QUESTION)) == expected.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_url)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", settings.mlflow_url)
    config = load_config(settings, application.name, answering.build)
    model = mlflow.pyfunc.load_model(f"models:/{application.name}/{added['version']}", model_config=config)
    (row,) = model.predict(pd.DataFrame({"question": [QUESTION]})).itertuples()
    assert (row.answer, row.completion_tokens) == (expected.text, expected.usage.completion_tokens)
    loader.close()


def test_parameters_package_and_version_make_the_release_and_older_formats_can_not_hold_it(qa: Application) -> None:
    manifest = a_chain(qa, model="one")
    assert manifest.format == 3
    assert read_manifest(manifest.canonical(), "a test") == manifest
    other = a_chain(qa, model="other")
    assert len({one.release_id for one in (manifest, other)}) == 2
    assert manifest.generator.identity != other.generator.identity


def test_a_chain_needs_its_package_which_brings_its_own_licence(qa: Application, package: Path, tmp_path: Path) -> None:
    manifest = a_chain(qa)
    assert f"{PACKAGE}==1.0.0" in requirements(manifest)
    assert any(line.startswith("langchain-core==") for line in locked(manifest))
    assert licences(manifest, qa, tmp_path)["generator"].startswith(f"Apache-2.0 (package {PACKAGE})")


def test_a_chain_that_is_not_installed_where_a_release_is_loaded_is_named_with_what_to_install(
    qa: Application, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = a_chain(qa, model="one").generator
    assert isinstance(generator, Chain)
    newer = generator.model_copy(update={"package_version": "1.1.0"})
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with pytest.raises(EngineError, match=r"pip install millrace-example-chain==1\.1\.0, or register a release"):
        open_engine(newer, tmp_path, upstream=Upstream(""), threads=1, cache_gb=1)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(package)])
    with pytest.raises(EngineError, match=r"'concise' is not installed.*pip install millrace-example-chain==1\.0\.0"):
        open_engine(generator, tmp_path, upstream=Upstream(""), threads=1, cache_gb=1)
