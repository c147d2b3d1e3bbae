"""Prod's sample and staging's copy of it on real tables: who is in, what becomes of a row, what a later run changes."""

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from millrace.applications import Application
from millrace.environments.erasure import erase as erase_user
from millrace.environments.sample import publish_documents, publish_evaluation_sets, publish_exchanges
from millrace.environments.sample_copy import copy_documents, copy_evaluation_sets, copy_exchanges
from millrace.errors import LakehouseError, SampleError, SettingsError, SourceError
from millrace.evaluation.sets import freeze_evaluation_set, read_evaluation_set
from millrace.lakehouse.cursors import move_cursor
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE
from millrace.lakehouse.tables import (
    BRONZE_DOCUMENTS,
    GOLD_EVALUATION_EXAMPLES,
    OPS_CURSORS,
    PROVENANCE,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
    Table,
)
from millrace.policies import Sample
from millrace.rollout.decisions import append, decide, fold, read_journal
from millrace.rollout.evidence import collect_evidence
from millrace.settings import Settings
from millrace.sources.completion_id import verify
from millrace.sources.ingest import land_documents, refine_documents
from millrace.sources.pseudonym import pseudonym
from millrace.upkeep import tidy_tables
from tests.environments.production import SECRETS, START, ask, fill_prod, prod_of, publish

pytestmark = pytest.mark.slow


@pytest.fixture
def staging(settings: Settings) -> Settings:
    return settings.model_copy(update={"environment": "staging"})


@pytest.fixture
def application(qa: Application) -> Application:
    sample = Sample(share=0.3, strata={"section/core": 0.5, "rating/bad": 1, "rating/none": 0.1})
    return qa.model_copy(update={"sample": sample})


@pytest.fixture
def prod(staging: Settings, application: Application) -> Settings:
    return fill_prod(staging, application)


def sample_all(prod: Settings, staging: Settings, application: Application) -> dict[str, dict[str, Any]]:
    """What a night brings: prod publishes, staging copies; by stage, what it told."""
    return publish(prod, application) | {
        stage.__name__: stage(staging, application, run="test")
        for stage in (copy_evaluation_sets, copy_documents, copy_exchanges)
    }


def content(lake: Lake, table: Table) -> dict[str, dict[str, Any]]:
    """Rows by key, without provenance."""
    rows = lake.read(table).drop_columns([field.name for field in PROVENANCE]).to_pylist()
    return {row[table.key[0]]: row for row in rows}


def lakes(prod: Settings, staging: Settings) -> tuple[Lake, Lake]:
    return Lake.of(prod, "qa"), Lake.of(staging, "qa")


def test_documents_are_taken_by_section_and_all_that_the_evaluation_sets_ask_about(
    prod: Settings, staging: Settings, application: Application
) -> None:
    sample_all(prod, staging, application)
    theirs, ours = (content(lake, SILVER_DOCUMENTS) for lake in lakes(prod, staging))
    assert all(theirs[key] == row for key, row in ours.items())
    core = {key for key, row in theirs.items() if row["section"] == "core"}
    assert {key for key in core if application.sample.takes(key, "section/core")} == core & ours.keys()
    assert 0.3 < len(core & ours.keys()) / len(core) < 0.7
    asked = lakes(prod, staging)[1].read(GOLD_EVALUATION_EXAMPLES)
    assert set(asked["document_id"].to_pylist()) <= ours.keys()
    # The set is whole, so its id is still that of its examples, and staging's own gate freezes the same one.
    [set_id] = set(asked["evaluation_set"].to_pylist())
    assert read_evaluation_set(lakes(prod, staging)[1], set_id)
    assert freeze_evaluation_set(staging, application, run="test") == set_id


def test_exchanges_are_taken_by_rating_each_with_its_feedback(
    prod: Settings, staging: Settings, application: Application
) -> None:
    told = sample_all(prod, staging, application)["publish_exchanges"]
    _, ours = lakes(prod, staging)
    exchanges, feedback = content(ours, SILVER_EXCHANGES), content(ours, SILVER_FEEDBACK)
    assert told["exchanges"] == len(exchanges)
    assert told["strata"]["rating/bad"] == [68, 68]
    assert sum(row["rating"] < 0.5 for row in feedback.values()) == 68
    good, of = told["strata"]["rating/good"]
    assert (good, of) == (sum(row["rating"] > 0.5 for row in feedback.values()), 66)
    assert 0 < good < of
    none, of = told["strata"]["rating/none"]
    assert (none, of) == (len(exchanges.keys() - feedback.keys()), 66)
    assert feedback.keys() <= exchanges.keys()
    for key, row in feedback.items():
        for name in ("user", "question", "answer", "release_version"):
            assert row[name] == exchanges[key][name]


def test_nothing_in_staging_leads_to_a_person_or_is_of_use_in_prod(
    prod: Settings, staging: Settings, application: Application
) -> None:
    sample_all(prod, staging, application)
    theirs, ours = lakes(prod, staging)
    for table in (SILVER_EXCHANGES, SILVER_FEEDBACK):
        before, after = (json.dumps(content(lake, table), default=str) for lake in (theirs, ours))
        assert [secret for secret in SECRETS if secret not in before] == []  # or the next line says nothing
        assert [secret for secret in SECRETS if secret in after] == []
        assert "[e-mail]" in after
        for name in ("user", "completion_id"):
            known = set(theirs.read(table, [name])[name].to_pylist())
            assert known.isdisjoint(ours.read(table, [name])[name].to_pylist())
    # Whoever has all of staging's secrets, and knows how prod makes its names, can't tell one from the other.
    known = {row["completion_id"] for row in theirs.read(SILVER_EXCHANGES).to_pylist()}
    for name, secret in settings_secrets(staging).items():
        guessed = {f"sample-{pseudonym(secret.encode(), one)}" for one in known}
        assert guessed.isdisjoint(content(ours, SILVER_EXCHANGES)), name
    key = prod.completion_key.get_secret_value().encode()
    for completion in ours.read(SILVER_FEEDBACK, ["completion_id"])["completion_id"].to_pylist():
        with pytest.raises(SourceError, match="was not issued"):
            verify(key, completion)
    assert collect_evidence(theirs, application.rollout, "rollout-1").exposed
    assert not collect_evidence(ours, application.rollout, "rollout-1").exposed
    assert set(ours.read(SILVER_FEEDBACK, ["release_version"])["release_version"].to_pylist()) == {"prod/1"}


def settings_secrets(settings: Settings) -> dict[str, str]:
    found = {name: getattr(settings, name) for name in Settings.model_fields}
    return {name: one.get_secret_value() for name, one in found.items() if isinstance(one, SecretStr) and one}


def test_the_same_user_is_one_user_also_tomorrow(prod: Settings, staging: Settings, application: Application) -> None:
    everybody = application.model_copy(update={"sample": Sample(share=1)})
    sample_all(prod, staging, everybody)
    theirs, ours = lakes(prod, staging)
    users = {name: set(lake.read(SILVER_EXCHANGES, ["user"])["user"].to_pylist()) for name, lake in
             (("prod", theirs), ("staging", ours))}  # fmt: skip
    assert len(users["prod"]) == len(users["staging"]) == 200
    ask(prod, application, users=30, start=START + timedelta(hours=2))
    told = sample_all(prod, staging, everybody)
    assert told["copy_exchanges"]["exchanges"] == 230
    assert set(ours.read(SILVER_EXCHANGES, ["user"])["user"].to_pylist()) == users["staging"]


def test_a_second_run_writes_nothing_and_a_larger_share_keeps_what_there_is(
    prod: Settings, staging: Settings, application: Application
) -> None:
    sample_all(prod, staging, application)
    _, ours = lakes(prod, staging)
    tables = (GOLD_EVALUATION_EXAMPLES, SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK)
    versions = [ours.version(table) for table in tables]
    before = [content(ours, table) for table in tables]
    again = sample_all(prod, staging, application)
    assert [told["changed"] for told in again.values()] == [False] * 6
    # Nor does one that has lost its place and reads everything.
    for lake in (ours, Lake.of(prod, "qa", environment=SAMPLE)):
        lake.merge(OPS_CURSORS, OPS_CURSORS.rows_schema.empty_table(), run="test", delete_unmatched="true")
    again = sample_all(prod, staging, application)
    assert [told["changed"] for told in again.values()] == [False] * 6
    assert [ours.version(table) for table in tables] == versions
    larger = Sample(share=0.6, strata={"section/core": 0.8, "rating/bad": 1, "rating/none": 0.2})
    sample_all(prod, staging, application.model_copy(update={"sample": larger}))
    for table, kept in list(zip(tables, before, strict=True))[1:]:
        now = content(ours, table)
        assert kept.items() <= now.items()
        assert len(kept) < len(now)


def test_what_is_deleted_or_changed_in_prod_is_so_in_staging_after_the_next_run(
    prod: Settings, staging: Settings, application: Application
) -> None:
    sample_all(prod, staging, application)
    theirs, ours = lakes(prod, staging)
    gone = [row["completion_id"] for row in theirs.read(SILVER_FEEDBACK).to_pylist() if row["rating"] < 0.5][:5]
    documents = content(ours, SILVER_DOCUMENTS)
    leaving = next(key for key, row in documents.items() if row["section"] == "core")
    erase(theirs, SILVER_FEEDBACK, gone)
    erase(theirs, SILVER_EXCHANGES, gone)
    erase(theirs, SILVER_DOCUMENTS, [leaving])
    told = sample_all(prod, staging, application)
    assert told["publish_documents"]["deleted"] == told["copy_documents"]["deleted"] == 1
    assert content(ours, SILVER_DOCUMENTS).keys() == documents.keys() - {leaving}
    assert told["publish_exchanges"]["deleted"] == told["copy_exchanges"]["deleted"] == 10
    assert content(ours, SILVER_EXCHANGES) == content(Lake.of(staging, "qa", environment=SAMPLE), SILVER_EXCHANGES)
    ask(prod, application, users=30, start=START + timedelta(hours=2))
    assert sample_all(prod, staging, application)["publish_exchanges"]["strata"]["rating/bad"] == [73, 73]


def test_a_prod_that_was_restored_from_a_backup_is_sampled_again(
    prod: Settings, staging: Settings, application: Application
) -> None:
    backup = Path(prod.home) / "backup"
    shutil.copytree(Path(prod.lake) / "prod", backup)
    ask(prod, application, users=30, start=START + timedelta(hours=2))
    theirs, ours = lakes(prod, staging)
    erase(theirs, SILVER_DOCUMENTS, list(content(theirs, SILVER_DOCUMENTS))[:3])
    sample_all(prod, staging, application)
    shutil.rmtree(Path(prod.lake) / "prod")
    shutil.copytree(backup, Path(prod.lake) / "prod")
    assert sample_all(prod, staging, application)["publish_exchanges"]["strata"]["rating/bad"] == [68, 68]
    assert [told["changed"] for told in sample_all(prod, staging, application).values()] == [False] * 6
    assert all(content(theirs, SILVER_DOCUMENTS)[key] == row for key, row in content(ours, SILVER_DOCUMENTS).items())


def test_a_sample_that_was_made_anew_is_copied_again(
    prod: Settings, staging: Settings, application: Application
) -> None:
    """Its tables have the versions of the ones before, and other names of everybody in them."""
    sample_all(prod, staging, application)
    sample, ours = Lake.of(staging, "qa", environment=SAMPLE), Lake.of(staging, "qa")
    version, before = sample.version(SILVER_EXCHANGES), content(ours, SILVER_EXCHANGES)
    shutil.rmtree(Path(prod.lake) / SAMPLE)
    other = prod.model_copy(update={"pseudonym_key": SecretStr("another key of prod's")})
    told = sample_all(other, staging, application)
    assert sample.version(SILVER_EXCHANGES) == version
    assert told["copy_exchanges"]["deleted"] > 0
    assert content(ours, SILVER_EXCHANGES) == content(sample, SILVER_EXCHANGES)
    assert content(ours, SILVER_EXCHANGES).keys().isdisjoint(before)


def test_who_is_erased_in_prod_leaves_what_is_published_at_once_and_staging_with_its_next_run(
    prod: Settings, staging: Settings, application: Application, mlflow_uri: str
) -> None:
    prod = prod.model_copy(update={"mlflow_uri": mlflow_uri})
    sample_all(prod, staging, application)
    sample, ours = Lake.of(prod, "qa", environment=SAMPLE), Lake.of(staging, "qa")
    theirs = Lake.of(prod, "qa")
    [erased] = [row for row in theirs.read(SILVER_FEEDBACK).to_pylist() if row["rating"] < 0.5][:1]
    before = content(sample, SILVER_EXCHANGES)
    report = erase_user(prod, application, erased["user"], actor="person/ann", run="test")
    assert report.erased
    left = content(sample, SILVER_EXCHANGES)
    [gone] = before.keys() - left.keys()
    assert left.items() < before.items()
    for path in (Path(prod.lake) / SAMPLE).rglob("*"):
        assert not path.is_file() or gone.encode() not in path.read_bytes(), path
    assert gone in content(ours, SILVER_EXCHANGES)
    assert copy_exchanges(staging, application, run="test")["deleted"] == 2
    assert content(ours, SILVER_EXCHANGES) == left


def test_an_erasure_without_prods_key_says_that_the_sample_waits_for_it(
    prod: Settings, staging: Settings, application: Application, mlflow_uri: str
) -> None:
    prod = prod.model_copy(update={"mlflow_uri": mlflow_uri})
    sample_all(prod, staging, application)
    user = Lake.of(prod, "qa").read(SILVER_EXCHANGES, ["user"])["user"][0].as_py()
    keyless = prod.model_copy(update={"pseudonym_key": SecretStr("")})
    report = erase_user(keyless, application, user, actor="person/ann", run="test")
    assert report.waiting.keys() == {"sample/silver/feedback", "sample/silver/exchanges"}
    assert erase_user(prod, application, user, actor="person/ann", run="test").erased


def test_the_upkeep_of_prod_keeps_what_is_published_and_no_other_environments_does(
    prod: Settings, staging: Settings, application: Application
) -> None:
    sample_all(prod, staging, application)
    published = {f"{SAMPLE}/{table.path}" for table in (
        GOLD_EVALUATION_EXAMPLES, SILVER_DOCUMENTS, SILVER_EXCHANGES, SILVER_FEEDBACK, OPS_CURSORS
    )}  # fmt: skip
    kept = {name for name in tidy_tables(prod, application) if name.startswith(f"{SAMPLE}/")}
    assert kept == published
    assert not [name for name in tidy_tables(staging, application) if name.startswith(f"{SAMPLE}/")]


def test_a_prod_that_nobody_has_asked_yet_gives_no_exchanges(staging: Settings, application: Application) -> None:
    prod = prod_of(staging)
    told = publish_exchanges(prod, application, run="test")
    assert (told["exchanges"], told["changed"]) == (0, False)
    assert publish_exchanges(prod, application, run="test") == {"changed": False}
    told = copy_exchanges(staging, application, run="test")
    assert (told["exchanges"], told["changed"]) == (0, False)
    assert copy_exchanges(staging, application, run="test") == {"changed": False}


def erase(lake: Lake, table: Table, keys: list[str]) -> None:
    listed = ", ".join(f"'{key}'" for key in keys)
    lake.merge(
        table, table.rows_schema.empty_table(), run="test", delete_unmatched=f"target.{table.key[0]} IN ({listed})"
    )


def test_what_stagings_own_gateway_brought_stays(prod: Settings, staging: Settings, application: Application) -> None:
    _, ours = lakes(prod, staging)
    land_documents(staging, application, run="test")
    refine_documents(staging, application, run="test")
    ask(staging, application, users=3)
    own = content(ours, SILVER_EXCHANGES)
    assert len(own) == 3
    publish_exchanges(prod, application, run="test")
    copy_exchanges(staging, application, run="test")
    assert own.items() < content(ours, SILVER_EXCHANGES).items()


def test_the_ingestion_of_staging_takes_of_its_sources_what_the_sample_has(
    prod: Settings, staging: Settings, application: Application
) -> None:
    sample_all(prod, staging, application)
    _, ours = lakes(prod, staging)
    sampled = content(ours, SILVER_DOCUMENTS)
    landed = land_documents(staging, application, run="test")
    assert landed["seen"] == landed["new"] == len(sampled) == ours.read(BRONZE_DOCUMENTS).num_rows
    assert not refine_documents(staging, application, run="test")["changed"]
    assert content(ours, SILVER_DOCUMENTS) == sampled


@pytest.mark.parametrize("environment", ["dev", "prod"])
def test_no_other_environment_takes_a_sample(settings: Settings, qa: Application, environment: str) -> None:
    elsewhere = settings.model_copy(update={"environment": environment})
    for stage in (copy_evaluation_sets, copy_documents, copy_exchanges):
        with pytest.raises(SampleError, match=f"{environment} takes no sample of prod"):
            stage(elsewhere, qa, run="test")
    assert not Path(settings.lake).exists()


@pytest.mark.parametrize("environment", ["dev", "staging"])
def test_no_other_environment_publishes_a_sample(settings: Settings, qa: Application, environment: str) -> None:
    elsewhere = settings.model_copy(update={"environment": environment})
    for stage in (publish_evaluation_sets, publish_documents, publish_exchanges):
        with pytest.raises(SampleError, match=f"{environment} publishes no sample: .* only prod does"):
            stage(elsewhere, qa, run="test")
    assert not Path(settings.lake).exists()


def test_without_documents_a_key_or_a_published_sample_nothing_changes(
    staging: Settings, application: Application
) -> None:
    prod = prod_of(staging)
    with pytest.raises(SampleError, match=r"qa: prod has no silver/documents in .*/prod/qa/silver/documents"):
        publish_documents(prod, application, run="test")
    keyless = prod.model_copy(update={"pseudonym_key": SecretStr("")})
    with pytest.raises(SettingsError, match="MILLRACE_PSEUDONYM_KEY is empty"):
        publish_exchanges(keyless, application, run="test")
    for stage, table in (
        (copy_evaluation_sets, "gold/evaluation_examples"),
        (copy_documents, "silver/documents"),
        (copy_exchanges, "silver/feedback"),
    ):
        told = rf"prod has published no {table} in .*/sample/qa/{table}; .* run qa.publish_sample in prod first"
        with pytest.raises(SampleError, match=told):
            stage(staging, application, run="test")
    assert not Path(staging.lake).exists()


def test_an_environment_reads_anothers_tables_and_writes_none_of_them(
    prod: Settings, staging: Settings, application: Application
) -> None:
    theirs = Lake.of(staging, "qa", environment="prod")
    before = theirs.version(SILVER_FEEDBACK)
    row = theirs.read(SILVER_FEEDBACK, SILVER_FEEDBACK.rows_schema.names).slice(0, 1)
    refusal = r"staging may not write {} of qa in prod \(.*/prod/qa/{}\): an environment writes its own tables only"
    with pytest.raises(LakehouseError, match=refusal.format("silver/feedback", "silver/feedback")):
        theirs.merge(SILVER_FEEDBACK, row, run="test")
    with pytest.raises(LakehouseError, match=refusal.format("silver/documents", "silver/documents")):
        theirs.transform(SILVER_DOCUMENTS, lambda batches: batches, SILVER_DOCUMENTS, run="test")
    with pytest.raises(LakehouseError, match=refusal.format("ops/cursors", "ops/cursors")):
        move_cursor(theirs, "reader", SILVER_FEEDBACK, 1, run="test")
    with pytest.raises(LakehouseError, match=refusal.format("ops/decisions", "ops/decisions")):
        append(theirs, decide(fold([]), "bootstrap", actor="ann", reason="mine"), run="test")
    assert theirs.version(SILVER_FEEDBACK) == before
    assert read_journal(theirs) == []
    publish(prod, application)
    published = Lake.of(staging, "qa", environment=SAMPLE)
    with pytest.raises(LakehouseError, match=r"staging may not write silver/feedback of qa in sample \("):
        published.merge(SILVER_FEEDBACK, row, run="test")
