"""`millrace key`, `millrace ask` and simulated users where keys are required, over a real PostgreSQL."""

import json
import shlex
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from millrace.cli import app
from millrace.demo.ask import ask
from millrace.demo.run import _keyed
from millrace.demo.users import SimulatedUsers
from millrace.errors import StackError
from millrace.releases.split import Split
from millrace.serving.api_keys import read_key
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.sources.event_log import now
from millrace.sources.questions import Question
from millrace.stack.environment import settings_variables
from millrace.stack.postgres import Postgres
from tests.serving.databases import Database
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release

pytestmark = pytest.mark.slow


@pytest.fixture
def millrace(keyed: Settings) -> Callable[..., Result]:
    """Runs one command as a process with these settings would."""
    environment = settings_variables(keyed, keys=True)

    def run(line: str, **changes: str) -> Result:
        return CliRunner().invoke(app, shlex.split(line), env=environment | changes)

    return run


def secret(written: str) -> str:
    return written.strip().rsplit("_", 1)[1]


def test_a_key_is_made_listed_rotated_and_revoked_and_its_secret_is_shown_once(
    millrace: Callable[..., Result], store: KeyStore
) -> None:
    made = millrace(
        "key create 'the [help] desk' --owner ann --scope ask --scope pin --application qa --requests-per-minute 60 "
        "--monthly-budget 2.5 --expires-days 30"
    )
    assert made.exit_code == 0
    said = read_key(made.stdout.removesuffix("\n"))
    assert said is not None
    assert (
        f"API key {said.id} of ann, shown this once: ask, pin of qa; 60 requests a minute; $2.5 a month" in made.stderr
    )
    assert store.find(said.id).opened_by(made.stdout.strip(), now())

    listed = millrace("key list")
    for told in (said.id, "the [help] desk", "ann", "ask, pin of qa; 60 requests a minute", "$0.000000", "valid"):
        assert told in listed.stdout
    (row,) = json.loads(millrace("key list --json").stdout)
    assert (row["id"], row["scopes"], row["monthly_budget_usd"], row["ended"]) == (said.id, ["ask", "pin"], 2.5, None)

    rotated = millrace(f"key rotate {said.id} --overlap-hours 2")
    assert read_key(rotated.stdout.strip()) == said
    assert "shown this once; the one before ends" in rotated.stderr
    assert "the secret before until" in millrace("key list").stdout

    assert millrace(f"key revoke {said.id} --reason 'it was in a chat'").exit_code == 0
    assert said.id not in millrace("key list").stdout
    ended = millrace("key list --all")
    assert "was revoked on" in ended.stdout
    for written in (made.stdout, rotated.stdout):
        for shown in (listed, ended, millrace("key list --all --json")):
            assert secret(written) not in shown.output


def test_without_more_a_key_asks_and_rates_and_is_whoevers_who_made_it(
    millrace: Callable[..., Result], store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "carl")
    assert millrace("key create plain").exit_code == 0
    (key,) = store.all()
    assert (key.owner, key.scopes, key.applications, key.expires_at) == ("carl", {"ask", "feedback"}, None, None)
    assert "This gateway answers without a key too" in millrace("key list", MILLRACE_GATEWAY_KEYS="").stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("key create x --scope root", "a key needs a scope, and root is none"),
        ("key create x --application nowhere", "application 'nowhere' is not declared"),
        ("key create x --requests-per-minute 0", "0 requests a minute can't be"),
        ("key create x --monthly-budget 0", "a budget of $0.0 can't be"),
        ("key create x --expires-days -1", "-1 days can't be; give 0 to 36,500"),
        ("key create x --expires-days inf", "inf days can't be"),
        ("key create ' '", "the name must be a printable text"),
        ("key revoke 0123456789ab --reason none", "dev has no API key '0123456789ab'"),
        ("key rotate nonsense", "dev has no API key 'nonsense'"),
        ("key rotate nonsense --overlap-hours nan", "nan days can't be"),
    ],
)
def test_what_cannot_be_is_one_sentence(millrace: Callable[..., Result], line: str, said: str) -> None:
    refused = millrace(line)
    assert refused.exit_code == 1
    assert refused.stdout == ""
    assert said in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_database_that_is_away_is_one_sentence(millrace: Callable[..., Result], database: Database) -> None:
    database.go_away()
    refused = millrace("key list")
    assert refused.exit_code == 1
    assert "does not answer" in refused.stderr
    assert "start it (`millrace up`)" in refused.stderr
    database.come_back()


def test_without_a_setting_the_keys_are_in_the_embedded_database(
    millrace: Callable[..., Result], keyed: Settings
) -> None:
    refused = millrace("key list", MILLRACE_KEYS_URL="")
    folder = Postgres(keyed.home / "postgres").socket_folder
    assert f"the database of API keys, gateway at {folder}, does not answer" in refused.stderr


@pytest.fixture
def guarded(start: Callable[..., Gateway], keyed: Settings) -> Gateway:
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), Drawer())})
    return start(shelf, gateway_keys="required", keys_url=keyed.keys_url)


def test_millrace_ask_shows_the_key_that_it_is_given_and_says_how_to_get_one(guarded: Gateway, store: KeyStore) -> None:
    here = guarded.settings.model_copy(update={"gateway_port": int(guarded.url.rsplit(":", 1)[1])})
    with pytest.raises(StackError, match=r"no API key.*; set MILLRACE_API_KEY to a key, which `millrace key create`"):
        ask(here, "qa", "why is that?", user="ann")
    with _keyed(here, "qa") as keyed:
        assert ask(keyed, "qa", "why is that?", user="ann").text == "you asked why is that?"
        with pytest.raises(StackError, match=r"the gateway refused: .* this needs pin"):
            ask(keyed, "qa@1", "why is that?", user="ann")


def test_simulated_users_have_a_key_of_their_own_as_long_as_they_come(guarded: Gateway, store: KeyStore, qa) -> None:
    question = Question("q", "why is that?", "because", "d", None, "live")
    with _keyed(guarded.settings, "qa") as keyed:
        users = SimulatedUsers(
            [guarded.url], "qa", [question], qa.demo, crowd="c", corrections=False,
            api_key=keyed.api_key.get_secret_value(),
        )  # fmt: skip
        assert [visit.release_version for visit in users.visits(3)] == ["1"] * 3
        (key,) = store.all()
        assert (key.name, key.applications, key.ended(now())) == ("simulated users", {"qa"}, None)
    (key,) = store.all()
    assert key.ended(now()) is not None
    with _keyed(keyed, "qa") as given:
        assert given is keyed
    assert len(store.all()) == 1
