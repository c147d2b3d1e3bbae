"""Who may do what in Airflow: in its API server's own words, and in the files of its login."""

import json
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import httpx
import mlflow
import pyarrow as pa
import pytest
from pydantic import SecretStr, ValidationError

from millrace.airflow_api import Airflow
from millrace.environments.access import airflow_wall
from millrace.environments.access.airflow_check import STRANGER, check
from millrace.environments.access.airflow_wall import Change, password_file
from millrace.environments.audit import search
from millrace.errors import SettingsError, StackError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_EVALUATIONS
from millrace.releases.registry import RELEASE_TAG
from millrace.rollout.decisions import State, append, decide, read_journal
from millrace.settings import Settings
from millrace.stack import Stack
from tests.conftest import stack_settings

PEOPLE = {"vera": "viewer", "otto": "operator", "ada": "admin"}
PASSWORDS = {name: f"the password of {name}" for name in PEOPLE}


@pytest.fixture
def staging(settings: Settings) -> Settings:
    return settings.model_copy(update={"environment": "staging", "airflow_users": PEOPLE})


def test_where_others_reach_airflow_only_named_people_and_the_stack_log_in(staging: Settings) -> None:
    assert airflow_wall.apply(staging, PASSWORDS) == [
        Change("add", "millrace", "service"),
        *(Change("add", name, role) for name, role in PEOPLE.items()),
    ]
    path = password_file(staging.home)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = json.loads(path.read_text())
    assert {name: written[name] for name in PEOPLE} == PASSWORDS
    assert set(written) == {"millrace", *PEOPLE}
    users = (path.parent / "airflow.cfg").read_text()
    assert "simple_auth_manager_users = millrace:op,vera:viewer,otto:user,ada:admin" in users
    assert airflow_wall.plan(staging) == [] == airflow_wall.apply(staging, PASSWORDS)


def test_a_change_is_told_before_it_is_made_and_made_once(staging: Settings) -> None:
    airflow_wall.apply(staging, PASSWORDS)
    before = json.loads(password_file(staging.home).read_text())
    changed = staging.model_copy(update={"airflow_users": {"vera": "operator", "ada": "admin", "new": "viewer"}})
    wanted = [Change("role", "vera", "operator"), Change("add", "new", "viewer"), Change("remove", "otto")]
    assert airflow_wall.plan(changed) == wanted
    assert [str(change) for change in wanted][2] == "let otto log in to Airflow no more"
    assert json.loads(password_file(staging.home).read_text()) == before
    other = {"ada": "another password"}
    assert airflow_wall.apply(changed, other) == [wanted[0], Change("password", "ada"), *wanted[1:]]
    after = json.loads(password_file(staging.home).read_text())
    assert after.keys() == {"millrace", "vera", "ada", "new"}
    assert (after["vera"], after["ada"]) == (before["vera"], "another password")
    assert after["millrace"] == before["millrace"]
    assert airflow_wall.apply(changed, other) == []


@pytest.mark.parametrize("name", ["admin", "Millrace", "anonymous", "ann:admin", "ann,bob", ""])
def test_a_name_that_is_no_persons_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="names no person"):
        Settings(airflow_users={name: "viewer"})


@pytest.mark.parametrize(
    ("passwords", "why"),
    [
        ('{"ann": "short"}', "the password of ann for Airflow has fewer than 12 characters"),
        ('{"bob": "long enough, it is"}', "MILLRACE_AIRFLOW_USERS has no bob"),
        ('["ann"]', "is no JSON object"),
        ("{", "is no JSON object"),
    ],
)
def test_passwords_that_cannot_be_are_refused_without_showing_them(
    settings: Settings, passwords: str, why: str
) -> None:
    given = settings.model_copy(update={"airflow_users": {"ann": "viewer"}, "airflow_passwords": SecretStr(passwords)})
    for asked in (airflow_wall.plan, airflow_wall.apply):
        with pytest.raises(SettingsError, match=why) as refused:
            asked(given)
        assert "long enough" not in str(refused.value)
        assert "short" not in str(refused.value)
    assert not password_file(settings.home).exists()


@pytest.fixture(scope="module")
def staged(open_folder: Path) -> Iterator[Stack]:
    """A whole stack of staging, with people."""
    settings = stack_settings(
        open_folder / "staged",
        environment="staging",
        airflow_users=PEOPLE,
        airflow_passwords=json.dumps(PASSWORDS),
        spark_remote="sc://127.0.0.1:9",  # none is asked here
    )
    with Stack(settings) as stack:
        yield stack


@pytest.mark.long
@pytest.mark.timeout(600)
def test_everybody_may_what_is_declared_and_nothing_else(staged: Stack) -> None:
    observed = check(staged.settings)
    assert [str(one) for one in observed if one.allowed != one.declared] == []
    refused = {one: [o for o in observed if o.identity == one and not o.allowed] for one in (STRANGER, *PEOPLE)}
    assert {name: len(refusals) for name, refusals in refused.items()} == {
        STRANGER: 16,
        "vera": 14,
        "otto": 6,
        "ada": 0,
    }


@pytest.mark.long
@pytest.mark.timeout(600)
def test_who_may_log_in_since_when_is_in_the_audit_trail(staged: Stack) -> None:
    told = search(staged.settings, action="permission")
    assert [(one["actor"], one["resource"], one["outcome"], one["details"]) for one in told] == [
        ("service/stack", f"airflow/{name}", "add", {"role": role})
        for name, role in {"millrace": "service", **PEOPLE}.items()
    ]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_viewer_can_trigger_clear_and_approve_nothing_and_an_operator_can(staged: Stack) -> None:
    url, dag = staged.settings.airflow_url, "handbook.approve"
    with Airflow(url, "vera", PASSWORDS["vera"]) as vera, Airflow(url, "otto", PASSWORDS["otto"]) as otto:
        vera.wait_for_dag(dag)
        with pytest.raises(StackError, match=r"does not let vera POST /dags/handbook.approve/dagRuns"):
            vera.trigger(dag)
        run = otto.trigger(dag, note="an operator may")
        assert vera.wait_for_run(dag, run.run_id, timeout=240).state == "success"  # nothing waits for an answer
        with pytest.raises(StackError, match="does not let vera POST"):
            vera.clear_run(dag, run.run_id)
        with pytest.raises(StackError, match="does not let vera PATCH"):
            vera.answer(dag, run.run_id, "approve", "Approve", reason="mine is fine")
        with pytest.raises(StackError, match="does not let vera PATCH"):
            vera.pause(dag)
        otto.clear_run(dag, run.run_id)
        assert otto.wait_for_run(dag, run.run_id, timeout=240).state == "success"
        with pytest.raises(StackError, match=r"404.*hitl|404.*not found"):
            otto.answer(dag, run.run_id, "approve", "Approve", reason="looks right")


@pytest.fixture
def waiting(staged: Stack) -> Lake:
    """In staging, version 1 of qa is champion, and version 2 passed the gate against it."""
    settings = staged.settings
    client = mlflow.MlflowClient(tracking_uri=settings.mlflow_url, registry_uri=settings.mlflow_url)
    client.create_registered_model("qa")
    made = client.create_run("0").info
    for _ in range(2):
        client.create_model_version(
            "qa",
            source=f"{made.artifact_uri}/release",
            run_id=made.run_id,
            tags={RELEASE_TAG: "r"},
            await_creation_for=0,
        )
    lake = Lake.of(settings, "qa")
    append(lake, decide(State(), "bootstrap", actor="test", reason="the first", champion="1"), run="test")
    row = {field.name: "x" for field in OPS_EVALUATIONS.columns} | {
        "champion": "1",
        "candidate": "2",
        "passed": True,
        "criteria": "[]",
        "evaluated_at": datetime.now(UTC),
    }
    lake.merge(OPS_EVALUATIONS, pa.Table.from_pylist([row], schema=OPS_EVALUATIONS.rows_schema), run="test")
    return lake


@pytest.mark.long
@pytest.mark.timeout(600)
def test_an_approval_is_an_operators_and_has_that_persons_name_in_journal_and_audit_trail(
    staged: Stack, waiting: Lake
) -> None:
    url = staged.settings.airflow_url
    with (
        staged.airflow() as stack,
        Airflow(url, "vera", PASSWORDS["vera"]) as vera,
        Airflow(url, "otto", PASSWORDS["otto"]) as otto,
    ):
        otto.wait_for_dag("qa.approve")
        run = otto.trigger("qa.approve").run_id
        deadline = time.monotonic() + 180
        while {task.task_id: task.state for task in otto.tasks("qa.approve", run)}["approve"] != "awaiting_input":
            assert time.monotonic() < deadline
            time.sleep(1)
        time.sleep(15)  # Airflow fails a task that is answered before its worker has left.
        for refused in (vera, stack):
            with pytest.raises(StackError, match=r"does not let (vera|millrace) PATCH"):
                refused.answer("qa.approve", run, "approve", "Approve", reason="mine is fine")
        # An operator may rewrite what a task returned: nothing that is approved is taken from there.
        token = httpx.post(
            f"{url}/auth/token", json={"username": "otto", "password": PASSWORDS["otto"]}, trust_env=False
        )
        rewritten = httpx.patch(
            f"{url}/api/v2/dags/qa.approve/dagRuns/{quote(run, safe='')}/taskInstances/choose/xcomEntries/return_value",
            json={"value": {"candidate": "1", "asks": "?", "told": "-"}},
            headers={"Authorization": f"Bearer {token.json()['access_token']}"},
            trust_env=False,
        )
        assert rewritten.status_code == 200, rewritten.text
        otto.answer("qa.approve", run, "approve", "Approve", reason="looks right")
        ended = otto.wait_for_run("qa.approve", run, timeout=240)
        logs = [otto.log_tail("qa.approve", run, task) for task in otto.tasks("qa.approve", run)]
        assert ended.state == "success", logs
    admitted = read_journal(waiting)[-1]
    assert (admitted.kind, admitted.challenger, admitted.actor) == ("admit", "2", "otto")
    (entry,) = search(staged.settings, action="approval")
    assert (entry["actor"], entry["outcome"], entry["release_version"]) == ("person/otto", "admit", "2")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_password_is_another_from_the_next_login_on_without_a_restart(staged: Stack) -> None:
    began = datetime.now(UTC)
    assert airflow_wall.apply(staged.settings, {"vera": "another password"}) == [Change("password", "vera")]
    url = staged.settings.airflow_url
    with Airflow(url, "vera", PASSWORDS["vera"]) as old, pytest.raises(StackError, match="refused the login of vera"):
        old.healthy()
    with Airflow(url, "vera", "another password") as new:
        assert new.runs("handbook.approve", since=began) == []


@pytest.mark.long
def test_the_shared_admin_of_one_machine_cannot_log_in_to_staging(staged: Stack) -> None:
    with (
        Airflow(staged.settings.airflow_url, "admin", staged.airflow_password) as admin,
        pytest.raises(StackError, match="refused the login of admin"),
    ):
        admin.healthy()
