"""A stage that is killed between any two of its writes, and run again, leaves the tables that it leaves undisturbed."""

import signal
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS, PROVENANCE, TABLES
from millrace.retrieval.builds import current
from millrace.retrieval.index import declared_builds
from millrace.settings import Settings
from millrace.sources.completion_id import issue
from millrace.sources.event_log import Accepted, Completed, EventLog, Feedback
from tests.faults.killed import HOUR, run_until_write, stage

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

STAGES = (
    "land documents",
    "refine documents",
    "chunk",
    "embed",
    "build and publish",
    "land events",
    "refine feedback",
    "monitor",
    "evaluation set",
    "training set",
)
MOST_KILLS = 25
CLOCKS = {"observed_at", *(field.name for field in PROVENANCE)}
"""Columns that say when or by whom, not what."""
COMPARED = TABLES.keys() - {OPS_COSTS.path}
"""What a killed run spent stays spent, and is neither progress nor a difference."""


def test_every_stage_killed_after_each_write_and_run_again_leaves_equal_tables(
    settings: Settings, qa: Application, mlflow_uri: str, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"mlflow_uri": mlflow_uri})
    undisturbed = settings.model_copy(update={"home": tmp_path / "undisturbed"})
    log_events(settings)
    log_events(undisturbed, ids=first_ids(settings))

    for name in STAGES:
        stage(name, undisturbed, qa)
        kills = run_until_done(name, settings, qa)
        assert kills, f"{name} wrote nothing at all"
        for path in COMPARED:
            assert rows(settings, path) == rows(undisturbed, path), f"{path} after {kills} kills of {name}"

    for path in ("silver/exchanges", "silver/feedback", "gold/metrics_hourly", "ops/breaches"):
        assert rows(settings, path), f"{path} is empty: its stage was not put to the test"
    builds = [current(declared_builds(s, qa)) for s in (settings, undisturbed)]
    assert builds[0] is not None
    assert builds[0] == builds[1]


def run_until_done(name: str, settings: Settings, application: Application) -> int:
    """How often the stage was killed before it ended. It is killed after its first write, again and again; where that
    left nothing that lasts (a file in a folder that is thrown away), after the second, and so on."""
    writes, kept = 1, lasting(settings, application)
    for kills in range(MOST_KILLS):
        status = run_until_write(name, settings, application, writes)
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, "the stage failed: see its output"
        before, kept = kept, lasting(settings, application)
        writes = writes + 1 if kept == before else 1
    raise AssertionError(f"{name} writes something at every run: a repeat is not free")


def lasting(settings: Settings, application: Application) -> object:
    """What a killed run has left for good: table versions, and which builds there are and which is published."""
    lake = Lake.of(settings, application.name)
    builds = declared_builds(settings, application)
    return {path: lake.version(TABLES[path]) for path in COMPARED}, builds.manifests(), current(builds)


def rows(settings: Settings, path: str) -> list[dict[str, object]]:
    table: pa.Table = Lake.of(settings, "qa").read(TABLES[path])
    kept = table.drop_columns([name for name in table.column_names if name in CLOCKS])
    return sorted(kept.to_pylist(), key=repr)


def first_ids(settings: Settings) -> list[str]:
    return (settings.home / "ids").read_text().split()


def log_events(settings: Settings, ids: list[str] | None = None) -> None:
    """Three exchanges at the gateway, two of them rated, one with a correction, all simulated."""
    if ids is None:
        key = settings.completion_key.get_secret_value().encode()
        ids = [issue(key, "qa", HOUR) for _ in range(3)]
        settings.home.mkdir(parents=True)
        (settings.home / "ids").write_text(" ".join(ids))
    moments = (HOUR + timedelta(seconds=second) for second in range(1000))
    log = EventLog(settings.event_log("qa"), "test", clock=lambda: next(moments))
    for number, completion_id in enumerate(ids):
        about = {
            "event_id": f"{10 + number:032x}",
            "completion_id": completion_id,
            "application": "qa",
            "simulated": True,
            "user": f"{number:032x}",
            "question": f"What is the default of option {number}?",
            "release_id": "rel-0",
            "release_version": "1",
            "index_build": "build",
            "prompt_version": "1",
            "rollout_id": None,
            "epoch": None,
            "arm": None,
            "assignment_probability": None,
            "pinned": False,
            "accepted_at": HOUR,
        }
        log.append(Accepted(**about))
        log.append(
            Completed(
                **about | {"event_id": f"{20 + number:032x}"},
                answer="It is 3.",
                citations=("chunk",),
                prompt_tokens=10,
                completion_tokens=4,
                seconds=0.5,
                cost_usd=0.001,
                from_cache=False,
                fell_back=False,
            )
        )
        if number:
            log.append(
                Feedback(
                    event_id=f"{30 + number:032x}",
                    completion_id=completion_id,
                    application="qa",
                    simulated=True,
                    rating=0.2 * number,
                    correction="It is 4." if number == 2 else None,
                )
            )
    log.close()
