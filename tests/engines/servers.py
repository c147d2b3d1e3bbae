"""Real OpenAI-compatible servers of the base model: `transformers serve`, which is in our environment, and vLLM, which
has one of its own (`make test-long` builds it)."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from millrace.engines.upstream import Upstream
from tests.conftest import answers, free_port, running

VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "vllm"
KEY = "the key of a test's vLLM"


@dataclass(frozen=True)
class Served:
    """A running server, and what it calls the base model."""

    upstream: Upstream
    model: str
    process: "subprocess.Popen[bytes]"


@contextmanager
def transformers_server(model: Path, scratch: Path) -> Iterator[Served]:
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    # It lists what is in Hugging Face's cache, and fails where there is none.
    (cache := scratch / "hub").mkdir(exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "2"}
    arguments = [program, "serve", model, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with running(arguments, environment, scratch / "transformers.log", _healthy(port), seconds=300) as process:
        yield Served(Upstream(f"http://127.0.0.1:{port}/v1"), str(model), process)


@contextmanager
def vllm_server(model: Path, scratch: Path, port: int | None = None) -> Iterator[Served]:
    if not VLLM.exists():
        pytest.skip(f"no vLLM in {VLLM.parents[1].name}: `make test-long` installs it")
    port = port or free_port()
    environment = os.environ | {
        "VLLM_API_KEY": KEY,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [VLLM, "serve", model, "--served-model-name", "smol", "--host", "127.0.0.1", "--port", port,
                 "--enable-lora", "--max-model-len", 4096, "--dtype", "float32", "--enforce-eager"]  # fmt: skip
    with running(arguments, environment, scratch / "vllm.log", _healthy(port), seconds=300) as process:
        yield Served(Upstream(f"http://127.0.0.1:{port}/v1", SecretStr(KEY)), "smol", process)


def _healthy(port: int) -> Callable[[], bool]:
    return lambda: answers(f"http://127.0.0.1:{port}/health")
