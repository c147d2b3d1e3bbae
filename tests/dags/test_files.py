"""The DAG files as Airflow reads them, without a scheduler: every stage is there, with its runbook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from millrace.applications import Schedules

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
FILES = sorted((PROJECT / "dags").glob("*.py"))
TIMED = ("CronDataIntervalTimetable", "CronTriggerTimetable", "AssetOrTimeSchedule")
READ = """
import json
from airflow.dag_processing.dagbag import DagBag
bag = DagBag("dags")
print(json.dumps({
    "errors": bag.import_errors,
    "dags": {
        dag.dag_id: {
            "file": dag.fileloc,
            "doc": dag.doc_md,
            "late": bool(dag.deadline),
            "timetable": type(dag.timetable).__name__,
            "catchup": dag.catchup,
            "backfilled": dag.allowed_run_types is None or "backfill" in {one.value for one in dag.allowed_run_types},
            "tasks": {task.task_id: [task.retries, len(task.on_failure_callback or ())] for task in dag.tasks},
            "places": {task.task_id: [task.pool, task.queue] for task in dag.tasks},
            "params": {
                name: {"description": dag.params.get_param(name).description} | dag.params.get_param(name).schema
                | {"default": dag.params.get_param(name).value}
                for name in dag.params
            },
        }
        for dag in bag.dags.values()
    },
}))
"""


ANOTHER = """
import json
from collections import defaultdict
from airflow.sdk import DAG
from millrace.applications import load_application
from millrace.settings import read_settings
from millrace_airflow import another
found, events = [None, "3", ""], defaultdict(set)
with DAG("a_stage") as dag:
    another(load_application(read_settings(), "qa"), "releases", lambda: found.pop())
for _ in range(3):
    dag.get_task("another").python_callable(outlet_events=events)
    print(json.dumps([[alias.name, [asset.uri for asset in emitted]] for alias, emitted in events.items()]))
    events.clear()
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of staging and prod together: between them they have every stage."""
    found = [_read(tmp_path_factory.mktemp("airflow"), environment) for environment in ("staging", "prod")]
    return {part: found[0][part] | found[1][part] for part in ("errors", "dags")}


def _read(home: Path, in_environment: str) -> dict:
    return json.loads(_ran(READ, home, in_environment).splitlines()[-1])


def _ran(script: str, home: Path, in_environment: str) -> str:
    environment = os.environ | {
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(PROJECT / "plugins"),
        "MILLRACE_ENVIRONMENT": in_environment,
    }
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    return ran.stdout


def test_every_file_is_read_and_makes_one_dag_an_application(read: dict) -> None:
    assert read["errors"] == {}
    assert set(read["dags"]) == {f"qa.{path.stem}" for path in FILES}
    assert {Path(dag["file"]).name for dag in read["dags"].values()} == {path.name for path in FILES}


def test_every_stage_has_a_runbook_a_deadline_and_an_alert(read: dict) -> None:
    for name, dag in read["dags"].items():
        for heading in ("### What it does", "### Healthy", "### When it fails"):
            assert heading in dag["doc"], (name, heading)
        assert dag["late"], name
        assert all(alerts for _, alerts in dag["tasks"].values()), name


def test_a_time_driven_stage_is_backfilled_by_a_command_of_its_runbook_or_refuses_and_says_why(read: dict) -> None:
    timed = {name: dag for name, dag in read["dags"].items() if dag["timetable"] in TIMED}
    assert {name for name, dag in timed.items() if dag["backfilled"]} == {
        "qa.ingest_documents",
        "qa.ingest_feedback",
        "qa.monitor",
    }
    assert timed.keys() == {f"qa.{stage}" for stage in Schedules.model_fields}
    for name, dag in timed.items():
        said = dag["doc"].split("### Backfill\n")[1]
        command = f"`millrace backfill {name.replace('qa', '<application>')} --from … --to …"
        assert said.startswith(command if dag["backfilled"] else "Airflow refuses one: "), name
        assert not dag["catchup"], name


def test_tasks_that_fill_a_machine_wait_for_one_another_and_go_to_workers_of_their_own(read: dict) -> None:
    places = {tuple(place) for dag in read["dags"].values() for place in dag["places"].values()}
    assert places == {("heavy", "heavy"), ("default_pool", "default")}


def test_what_a_person_can_fill_in_is_typed_described_and_has_a_default(read: dict) -> None:
    forms = {name: dag["params"] for name, dag in read["dags"].items() if dag["params"]}
    filled = ("finetune", "finetune_embedding", "compress", "optimize_prompt", "batch_inference", "evaluate_candidate")
    assert {f"qa.{stage}" for stage in filled} <= forms.keys()
    for name, fields in forms.items():
        for field, schema in fields.items():
            assert schema.get("description"), (name, field)
            assert schema.keys() & {"type", "enum"}, (name, field)
            jsonschema.validate(schema["default"], schema)


def test_a_stage_begins_again_while_another_one_waits(read: dict, tmp_path: Path) -> None:
    event = ["qa/releases", ["millrace://qa/releases"]]
    told = [json.loads(line) for line in _ran(ANOTHER, tmp_path, "prod").splitlines()[-3:]]
    assert told == [[event], [event], []]
    for stage in ("evaluate_candidate", "approve"):
        assert "another" in read["dags"][f"qa.{stage}"]["tasks"]


@pytest.mark.parametrize(("stage", "its_own"), [("sample", "staging"), ("publish_sample", "prod")])
def test_only_prod_publishes_a_sample_and_only_staging_brings_it(tmp_path: Path, stage: str, its_own: str) -> None:
    for environment in ("staging", "prod", "dev"):
        ran = subprocess.run(
            [sys.executable, "-c", f"import runpy; print(sorted(runpy.run_path('dags/{stage}.py')))"],
            cwd=PROJECT,
            env=os.environ
            | {
                "AIRFLOW_HOME": str(tmp_path),
                "PYTHONPATH": str(PROJECT / "plugins"),
                "MILLRACE_ENVIRONMENT": environment,
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert (f"'qa_{stage}'" in ran.stdout) == (environment == its_own)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dag_file_is_a_table_of_contents(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
