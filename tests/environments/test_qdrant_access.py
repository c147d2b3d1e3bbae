"""Tokens, and the collections that they open. Whether a real server keeps their rules is tried where one is named;
elsewhere the tries are run against a stand-in that reads tokens as Qdrant's documentation says it does."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import jwt
import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from millrace.cli import app
from millrace.environments import audit
from millrace.environments.access.matrix import READS
from millrace.environments.access.qdrant_check import check, declared
from millrace.environments.access.qdrant_wall import apply, declared_collections, known_collections, plan, token
from millrace.errors import AccessError, RetrievalError
from millrace.retrieval.server import Server, connect
from millrace.retrieval.service import ServiceBuilds, collection_name
from millrace.settings import Settings
from millrace.stack.environment import settings_variables
from tests.conftest import copy_declarations
from tests.retrieval.stand_in import StandIn

API_KEY = "the API key of the test's Qdrant server"
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def asking(url: str, key: str) -> Server:
    """The server at `url`, asked with `key`."""
    return connect(url, SecretStr(key))


class TokenStandIn(StandIn):
    """Reads a key that is no API key as a token that the API key signed."""

    def access(self, key: str, collection: str) -> str | None:
        if key == API_KEY:
            return "m"
        try:
            said = jwt.decode(key, API_KEY, algorithms=["HS256"])
        except jwt.InvalidTokenError:
            return None
        return next((one["access"] for one in said["access"] if one["collection"] == collection), "")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = TokenStandIn(keys={})
    yield server
    server.stop()


@pytest.fixture
def shared(settings: Settings, stand_in: StandIn, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"qdrant_url": stand_in.url, "applications": copy_declarations(tmp_path)})


def test_a_token_opens_its_identitys_collections_and_those_it_reads_until_it_expires(shared: Settings) -> None:
    collections = declared_collections(shared)
    assert Counter(collections.values()) == dict.fromkeys(READS, 2)
    for identity, others in READS.items():
        written = token(identity, collections, API_KEY, now=NOW, valid=timedelta(days=30))
        said = jwt.decode(written, API_KEY, algorithms=["HS256"], options={"verify_exp": False})
        assert said.keys() == {"subject", "exp", "access"}
        assert datetime.fromtimestamp(said["exp"], UTC) == NOW + timedelta(days=30)
        own = {name: "rw" for name, environment in collections.items() if environment == identity}
        read = {name: "r" for name, environment in collections.items() if environment in others}
        assert {one["collection"]: one["access"] for one in said["access"]} == own | read


def test_a_key_that_could_be_guessed_from_a_token_signs_none(shared: Settings) -> None:
    make = partial(token, collections=declared_collections(shared), now=NOW, valid=timedelta(days=1))
    with pytest.raises(AccessError, match="Qdrant's API key has 5 bytes"):
        make("dev", api_key="short")
    with pytest.raises(AccessError, match="there is no identity 'test'; there are dev, staging, prod"):
        make("test", api_key=API_KEY)
    with pytest.raises(AccessError, match="no application is declared"):
        token("dev", {}, API_KEY, now=NOW, valid=timedelta(days=1))


def test_what_is_missing_is_created_once_and_then_a_builder_needs_no_more_than_its_token(
    shared: Settings, stand_in: StandIn
) -> None:
    administrator = asking(stand_in.url, API_KEY)
    planned = [str(change) for change in plan(shared, administrator)]
    assert planned == [f"create collection {name}" for name in declared_collections(shared)]
    dev = token("dev", declared_collections(shared), API_KEY, now=datetime.now(UTC), valid=timedelta(hours=1))
    own = next(name for name, environment in declared_collections(shared).items() if environment == "dev")
    with pytest.raises(RetrievalError, match=f"refuses the token of dev .*: it may not create collection {own}"):
        ServiceBuilds(asking(stand_in.url, dev), own).prepare()
    assert [str(change) for change in apply(shared, administrator)] == planned
    assert plan(shared, administrator) == []
    ServiceBuilds(asking(stand_in.url, dev), own).prepare()
    tuned = collection_name("prod", "qa", "a-lineage-that-a-candidate-brought")
    ServiceBuilds(administrator, tuned).prepare()
    assert known_collections(shared, administrator) == declared_collections(shared) | {tuned: "prod"}


def test_the_command_prints_a_token_alone_and_tells_the_audit_trail(shared: Settings) -> None:
    environment = settings_variables(shared, keys=True)
    secrets = {"MILLRACE_ACCESS_SECRETS": json.dumps({"qdrant": {"admin": API_KEY}})}
    plain = CliRunner().invoke(app, ["access", "plan", "--wall", "qdrant"], env=environment | secrets)
    assert plain.stdout.startswith("qdrant: 6 changes\n  create collection millrace-dev-")
    done = CliRunner().invoke(app, ["access", "token", "dev", "--days", "7"], env=environment | secrets)
    assert done.exit_code == 0, done.output
    said = jwt.decode(done.stdout.strip(), API_KEY, algorithms=["HS256"])
    assert said["subject"] == "dev"
    assert timedelta(days=6) < datetime.fromtimestamp(said["exp"], UTC) - datetime.now(UTC) <= timedelta(days=7)
    assert done.stderr.startswith("A token of dev until ")
    assert API_KEY not in done.output
    (entry,) = audit.search(shared, action="permission")
    assert entry["details"]["change"].startswith("token of dev until ")
    assert done.stdout.strip() not in json.dumps(entry, default=str)
    nobody = CliRunner().invoke(app, ["access", "token", "dev"], env=environment)
    assert (nobody.exit_code, "MILLRACE_ACCESS_SECRETS has no 'admin' for qdrant" in nobody.stderr) == (1, True)


@pytest.mark.slow
def test_every_try_is_made_and_leaves_nothing_behind(stand_in: StandIn) -> None:
    administrator = asking(stand_in.url, API_KEY)
    found = check(administrator, API_KEY, partial(asking, stand_in.url))
    assert [str(one) for one in found if one.wrong] == []
    assert sum(one.allowed is False for one in found) == 3 * (2 + 3) + 3 * 5 + 3 * 7
    told = [(one.identity, one.environment, one.action, one.declared) for one in declared()]
    assert [(one.identity, one.environment, one.action, one.declared) for one in found] == told
    assert stand_in.disk.store.get_collections().collections == []


@pytest.mark.slow
def test_a_server_that_reads_no_tokens_is_no_wall() -> None:
    """As with `jwt_rbac` off, or no key at all: what is not as declared is found, and still nothing is left."""
    open_to_all = StandIn()
    found = check(asking(open_to_all.url, API_KEY), API_KEY, partial(asking, open_to_all.url))
    assert all(one.allowed for one in found)
    assert sum(one.wrong for one in found) == sum(not one.declared for one in found)
    assert open_to_all.disk.store.get_collections().collections == []
    open_to_all.stop()


@pytest.mark.skipif("TEST_QDRANT_URL" not in os.environ, reason="MILLRACE_QDRANT_URL names no Qdrant server")
def test_a_real_server_keeps_the_rules_of_tokens() -> None:
    """With its API key in MILLRACE_QDRANT_API_KEY and `service.jwt_rbac: true`."""
    url, api_key = os.environ["TEST_QDRANT_URL"], os.environ["TEST_QDRANT_API_KEY"]
    found = check(asking(url, api_key), api_key, partial(asking, url))
    assert [str(one) for one in found if one.wrong] == []
    assert sum(one.allowed is False for one in found) == 3 * (2 + 3) + 3 * 5 + 3 * 7
