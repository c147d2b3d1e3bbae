"""Real stores on disk for every test: a home of its own, a small application on real documents."""

from pathlib import Path

import pytest
from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.settings import Settings

TEMPLATE = "{% for chunk in chunks %}{{ chunk.text }}\n{% endfor %}Question: {{ question }}\nAnswer:"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        pace="demo",
        spark_tables=frozenset(),
        completion_key="test completion key",
        pseudonym_key="test pseudonym key",
        threads=2,
    )


@pytest.fixture(scope="session")
def qa() -> Application:
    return Application.model_validate(
        {
            "name": "qa",
            "description": "a small corpus of real documents",
            "sources": [
                {"kind": "airflow_config", "sections": ["core", "triggerer"]},
                {"kind": "python_topics", "topics": ["if", "for"]},
            ],
            "prompt": {"template": TEMPLATE, "variants": {"terse": "{{ chunks[0].text }}\n{{ question }}"}},
            "questions": {"evaluation_sections": ["triggerer"]},
            "rollout": {"steps": [{"share": 0.25, "margin": 0.3}, {"share": 0.5, "margin": 0.2}]},
        }
    )


@pytest.fixture
def lake(settings: Settings) -> Lake:
    return Lake.of(settings, "qa")
