"""Three environments side by side on one machine: dev and staging as programs, prod as a whole stack with its own
Airflow, each with its own credential on one MLflow server. A promotion of each kind, a bad one, and one taken back."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.airflow_api import Airflow
from millrace.applications import Application, load_application
from millrace.environments.access.airflow_wall import known_passwords
from millrace.environments.audit import search, verify
from millrace.environments.difference import compare_environments
from millrace.errors import ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS, OPS_PROMOTIONS
from millrace.releases import published_split, registry
from millrace.releases.declare import declare_release
from millrace.rollout import people
from millrace.settings import Settings
from millrace.stack import Stack
from millrace.training.candidate import release_candidate
from millrace.training.finetune import build_set, finetune
from tests.conftest import COMMIT, stack_settings
from tests.end_to_end.test_second import ends, until
from tests.environments.conftest import PASSWORDS
from tests.environments.test_promotion import promoted
from tests.training.conftest import index

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(3000)]

EVE = {"actor": "eve", "reason": "users complained"}
FORM = {"max_examples": 12, "method": None, "start": "base", "teacher": None, "remove_blocks": 0}


def log_in(identity: str) -> None:
    os.environ |= {"MLFLOW_TRACKING_USERNAME": identity, "MLFLOW_TRACKING_PASSWORD": PASSWORDS[identity]}


@pytest.fixture
def prod(open_folder: Path, walled_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    from mlflow.utils.workspace_context import WorkspaceContext

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "prod")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["prod"])
    shared = {"mlflow_uri": walled_uri, "mlflow_workspaces": True, "commit": COMMIT}
    shared |= {"airflow_users": {"otto": "operator"}}
    settings = stack_settings(Path(tempfile.mkdtemp(dir=open_folder)), environment="prod", **shared)
    declaration = settings.applications / "qa.toml"
    # Twice on two cores: a few steps in four blocks, so that its answers are its own and the export's are alike.
    short = declaration.read_text().replace("\nepochs = 2\n", "\nepochs = 6\nlora_layers = 4\n")
    # Dear, so that the gate refuses it for certain: the base model scores next to nothing on ten questions.
    dear = '"{% for chunk in chunks %}' + "{{ chunk.text }} " * 4 + '{% endfor %}{{ question }}"'
    short = short.replace('"Repeat these words and nothing else: {{ question }}"', dear)
    declaration.write_text(f'{short}\n[promotion.prod]\nfinetune = "code"\n')
    with WorkspaceContext(None), Stack(settings) as stack:
        yield stack


def in_dev(settings: Settings, application: Application) -> dict[str, str]:
    """What dev makes of other documents than prod learns from: name → version."""
    reference = application.sources[0].model_copy(update={"sections": ("database", "triggerer")})
    asked = application.questions.model_copy(update={"live_sections": ()})
    application = application.model_copy(update={"sources": (reference,), "questions": asked})
    index(settings, application)
    made = {"declared": declare_release(settings, application, variant=None, run="declare by ann")["version"]}
    made["broken"] = declare_release(settings, application, variant="broken", run="declare by ann")["version"]
    learns = build_set(settings, application, run="train by ann", **FORM)["learns"]
    trained = finetune(settings, application, run="train by ann", **learns)
    tuned = release_candidate(settings, application, trained=trained, run="train by ann", form=FORM)
    return made | {"finetuned": tuned["version"]}


def promote(airflow: Airflow, person: Airflow, version: str) -> str:
    """The id of a promotion that a person approved of, and that succeeded."""
    run = airflow.trigger("qa.promote", {"version": version}).run_id

    def states() -> dict[str, str | None]:
        return {task.task_id: task.state for task in airflow.tasks("qa.promote", run)}

    until(lambda: states()["approve"] == "awaiting_input" or states()["ask_for"] == "failed", 120)
    time.sleep(15)  # Airflow fails a task that is answered before its worker has left; no person is that quick.
    person.answer("qa.promote", run, "approve", "Approve", reason="asked and answered")
    ends(airflow, "qa.promote", run, "success")
    return run


def test_a_release_goes_from_dev_to_prod_as_bytes_or_by_its_code_and_comes_back(prod: Stack) -> None:
    here = prod.settings
    application = load_application(here, "qa")
    dev, staging = (here.model_copy(update={"environment": name}) for name in ("dev", "staging"))
    lake = Lake.of(here, "qa")
    log_in("dev")
    made = in_dev(dev, application)
    log_in("staging")
    there = {name: promoted(staging, application, version, name)["version"] for name, version in made.items()}
    assert all(there.values())
    log_in("prod")

    with prod.airflow() as airflow, Airflow(here.airflow_url, "otto", known_passwords(here)["otto"]) as person:
        for dag in ("refresh_embeddings", "evaluate_candidate", "rollout", "finetune", "promote"):
            airflow.wait_for_dag(f"qa.{dag}")
            airflow.unpause(f"qa.{dag}")
        ingested = airflow.trigger("qa.ingest_documents")
        ends(airflow, ingested.dag_id, ingested.run_id, "success")
        embedded = airflow.wait_for_asset_run("qa.refresh_embeddings", since=ingested.run_after, timeout=120)
        ends(airflow, embedded.dag_id, embedded.run_id, "success")

        # As bytes: the first release of prod, and then one that is worse.
        promote(airflow, person, there["declared"])
        until(lambda: champion(here) == "1", 180)
        assert release_id(here, application, "1") == release_id(dev, application, made["declared"], "dev")
        promote(airflow, person, there["broken"])
        until(lambda: verdicts(lake).get("2") is not None, 600)
        assert not verdicts(lake)["2"]
        assert release_id(here, application, "2") == release_id(staging, application, there["broken"], "staging")

        # By its code: prod trains it again, and it is another release.
        run = promote(airflow, person, there["finetuned"])
        (rebuild,) = (one for one in airflow.runs("qa.finetune") if one.run_id.startswith("promotion__"))
        assert rebuild.conf == FORM
        ends(airflow, "qa.finetune", rebuild.run_id, "success")
        until(lambda: verdicts(lake).get("3") is not None, 600)
        tags = registry.versions(here, application)["3"]
        assert tags["millrace.registered_by"].startswith(f"qa.finetune/{rebuild.run_id}/release")
        assert (tags["millrace.commit"], tags["millrace.recipe"]) == (COMMIT, recipe(staging, application, there))
        learnt = registry.versions(staging, application)[there["finetuned"]]["training_set"]
        assert tags["training_set"] != learnt, "prod has other documents"
        assert release_id(here, application, "3") != release_id(staging, application, there["finetuned"], "staging")
        assert set(answering(airflow, run)) == {"ask_for", "approve", "bring", "rebuild"}

    # Taken back: users are given what they were given before.
    people.admit(here, application, "3", **EVE)
    until(lambda: challenger(here) == "3", 300)
    people.skip(here, application, **EVE)
    assert champion(here) == "3"
    people.withdraw(here, application, "3", **EVE)
    assert champion(here) == "1"

    steps = lake.read(OPS_PROMOTIONS).to_pylist()
    assert sorted((step["source_version"], step["step"], step["way"]) for step in steps) == sorted(
        [(there[name], "approved", way) for name, way in WAYS.items()]
        + [(there[name], "copied" if way == "models" else "rebuilding", way) for name, way in WAYS.items()]
    )
    verify(here)
    told = [(one["actor"], one["outcome"]) for one in search(here, application="qa", resource="ops/promotions")]
    assert told == [
        ("person/otto", "approved"), ("service/promotion", "copied"),
        ("person/otto", "approved"), ("service/promotion", "copied"),
        ("person/otto", "approved"), ("service/promotion", "rebuilding"),
    ]  # fmt: skip
    last = search(here, application="qa", actor="person/eve")[-1]
    assert (last["outcome"], last["details"]["champion"]) == ("rollback", "1")

    parts = {part.name: part for part in compare_environments(here, "staging", "prod")}
    assert {one.name for one in parts["models"].differences} >= {"qa champion"}
    assert parts["models"].equal >= 1
    log_in("dev")
    for write in (
        lambda: registry.tag_release(here, application, "1", {"a": "b"}),
        lambda: declare_release(here, application, variant="terse", run="mallory"),
    ):
        with pytest.raises(ReleaseError, match=r"does not let dev .* in prod"):
            write()


WAYS = {"declared": "models", "broken": "models", "finetuned": "code"}


def champion(settings: Settings) -> str | None:
    split = published_split.read_split(settings, "qa")
    return split.champion if split else None


def challenger(settings: Settings) -> str | None:
    split = published_split.read_split(settings, "qa")
    return split.challenger if split else None


def verdicts(lake: Lake) -> dict[str, bool]:
    rows = lake.read(OPS_EVALUATIONS, ["candidate", "passed"]).to_pylist()
    return {row["candidate"]: row["passed"] for row in rows}


def release_id(settings: Settings, application: Application, version: str, identity: str = "prod") -> str:
    log_in(identity)
    found = registry.versions(settings, application)[version][registry.RELEASE_TAG]
    log_in("prod")
    return found


def recipe(staging: Settings, application: Application, there: dict[str, Any]) -> str:
    return registry.versions(staging, application)[there["finetuned"]]["millrace.recipe"]


def answering(airflow: Airflow, run: str) -> list[str]:
    return [task.task_id for task in airflow.tasks("qa.promote", run) if task.state == "success"]
