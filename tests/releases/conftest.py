"""An application of its own for every test in one MLflow server; and one, shared, with documents and a real index."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from millrace.applications import Application
from millrace.evaluation.canaries import publish_build
from millrace.releases.declare import declare_release
from millrace.releases.manifest import Manifest, PromptVersion, declared_manifest, describe_weights
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents

Make = Callable[[str], tuple[Manifest, Path]]


@pytest.fixture
def registry(settings: Settings, mlflow_uri: str) -> Settings:
    """Settings with the session's MLflow server."""
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


@pytest.fixture
def application(qa: Application) -> Application:
    return qa.model_copy(update={"name": f"releases_{uuid.uuid4().hex[:8]}"})


@pytest.fixture
def make_release(application: Application, tmp_path: Path) -> Make:
    """A manifest and its weights: a few bytes, since a registry does not look into them."""

    def make(content: str) -> tuple[Manifest, Path]:
        weights = tmp_path / "model.gguf"
        weights.write_text(content)
        prompt = PromptVersion(name="p", version="1", template="{{ question }}")
        return declared_manifest(application, describe_weights(weights), prompt, "lineage"), weights

    return make


@dataclass(frozen=True)
class Answering:
    """An application with an index build, and two registered releases of the same weights."""

    settings: Settings
    application: Application
    build: str
    declared: str
    terse: str


@pytest.fixture(scope="session")
def answering(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str, qa: Application) -> Answering:
    settings = Settings(
        home=tmp_path_factory.mktemp("answering"), mlflow_uri=mlflow_uri, spark_tables=frozenset(), threads=2
    )
    application = qa.model_copy(update={"name": "answering"})
    for stage in (land_documents, refine_documents, refresh_chunks, refresh_embeddings):
        stage(settings, application, run="test")
    build = build_index(settings, application, run="test")["build"]
    publish_build(settings, application, build, run="test")
    declared, terse = (
        declare_release(settings, application, variant=variant, run="test")["version"] for variant in (None, "terse")
    )
    return Answering(settings, application, build, declared, terse)
