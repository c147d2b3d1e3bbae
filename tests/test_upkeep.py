"""Upkeep removes what can be made or fetched again, and nothing else."""

import logging
import os
import time
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from mlflow import MlflowClient

from millrace.applications import Application
from millrace.environments.audit import verify
from millrace.errors import ReleaseError
from millrace.lakehouse.audit.chain import record
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import BRONZE_EVENTS, OPS_DECISIONS
from millrace.releases.manifest import PromptVersion, declared_manifest, describe_weights
from millrace.releases.published_split import publish_split
from millrace.releases.registry import RELEASE_TAG, fetch_release, register_release, versions
from millrace.releases.retention import remove_files
from millrace.releases.split import Split
from millrace.retrieval.builds import FORMAT, BuildManifest
from millrace.retrieval.embed import lineage_id
from millrace.retrieval.index import builds_of
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.event_log import EventLog, Feedback
from millrace.sources.feedback import land_events
from millrace.upkeep import remove_unused, tidy_tables
from tests.lakehouse.things import happened
from tests.retrieval.stand_in import StandIn

KEY = b"test completion key"
LONG_AGO = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=100)


@pytest.fixture
def tracked(settings: Settings, mlflow_uri: str) -> Settings:
    return settings.model_copy(update={"mlflow_uri": mlflow_uri})


def age(path: Path, days: float) -> None:
    for one in (*path.rglob("*"), path):
        os.utime(one, (then := time.time() - days * 86_400, then))


def feedback(tracked: Settings, at: datetime, count: int) -> Path:
    """A segment with so many events of the hour `at`."""
    folder = tracked.event_log("upkeep")
    before = set(folder.glob("*.jsonl"))
    log = EventLog(folder, clock=lambda: at)
    for _ in range(count):
        completion = issue(KEY, "upkeep", at)
        log.append(Feedback(completion_id=completion, application="upkeep", simulated=True, user="a" * 32, rating=1.0))
    log.close()
    return (set(folder.glob("*.jsonl")) - before).pop()


def test_the_environments_own_tables_are_tidied_with_an_applications(settings: Settings, qa: Application) -> None:
    for event in "ab":
        record(settings, [happened(event)], run="r")
    told = tidy_tables(settings, qa)["_platform/ops/audit"]
    assert (told["files_before"], told["files"]) == (2, 1)
    assert verify(settings).entries == 2


def test_event_segments_go_once_every_line_is_in_a_table_and_they_are_old(
    tracked: Settings, qa: Application, caplog: pytest.LogCaptureFixture
) -> None:
    application = qa.model_copy(update={"name": "upkeep"})
    landed, waiting = feedback(tracked, LONG_AGO, 3), feedback(tracked, LONG_AGO + timedelta(hours=1), 3)
    recent = feedback(tracked, datetime.now(UTC) - timedelta(days=1), 3)
    landed.write_bytes(landed.read_bytes() + b"no event\n" + b'{"torn')
    land_events(tracked, application, LONG_AGO, LONG_AGO + timedelta(hours=1), run="test")

    with caplog.at_level(logging.ERROR, "millrace.alerts"):
        assert remove_unused(tracked, application)["segments"] == [landed.name]
    assert f"ALERT upkeep: events that no run has read: {waiting.name} in " in caplog.text
    assert (landed.exists(), waiting.exists(), recent.exists()) == (False, True, True)
    assert Lake.of(tracked, "upkeep").read(BRONZE_EVENTS).num_rows == 3
    again = land_events(tracked, application, LONG_AGO, LONG_AGO + timedelta(hours=1), run="test")
    assert not again["changed"]


def test_lineages_and_copies_of_releases_that_users_cannot_meet_go(
    tracked: Settings, qa: Application, tmp_path: Path
) -> None:
    application = qa.model_copy(update={"name": f"upkeep_{time.time_ns()}"})
    folders = {}
    for content in ("champion", "unused", "lately used", "forged"):
        weights = tmp_path / "model.gguf"
        weights.write_text(content)
        prompt = PromptVersion(name="p", version="1", template="{{ question }}")
        manifest = declared_manifest(application, describe_weights(weights), prompt, f"lineage of {content}")
        version = register_release(tracked, application, manifest, weights.parent, run="test", tags={})
        folders[content] = fetch_release(tracked, application, version)
        (tracked.index_builds(application.name) / manifest.retrieval.lineage).mkdir(parents=True)
    (tracked.index_builds(application.name) / lineage_id(application)).mkdir()
    publish_split(tracked, application.name, Split(sequence=0, champion="1"))
    for content in ("champion", "unused"):
        age(folders[content], 30)
        age(tracked.index_builds(application.name) / f"lineage of {content}", 30)
    age(tracked.index_builds(application.name) / lineage_id(application), 30)
    other = tracked.home / "releases" / ".." / "events"
    other.mkdir(exist_ok=True)
    age(other, 30)
    client = MlflowClient(tracked.mlflow_url, tracked.mlflow_url)
    client.set_model_version_tag(application.name, "4", RELEASE_TAG, "../events")

    gone = remove_unused(tracked, application)

    assert gone["releases"] == [folders["unused"].name]
    assert other.is_dir(), "a tag that anybody may set is no path"
    assert gone["lineages"] == ["lineage of unused"]
    kept = {path.name for path in tracked.index_builds(application.name).iterdir()}
    assert kept == {"lineage of champion", "lineage of lately used", "lineage of forged", lineage_id(application)}
    assert fetch_release(tracked, application, "2").is_dir(), "the registry keeps what was removed here"


@pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")
def test_on_a_qdrant_server_a_lineage_goes_with_a_key_that_may_only_write(tracked: Settings, qa: Application) -> None:
    application = qa.model_copy(update={"name": f"upkeep_{uuid.uuid4().hex[:8]}"})
    stand_in = StandIn(keys={"admin": "m", "writer": "rw"})
    about = {"qdrant_url": stand_in.url, "qdrant_api_key": "admin"}
    served = Settings.model_validate(tracked.model_dump() | about)
    names = ("old", "lately built", lineage_id(application))
    for lineage in names:
        built = datetime.now(UTC) - timedelta(days=0 if lineage == "lately built" else 30)
        manifest = BuildManifest(
            **{
                "format": FORMAT,
                "build": "b",
                "lineage": lineage,
                "content_sha": "c",
                "built_at": built,
                "run": "test",
            },
            **dict.fromkeys(("chunks_version", "embeddings_version", "chunks", "documents"), 0),
        )
        builds_of(served, application.name, lineage).make(manifest, pa.table({"chunk_id": [], "content_hash": []}))

    writing = Settings.model_validate(served.model_dump() | {"qdrant_api_key": "writer"})
    assert remove_unused(writing, application)["lineages"] == ["old"]
    assert remove_unused(writing, application)["lineages"] == []
    kept = [lineage for lineage in names if builds_of(writing, application.name, lineage).manifests()]
    assert kept == ["lately built", lineage_id(application)]
    stand_in.stop()


def test_task_logs_go_when_they_are_old_and_only_this_applications(tracked: Settings, qa: Application) -> None:
    application = qa.model_copy(update={"name": "upkeep"})
    tasks = tracked.home / "logs" / "tasks"
    for dag, days in (("upkeep.rollout", 40), ("upkeep.finetune", 1), ("other.rollout", 40)):
        run = tasks / f"dag_id={dag}" / "run_id=one" / "task_id=a"
        run.mkdir(parents=True)
        (run / "attempt=1.log").write_text("said")
        age(run.parent, days)

    assert remove_unused(tracked, application)["logs"] == ["dag_id=upkeep.rollout/run_id=one"]
    assert remove_unused(tracked, application)["logs"] == []
    assert (tasks / "dag_id=other.rollout" / "run_id=one").exists()


def test_the_registrys_files_of_an_old_release_without_an_alias_go_and_the_rest_of_it_stays(
    tracked: Settings, qa: Application, tmp_path: Path
) -> None:
    application = qa.model_copy(update={"name": f"kept_{uuid.uuid4().hex[:8]}"})
    prompt = PromptVersion(name="p", version="1", template="{{ question }}")
    weights = tmp_path / "model.gguf"
    for content in ("champion", "refused"):
        weights.write_text(content)
        manifest = declared_manifest(application, describe_weights(weights), prompt, "lineage")
        register_release(tracked, application, manifest, tmp_path, run="test", tags={"origin": content})
    publish_split(tracked, application.name, Split(sequence=0, champion="1"))
    now = datetime.now(UTC)

    assert remove_files(tracked, application, before=now - timedelta(days=180)) == []
    ceased = {"sequence": 0, "decided_at": now, "champion": "2"}, {"sequence": 1, "decided_at": now + timedelta(days=2)}
    told = {"kind": "a", "actor": "a", "reason": "r", "epoch": 1, "champion": "1", "share": 0.0, "evidence": "{}"}
    rows = [told | {"rollout_id": None, "challenger": None, "simulated": False} | one for one in ceased]
    journal = pa.Table.from_pylist(rows, schema=OPS_DECISIONS.rows_schema)
    Lake.of(tracked, application.name).merge(OPS_DECISIONS, journal, run="test")
    assert remove_files(tracked, application, before=now + timedelta(days=1)) == [], "it was champion until later"
    assert remove_files(tracked, application, before=now + timedelta(days=3)) == ["2"]
    assert remove_files(tracked, application, before=now + timedelta(days=3)) == []
    assert fetch_release(tracked, application, "1").is_dir()
    with pytest.raises(ReleaseError, match=rf"files of release {application.name}@2 were removed .*; declare or train"):
        fetch_release(tracked, application, "2")
    assert versions(tracked, application)["2"]["origin"] == "refused"
    again = register_release(tracked, application, manifest, tmp_path, run="test", tags={})
    assert again == "3"
    assert fetch_release(tracked, application, again).is_dir()
