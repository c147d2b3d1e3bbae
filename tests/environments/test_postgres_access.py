from collections import Counter
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest
from pydantic import SecretStr

from millrace.environments.access.matrix import SHARED
from millrace.environments.access.postgres_calls import Refused, connected, rows
from millrace.environments.access.postgres_check import check, declared
from millrace.environments.access.postgres_wall import apply, declared_databases, identities, plan
from millrace.errors import AccessError, ApiKeyError, KeysAway
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from tests.environments.conftest import DATABASE_PASSWORDS, superuser_url
from tests.scram import scram_server

pytestmark = pytest.mark.slow


@pytest.fixture
def url(walled_postgres: str) -> str:
    """Of the server that the environments share, as its superuser reaches it."""
    return walled_postgres


def as_administrator(url: str, statement: str, database: str = "") -> list[tuple[object, ...]]:
    with closing(connected(url, database=database)) as connection:
        connection.autocommit = True
        return rows(connection, statement)


def test_a_new_server_is_planned_put_up_once_and_asks_each_identity_for_its_password(open_folder: Path) -> None:
    with scram_server(open_folder) as server:
        url = superuser_url(server)
        with pytest.raises(AccessError, match="dev, mlflow, prod, staging is new on PostgreSQL and needs a password"):
            apply(url, "", {})
        planned = [str(change) for change in plan(url, "", DATABASE_PASSWORDS)]
        assert "create role dev" in planned
        assert "create database prod_airflow of prod" in planned
        assert "take CONNECT on database prod_airflow from PUBLIC" in planned
        assert [str(change) for change in apply(url, "", DATABASE_PASSWORDS)] == planned
        assert plan(url, "", DATABASE_PASSWORDS) == []
        assert apply(url, "", DATABASE_PASSWORDS) == []
        verifiers = as_administrator(url, "select rolname, rolpassword from pg_authid where rolcanlogin")
        stored = {name: verifier for name, verifier in verifiers if name in DATABASE_PASSWORDS}
        assert stored.keys() == DATABASE_PASSWORDS.keys()
        assert all(str(verifier).startswith("SCRAM-SHA-256$") for verifier in stored.values())


def test_the_server_lets_each_identity_into_its_own_databases_and_refuses_everything_else(url: str) -> None:
    observed = check(url, DATABASE_PASSWORDS)
    assert [str(one) for one in observed if one.wrong] == []
    assert [(one.identity, one.environment, one.resource, one.action, one.declared) for one in observed] == [
        (one.identity, one.environment, one.resource, one.action, one.declared) for one in declared()
    ]
    into_databases = Counter((one.identity, one.allowed) for one in observed if one.resource.startswith("database"))
    assert into_databases == {
        (identity, own): 12 if own else 36 + 2 for identity in identities() for own in (True, False)
    }
    refused = [one for one in observed if one.allowed is False]
    assert len(refused) == 4 * (36 + 2 + 3 * 3 + 6)
    assert {one.environment for one in refused if one.identity == "dev"} == {"staging", "prod", SHARED}
    assert plan(url, "", DATABASE_PASSWORDS) == []


def test_what_was_given_by_hand_is_found_and_taken_away_and_nothing_is_lost(url: str) -> None:
    with closing(connected(url, role="prod", password=DATABASE_PASSWORDS["prod"], database="prod_gateway")) as prod:
        prod.autocommit = True
        rows(prod, "create schema api_keys; create table api_keys.keys (id text); create schema open")
        rows(prod, "grant usage on schema api_keys to dev; grant select on api_keys.keys to dev")
        rows(prod, "grant usage, create on schema open to dev")
    as_administrator(url, "grant connect on database prod_gateway to dev")
    as_administrator(url, "create role ann login")
    as_administrator(url, "grant prod to dev")
    as_administrator(url, "grant staging to ann")
    as_administrator(url, "grant pg_read_all_data to staging")
    as_administrator(url, "alter role staging createrole")
    as_administrator(url, "alter database staging_airflow owner to ann")
    as_administrator(url, "alter role dev password null")
    as_administrator(url, "set role dev; create table open.of_dev (told text)", "prod_gateway")
    found = [str(change) for change in plan(url, "", DATABASE_PASSWORDS)]
    assert found == [
        "set the password of dev",
        "let staging log in, and take every attribute of an administrator from it",
        "take role pg_read_all_data from staging",
        "take role prod from dev",
        "take role staging from ann",
        "give database staging_airflow to staging",
        "take CONNECT on database prod_gateway from dev",
        "take what dev has inside of database prod_gateway",
    ]
    assert [str(change) for change in apply(url, "", DATABASE_PASSWORDS)] == found
    assert plan(url, "", DATABASE_PASSWORDS) == []
    owners = as_administrator(url, "select datname, pg_get_userbyid(datdba) from pg_database where not datistemplate")
    assert dict(owners) == declared_databases() | {"postgres": "postgres"}
    kept = as_administrator(
        url, "select tableowner from pg_tables where tablename in ('of_dev', 'keys')", "prod_gateway"
    )
    assert kept == [("prod",), ("prod",)]
    as_administrator(url, "drop role ann")


def test_the_check_sees_a_hole_that_somebody_made(url: str) -> None:
    as_administrator(url, "grant connect on database prod_airflow to dev")
    as_administrator(url, "grant pg_read_all_data to dev")
    try:
        wrong = [str(one) for one in check(url, DATABASE_PASSWORDS) if one.wrong]
    finally:
        apply(url, "", DATABASE_PASSWORDS)
    assert wrong == [
        "dev: connect database prod_airflow in prod: allowed, which is not as declared",
        "dev: read database prod_airflow in prod: allowed, which is not as declared",
        "dev: read password hashes of server in shared: allowed, which is not as declared",
    ]
    assert [str(one) for one in check(url, DATABASE_PASSWORDS) if one.wrong] == []


def test_a_server_that_asks_nobody_for_a_password_is_no_wall(open_folder: Path) -> None:
    with scram_server(open_folder) as server:
        apply(url := superuser_url(server), "", DATABASE_PASSWORDS)
        (server.data / "pg_hba.conf").write_text("local all all trust\n")
        as_administrator(url, "select pg_reload_conf()")
        wrong = [one for one in check(url, DATABASE_PASSWORDS) if one.wrong]
        assert {(one.identity, one.action) for one in wrong} == {
            (identity, "enter by a wrong password") for identity in identities()
        }


def test_a_changed_password_ends_the_old_one(url: str) -> None:
    changed = {"dev": "another password of dev"}
    assert [str(change) for change in apply(url, "", changed)] == ["set the password of dev"]
    with pytest.raises(Refused, match=r"doesn't let dev in .*password authentication failed"):
        connected(url, role="dev", password=DATABASE_PASSWORDS["dev"], database="dev_airflow")
    connected(url, role="dev", password=changed["dev"], database="dev_airflow").close()
    apply(url, "", DATABASE_PASSWORDS)
    with pytest.raises(AccessError, match="the password of dev for PostgreSQL must have at least 12"):
        plan(url, "", {"dev": "short"})


def test_a_refusal_names_who_what_and_where(url: str) -> None:
    with pytest.raises(Refused, match=r'doesn\'t let dev in .*permission denied for database "prod_airflow"'):
        connected(url, role="dev", password=DATABASE_PASSWORDS["dev"], database="prod_airflow")
    with (
        closing(connected(url, role="dev", password=DATABASE_PASSWORDS["dev"], database="dev_airflow")) as dev,
        pytest.raises(Refused, match=r"refuses dev in database dev_airflow .*permission denied"),
    ):
        rows(dev, "create role another")
    with pytest.raises(AccessError, match="seen and changed by a superuser only"):
        plan(url.replace("postgres@", "dev@").replace("/postgres?", "/dev_airflow?"), DATABASE_PASSWORDS["dev"], {})


def test_nobody_but_the_owner_drops_a_database(url: str) -> None:
    for database, owner in declared_databases().items():
        for identity in identities():
            if identity == owner:
                continue
            own = next(name for name, of in declared_databases().items() if of == identity)
            with closing(
                connected(url, role=identity, password=DATABASE_PASSWORDS[identity], database=own)
            ) as connection:
                connection.autocommit = True
                with pytest.raises(Refused, match=f"must be owner of database {database}"):
                    rows(connection, f'drop database "{database}"')


def test_keys_of_another_environment_are_refused_by_who_asks_and_where(url: str, settings: Settings) -> None:
    dev = f"dev:{quote(DATABASE_PASSWORDS['dev'])}"
    own = url.replace("postgres@/postgres", f"{dev}@/dev_gateway")
    assert KeyStore(settings.model_copy(update={"keys_url": SecretStr(own)})).all() == []  # it makes its table
    for login, said in ((dev, "permission denied for database"), ("dev:guessed", "password authentication failed")):
        address = url.replace("postgres@/postgres", f"{login}@/prod_gateway")
        store = KeyStore(settings.model_copy(update={"keys_url": SecretStr(address)}))
        with pytest.raises(ApiKeyError, match=f"prod_gateway at .*, refuses dev .*{said}") as refused:
            store.all()
        assert not isinstance(refused.value, KeysAway)
