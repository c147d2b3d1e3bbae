"""`millrace access` over real servers: MLflow with its login, and PostgreSQL that asks for passwords."""

import json
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from millrace.cli import app
from millrace.environments import audit
from millrace.environments.access.airflow_wall import password_file
from millrace.environments.access.matrix import PLACES, READS, Observed, right
from millrace.environments.access.mlflow_calls import Caller, Login
from millrace.environments.access.postgres_calls import Refused, connected, rows
from millrace.environments.access.walls import Wall, put_up
from millrace.private_files import write_json
from millrace.settings import Settings
from millrace.stack.environment import settings_variables
from tests.environments.conftest import ADMINISTRATOR, DATABASE_PASSWORDS, PASSWORDS

SECRETS = {
    "mlflow": {"admin": ADMINISTRATOR.password} | PASSWORDS,
    "postgres": {"admin": ""} | DATABASE_PASSWORDS,
}


@pytest.fixture
def alone(settings: Settings) -> Callable[..., Result]:
    """Runs one command as a process would whose environment has servers for itself, or none."""
    return lambda line, **changes: _run(settings, line, changes)


@pytest.fixture
def walled(shared: Settings, walled_postgres: str) -> Callable[..., Result]:
    """The same, where environments share MLflow and PostgreSQL."""
    given = shared.model_copy(update={"postgres_url": walled_postgres})
    return lambda line, secrets=SECRETS, **changes: _run(
        given, line, {"MILLRACE_ACCESS_SECRETS": json.dumps(secrets)} | changes
    )


def _run(settings: Settings, line: str, changes: dict[str, str]) -> Result:
    environment = settings_variables(settings, keys=True) | changes
    done = CliRunner().invoke(app, shlex.split(line), env=environment)
    for wall in SECRETS.values():
        assert not [secret for secret in wall.values() if secret and secret in done.output]
    return done


def test_no_identity_writes_anothers_environment_and_only_the_declared_ones_are_read() -> None:
    rights = {(identity, place): right(identity, place) for identity in READS for place in PLACES}
    assert {pair for pair, given in rights.items() if given == "manages"} == {
        *((name, name) for name in READS),
        ("prod", "sample"),
    }
    assert {pair for pair, given in rights.items() if given == "reads"} == {
        ("dev", "prod"),
        ("staging", "dev"),
        ("staging", "sample"),
        ("prod", "staging"),
    }


def test_where_there_are_no_servers_each_wall_says_that_it_is_only_code(alone: Callable[..., Result]) -> None:
    for command in ("plan", "apply", "check"):
        done = alone(f"access {command}")
        assert done.exit_code == 0
        told = done.stderr.splitlines()
        assert [line.split(":")[0] for line in told] == ["lake", "mlflow", "postgres", "qdrant", "gateway", "airflow"]
        assert all("only code here, no server refuses" in line for line in told)
    assert "0 allowed, 0 denied by servers" in done.stdout
    for wall in ("lake", "mlflow", "postgres", "qdrant", "gateway", "airflow"):
        assert f"{wall}, as declared: not observed" in done.stdout
    assert "(all)" in done.stdout
    assert "0 not as declared" in done.stdout
    tries = json.loads(alone("access check --json").stdout)
    assert {name: len(some) for name, some in tries.items()} == {
        "lake": 12 * 7 + 3,
        "mlflow": 135,
        "postgres": 4 * (48 + 2 + 9 + 6),
        "qdrant": 72,
        "gateway": 35,
        "airflow": 48,
    }
    assert {one["allowed"] for some in tries.values() for one in some} == {None}


def test_a_server_that_is_there_and_does_not_answer_fails_the_check(
    alone: Callable[..., Result], settings: Settings
) -> None:
    password_file(settings.home).parent.mkdir(parents=True)
    write_json(password_file(settings.home), {"admin": "a password", "millrace": "another one"})
    done = alone("access check --wall airflow", MILLRACE_AIRFLOW_PORT="1")
    assert done.exit_code == 1
    assert "airflow: Airflow at http://127.0.0.1:1 does not answer" in done.stderr


def test_what_is_wrong_with_what_was_given_is_one_sentence(alone: Callable[..., Result]) -> None:
    for given in ("hush, no JSON", '{"mlflow": "hush"}', '["hush"]'):
        done = alone("access plan", MILLRACE_ACCESS_SECRETS=given)
        assert done.exit_code == 1
        assert done.stderr.startswith("MILLRACE_ACCESS_SECRETS is no JSON of the shape")
        assert "hush" not in done.output
    unknown = alone("access check --wall moat")
    assert (unknown.exit_code, unknown.stderr) == (
        1,
        "there is no wall moat; there are lake, mlflow, postgres, qdrant, gateway, airflow\n",
    )
    with_password = alone("access plan", MILLRACE_POSTGRES_URL="postgresql://postgres:hush@host/postgres")
    assert with_password.exit_code == 1
    away = alone("access plan", MILLRACE_POSTGRES_URL="postgresql://postgres@127.0.0.1:1/postgres")
    assert (away.exit_code, "MILLRACE_ACCESS_SECRETS has no 'admin' for postgres" in away.stderr) == (1, True)
    secrets = json.dumps({"postgres": {"admin": "hush"}})
    away = alone(
        "access plan",
        MILLRACE_POSTGRES_URL="postgresql://postgres@127.0.0.1:1/postgres",
        MILLRACE_ACCESS_SECRETS=secrets,
    )
    assert away.exit_code == 1
    assert "postgres: PostgreSQL of MILLRACE_POSTGRES_URL doesn't answer" in away.stderr
    none = alone(
        "access plan",
        MILLRACE_POSTGRES_URL="postgresql://postgres@127.0.0.1:1/postgres?nosuch=1",
        MILLRACE_ACCESS_SECRETS=secrets,
    )
    assert (none.exit_code, 'invalid URI query parameter: "nosuch"' in none.stderr) == (1, True)
    checked = alone(
        "access check",
        MILLRACE_POSTGRES_URL="postgresql://postgres@127.0.0.1:1/postgres",
        MILLRACE_ACCESS_SECRETS=secrets,
    )
    assert (checked.exit_code, "0 denied by servers" in checked.stdout) == (1, True)
    assert "postgres: to try what dev, mlflow, prod, staging may do on PostgreSQL needs its password" in checked.stderr
    none = alone("access token dev")
    assert (none.exit_code, "which no token opens" in none.stderr) == (1, True)


def test_what_was_begun_is_in_the_audit_trail_even_if_nobody_lived_to_say_how_it_ended(settings: Settings) -> None:
    def apply() -> list[str]:
        raise KeyboardInterrupt

    wall = Wall("postgres", "", list, lambda: ["create role ann@example.com"], apply, list)
    with pytest.raises(KeyboardInterrupt):
        put_up(settings, wall, actor="person/ann")
    (entry,) = audit.search(settings, action="permission")
    assert (entry["outcome"], entry["details"]) == ("attempted", {"change": "create role ann at example.com"})


def test_what_was_done_is_recorded_and_not_what_was_meant(settings: Settings) -> None:
    """Somebody granted another role between the two."""
    wall = Wall(
        "lake", "", list, lambda: ["let dev read prod"], lambda: ["let dev read prod", "take it from bob"], list
    )
    assert put_up(settings, wall, actor="person/ann") == ["let dev read prod", "take it from bob"]
    told = [(entry["outcome"], entry["details"]["change"]) for entry in audit.search(settings, action="permission")]
    assert told == [
        ("attempted", "let dev read prod"),
        ("changed", "let dev read prod"),
        ("changed", "take it from bob"),
    ]


def test_both_walls_are_planned_put_up_told_to_the_audit_trail_and_checked(
    walled: Callable[..., Result], shared: Settings
) -> None:
    assert walled("access plan").stdout == "mlflow: nothing to change\npostgres: nothing to change\n"
    changed = {name: wall | {"staging": f"another password for {name}"} for name, wall in SECRETS.items()}
    told = "mlflow: 1 change\n  set the password of staging\npostgres: 1 change\n  set the password of staging\n"
    assert walled("access plan", changed).stdout == told
    assert walled("access apply", changed).stdout == told
    assert walled("access plan", changed).stdout == "mlflow: nothing to change\npostgres: nothing to change\n"
    assert walled("access apply").stdout == told
    entries = audit.search(shared, action="permission")
    assert Counter(entry["resource"] for entry in entries) == {"access/mlflow": 4, "access/postgres": 4}
    assert {(entry["outcome"], entry["details"]["change"]) for entry in entries} == {
        ("attempted", "set the password of staging"),
        ("changed", "set the password of staging"),
    }
    assert audit.verify(shared).entries == 8

    done = walled("access check")
    assert done.exit_code == 0, done.output
    last = done.stdout.splitlines()[-1]
    allowed, denied = 45 + 3 * 4 + 48, 3 * 11 + 3 * 15 + 4 * (36 + 2 + 9 + 6)
    unseen = 87 + 72 + 35 + 48  # the lake, Qdrant, the gateway, Airflow
    assert denied >= 60
    assert last == f"{allowed} allowed, {denied} denied by servers, {unseen} not observed, 0 not as declared"


def test_a_hole_that_somebody_made_is_shown_and_ends_in_a_failure(
    walled: Callable[..., Result], walled_postgres: str
) -> None:
    with closing(connected(walled_postgres)) as administrator:
        administrator.autocommit = True
        rows(administrator, "grant connect on database prod_gateway to dev")
    done = walled("access check --wall postgres")
    planned = walled("access plan --wall postgres").stdout
    walled("access apply --wall postgres")
    assert done.exit_code == 1
    assert "!connect" in done.stdout
    assert done.stdout.endswith("  dev: connect database prod_gateway in prod: allowed, which is not as declared\n")
    assert planned == "postgres: 1 change\n  take CONNECT on database prod_gateway from dev\n"
    assert walled("access check --wall postgres").exit_code == 0


def test_whoever_stole_devs_credential_reads_prods_models_and_changes_nothing_until_it_is_rotated(
    walled: Callable[..., Result], shared: Settings, walled_postgres: str
) -> None:
    """Everything that dev's credential could be tried for, on every server that is here."""
    before = _of_others(shared, walled_postgres)
    tries = json.loads(walled("access check --json").stdout)
    thief = [Observed(**one) for wall in ("mlflow", "postgres") for one in tries[wall] if one["identity"] == "dev"]
    elsewhere = [one for one in thief if one.environment != "dev"]
    assert {(one.environment, one.action) for one in elsewhere if one.allowed} == {("prod", "read")}
    assert {one.resource for one in elsewhere if one.allowed} == {
        "artifacts",
        "experiment",
        "registered model",
        "prompt",
    }
    denied = [f"{one.action} {one.resource} in {one.environment}" for one in elsewhere if one.allowed is False]
    denied += _tried_as_administrator(shared)
    assert len(set(denied)) == len(denied) >= 60
    assert _of_others(shared, walled_postgres) == before

    rotated = {name: wall | {"dev": f"what nobody stole of {name}"} for name, wall in SECRETS.items()}
    try:
        assert walled("access apply", rotated).stdout.count("set the password of dev") == 2
        with Caller(shared, Login("dev", PASSWORDS["dev"])) as ask:
            assert ask.ask("GET", "2.0/mlflow/registered-models/search", workspace="dev").status_code == 401
        with pytest.raises(Refused, match=r"doesn't let dev in .*password authentication failed"):
            connected(walled_postgres, role="dev", password=DATABASE_PASSWORDS["dev"], database="dev_airflow")
        assert walled("access check --wall postgres", rotated).exit_code == 0
    finally:
        walled("access apply")
    told = [entry["details"]["change"] for entry in audit.search(shared, action="permission")]
    assert told == ["set the password of dev"] * 8


def _tried_as_administrator(shared: Settings) -> list[str]:
    """What only MLflow's administrator does, that the server refused dev."""
    tried: dict[str, tuple[str, str, dict[str, Any]]] = {
        "create a workspace": ("POST", "3.0/mlflow/workspaces", {"name": "dev-too"}),
        "create a user": ("POST", "2.0/mlflow/users/create", {"username": "eve", "password": "a password of eve"}),
        "set prod's password": (
            "PATCH",
            "2.0/mlflow/users/update-password",
            {"username": "prod", "password": "a password of eve"},
        ),
        "become administrator": ("PATCH", "2.0/mlflow/users/update-admin", {"username": "dev", "is_admin": True}),
        "delete prod": ("DELETE", "2.0/mlflow/users/delete", {"username": "prod"}),
        "create a role": ("POST", "3.0/mlflow/roles/create", {"name": "all", "workspace": "prod"}),
    }
    with Caller(shared, Login("dev", PASSWORDS["dev"])) as ask:
        answers = {what: ask.ask(method, path, json=body) for what, (method, path, body) in tried.items()}
    assert {what: answer.status_code for what, answer in answers.items()} == dict.fromkeys(tried, 403)
    return list(tried)


def _of_others(shared: Settings, walled_postgres: str) -> dict[str, Any]:
    """What staging and prod have, and who may do what, as the administrators see it; less the probes' runs."""
    told: dict[str, Any] = {}
    with Caller(shared, ADMINISTRATOR) as ask:
        for environment in ("staging", "prod"):
            models = ask("GET", "2.0/mlflow/registered-models/search", workspace=environment)
            told[environment] = sorted(
                one["name"] for one in models.get("registered_models", []) if not one["name"].startswith("millrace.")
            )
        told["users"] = sorted(
            (user["username"], user["is_admin"]) for user in ask("GET", "2.0/mlflow/users/list")["users"]
        )
    with closing(connected(walled_postgres)) as administrator:
        told["roles"] = rows(administrator, "select rolname, rolsuper, rolpassword from pg_authid order by 1")
        told["databases"] = rows(administrator, "select datname, datdba, datacl::text from pg_database order by 1")
    return told
