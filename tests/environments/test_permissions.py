"""What differs in permissions, wall by wall: as declared, and after somebody gave something by hand. Servers are real;
Qdrant's is a stand-in that reads tokens."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from millrace.cli import app
from millrace.environments.access import airflow_wall, lake_wall, mlflow_wall, postgres_wall, qdrant_wall
from millrace.environments.access.lake_wall import Bucket
from millrace.environments.access.matrix import READS, right
from millrace.environments.access.mlflow_calls import Caller
from millrace.environments.access.postgres_calls import connected, rows
from millrace.environments.description import record_description, recorded_description
from millrace.environments.difference import Part, compare_environments
from millrace.lakehouse.audit.chain import record_act
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import Key
from millrace.lakehouse.tables import OPS_ENVIRONMENT, PLATFORM
from millrace.retrieval.server import connect
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.stack.environment import settings_variables
from millrace.stack.versitygw import Versitygw
from tests.environments.conftest import ADMINISTRATOR, DATABASE_PASSWORDS, LAKE_KEYS, LAKE_PRINCIPALS, PASSWORDS, As
from tests.environments.test_qdrant_access import API_KEY, TokenStandIn
from tests.scram import scram_server

OWN, OTHER = "its own identity", "the other's identity"
PAIRS = [("dev", "staging"), ("staging", "prod"), ("prod", "dev")]


def compared(settings: Settings, left: str, right: str) -> Part:
    (part,) = (one for one in compare_environments(settings, left, right) if one.name == "permissions")
    return part


def differing(part: Part, wall: str) -> dict[str, tuple[str | None, str | None]]:
    return {one.name: (one.left, one.right) for one in part.differences if one.name.startswith(f"{wall}: ")}


def unread(part: Part, wall: str) -> list[tuple[str, str]]:
    return [(one.environment, one.why) for one in part.unread if one.name == wall]


def with_secrets(settings: Settings, **secrets: dict[str, str]) -> Settings:
    return settings.model_copy(update={"access_secrets": SecretStr(json.dumps(secrets))})


def declared(left: str, other: str) -> dict[str, tuple[str, str]]:
    """What the matrix itself lets differ, by who."""
    (third,) = READS.keys() - {left, other}
    found = {
        OTHER: (right(other, left) or "nothing", right(left, other) or "nothing"),
        third: (right(third, left) or "nothing", right(third, other) or "nothing"),
    }
    return {who: told for who, told in found.items() if told[0] != told[1]}


# Lake.


def of_lake(object_store: Versitygw, settings: Settings) -> Settings:
    keys = {"admin": object_store.root} | LAKE_KEYS
    return with_secrets(settings, lake={name: f"{one.access_key}:{one.secret_key}" for name, one in keys.items()})


@pytest.mark.slow
@pytest.mark.parametrize(("left", "other"), PAIRS)
def test_a_store_lets_environments_differ_as_the_matrix_does(
    left: str, other: str, lake_as: As, object_store: Versitygw
) -> None:
    found = compared(of_lake(object_store, lake_as("dev")), left, other)
    assert differing(found, "lake") == {f"lake: {who}": told for who, told in declared(left, other).items()}
    assert found.equal >= 1  # each manages its own
    assert unread(found, "lake") == []


@pytest.mark.slow
def test_what_somebody_wrote_into_the_buckets_policy_is_a_difference(
    lake_as: As, object_store: Versitygw, walled_lake: Settings
) -> None:
    settings = of_lake(object_store, lake_as("dev"))
    bucket = Bucket(walled_lake, object_store.root)
    policy = json.loads(bucket.ask("read its policy", "get_bucket_policy")["Policy"])
    everything = "arn:aws:s3:::walled"
    object_store.create_user(Key("ann", "the secret of ann"))
    given = [
        ("ann", ["s3:GetObject"], f"{everything}/lake/prod/*"),
        (LAKE_PRINCIPALS["prod"], ["s3:PutObject"], f"{everything}/lake/staging/qa/*"),
        (LAKE_PRINCIPALS["staging"], ["s3:GetObject"], f"{everything}/*"),
        ("ann", ["s3:ListBucket"], everything),
    ]
    policy["Statement"].append(
        {
            "Effect": "Deny",
            "Principal": {"AWS": [LAKE_PRINCIPALS["dev"]]},
            "Action": ["s3:GetObject"],
            "Resource": [f"{everything}/lake/prod/_platform/*"],
        }
    )
    policy["Statement"] += [
        {"Effect": "Allow", "Principal": {"AWS": [who]}, "Action": what, "Resource": [where]}
        for who, what, where in given
    ]
    bucket.ask("change its policy", "put_bucket_policy", Policy=json.dumps(policy))
    try:
        found = differing(compared(settings, "staging", "prod"), "lake")
    finally:
        lake_wall.apply(walled_lake, object_store.root, LAKE_PRINCIPALS)
    assert found["lake: ann"] == (
        f"s3:ListBucket on {everything}",
        f"s3:GetObject on *, s3:ListBucket on {everything}",
    )
    assert found["lake: dev"] == (right("dev", "staging") or "nothing", "reads, deny s3:GetObject on _platform/*")
    theirs, ours = found[f"lake: {OTHER}"]
    assert theirs == "reads, s3:PutObject on qa/*"
    assert f"s3:GetObject on {everything}/*" in str(ours)
    assert found[f"lake: {OWN}"] == (f"manages, s3:GetObject on {everything}/*", "manages")


@pytest.mark.slow
def test_a_policy_is_its_administrators_to_read(lake_as: As, object_store: Versitygw) -> None:
    found = compared(lake_as("dev"), "dev", "prod")
    assert differing(found, "lake") == {}
    (dev, why), (prod, _) = unread(found, "lake")
    assert (dev, prod) == ("dev", "prod")
    assert why == (
        "lake: who may do what there is an administrator's to read, and MILLRACE_ACCESS_SECRETS has no 'admin' for "
        "lake; see docs/access.md"
    )
    keys = {name: f"{one.access_key}:{one.secret_key}" for name, one in LAKE_KEYS.items()}
    no_administrator = with_secrets(lake_as("dev"), lake=keys | {"admin": keys["dev"]})
    assert "does not let lake-dev read its policy" in unread(compared(no_administrator, "dev", "prod"), "lake")[0][1]


# MLflow.


@pytest.mark.long
def test_mlflows_roles_are_compared_by_what_they_let_whom_do(ask_as: As) -> None:
    settings = with_secrets(ask_as("dev"), mlflow={"admin": ADMINISTRATOR.password})
    for left, other in PAIRS:
        found = compared(settings, left, other)
        told = differing(found, "mlflow")
        words = {"reads": "READ", "nothing": "nothing"}
        assert {name: value for name, value in told.items() if name.endswith(" on registered_model *")} == {
            f"mlflow: {who} on registered_model *": (words[one], words[two])
            for who, (one, two) in declared(left, other).items()
        }
        assert not [name for name in told if name.startswith(f"mlflow: {OWN}")]
        assert unread(found, "mlflow") == unread(found, "mlflow: everybody else") == []

    with Caller(settings, ADMINISTRATOR) as ask:
        roles = ask("GET", "3.0/mlflow/roles/list", params={"workspace": "prod"})["roles"]
        role = {"username": "ann", "role_id": next(one["id"] for one in roles if one["name"] == mlflow_wall.MANAGES)}
        ask("POST", "2.0/mlflow/users/create", json={"username": "ann", "password": "the password of ann"})
        ask("POST", "3.0/mlflow/roles/assign", json=role)
        try:
            told = differing(compared(settings, "staging", "prod"), "mlflow")
        finally:
            ask("DELETE", "2.0/mlflow/users/delete", json={"username": "ann"})
    assert told["mlflow: ann on registered_model *"] == ("nothing", "MANAGE")
    assert told["mlflow: ann on workspace *"] == ("nothing", "USE")
    assert mlflow_wall.plan(settings, ADMINISTRATOR, PASSWORDS) == []


# PostgreSQL.


@pytest.mark.slow
def test_what_was_given_by_hand_in_postgresql_is_a_difference(settings: Settings, walled_postgres: str) -> None:
    here = settings.model_copy(update={"postgres_url": walled_postgres})
    assert "has no 'admin' for postgres" in unread(compared(here, "dev", "prod"), "postgres")[0][1]
    here = with_secrets(here, postgres={"admin": ""})
    for left, other in PAIRS:
        found = compared(here, left, other)
        assert (differing(found, "postgres"), unread(found, "postgres")) == ({}, [])
        assert found.equal == 3  # both databases, and what its identity may on the server
    with (
        closing(connected(walled_postgres)) as server,
        closing(connected(walled_postgres, database="prod_gateway")) as inside,
    ):
        server.autocommit = inside.autocommit = True
        rows(server, "create role ann login")
        try:
            for statement in (
                "grant connect on database prod_gateway to dev",
                "grant temporary on database prod_airflow to public",
                "grant staging to ann",
                "grant pg_read_all_data to prod",
                "alter role staging createrole",
            ):
                rows(server, statement)
            rows(inside, "grant usage on schema public to ann")
            told = differing(compared(here, "staging", "prod"), "postgres")
        finally:
            rows(inside, "revoke usage on schema public from ann")
            postgres_wall.apply(walled_postgres, "", DATABASE_PASSWORDS)
            rows(server, "drop role ann")
    assert told == {
        "postgres: PUBLIC on database airflow": ("nothing", "TEMPORARY"),
        "postgres: ann on database gateway": ("nothing", "has something inside"),
        "postgres: ann on its identity": ("is a member", "nothing"),
        "postgres: dev on database gateway": ("nothing", "CONNECT"),
        f"postgres: {OWN} on role pg_read_all_data": ("nothing", "is a member"),
        f"postgres: {OWN} on the server": ("createrole, logs in", "logs in"),
    }
    assert differing(compared(here, "staging", "prod"), "postgres") == {}


# Qdrant.


@pytest.fixture
def qdrant() -> Iterator[TokenStandIn]:
    server = TokenStandIn(keys={})
    yield server
    server.stop()


def test_of_qdrant_the_callers_token_is_compared_and_others_are_said_to_be_unknown(
    settings: Settings, qdrant: TokenStandIn
) -> None:
    shared = settings.model_copy(update={"qdrant_url": qdrant.url})
    administrator = connect(qdrant.url, SecretStr(API_KEY))
    qdrant_wall.apply(shared, administrator)
    collections = qdrant_wall.known_collections(shared, administrator)

    def asked_with(key: str) -> Part:
        return compared(shared.model_copy(update={"qdrant_api_key": SecretStr(key)}), "dev", "prod")

    def token(collections: dict[str, str]) -> str:
        return qdrant_wall.token("dev", collections, API_KEY, now=datetime.now(UTC), valid=timedelta(hours=1))

    found = asked_with(token(collections))
    told = differing(found, "qdrant")
    assert unread(found, "qdrant") == []
    assert len(told) == len(collections) / len(READS)
    for name, value in told.items():
        assert name.startswith("qdrant: dev on index ")
        assert value == ("manages", "reads")
    (_, why), _ = unread(found, "qdrant: everybody else")
    assert why == "qdrant: Qdrant keeps no list of tokens: what others' open is known to who signs them"
    mine = {name: environment for name, environment in collections.items() if environment == "dev"}
    assert set(differing(asked_with(token(mine)), "qdrant").values()) == {("manages", "nothing")}
    assert differing(asked_with(API_KEY), "qdrant") == {}
    (dev, why), (prod, _) = unread(asked_with("a key of nobody"), "qdrant")
    assert (dev, prod, "refuses" in why) == ("dev", "prod", True)


# Gateway and Airflow, of which each environment tells in its lake.


def make_key(store: KeyStore, *scopes: str, expires_at: datetime | None = None) -> str:
    """As `millrace key create` does; its id."""
    made, _ = store.create(
        "a test's", owner="ann", scopes=scopes, applications=["qa"] if "ask" in scopes else None,
        requests_per_minute=None, monthly_budget_usd=None, expires_at=expires_at, actor="ann",
    )  # fmt: skip
    return made.id


@pytest.mark.slow
def test_keys_are_counted_by_what_they_may_do_and_no_key_at_all_is_told(settings: Settings, open_folder: Path) -> None:
    sides = {one: settings.model_copy(update={"environment": one}) for one in READS}
    for side in sides.values():
        record_description(side, run="test")
    with scram_server(open_folder) as server:
        server.create_database("keys")
        keys_url = {"keys_url": SecretStr(server.url("keys"))}
        staging, prod = (KeyStore(sides[one].model_copy(update=keys_url)) for one in ("staging", "prod"))
        with closing(staging), closing(prod):
            make_key(staging, "ask", "feedback")
            for _ in range(2):
                make_key(prod, "ask", "feedback")
            make_key(prod, "admin", expires_at=datetime.now(UTC) + timedelta(days=1))
            make_key(prod, "feedback", expires_at=datetime.now(UTC) + timedelta(seconds=1))
            prod.revoke(make_key(prod, "pin"), actor="ann", reason="the test is over")
            make_key(prod, "ask", "pin")
            (pins,) = (key for key in prod.all() if key.scopes == {"ask", "pin"})
            prod.rotate(pins.id, overlap=timedelta(0), actor="ann")
    time.sleep(1)
    found = compared(settings, "staging", "prod")
    assert differing(found, "gateway") == {
        "gateway: keys for admin": ("nothing", "1 of them"),
        "gateway: keys for ask, feedback on qa": ("1 of them", "2 of them"),
        "gateway: keys for ask, pin on qa": ("nothing", "1 of them"),
    }
    assert unread(found, "gateway") == []
    assert differing(compared(settings, "dev", "staging"), "gateway") == {
        "gateway: keys for ask, feedback on qa": ("nothing", "1 of them"),
        "gateway: whoever shows no key": ("everything", "nothing"),
    }


def test_a_key_of_which_an_older_millrace_told_too_little_is_not_taken_for_equal(settings: Settings) -> None:
    staging = settings.model_copy(update={"environment": "staging"})
    for side in (settings, staging):
        record_description(side, run="test")
    record_act(staging, "ann", "key", "key/0f0f", "created", at=datetime.now(UTC), details={"scopes": ["ask"]})
    found = compared(settings, "dev", "staging")
    ((environment, why),) = unread(found, "gateway")
    assert (environment, differing(found, "gateway")) == ("staging", {})
    assert "an older Millrace made 1 of the keys of staging" in why
    record_act(staging, "ann", "key", "key/0f0f", "revoked", at=datetime.now(UTC), details={"scopes": ["ask"]})
    assert unread(compared(settings, "dev", "staging"), "gateway") == []


def test_people_and_roles_of_airflow_are_compared_as_its_own_files_have_them(settings: Settings) -> None:
    """Both have one home here, so that they share its lake; what its files say is one's, then the other's."""

    def told(environment: str, files_say: Callable[[str], str] = str, **people: str) -> None:
        side = settings.model_copy(update={"environment": environment})
        airflow_wall.apply(side.model_copy(update={"airflow_users": people}))
        written = settings.home / "airflow" / "airflow.cfg"
        written.write_text(files_say(written.read_text()))
        record_description(side, run="test")  # in its settings is nobody: what is declared doesn't count

    told("staging", otto="operator", vera="viewer")
    told("prod", otto="viewer", ada="admin")
    here = settings.model_copy(update={"environment": "staging"})
    assert differing(compared(here, "staging", "prod"), "airflow") == {
        "airflow: login ada": ("nothing", "admin"),
        "airflow: login otto": ("operator", "viewer"),
        "airflow: login vera": ("viewer", "nothing"),
    }
    told("prod", lambda text: text.replace("otto:viewer", "otto:admin"), otto="viewer", vera="viewer")
    assert differing(compared(here, "staging", "prod"), "airflow") == {"airflow: login otto": ("operator", "admin")}
    passwords = airflow_wall.known_passwords(settings).values()
    row = Lake.of(here, PLATFORM).read(OPS_ENVIRONMENT, ["content"]).to_pylist()[0]["content"]
    assert not [password for password in passwords if password in row]


def test_a_wall_without_a_server_and_an_environment_that_told_nothing_are_named(settings: Settings) -> None:
    record_description(settings, run="test")
    found = compared(settings, "dev", "staging")
    assert (found.differences, found.equal) == ([], 0)
    for wall, why in {
        "lake": "lake: MILLRACE_LAKE_URI is empty: the lake is a folder",
        "mlflow": "mlflow: MILLRACE_MLFLOW_WORKSPACES is off",
        "postgres": "postgres: MILLRACE_POSTGRES_URL is empty",
        "qdrant": "qdrant: MILLRACE_QDRANT_URL is empty",
    }.items():
        assert [(environment, told.startswith(why)) for environment, told in unread(found, wall)] == [
            ("dev", True),
            ("staging", True),
        ]
    assert "dev wrote down no logins" in unread(found, "airflow")[0][1]
    for wall in ("gateway", "airflow"):
        environment, why = unread(found, wall)[-1]
        assert (environment, "staging has not described itself" in why) == ("staging", True)


def test_what_an_older_and_a_later_millrace_wrote_of_themselves_is_read(settings: Settings) -> None:
    for environment, changes in (("dev", {}), ("staging", {"something": "else"})):
        side = settings.model_copy(update={"environment": environment})
        record_description(side, run="test")
        lake = Lake.of(side, PLATFORM)
        row = lake.read(OPS_ENVIRONMENT, OPS_ENVIRONMENT.rows_schema.names).to_pylist()[0]
        content = json.loads(row["content"])
        old = {name: content[name] for name in ("settings", "secrets", "declarations")}
        row |= {"described_at": datetime.now(UTC), "content": json.dumps(old | changes)}
        lake.merge(OPS_ENVIRONMENT, pa.Table.from_pylist([row], schema=OPS_ENVIRONMENT.rows_schema), run="test")
        assert recorded_description(side).keys_required is None
    assert "an older Millrace described dev" in unread(compared(settings, "dev", "staging"), "gateway")[0][1]


def test_a_person_sees_each_wall_in_the_command(settings: Settings) -> None:
    environment = settings_variables(settings, keys=True)
    told = CliRunner().invoke(app, ["env", "diff", "dev", "staging"], env=environment)
    assert told.exit_code == 0, told.output
    assert "permissions: 0 differ, 0 are equal" in told.output
    assert "  dev and staging can't be read: qdrant: MILLRACE_QDRANT_URL is empty" in told.output
