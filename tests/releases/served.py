"""Releases over HTTP, as MLflow serves models: processes of their own, and how they are asked."""

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import answers, free_port, running

NOWHERE = "http://127.0.0.1:9"
"""Nobody listens there: what is told this address and works needs no MLflow server."""


def only(requirements: Path, folder: Path) -> Path:
    """A folder with exactly the distributions that a requirements file names, for `python -S` and PYTHONPATH."""
    folder.mkdir()
    for line in requirements.read_text().split():
        name, _, version = line.partition("==")
        found = distribution(name)
        assert found.version == version
        for top in {file.parts[0] for file in found.files or () if ".." not in file.parts}:
            source, target = Path(str(found.locate_file(top))), folder / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    return folder


@contextmanager
def serving(
    arguments: Sequence[object], environment: Mapping[str, str], log: Path, *, ends_with: tuple[int, ...]
) -> Iterator[str]:
    """Runs `python <arguments> --host --port`; its address. It must end by itself after SIGTERM."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    known = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    whole = known | {"MLFLOW_TRACKING_URI": NOWHERE, "HF_HUB_OFFLINE": "1"} | dict(environment)
    command = [sys.executable, *arguments, "--host", "127.0.0.1", "--port", port]
    with running(command, whole, log, lambda: answers(f"{url}/ping")) as process:
        yield url
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) in ends_with, log.read_text()[-3000:]


def invoked(url: str, questions: Sequence[str]) -> list[dict[str, Any]]:
    """The rows that `/invocations` answers."""
    body = {"dataframe_records": [{"question": question} for question in questions]}
    answered = httpx.post(f"{url}/invocations", json=body, timeout=120, trust_env=False)
    assert answered.status_code == 200, answered.text
    return answered.json()["predictions"]
