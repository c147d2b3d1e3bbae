"""Three environments side by side on one machine, in one object store and on one MLflow server, each with its own
credential: staging and prod as whole stacks with an Airflow and a Spark Connect server of their own, dev as somebody's
programs. A promotion of each kind, a bad one, and one taken back."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from millrace.airflow_api import Airflow
from millrace.applications import Application, load_application
from millrace.environments.access.airflow_wall import known_passwords
from millrace.environments.access.lake_wall import apply as apply_lake_access
from millrace.environments.audit import search, verify
from millrace.environments.difference import compare_environments
from millrace.errors import AccessRefused, ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.local import LocalEngine
from millrace.lakehouse.tables import OPS_EVALUATIONS, OPS_PROMOTIONS, SILVER_DOCUMENTS
from millrace.releases import published_split, registry
from millrace.releases.declare import declare_release
from millrace.rollout import people
from millrace.settings import Settings
from millrace.stack import Stack
from millrace.stack.versitygw import Versitygw
from millrace.training.candidate import release_candidate
from millrace.training.finetune import build_set, finetune
from tests.conftest import COMMIT, stack_settings
from tests.end_to_end.test_second import ends, until
from tests.environments.conftest import LAKE_KEYS, LAKE_PRINCIPALS, PASSWORDS
from tests.training.conftest import index

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(3000)]

EVE = {"actor": "eve", "reason": "users complained"}
FORM = {"max_examples": 12, "method": None, "start": "base", "teacher": None, "remove_blocks": 0}


def log_in(identity: str) -> None:
    os.environ |= {"MLFLOW_TRACKING_USERNAME": identity, "MLFLOW_TRACKING_PASSWORD": PASSWORDS[identity]}


@pytest.fixture
def three(open_folder: Path, walled_uri: str, walled_lake: Settings) -> dict[str, Settings]:
    """Environment → its settings: one MLflow server and one lake, a credential of its own for each."""
    lake = {"lake_uri": "s3://three/lake", "lake_endpoint": walled_lake.lake_endpoint}
    shared = lake | {"mlflow_uri": walled_uri, "mlflow_workspaces": True, "commit": COMMIT}
    made = {}
    for environment, key in LAKE_KEYS.items():
        folder = Path(tempfile.mkdtemp(dir=open_folder))
        keys = {"lake_access_key": SecretStr(key.access_key), "lake_secret_key": SecretStr(key.secret_key)}
        users = {"airflow_users": {"otto": "operator"}}
        made[environment] = stack_settings(folder, environment=environment, **shared, **keys, **users)
        declare(made[environment].applications / "qa.toml")
    made["dev"] = made["dev"].model_copy(update={"spark_tables": frozenset()})  # programs, no server of Spark's
    return made


def declare(declaration: Path) -> None:
    # Twice on two cores: a few steps in four blocks, so that its answers are its own and the export's are alike.
    short = declaration.read_text().replace("\nepochs = 2\n", "\nepochs = 6\nlora_layers = 4\n")
    # Dear, so that the gate refuses it for certain: the base model scores next to nothing on ten questions.
    dear = '"{% for chunk in chunks %}' + "{{ chunk.text }} " * 4 + '{% endfor %}{{ question }}"'
    short = short.replace('"Repeat these words and nothing else: {{ question }}"', dear)
    declaration.write_text(f'{short}\n[promotion.prod]\nfinetune = "code"\n')


@pytest.fixture
def stacks(
    three: dict[str, Settings], object_store: Versitygw, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Stack]]:
    from mlflow.utils.workspace_context import WorkspaceContext

    apply_lake_access(three["prod"], object_store.root, LAKE_PRINCIPALS)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # set back at the end
    with ExitStack() as running:
        running.enter_context(WorkspaceContext(None))
        started = {}
        for name in ("staging", "prod"):
            log_in(name)
            started[name] = running.enter_context(Stack(three[name]))
        yield started


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


def test_a_release_goes_from_dev_to_prod_as_bytes_or_by_its_code_and_comes_back(
    three: dict[str, Settings], stacks: dict[str, Stack]
) -> None:
    dev, staging, here = three["dev"], three["staging"], three["prod"]
    application = load_application(here, "qa")
    lake = Lake.of(here, "qa")
    log_in("dev")
    made = in_dev(dev, application)
    log_in("staging")
    with stacks["staging"].airflow() as airflow, as_otto(staging) as person:
        airflow.wait_for_dag("qa.promote")
        airflow.unpause("qa.promote")
        for version in made.values():
            promote(airflow, person, version)
    in_staging = {
        tags[registry.RELEASE_TAG]: version for version, tags in registry.versions(staging, application).items()
    }
    there = {name: in_staging[release_id(dev, application, version, "dev")] for name, version in made.items()}
    log_in("prod")

    with stacks["prod"].airflow() as airflow, as_otto(here) as person:
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
    # Nor does the store: dev reads prod and writes nothing of it, staging doesn't even read it.
    theirs, nothing = Lake.of(dev, "qa", environment="prod"), SILVER_DOCUMENTS.rows_schema.empty_table()
    assert theirs.read(SILVER_DOCUMENTS).num_rows == Lake.of(here, "qa").read(SILVER_DOCUMENTS).num_rows > 0
    with pytest.raises(AccessRefused, match="does not let lake-dev write s3://three/lake/prod/qa/silver/documents"):
        LocalEngine().merge(theirs.uri(SILVER_DOCUMENTS), SILVER_DOCUMENTS, nothing, run="x", delete_unmatched="true")
    with pytest.raises(AccessRefused, match="does not let lake-staging read s3://three/lake/prod/qa/silver/documents"):
        Lake.of(staging, "qa", environment="prod").read(SILVER_DOCUMENTS)


def as_otto(settings: Settings) -> Airflow:
    """A person who may approve."""
    return Airflow(settings.airflow_url, "otto", known_passwords(settings)["otto"])


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
