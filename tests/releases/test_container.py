"""A release as a folder: complete, exact, and answering as a process, since no container engine is at hand here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
import pytest
from typer.testing import CliRunner

from millrace.cli import app
from millrace.errors import ReleaseError, RetrievalError
from millrace.releases.container import BASE, write_container
from millrace.releases.package import verify_release
from millrace.settings import PROJECT, Settings
from tests.releases.conftest import Answering
from tests.releases.served import NOWHERE, invoked, only, serving
from tests.retrieval.stand_in import StandIn

pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")]

QUESTIONS = ["How many task instances may run at the same time?", "What is the DAG folder?"]


@pytest.fixture(scope="module")
def folder(answering: Answering, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("container") / "release"
    write_container(answering.settings, answering.application, answering.declared, written)
    return written


@pytest.fixture(scope="module")
def config(folder: Path, answering: Answering) -> dict[str, object]:
    """As plain MLflow is told it."""
    return {"index_builds": str(folder / "index"), "index_build": answering.build, "threads": 2}


@pytest.fixture(scope="module")
def inline(folder: Path, config: dict[str, object]) -> list[dict[str, object]]:
    """What `load_model` answers, with what the folder holds."""
    model = mlflow.pyfunc.load_model(str(folder / "model"), model_config=config)
    answers = model.predict(pd.DataFrame({"question": QUESTIONS}))
    return json.loads(answers.to_json(orient="records"))


def test_the_folder_holds_the_release_its_index_build_the_code_and_exact_requirements(
    folder: Path, answering: Answering
) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "Dockerfile", "code", "index", "load.json", "model", "requirements.txt"
    ]  # fmt: skip
    manifest = verify_release(folder / "model" / "data" / "release", (folder / "Dockerfile").read_text().split()[2])
    assert (folder / "index" / manifest.retrieval.lineage / answering.build / "manifest.json").is_file()
    assert json.loads((folder / "load.json").read_text()) == {"index_build": answering.build}
    assert all(re.fullmatch(r"[a-z0-9.-]+==\S+", line) for line in (folder / "requirements.txt").read_text().split())
    assert (folder / "model" / "model_card.md").is_file()


def test_the_dockerfile_has_the_base_of_our_own_and_copies_what_is_there(folder: Path) -> None:
    assert f"FROM {BASE}\n" in (PROJECT / "Dockerfile").read_text()
    lines = (folder / "Dockerfile").read_text().splitlines()
    assert f"FROM {BASE}" in lines
    copied = [line.split()[-2] for line in lines if line.startswith("COPY")]
    assert copied == ["requirements.txt", "code", "load.json", "model", "index"]
    assert all((folder / name).exists() for name in copied)
    assert lines.index("USER 10001:10001") < next(i for i, line in enumerate(lines) if line.startswith("ENTRYPOINT"))
    (entry,) = (json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT"))
    assert entry == ["python", "-m", "millrace.releases.serve", "/opt/release"]


def test_its_entry_point_answers_with_nothing_but_the_folder_and_its_requirements(
    folder: Path, inline: list[dict[str, object]], tmp_path: Path
) -> None:
    path = os.pathsep.join([str(folder / "code"), str(only(folder / "requirements.txt", tmp_path / "installed"))])
    # Without `site` there are no packages but those of PYTHONPATH, and this Millrace's code is not found either.
    arguments = ["-S", "-m", "millrace.releases.serve", folder]
    given = {"PYTHONPATH": path, "MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps({"threads": 2})}
    with serving(arguments, given, tmp_path / "log", ends_with=(0, -15)) as url:
        assert invoked(url, QUESTIONS) == inline


def test_mlflow_models_predict_needs_no_server(
    folder: Path, config: dict[str, object], inline: list[dict[str, object]], tmp_path: Path
) -> None:
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    asked.write_text(json.dumps({"dataframe_records": [{"question": question} for question in QUESTIONS]}))
    done = subprocess.run(
        [sys.executable, "-m", "mlflow", "models", "predict", "--model-uri", folder / "model",
         "--env-manager", "local", "--input-path", asked, "--output-path", answered],
        env=os.environ | {"MLFLOW_TRACKING_URI": NOWHERE, "MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps(config)},
        capture_output=True,
        text=True,
        timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(answered.read_text())["predictions"] == inline


def test_with_a_qdrant_server_the_folder_says_where_and_holds_no_key(answering: Answering, tmp_path: Path) -> None:
    from millrace.retrieval.index import build_index, declared_builds

    stand_in = StandIn(keys={"reader": "r", "writer": "m"})
    changes = {"qdrant_url": stand_in.url, "qdrant_api_key": "writer"}
    settings = Settings.model_validate(answering.settings.model_dump() | changes)
    build_index(settings, answering.application, run="test")
    declared_builds(settings, answering.application).publish(answering.build)
    write_container(settings, answering.application, answering.declared, tmp_path / "release")
    told = json.loads((tmp_path / "release" / "load.json").read_text())
    assert told == {"index_build": answering.build, "qdrant_url": stand_in.url, "environment": "dev"}
    dockerfile = (tmp_path / "release" / "Dockerfile").read_text()
    assert "COPY --chown=10001:10001 index" not in dockerfile
    assert "the Qdrant server that `load.json` names (its key: qdrant_api_key)" in dockerfile
    stand_in.stop()


def test_what_can_not_be_written_leaves_nothing_behind(answering: Answering, tmp_path: Path) -> None:
    settings, application = answering.settings, answering.application
    (taken := tmp_path / "taken").mkdir()
    with pytest.raises(ReleaseError, match="is there already"):
        write_container(settings, application, answering.declared, taken)
    with pytest.raises(ReleaseError, match="answering@999 is not registered"):
        write_container(settings, application, "999", tmp_path / "new")
    with pytest.raises(RetrievalError, match="there is no index build 'none'"):
        write_container(settings, application, answering.declared, tmp_path / "new", build="none")
    assert list(tmp_path.iterdir()) == [taken]


def test_a_person_who_names_what_is_not_there_is_told_so(
    answering: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_MLFLOW_URI", answering.settings.mlflow_uri)
    monkeypatch.setenv("MILLRACE_HOME", str(answering.settings.home))
    typed = CliRunner().invoke(app, ["release", "container", "999", str(tmp_path / "new")])
    assert (typed.exit_code, len(typed.stderr.splitlines())) == (1, 1)
    assert "qa@999 is not registered" in typed.stderr


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ('{"index_bild": "b"}', "names index_bild; known are index_builds, "),
        ("no", "is no JSON object"),
        ('"text"', "is no JSON object"),
    ],
)
def test_a_misspelt_configuration_is_refused_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, refusal: str
) -> None:
    from millrace.releases import serve

    monkeypatch.setenv(serve.CONFIG_VARIABLE, said)
    monkeypatch.setattr(sys, "argv", ["serve", str(folder)])
    with pytest.raises(SystemExit, match=refusal):
        serve.main()
