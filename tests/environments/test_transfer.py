import getpass
import hashlib
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow import MlflowClient
from pydantic import SecretStr
from typer.testing import CliRunner

from millrace.applications import Application, load_application
from millrace.cli import app
from millrace.environments import transfer
from millrace.environments.audit import search
from millrace.environments.transfer import copy_release
from millrace.errors import ReleaseError
from millrace.evaluation.gate import find_leaks
from millrace.evaluation.sets import Example
from millrace.evaluation.tracking import log_evaluation
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES
from millrace.releases import registry
from millrace.releases.manifest import PromptVersion, declared_manifest, describe_weights
from millrace.releases.registry import RELEASE_TAG
from millrace.settings import Settings
from millrace.sources.erased import Erasure, hashed_question, write_erasures
from tests.conftest import COMMIT, copy_declarations
from tests.environments.conftest import As

START = datetime(2026, 11, 24, tzinfo=UTC)
QUESTION = "Where is the DAG folder?"


def trained(settings: Settings, application: Application, folder: Path, *, trained_on: str = "set-1") -> str:
    """A release as a fine-tune in `settings.environment` leaves it: registered, evaluated, its set in the lake."""
    weights = folder / "model.gguf"
    weights.write_text(f"trained on {trained_on}")
    prompt = PromptVersion(name="p", version="1", template="{{ question }}")
    manifest = declared_manifest(application, describe_weights(weights), prompt, "lineage")
    tags = {"millrace.origin": "finetune", "training_set": trained_on, "mlflow_run": "r1", "simulated": "false"}
    version = registry.register_release(settings, application, manifest, folder, run="train by ann", tags=tags)
    row = {
        "training_set": "set-1", "example_id": "e1", "origin": "document", "simulated": False, "section": None,
        "question": QUESTION, "answer": "In the home.", "chunk_ids": [], "prompt": QUESTION,
    }  # fmt: skip
    rows = pa.Table.from_pylist([row], schema=GOLD_TRAINING_EXAMPLES.rows_schema)
    Lake.of(settings, application.name).merge(GOLD_TRAINING_EXAMPLES, rows, run="test")
    log_evaluation(settings, application.name, evaluation(version))
    return version


def evaluation(version: str) -> dict[str, Any]:
    quality = {"name": "quality", "measure": "difference", "passed": True}
    numbers = {"champion": 0.5, "candidate": 0.75, "estimate": 0.25, "low": 0.1, "high": 0.4, "bound": -0.05}
    return {
        "evaluation_id": "eval-1", "verdict": "passed", "evaluation_set": "questions-1", "champion": "9",
        "candidate": version, "index_build": "build-1", "criteria": [quality | numbers],
    }  # fmt: skip


def evidence(settings: Settings, application: Application) -> list[Any]:
    with registry.mlflow_client(settings, "look for evidence") as client:
        experiment = client.get_experiment_by_name(f"{application.name}/evidence")
        return list(client.search_runs([experiment.experiment_id])) if experiment else []


def files(settings: Settings, application: Application, version: str, folder: Path) -> dict[str, str]:
    registry.fetch_model(settings, application, version, folder)
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_release_goes_from_dev_to_prod_as_it_is_with_what_is_known_of_it(
    ask_as: As, application: Application, tmp_path: Path
) -> None:
    dev = ask_as("dev")
    version = trained(dev, application, tmp_path)
    release_id = registry.versions(dev, application)[version]["millrace.release_id"]
    [run] = _evaluations(dev, application)
    bytes_in_dev = files(dev, application, version, tmp_path / "dev")

    staging = ask_as("staging")
    copied = copy_release(staging, application, version, source="dev", run="copy by bob")
    assert copied == {"version": "1", "release_id": release_id, "changed": True, "evaluations": 1}
    prod = ask_as("prod")
    for changed in (True, False):
        copied = copy_release(prod, application, "1", source="staging", run="copy by eve")
        assert copied == {"version": "1", "release_id": release_id, "changed": changed, "evaluations": 1}

    assert files(prod, application, "1", tmp_path / "prod") == bytes_in_dev
    assert registry.versions(prod, application)["1"] == {
        "millrace.origin": "finetune",
        "training_set": "set-1",
        "mlflow_run": "r1",
        "simulated": "false",
        "millrace.release_id": release_id,
        "millrace.state": "candidate",
        "millrace.registered_by": "train by ann",
        "millrace.built_by": "ann",
        "millrace.commit": COMMIT,
        "millrace.copied_from": f"dev/{application.name}@1 staging/{application.name}@1",
        "millrace.copied_by": "copy by eve",
    }
    [brought] = evidence(prod, application)
    assert brought.data.tags["millrace.copied_from"] == f"dev/{run.info.run_id}"
    assert (brought.data.metrics, brought.data.params) == (run.data.metrics, run.data.params)
    assert brought.data.metrics["quality.estimate"] == 0.25
    assert (brought.info.start_time, brought.info.status) == (run.info.start_time, "FINISHED")
    assert brought.data.tags["millrace.evaluation_id"] == "eval-1"
    asked = Example("x1", None, QUESTION, "In the home.", "d1")
    assert find_leaks(Lake.of(prod, application.name), "set-1", [asked]) == [(QUESTION, asked)]


def test_what_an_erased_user_asked_does_not_come_back_with_a_release(settings: Settings, qa: Application) -> None:
    dev, prod = (settings.model_copy(update={"environment": name}) for name in ("dev", "prod"))
    there, here = Lake.of(dev, qa.name), Lake.of(prod, qa.name)
    asked = {("document", "Why?"), ("correction", "Why?"), ("correction", "What now?")}
    row = {
        "training_set": "set-1", "simulated": False, "section": None, "answer": "So.", "chunk_ids": [], "prompt": "p",
    }  # fmt: skip
    rows = [row | {"example_id": f"{of} {one}", "origin": of, "question": one} for of, one in asked]
    there.merge(GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run="t")
    hashes = [hashed_question(settings.pseudonym_key.get_secret_value().encode(), "Why?")]
    write_erasures(here, [Erasure("f" * 32, START, START, frozenset(), {"questions": hashes})], run="test")

    tags = {RELEASE_TAG: "r", "training_set": "set-1"}
    keyless = prod.model_copy(update={"pseudonym_key": SecretStr("")})
    with pytest.raises(ReleaseError, match="set MILLRACE_PSEUDONYM_KEY to the gateway's"):
        transfer._copy_training_sets(keyless, dev, qa, tags, "test")
    transfer._copy_training_sets(prod, dev, qa, tags, "test")
    found = here.read(GOLD_TRAINING_EXAMPLES).to_pylist()
    assert {(one["origin"], one["question"]) for one in found} == asked - {("correction", "Why?")}


def test_a_person_copies_a_release_by_one_command(
    ask_as: As, application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = ask_as("staging")
    declared = load_application(staging.model_copy(update={"applications": copy_declarations(tmp_path)}), "handbook")
    version = trained(ask_as("dev"), declared, tmp_path)
    ask_as("staging")
    for name in ("home", "mlflow_uri", "mlflow_workspaces", "environment"):
        monkeypatch.setenv(f"MILLRACE_{name.upper()}", str(getattr(staging, name)))
    monkeypatch.setenv("MILLRACE_APPLICATIONS", str(tmp_path / "applications"))
    command = ["release", "copy", version, "--from", "dev", "--application", "handbook"]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    # Which it is, other tests of this server decide.
    found = re.search(r"of dev is handbook@(\d+) in staging, with 1 evaluations", told.output)
    assert found, told.output
    assert f"Candidate {found[1]} " in told.output
    assert "which was registered before" in CliRunner().invoke(app, command).output
    (entry,) = search(staging, application="handbook", resource="ops/promotions")
    told = (entry["actor"], entry["action"], entry["outcome"], entry["release_version"])
    assert told == (f"person/{getpass.getuser()}", "promotion", "copied", found[1])
    refused = CliRunner().invoke(app, ["release", "copy", "77", "--from", "dev", "--application", "handbook"])
    assert refused.exit_code == 1
    assert "handbook@77 is not registered in dev" in refused.output


def test_a_copy_killed_anywhere_is_completed_by_the_next(
    ask_as: As, application: Application, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = trained(ask_as("dev"), application, tmp_path)
    staging = ask_as("staging")

    def die(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    for at in ("create_run", "log_batch", "set_terminated", "log_model_artifacts", "create_model_version"):
        with monkeypatch.context() as patched:
            patched.setattr(MlflowClient, at, die)
            with pytest.raises(KeyboardInterrupt):
                copy_release(staging, application, version, source="dev", run="test")
        assert registry.versions(staging, application) == {}
    copied = copy_release(staging, application, version, source="dev", run="test")
    assert (copied["version"], copied["changed"]) == ("1", True)
    assert [one.info.status for one in evidence(staging, application)] == ["FINISHED"]
    registry.fetch_release(staging, application, "1")


def test_dev_can_bring_nothing_into_prod_and_prod_takes_nothing_from_dev(
    ask_as: As, application: Application, tmp_path: Path
) -> None:
    version = trained(ask_as("dev"), application, tmp_path)
    copy_release(ask_as("staging"), application, version, source="dev", run="test")
    for identity, source, refusal in (
        (
            "dev",
            "dev",
            r"does not let dev keep the evaluations of rel-\w+ in prod",
        ),
        ("dev", "staging", f"does not let dev list the releases of {application.name} in staging"),
        ("prod", "dev", f"does not let prod list the releases of {application.name} in dev"),
        ("prod", "prod", "prod copies releases from dev or staging, not from 'prod'"),
    ):
        with pytest.raises(ReleaseError, match=refusal):
            copy_release(ask_as(identity, "prod"), application, "1", source=source, run="test")
    assert registry.versions(ask_as("prod"), application) == {}


def test_what_a_release_was_trained_on_must_be_in_reach(ask_as: As, application: Application, tmp_path: Path) -> None:
    version = trained(ask_as("dev"), application, tmp_path, trained_on="set-elsewhere")
    with pytest.raises(
        ReleaseError, match=r"training set set-elsewhere of release rel-\w+ is not in .*/dev, so nobody"
    ):
        copy_release(ask_as("staging"), application, version, source="dev", run="test")
    assert registry.versions(ask_as("staging"), application) == {}


def _evaluations(settings: Settings, application: Application) -> list[Any]:
    with registry.mlflow_client(settings, "look for evaluations") as client:
        experiment = client.get_experiment_by_name(f"{application.name}/evaluations")
        return list(client.search_runs([experiment.experiment_id]))
