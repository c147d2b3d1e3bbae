from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from millrace.errors import EngineError, ReleaseError
from millrace.releases.loader import ReleaseLoader
from millrace.releases.pyfunc import PyfuncRelease
from millrace.retrieval.embed import Embedder
from millrace.retrieval.index import build_index, declared_builds
from millrace.retrieval.search import Retriever
from millrace.settings import Settings
from tests.releases.conftest import Answering
from tests.retrieval.stand_in import StandIn
from tests.serving.parrot import Drawer, Parrot, a_release

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")]

QUESTIONS = ["How many task instances may run at the same time?", "What is the DAG folder?"]


@pytest.fixture
def model_uri(answering: Answering, monkeypatch: pytest.MonkeyPatch) -> str:
    """As a user of plain MLflow has it; the package itself never reads these."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", answering.settings.mlflow_url)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", answering.settings.mlflow_url)
    return f"models:/{answering.application.name}/{answering.declared}"


def test_plain_mlflow_loads_a_release_and_gets_the_same_answers(answering: Answering, model_uri: str) -> None:
    builds = answering.settings.index_builds(answering.application.name)
    model = mlflow.pyfunc.load_model(model_uri, model_config={"index_builds": str(builds), "threads": 2})
    answers = model.predict(pd.DataFrame({"question": QUESTIONS}))
    assert list(answers.columns) == ["answer", "citations", "prompt_tokens", "completion_tokens"]
    loader = ReleaseLoader(answering.settings, answering.application)
    pipeline = loader.load(answering.declared)
    for row, question in zip(answers.itertuples(), QUESTIONS, strict=True):
        expected = pipeline.answer(question)
        assert row.answer == expected.text
        assert list(row.citations) == [hit.chunk_id for hit in expected.citations]
        assert (row.prompt_tokens, row.completion_tokens) == (
            expected.usage.prompt_tokens,
            expected.usage.completion_tokens,
        )
    loader.close()


def test_plain_mlflow_answers_from_a_qdrant_server_too(answering: Answering, model_uri: str) -> None:
    stand_in = StandIn(keys={"reader": "r", "writer": "m"})
    changes = {"qdrant_url": stand_in.url, "qdrant_api_key": "writer"}
    settings = Settings.model_validate(answering.settings.model_dump() | changes)
    assert build_index(settings, answering.application, run="test")["build"] == answering.build
    declared_builds(settings, answering.application).publish(answering.build)
    config = {"qdrant_url": stand_in.url, "qdrant_api_key": "reader", "environment": "dev", "threads": 2}
    model = mlflow.pyfunc.load_model(model_uri, model_config=config)
    (row,) = model.predict(pd.DataFrame({"question": QUESTIONS[:1]})).itertuples()
    embedder = Embedder(answering.application.retrieval.embedding_model, settings.cache, threads=2)
    found = Retriever(declared_builds(answering.settings, answering.application), embedder)
    hits = found.search(QUESTIONS[0], answering.application.retrieval.chunks)
    assert row.answer
    assert list(row.citations) == [hit.chunk_id for hit in hits][: len(row.citations)]
    assert len(row.citations) > 0
    stand_in.stop()


def test_what_can_not_be_answered_is_the_callers_fault_or_the_servers_and_says_so() -> None:
    class Away(Parrot):
        def generate(self, messages: Any, config: Any) -> Any:
            raise EngineError("vllm doesn't answer; start it")

    def predict(engine: Parrot, *questions: str) -> pd.DataFrame:
        return PyfuncRelease(a_release(engine, Drawer()), "build-1").predict(pd.DataFrame({"question": questions}))

    assert list(predict(Parrot(), "one", "two")["answer"]) == ["you asked one", "you asked two"]
    for engine, questions, said, status in (
        (Parrot(), ["one", " "], "the question is empty", 400),
        (Away(), ["one"], "vllm doesn't answer; start it", 503),
    ):
        with pytest.raises(MlflowException, match=said) as refused:
            predict(engine, *questions)
        assert refused.value.get_http_status_code() == status


def test_a_release_without_an_index_says_what_it_needs(model_uri: str) -> None:
    with pytest.raises(ReleaseError, match="answers from an index: load it with model_config="):
        mlflow.pyfunc.load_model(model_uri)
