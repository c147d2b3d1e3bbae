"""One started stack is shared by these tests; those that kill or stop one start their own (`test_lifecycle.py`)."""

import json
import stat
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import httpx
import psutil
import pytest

from millrace.airflow_api import Airflow
from millrace.environments.access.airflow_wall import password_file
from millrace.errors import StackError
from millrace.settings import PROJECT
from millrace.stack import Stack
from millrace.stack.environment import part_environment
from millrace.stack.processes import part_processes, recorded
from tests.canaries import Canaries, CommandLines

pytestmark = pytest.mark.stack

ALL_PARTS = (
    "postgres", "spark", "mlflow", "airflow", "airflow-scheduler", "airflow-dag-processor", "airflow-triggerer",
    "airflow-history", "gateway",
)  # fmt: skip


def millrace(stack: Stack, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = part_environment(stack.settings, threads=1, keys=False)
    return subprocess.run(
        [sys.executable, "-m", "millrace.cli", *arguments], env=environment, capture_output=True, text=True, cwd=PROJECT
    )


def test_status_for_programs_says_of_every_part_that_it_is_healthy(running_stack: Stack) -> None:
    answer = millrace(running_stack, "status", "--json")
    assert answer.returncode == 0, answer.stdout
    said = json.loads(answer.stdout)
    assert said["state"] == "ready"
    parts = {part["part"]: part["healthy"] for part in said["parts"]}
    assert parts == dict.fromkeys(ALL_PARTS, True)
    assert all(part["memory_mb"] > 0 and part["pid"] for part in said["parts"])


def test_a_second_start_on_the_same_home_says_that_it_runs_already(running_stack: Stack) -> None:
    refused = millrace(running_stack, "up")
    assert refused.returncode == 1
    assert "a stack already runs on" in refused.stderr
    assert len(refused.stderr.strip().split("\n")) == 1
    with pytest.raises(StackError, match="already runs"), Stack(running_stack.settings):
        pass
    assert millrace(running_stack, "status").returncode == 0


def test_every_part_listens_on_this_machine_only(running_stack: Stack) -> None:
    home = running_stack.settings.home
    members = [one for part in part_processes(home, recorded(home)).values() for one in part]
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for member in members
        for connection in _connections(member)
        if connection.status == psutil.CONN_LISTEN
    }
    ports = {port for _, port in listening}
    assert {running_stack.settings.airflow_port, running_stack.settings.gateway_port} <= ports
    assert {ip for ip, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_airflow_knows_the_stack_and_one_person_and_only_the_owner_can_read_their_passwords(
    running_stack: Stack,
) -> None:
    path = password_file(running_stack.settings.home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    passwords = json.loads(path.read_text())
    assert set(passwords) == {"admin", "millrace"}
    assert passwords["admin"] == running_stack.airflow_password != passwords["millrace"]
    url = running_stack.settings.airflow_url
    assert httpx.get(f"{url}/api/v2/dags", trust_env=False).status_code == 401
    with Airflow(url, "admin", "wrong") as stranger, pytest.raises(StackError, match="refused the login of admin"):
        stranger.healthy()


def test_every_dag_file_is_read_and_the_heavy_pool_has_one_slot(running_stack: Stack) -> None:
    with running_stack.airflow() as airflow:
        for application in ("qa", "handbook"):
            airflow.wait_for_dag(f"{application}.ingest_documents")
        assert airflow.import_errors() == {}
        assert airflow.pool_slots("heavy") == 1


def test_dags_wait_for_somebody_to_unpause_them(running_stack: Stack) -> None:
    with running_stack.airflow() as airflow:
        airflow.wait_for_dag("handbook.ingest_documents")
        assert airflow.runs("handbook.ingest_documents") == []
        assert airflow.is_paused("handbook.ingest_documents")


def test_a_triggered_run_is_followed_to_its_end_and_its_log_can_be_read(running_stack: Stack) -> None:
    began = datetime.now(UTC)
    said: list[str] = []
    with running_stack.airflow() as airflow:
        airflow.wait_for_dag("qa.ingest_documents")
        triggered = airflow.trigger("qa.ingest_documents", note="a test")
        ended = airflow.wait_for_run(triggered.dag_id, triggered.run_id, timeout=240, on_change=said.append)
        tasks = airflow.tasks(ended.dag_id, ended.run_id)
        logs = {task.task_id: airflow.log_tail(ended.dag_id, ended.run_id, task) for task in tasks}
        assert ended.state == "success", logs
        assert [task.task_id for task in tasks] == ["land", "refine", "chunk"]
        assert all(logs.values())
        assert airflow.result(ended.dag_id, ended.run_id, "land")
        assert triggered.run_id in [run.run_id for run in airflow.runs("qa.ingest_documents", since=began)]
        assert airflow.runs("qa.ingest_documents", since=began + timedelta(days=1)) == []
    assert said[-1] == "land success, refine success, chunk success"


def test_no_secret_is_where_it_does_not_belong(
    running_stack: Stack, canaries: Canaries, command_lines: CommandLines
) -> None:
    """After the runs above; `end_to_end` looks again when the whole story has been told."""
    assert canaries.not_planted(running_stack) == []
    assert canaries.left_by(running_stack) == []
    assert [line for line in command_lines.seen if canaries.are_in(line)] == []
    assert any("millrace.serving" in line for line in command_lines.seen)


def _connections(process: psutil.Process) -> Sequence[psutil._ntuples.pconn]:
    try:
        return process.net_connections(kind="tcp")
    except psutil.Error:
        return ()
