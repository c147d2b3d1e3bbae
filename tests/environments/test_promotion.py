"""A release goes from one environment to the next: who asks, who answers, which way, and what the trail says."""

from pathlib import Path
from typing import Any

import pytest

from millrace.applications import Application, Training
from millrace.environments.audit import search, verify
from millrace.environments.promotion import bring, record_answer, request
from millrace.errors import ApprovalError, ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.promotions import read_steps
from millrace.lakehouse.tables import OPS_PROMOTIONS
from millrace.lakehouse.trained import EMBEDDING_TAG
from millrace.releases import registry
from millrace.releases.recipe import COMMIT_TAG, Recipe, Stage
from millrace.releases.registry import BUILDER_TAG
from millrace.settings import Settings
from tests.conftest import COMMIT
from tests.environments.conftest import As
from tests.environments.test_transfer import trained

FORM = {"max_examples": 8, "method": None, "start": "base", "teacher": None, "remove_blocks": 0}


@pytest.fixture
def by_code(application: Application) -> Application:
    """Staging makes fine-tunes again."""
    ways = application.promotion.staging.model_copy(update={"finetune": "code"})
    return application.model_copy(update={"promotion": application.promotion.model_copy(update={"staging": ways})})


@pytest.fixture
def in_dev(ask_as: As, application: Application, tmp_path: Path) -> str:
    """The version of a fine-tuned release in dev, built by ann at `COMMIT`."""
    dev = ask_as("dev")
    version = trained(dev, application, tmp_path)
    registry.tag_release(dev, application, version, Recipe.of(application, "finetune", FORM).tags)
    return version


def answer(option: str, name: str, reason: str = "it was asked well") -> dict[str, Any]:
    """As the operator gives it."""
    user = {"id": name, "name": name}
    return {"chosen_options": [option], "params_input": {"reason": reason}, "responded_by_user": user}


def promoted(settings: Settings, application: Application, version: str, run_id: str = "r1") -> dict[str, Any]:
    """What the DAG does with a release that eve approves of."""
    asked = request(settings, application, version, run_id=run_id)["promotion"]
    record_answer(settings, application, asked, answer("Approve", "eve"))
    return bring(settings, application, asked, run=f"promote/{run_id}/bring")


def test_a_release_is_asked_about_approved_copied_and_written_into_the_audit_trail(
    ask_as: As, application: Application, in_dev: str
) -> None:
    staging, lake = ask_as("staging"), Lake.of(ask_as("staging"), application.name)
    asked = request(staging, application, in_dev, run_id="r1")
    assert asked["asks"] == f"May {application.name}@1 of dev come into staging?"
    for told in ("made by finetune", COMMIT, "built by ann", "bytes", "1 against 9: passed, quality +0.250"):
        assert told in asked["told"]
    assert lake.read(OPS_PROMOTIONS).num_rows == 0

    promotion = asked["promotion"]
    with pytest.raises(ApprovalError, match=r"nobody approved of promotion \w+, and staging asks for that"):
        bring(staging, application, promotion, run="test")
    for name in ("ann", "Ann"):  # as an operating system and as Airflow may write the same person
        with pytest.raises(ApprovalError, match=rf"{name} built version 1 of .* in dev and can't decide about it"):
            record_answer(staging, application, promotion, answer("Approve", name))
    with pytest.raises(ApprovalError, match="eve gave no reason"):
        record_answer(staging, application, promotion, answer("Approve", "eve", " "))
    assert registry.versions(staging, application) == {}

    for said in (answer("Approve", "eve"), answer("Approve", "bob")):  # a cleared task asks again: the first one stays
        record_answer(staging, application, promotion, said)
    with pytest.raises(ApprovalError, match=r"eve answered otherwise about promotion \w+ before; start another"):
        record_answer(staging, application, promotion, answer("Reject", "bob"))
    for changed in (True, False):
        brought = bring(staging, application, promotion, run="promote/r1/bring")
        assert (brought["changed"], brought["version"], brought["rebuild"]) == (changed, "1", [])
    assert registry.versions(staging, application)["1"]["millrace.copied_by"] == "promote/r1/bring"
    steps = read_steps(lake, promotion["promotion_id"])
    assert {(step, row["actor"], row["reason"]) for step, row in steps.items()} == {
        ("approved", "eve", "it was asked well"),
        ("copied", "promotion", "copied with 1 evaluations"),
    }
    entries = search(staging, application=application.name, resource="ops/promotions")
    told = [(one["actor"], one["action"], one["outcome"], one["release_id"], one["release_version"]) for one in entries]
    release_id = promotion["release_id"]
    assert told == [
        ("person/eve", "approval", "approved", release_id, None),
        ("service/promotion", "promotion", "copied", release_id, "1"),
    ]
    assert entries[1]["details"] == {"source": "dev", "source_version": "1", "way": "models", "commit": COMMIT}
    for name in ("ann", "Ann"):
        (refused,) = search(staging, actor=name)
        assert (refused["action"], refused["outcome"]) == ("approval", "refused")
    assert verify(staging).entries == 4


@pytest.mark.parametrize(
    "changed", [{"release_id": "rel-forged"}, {"source_version": "2"}, {"way": "code", "recipe": "{}"}]
)
def test_nothing_comes_but_what_the_journal_says_was_approved(
    ask_as: As, application: Application, in_dev: str, changed: dict[str, str]
) -> None:
    staging = ask_as("staging")
    asked = request(staging, application, in_dev, run_id="r1")["promotion"]
    record_answer(staging, application, asked, answer("Approve", "eve"))
    with pytest.raises(ApprovalError, match=f"eve approved of another {', '.join(changed)} than promotion"):
        bring(staging, application, asked | changed, run="test")
    assert registry.versions(staging, application) == {}


@pytest.mark.parametrize("tag", [BUILDER_TAG, "training_set", EMBEDDING_TAG])
def test_who_built_it_and_what_it_learnt_may_not_be_told_otherwise_once_it_was_asked_about(
    ask_as: As, application: Application, in_dev: str, tag: str
) -> None:
    staging = ask_as("staging")
    asked, other = (request(staging, application, in_dev, run_id=f"r{n}")["promotion"] for n in (1, 2))
    record_answer(staging, application, asked, answer("Approve", "eve"))
    registry.tag_release(ask_as("dev"), application, in_dev, {tag: "zed"})
    staging = ask_as("staging")
    with pytest.raises(ReleaseError, match="is told otherwise than when it was asked about"):
        bring(staging, application, asked, run="test")
    with pytest.raises(ReleaseError, match="is told otherwise than when it was asked about"):
        record_answer(staging, application, other, answer("Approve", "ann"))
    assert registry.versions(staging, application) == {}


def test_what_a_person_rejects_does_not_come_and_may_be_asked_about_again(
    ask_as: As, application: Application, in_dev: str
) -> None:
    staging = ask_as("staging")
    asked = request(staging, application, in_dev, run_id="r1")["promotion"]
    record_answer(staging, application, asked, answer("Reject", "eve"))
    brought = bring(staging, application, asked, run="test")
    assert (brought["why"], brought["version"]) == ("eve rejected it", None)
    assert registry.versions(staging, application) == {}
    assert promoted(staging, application, in_dev, "r2")["version"] == "1"


def test_where_the_declaration_says_code_the_same_commit_is_asked_to_make_it_again(
    ask_as: As, by_code: Application, in_dev: str
) -> None:
    staging = ask_as("staging")
    assert "made again of the data of staging" in request(staging, by_code, in_dev, run_id="r1")["told"]
    brought = promoted(staging, by_code, in_dev)
    (rebuild,) = brought["rebuild"]
    assert rebuild["trigger_dag_id"] == f"{by_code.name}.finetune"
    assert rebuild["trigger_run_id"].startswith("promotion__")
    assert rebuild["conf"] == FORM
    assert (brought["changed"], brought["version"]) == (False, None)
    assert registry.versions(staging, by_code) == {}
    assert Lake.of(staging, by_code.name).read(OPS_PROMOTIONS, ["step"])["step"].to_pylist().count("rebuilding") == 1
    assert search(staging, application=by_code.name)[-1]["details"]["way"] == "code"


@pytest.mark.parametrize(
    ("kind", "origin", "stage"),
    [("embedding", "embedding", "finetune_embedding"), ("prompt", "prompt_study", "optimize_prompt")],
)
def test_every_kind_has_its_own_way_and_the_stage_that_makes_it(
    ask_as: As, application: Application, in_dev: str, kind: str, origin: str, stage: Stage
) -> None:
    ways = application.promotion.staging.model_copy(update={kind: "code"})
    declared = application.model_copy(
        update={"promotion": application.promotion.model_copy(update={"staging": ways, "approval_in": ()})}
    )
    assert request(ask_as("staging"), declared, in_dev, run_id="r1")["promotion"]["way"] == "models"  # a fine-tune
    made = Recipe.of(application, stage, {"trials": 3}).tags | {"millrace.origin": origin}
    registry.tag_release(ask_as("dev"), application, in_dev, made)
    staging = ask_as("staging")
    asked = request(staging, declared, in_dev, run_id="r1")["promotion"]
    (rebuild,) = bring(staging, declared, asked, run="test")["rebuild"]
    assert (rebuild["trigger_dag_id"], rebuild["conf"]) == (f"{application.name}.{stage}", {"trials": 3})


def test_what_was_approved_is_what_comes_even_if_somebody_changes_it_in_dev_meanwhile(
    ask_as: As, application: Application, by_code: Application, in_dev: str
) -> None:
    staging = ask_as("staging")
    release_id = registry.versions(ask_as("dev"), application)[in_dev][registry.RELEASE_TAG]
    ask_as("staging")
    ways = {"models": application, "code": by_code}
    asked = {name: request(staging, one, in_dev, run_id=name) for name, one in ways.items()}
    for name, one in asked.items():
        record_answer(staging, application, one["promotion"], answer("Approve", "eve", name))
    other = Recipe.of(application, "finetune", FORM | {"max_examples": 9999}).tags
    registry.tag_release(ask_as("dev"), application, in_dev, other | {registry.RELEASE_TAG: "rel-forged"})
    ask_as("staging")
    with pytest.raises(ReleaseError, match=f"@1 of dev is rel-forged now, and {release_id} was approved; promote it"):
        bring(staging, application, asked["models"]["promotion"], run="test")
    assert registry.versions(staging, application) == {}
    (rebuild,) = bring(staging, by_code, asked["code"]["promotion"], run="test")["rebuild"]
    assert rebuild["conf"] == FORM
    assert '"max_examples":8' in asked["code"]["told"]


def test_what_this_code_would_not_make_again_is_refused_in_one_sentence_and_nothing_is_written(
    ask_as: As, by_code: Application, in_dev: str
) -> None:
    staging = ask_as("staging")
    other = staging.model_copy(update={"commit": "b" * 40})
    with pytest.raises(ReleaseError, match=f"staging runs commit {'b' * 40}, and .*@1 of dev was made by {COMMIT}; "):
        request(other, by_code, in_dev, run_id="r1")
    learns = by_code.model_copy(update={"training": Training(epochs=3)})
    with pytest.raises(ReleaseError, match=r"staging declares .* otherwise .*: training.epochs is 3 and was 1;"):
        request(staging, learns, in_dev, run_id="r1")
    for tags, told in (
        (Recipe.of(by_code, "finetune", FORM | {"teacher": "7"}).tags, "learnt the answers of version 7 of dev"),
        ({COMMIT_TAG: f"{COMMIT}-changed"}, "was made by code that no commit has, so staging can't make it again"),
        ({"millrace.recipe": "{}"}, "can't be understood"),
    ):
        registry.tag_release(ask_as("dev"), by_code, in_dev, tags)
        with pytest.raises(ReleaseError, match=told):
            request(ask_as("staging"), by_code, in_dev, run_id="r1")
    # The code may have become another one since the question was asked.
    registry.tag_release(
        ask_as("dev"), by_code, in_dev, Recipe.of(by_code, "finetune", FORM).tags | {COMMIT_TAG: COMMIT}
    )
    ask_as("staging")
    asked = request(staging, by_code, in_dev, run_id="r1")["promotion"]
    record_answer(staging, by_code, asked, answer("Approve", "eve"))
    with pytest.raises(ReleaseError, match=f"staging runs commit {'b' * 40}"):
        bring(other, by_code, asked, run="test")
    assert Lake.of(staging, by_code.name).read(OPS_PROMOTIONS, ["step"])["step"].to_pylist() == ["approved"]


def test_releases_begin_in_dev_and_go_one_environment_at_a_time(
    ask_as: As, settings: Settings, application: Application, in_dev: str
) -> None:
    with pytest.raises(ReleaseError, match="nothing is promoted to dev, where releases begin; promote in staging or"):
        request(ask_as("dev"), application, in_dev, run_id="r1")
    prod = ask_as("prod")
    with pytest.raises(ReleaseError, match=f"{application.name}@1 is not registered in staging"):
        request(prod, application, in_dev, run_id="r1")
    assert promoted(ask_as("staging"), application, in_dev)["version"] == "1"
    assert promoted(ask_as("prod"), application, "1")["version"] == "1"
    with pytest.raises(ReleaseError, match="between environments of one MLflow server; set MILLRACE_MLFLOW_URI"):
        request(settings.model_copy(update={"environment": "prod"}), application, "1", run_id="r1")
