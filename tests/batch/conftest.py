"""An application with documents, an index build and two small releases, once; a lake of its own for every test."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from millrace.applications import AirflowConfigSource, Application, Generation
from millrace.batch.questions import submit_questions
from millrace.releases.declare import declare_release
from millrace.releases.published_split import publish_split
from millrace.releases.split import Split
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index, declared_builds
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from tests.batch.a_run import QUESTIONS

Submit = Callable[[int], None]


@dataclass(frozen=True)
class Served:
    """Where things are, the champion's version, and that of another release."""

    settings: Settings
    application: Application
    build: str
    champion: str
    other: str


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str, qa: Application) -> Served:
    settings = Settings(
        home=tmp_path_factory.mktemp("batch"), mlflow_uri=mlflow_uri, spark_tables=frozenset(), threads=2
    )
    application = qa.model_copy(
        update={
            "name": f"batch_{uuid.uuid4().hex[:8]}",
            "sources": (AirflowConfigSource(kind="airflow_config", sections=("triggerer",)),),
            "generation": Generation(max_new_tokens=6),
        }
    )
    for stage in (land_documents, refine_documents, refresh_chunks, refresh_embeddings):
        stage(settings, application, run="test")
    build = build_index(settings, application, run="test")["build"]
    declared_builds(settings, application).publish(build)
    champion, other = (
        declare_release(settings, application, variant=variant, run="test")["version"] for variant in (None, "terse")
    )
    publish_split(settings, application.name, Split(sequence=0, champion=champion))
    return Served(settings, application, build, champion, other)


@pytest.fixture
def served(prepared: Served, spark_url: str, tmp_path: Path) -> Served:
    """`prepared` in a home with an empty lake, where Spark commits the answers, three to a slice."""
    home = tmp_path / "home"
    home.mkdir()
    for kept in ("releases", "indexes"):
        (home / kept).symlink_to(prepared.settings.home / kept)
    settings = prepared.settings.model_copy(
        update={
            "home": home,
            "spark_remote": spark_url,
            "spark_tables": frozenset({"gold/answers"}),
            "batch_slice": 3,
        }
    )
    return Served(settings, prepared.application, prepared.build, prepared.champion, prepared.other)


@pytest.fixture
def submit(served: Served, tmp_path: Path) -> Submit:
    """Submits the first so many questions of `QUESTIONS`; those that are known stay."""

    def run(count: int) -> None:
        path = tmp_path / "questions.csv"
        rows = [f"q{number:02},{question}" for number, question in enumerate(QUESTIONS[:count])]
        path.write_text("\n".join(["question_id,question", *rows]))
        submit_questions(served.settings, served.application, path, run="test")

    return run
