import mlflow.pyfunc
import pandas as pd
import pytest

from millrace.errors import ReleaseError
from millrace.releases.loader import ReleaseLoader
from tests.releases.conftest import Answering

pytestmark = pytest.mark.model

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


def test_a_release_without_an_index_says_what_it_needs(model_uri: str) -> None:
    with pytest.raises(ReleaseError, match="answers from an index: load it with model_config="):
        mlflow.pyfunc.load_model(model_uri)
