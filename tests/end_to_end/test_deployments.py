"""One release deployed in five ways gives the same answers: inline, batch, stream, container, service."""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import mlflow.pyfunc
import openai
import pandas as pd
import pytest

from millrace.applications import Application, load_application
from millrace.batch.inference import infer
from millrace.batch.questions import submit_questions
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_ANSWERS
from millrace.releases.container import write_container
from millrace.releases.declare import declare_release
from millrace.releases.published_split import publish_split
from millrace.releases.split import Split
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index, declared_builds
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from tests.conftest import DECLARATIONS, answers, choose_free_ports, gateway_environment, running
from tests.releases.served import invoked, serving

pytestmark = [pytest.mark.model, pytest.mark.spark, pytest.mark.long, pytest.mark.timeout(900)]

QUESTIONS = [
    f"What does the option {name} do?"
    for name in ("parallelism", "dags_folder", "executor", "load_examples", "fernet_key", "capacity")
]
Answers = list[tuple[str, tuple[str, ...]]]
"""Text and citations, in the order of `QUESTIONS`."""


@dataclass(frozen=True)
class Deployed:
    settings: Settings
    application: Application
    version: str


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str, spark_url: str) -> Deployed:
    """A champion with an index build; Spark commits the answers of tables."""
    folder = tmp_path_factory.mktemp("deployed")
    (folder / "applications").mkdir()
    declaration = (DECLARATIONS / "qa.toml").read_text().replace('name = "qa"', 'name = "five_ways"')
    (folder / "applications" / "five_ways.toml").write_text(declaration)
    settings = Settings(
        home=folder / "home",
        applications=folder / "applications",
        gateway_port=choose_free_ports()["gateway_port"],
        mlflow_uri=mlflow_uri,
        spark_remote=spark_url,
        spark_tables=frozenset({"gold/answers"}),
        completion_key="test completion key",
        pseudonym_key="test pseudonym key",
        threads=2,
    )
    application = load_application(settings, "five_ways")
    for stage in (land_documents, refine_documents, refresh_chunks, refresh_embeddings):
        stage(settings, application, run="test")
    declared_builds(settings, application).publish(build_index(settings, application, run="test")["build"])
    version = declare_release(settings, application, variant=None, run="test")["version"]
    publish_split(settings, application.name, Split(sequence=0, champion=version))
    return Deployed(settings, application, version)


@pytest.fixture(scope="module")
def folder(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a container's image is built from."""
    written = tmp_path_factory.mktemp("container") / "release"
    write_container(deployed.settings, deployed.application, deployed.version, written)
    return written


@pytest.fixture(scope="module")
def config(deployed: Deployed) -> dict[str, object]:
    """As plain MLflow is told it."""
    return {"index_builds": str(deployed.settings.index_builds(deployed.application.name)), "threads": 2}


@pytest.fixture(scope="module")
def inline(deployed: Deployed, folder: Path, config: dict[str, object]) -> Answers:
    model = mlflow.pyfunc.load_model(str(folder / "model"), model_config=config)
    found = model.predict(pd.DataFrame({"question": QUESTIONS}))
    said = [(row.answer, tuple(row.citations)) for row in found.itertuples()]
    assert len({answer for answer, _ in said}) == len(QUESTIONS), "else equal answers would prove little"
    assert all(citations for _, citations in said)
    return said


@pytest.mark.parametrize("mode", ["batch", "stream"])
def test_on_spark_each_question_is_answered_once_and_as_inline(
    deployed: Deployed, inline: Answers, tmp_path: Path, mode: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for kept in ("releases", "indexes"):
        (home / kept).symlink_to(deployed.settings.home / kept)
    settings = deployed.settings.model_copy(update={"home": home, "batch_slice": 4})
    asked = tmp_path / "asked.jsonl"
    lines = ({"question_id": str(number), "question": question} for number, question in enumerate(QUESTIONS))
    asked.write_text("\n".join(map(json.dumps, lines)))
    submit_questions(settings, deployed.application, asked, run="test")
    done = infer(settings, deployed.application, run="test", mode=mode)
    assert (done["asked"], done["errors"], done["release_version"]) == (len(QUESTIONS), 0, deployed.version)
    assert infer(settings, deployed.application, run="again", mode=mode)["asked"] == 0
    rows = Lake.of(settings, deployed.application.name).read(GOLD_ANSWERS).to_pylist()
    assert {row["mode"] for row in rows} == {mode}
    said = [(row["answer"], tuple(row["citations"])) for row in sorted(rows, key=lambda row: int(row["question_id"]))]
    assert said == inline


def test_the_entry_point_of_a_container_answers_as_inline(folder: Path, inline: Answers, tmp_path: Path) -> None:
    given = {"PYTHONPATH": str(folder / "code"), "MLFLOW_PYFUNC_INFERENCE_CONFIG": '{"threads": 2}'}
    arguments = ["-m", "millrace.releases.serve", folder]
    with serving(arguments, given, tmp_path / "log", ends_with=(0, -signal.SIGTERM)) as url:
        rows = invoked(url, QUESTIONS)
    assert [(row["answer"], tuple(row["citations"])) for row in rows] == inline


def test_mlflow_models_serve_answers_as_inline(
    deployed: Deployed, folder: Path, config: dict[str, object], inline: Answers, tmp_path: Path
) -> None:
    arguments = ["-m", "mlflow", "models", "serve", "--model-uri", folder / "model", "--env-manager", "local"]
    given = {
        "MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps(config),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # where the command looks for uvicorn
    }
    # The command starts a server and waits for it: a signal ends both, each in its way.
    with serving(arguments, given, tmp_path / "log", ends_with=(0, 1, -signal.SIGTERM)) as url:
        rows = invoked(url, QUESTIONS)
    assert [(row["answer"], tuple(row["citations"])) for row in rows] == inline


def test_the_gateway_answers_as_inline(deployed: Deployed, inline: Answers, tmp_path: Path) -> None:
    url = deployed.settings.gateway_url
    command, environment = [sys.executable, "-m", "millrace.serving"], gateway_environment(deployed.settings)
    with running(command, environment, tmp_path / "log", lambda: answers(f"{url}/readyz")):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=120)
        said = []
        for question in QUESTIONS:
            done = client.chat.completions.create(
                model=deployed.application.name, messages=[{"role": "user", "content": question}], user="ann"
            )
            told = done.model_extra["millrace"]
            assert told["release_version"] == deployed.version
            said.append(
                (done.choices[0].message.content, tuple(citation["chunk_id"] for citation in told["citations"]))
            )
    assert said == inline
