"""The story, told once by the running stack for every test of this folder."""

import io

import pytest
from rich.console import Console

from millrace.demo.run import Told, tell_story
from millrace.lakehouse.lake import Lake
from millrace.stack import Stack


@pytest.fixture(scope="session")
def told(running_stack: Stack) -> Told:
    said = Console(file=(out := io.StringIO()), width=200)
    with running_stack.airflow() as airflow:
        told = tell_story(running_stack.settings, "qa", airflow, said)
    assert told.failure is None, out.getvalue()
    return told


@pytest.fixture(scope="session")
def qa_lake(running_stack: Stack) -> Lake:
    return Lake.of(running_stack.settings, "qa")
