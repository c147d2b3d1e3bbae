"""`millrace access check` of the gateway's wall: a key of each scope, tried over HTTP."""

import shlex
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner, Result

from millrace.cli import app
from millrace.environments import audit
from millrace.environments.access import gateway_check
from millrace.releases.split import Split
from millrace.serving.api_keys import SCOPES
from millrace.serving.key_store import KeyStore
from millrace.settings import Settings
from millrace.stack.environment import settings_variables
from tests.conftest import free_port
from tests.serving.parrot import Drawer, Gateway, Parrot, Shelf, a_release

pytestmark = pytest.mark.slow


@pytest.fixture
def check(keyed: Settings) -> Callable[[int], Result]:
    """Checks the gateway on a port."""

    def run(port: int) -> Result:
        environment = settings_variables(keyed, keys=True) | {"MILLRACE_GATEWAY_PORT": str(port)}
        return CliRunner().invoke(app, shlex.split("access check --wall gateway"), env=environment)

    return run


def test_each_scope_opens_what_it_is_for_and_nothing_else(
    start: Callable[..., Gateway], keyed: Settings, store: KeyStore, check: Callable[[int], Result]
) -> None:
    assert set(gateway_check.SCOPES) == set(SCOPES)
    drawer = Drawer()
    shelf = Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer)})
    gateway = start(shelf, drawer, gateway_keys="required", keys_url=keyed.keys_url)
    done = check(urlsplit(gateway.url).port or 0)
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("7 allowed, 28 denied by servers, 0 not observed, 0 not as declared\n")
    assert [key.revoked_at is not None for key in store.all()] == [True] * len(gateway_check.HOLDERS)
    assert gateway.lines() == []
    kept = audit.search(keyed, action="key")
    assert [entry["outcome"] for entry in kept] == ["created"] * 5 + ["revoked"] * 5


def test_a_gateway_that_asks_for_no_key_is_no_wall(
    start: Callable[..., Gateway], check: Callable[[int], Result]
) -> None:
    drawer = Drawer()
    gateway = start(Shelf(Split(sequence=0, champion="1"), {"1": a_release(Parrot(), drawer)}), drawer)
    done = check(urlsplit(gateway.url).port or 0)
    assert done.exit_code == 1
    assert "35 allowed, 0 denied by servers, 0 not observed, 28 not as declared" in done.stdout
    assert "no key: read metrics in dev: allowed, which is not as declared" in done.stdout


def test_a_gateway_that_does_not_answer_is_no_wall_that_holds(check: Callable[[int], Result]) -> None:
    done = check(free_port())
    assert done.exit_code == 1
    assert "gateway: the gateway at http://127.0.0.1:" in done.stderr
    assert "gave no answer to ask questions" in done.stderr
