"""`millrace access` over a real S3 server beside MLflow and PostgreSQL: whoever has stolen everything that dev has."""

import json
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import closing

import pytest
from typer.testing import CliRunner, Result

from millrace.cli import app
from millrace.environments.access import lake_check
from millrace.environments.access.lake_wall import Bucket
from millrace.environments.access.matrix import Observed
from millrace.environments.access.postgres_calls import connected, rows
from millrace.lakehouse.storage import Key
from millrace.settings import Settings
from millrace.stack.environment import settings_variables
from millrace.stack.versitygw import Versitygw
from tests.environments.conftest import ADMINISTRATOR, DATABASE_PASSWORDS, LAKE_KEYS, PASSWORDS, As

pytestmark = pytest.mark.long


def shown(key: Key) -> str:
    return f"{key.access_key}:{key.secret_key}"


@pytest.fixture
def walled(shared: Settings, lake_as: As, walled_postgres: str, object_store: Versitygw) -> Callable[..., Result]:
    """Runs one command where environments share a lake, MLflow and PostgreSQL."""
    lake = lake_as("dev")
    given = shared.model_copy(
        update={
            "postgres_url": walled_postgres,
            "lake_uri": lake.lake_uri,
            "lake_endpoint": lake.lake_endpoint,
            "lake_access_key": lake.lake_access_key,
            "lake_secret_key": lake.lake_secret_key,
        }
    )
    secrets = {
        "lake": {"admin": shown(object_store.root)} | {name: shown(key) for name, key in LAKE_KEYS.items()},
        "mlflow": {"admin": ADMINISTRATOR.password} | PASSWORDS,
        "postgres": {"admin": ""} | DATABASE_PASSWORDS,
    }
    environment = settings_variables(given, keys=True) | {"MILLRACE_ACCESS_SECRETS": json.dumps(secrets)}
    return lambda line: CliRunner().invoke(app, shlex.split(line), env=environment)


def test_the_lakes_wall_is_planned_taken_down_by_hand_put_up_and_told(
    walled: Callable[..., Result], object_store: Versitygw, walled_lake: Settings
) -> None:
    assert walled("access plan --wall lake").stdout == "lake: nothing to change\n"
    declared = [(one.identity, one.environment, one.resource, one.action) for one in lake_check.declared()]
    bucket = Bucket(walled_lake, object_store.root)
    bucket.ask("take its policy", "delete_bucket_policy")
    try:
        planned = walled("access plan --wall lake")
        assert "add in the policy of bucket walled" in planned.stdout
        closed = walled("access check --wall lake")
        assert closed.exit_code == 1  # nobody, not even an owner, can put its probe there
        assert "does not let lake-dev" in closed.stderr
    finally:
        assert walled("access apply --wall lake").exit_code == 0
    assert walled("access plan --wall lake").stdout == "lake: nothing to change\n"
    found = json.loads(walled("access check --wall lake --json").stdout)["lake"]
    assert sorted(declared) == sorted(
        (one["identity"], one["environment"], one["resource"], one["action"]) for one in found
    )
    assert not [one for one in found if one["allowed"] != one["declared"]]


def test_whoever_stole_all_that_dev_has_reads_prod_and_changes_nothing_on_any_server(
    walled: Callable[..., Result], walled_postgres: str
) -> None:
    tries = json.loads(walled("access check --json").stdout)
    thief = [Observed(**one) for wall in ("lake", "mlflow", "postgres") for one in tries[wall]]
    elsewhere = [one for one in thief if one.identity == "dev" and one.environment != "dev"]
    assert {one.environment for one in elsewhere if one.allowed} == {"prod"}
    assert {one.action for one in elsewhere if one.allowed} == {"read", "list"}
    denied = Counter(one.environment for one in elsewhere if one.allowed is False)
    assert denied == {"prod": 5 + 11 + 15, "staging": 7 + 15 + 15, "sample": 7, "shared": 12 + 2 + 3 + 6}
    assert sum(denied.values()) >= 60
    with closing(connected(walled_postgres)) as administrator:
        assert rows(administrator, "select count(*) from pg_database where datname like 'prod%'") == [(2,)]
