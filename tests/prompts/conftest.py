"""An application of its own for every test in the session's MLflow server, with a champion that nothing can load."""

import uuid
from pathlib import Path

import pytest

from millrace.applications import Application
from millrace.releases.manifest import Manifest, declared_manifest, describe_weights
from millrace.releases.prompt_registry import register_prompt
from millrace.releases.published_split import publish_split
from millrace.releases.registry import register_release
from millrace.releases.split import Split
from millrace.settings import Settings


@pytest.fixture
def registry(settings: Settings, mlflow_uri: str) -> Settings:
    """Settings with the session's MLflow server."""
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


@pytest.fixture
def application(qa: Application) -> Application:
    return qa.model_copy(update={"name": f"prompts_{uuid.uuid4().hex[:8]}"})


@pytest.fixture
def champion(registry: Settings, application: Application, tmp_path: Path) -> tuple[str, Manifest]:
    """Version and manifest of a champion that was trained on simulated corrections; its weights are a few bytes."""
    weights = tmp_path / "model.gguf"
    weights.write_text("weights")
    prompt = register_prompt(registry, application, application.prompt.template, run="test")
    manifest = declared_manifest(application, describe_weights(weights), prompt, "lineage")
    tags = {"training_set": "train-1", "simulated": "true"}
    version = register_release(registry, application, manifest, weights.parent, run="test", tags=tags)
    publish_split(registry, application.name, Split(sequence=0, champion=version))
    return version, manifest
