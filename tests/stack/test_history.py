"""On the real database of a running stack."""

import time
from datetime import UTC, datetime, timedelta

import pytest

from millrace.airflow_api import Airflow
from millrace.stack import Stack
from millrace.stack.home import obtain_secrets
from millrace.stack.parts import all_parts

pytestmark = [pytest.mark.long, pytest.mark.stack, pytest.mark.timeout(600)]


def test_old_runs_leave_airflows_database_and_the_latest_of_a_dag_stays(
    running_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    from millrace.stack import history

    settings = running_stack.settings
    part = next(one for one in all_parts(settings, obtain_secrets(settings.home)) if one.name == "airflow-history")
    for name, value in part.environment.items():
        monkeypatch.setenv(name, value)
    dag = "handbook.maintain_lakehouse"
    with running_stack.airflow() as airflow:
        airflow.wait_for_dag(dag)
        first = ended(airflow, dag)
        between = datetime.now(UTC)
        second = ended(airflow, dag)
        # A DAG that nobody has read since goes, too: that of a file that was removed.
        while min(read_at(airflow)) <= between:
            time.sleep(1)
        assert history.clean(between - timedelta(days=90)) == 0
        assert [run.run_id for run in airflow.runs(dag)] == [first, second]
        assert history.clean(between) == 0
        assert [run.run_id for run in airflow.runs(dag)] == [second]


def read_at(airflow: Airflow) -> list[datetime]:
    """When Airflow last read each DAG."""
    found = airflow._call("GET", "/dags", params={"limit": 100})["dags"]
    return [datetime.fromisoformat(one["last_parsed_time"]) for one in found]


def ended(airflow: Airflow, dag: str) -> str:
    """The id of a run that was triggered and has ended."""
    run = airflow.trigger(dag).run_id
    airflow.wait_for_run(dag, run, timeout=240)
    return run
