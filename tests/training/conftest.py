"""A tiny fine-tune on real sentences: eight examples and one that is held out, steps that take a second."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.lakehouse.tables import SILVER_FEEDBACK
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import refresh_embeddings
from millrace.retrieval.index import build_index, declared_builds
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from millrace.training.spec import Spec
from tests.training.tiny import EXAMPLES, first_blocks, spec_in


@pytest.fixture
def tracked(settings: Settings, mlflow_uri: str) -> Settings:
    """Settings with the session's MLflow server."""
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


@pytest.fixture
def tiny(qa: Application) -> Application:
    """`qa` under a name that no other test has in MLflow, with a training of a few steps."""
    training = {"lora_layers": 2, "lora_rank": 4, "epochs": 2, "max_tokens": 400, "max_examples": 9}
    return qa.model_copy(
        update={"name": f"qa_{uuid.uuid4().hex[:8]}", "training": qa.training.model_copy(update=training)}
    )


@pytest.fixture
def examples() -> list[dict[str, str]]:
    return EXAMPLES


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first two of the base model's 30 blocks and its first 1024 tokens: what is the same for every model takes
    seconds on it."""
    return first_blocks(tmp_path_factory.mktemp("base") / "two-blocks.gguf", 2, tokens=1024)


@pytest.fixture
def make_spec(tmp_path: Path, two_blocks: Path) -> Callable[..., Spec]:
    def make(folder: str = "run", examples: list[dict[str, str]] = EXAMPLES, **changed: Any) -> Spec:
        return spec_in(tmp_path / folder, changed.pop("base", two_blocks), examples, **changed)

    return make


def feedback(*rows: dict[str, Any]) -> pa.Table:
    """Rows of `silver/feedback`, a minute apart; each says what matters of it."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    base = {
        "content_hash": "h",
        "events_seen": 1,
        "date": start.date(),
        "user": "u",
        "simulated": False,
        "comment": None,
        "correction": None,
        "release_id": "r",
        "release_version": "1",
        "index_build": "b",
        "question": "What is it?",
        "answer": "no",
    }
    return pa.Table.from_pylist(
        [
            base | {"completion_id": str(i), "occurred_at": start + timedelta(minutes=i)} | row
            for i, row in enumerate(rows)
        ],
        schema=SILVER_FEEDBACK.rows_schema,
    )


def index(settings: Settings, application: Application) -> None:
    """What a training set needs: documents, chunks, and a published index build."""
    land_documents(settings, application, run="test")
    refine_documents(settings, application, run="test")
    refresh_chunks(settings, application, run="test")
    refresh_embeddings(settings, application, run="test")
    build = build_index(settings, application, run="test")["build"]
    declared_builds(settings, application).publish(build)
