"""A release whose model a real server has: declared, registered, loaded, and answering as any other."""

import mlflow.pyfunc
import pandas as pd
import pytest

from millrace.applications import Application
from millrace.errors import EngineError
from millrace.releases.declare import declare_release
from millrace.releases.loader import ReleaseLoader
from millrace.releases.manifest import ServedModel
from millrace.releases.published_split import publish_split
from millrace.releases.pyfunc import load_config
from millrace.releases.registry import fetch_release, release_manifest
from millrace.releases.split import Split
from millrace.settings import Settings
from tests.conftest import free_port
from tests.engines.servers import Served
from tests.releases.conftest import Answering

pytestmark = pytest.mark.model

QUESTION = "What is the DAG folder?"


@pytest.fixture(scope="module")
def served(answering: Answering, model_server: Served) -> tuple[Settings, Application]:
    """Settings that name a server and its model, and the application of `answering` with an index build."""
    changes = {"upstream_url": model_server.upstream.url, "upstream_model": model_server.model}
    return Settings.model_validate(answering.settings.model_dump() | changes), answering.application


@pytest.mark.long
def test_one_setting_makes_new_releases_answer_from_the_server(
    served: tuple[Settings, Application], answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, application = served
    declared = declare_release(settings, application, variant=None, run="test")
    assert declared["changed"]
    assert not declare_release(settings, application, variant=None, run="test")["changed"]
    manifest = release_manifest(settings, application, declared["version"])
    assert isinstance(manifest.generator, ServedModel)
    assert manifest.generator.name == settings.upstream_model
    folder = fetch_release(settings, application, declared["version"])
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]

    loader = ReleaseLoader(settings, application)
    here, there = loader.load(answering.declared), loader.load(declared["version"])
    expected = here.answer(QUESTION)
    answer = there.answer(QUESTION)
    # The same weights in another engine, and nearly the same arithmetic.
    assert answer.text.split()[:3] == expected.text.split()[:3]
    assert answer.citations == expected.citations
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert (answer.release_id, answer.index_build) == (declared["release_id"], answering.build)
    assert "".join(there.stream(QUESTION)) == answer.text
    loader.close()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.mlflow_url)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", settings.mlflow_url)
    config = load_config(settings, application.name, answering.build)
    model = mlflow.pyfunc.load_model(f"models:/{application.name}/{declared['version']}", model_config=config)
    (row,) = model.predict(pd.DataFrame({"question": [QUESTION]})).itertuples()
    assert row.answer == answer.text


def test_a_variant_of_a_served_champion_is_served_too_and_costs_no_upload_of_weights(
    served: tuple[Settings, Application], answering: Answering
) -> None:
    settings, application = served
    champion = declare_release(settings, application, variant=None, run="test")["version"]
    publish_split(settings, application.name, Split(sequence=0, champion=champion))
    variant = declare_release(settings, application, variant="terse", run="test")["version"]
    manifest = release_manifest(settings, application, variant)
    assert manifest.generator == release_manifest(settings, application, champion).generator
    assert manifest.prompt.template == application.prompt.variants["terse"]


def test_a_server_that_is_away_stops_only_releases_that_need_it(
    served: tuple[Settings, Application], answering: Answering
) -> None:
    settings, application = served
    version = declare_release(settings, application, variant=None, run="test")["version"]
    away = settings.model_copy(update={"upstream_url": f"http://127.0.0.1:{free_port()}/v1"})
    loader = ReleaseLoader(away, application)
    with pytest.raises(EngineError, match="doesn't answer"):
        loader.load(version)
    assert loader.load(answering.declared).answer(QUESTION).text
    loader.close()
    with pytest.raises(EngineError, match="set MILLRACE_UPSTREAM_URL"):
        ReleaseLoader(answering.settings, application).load(version)


def test_a_misspelt_model_is_refused_before_anything_is_registered(served: tuple[Settings, Application]) -> None:
    settings, application = served
    wrong = settings.model_copy(update={"upstream_model": "no/such-model"})
    with pytest.raises(EngineError, match="has no model 'no/such-model'"):
        declare_release(wrong, application, variant=None, run="test")
