"""On the real database of a running stack."""

from datetime import UTC, datetime, timedelta

import pytest

from millrace.stack import Stack
from millrace.stack.home import obtain_secrets
from millrace.stack.parts import all_parts

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


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
        runs = [airflow.trigger(dag).run_id for _ in range(2)]
        for run in runs:
            airflow.wait_for_run(dag, run, timeout=240)
        assert history.clean(datetime.now(UTC) - timedelta(days=90)) == 0
        assert [run.run_id for run in airflow.runs(dag)] == runs
        assert history.clean(datetime.now(UTC)) == 0
        assert [run.run_id for run in airflow.runs(dag)] == runs[1:]
