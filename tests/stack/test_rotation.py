"""`millrace secret`, and what a rotation leaves behind."""

import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from millrace.environments.audit import search
from millrace.errors import SettingsError
from millrace.secret_sources import NO_SECRET, SecretFile, SecretVariable
from millrace.settings import Settings
from millrace.sources.completion_id import CompletionKeys, issue, read_keys
from millrace.stack.environment import settings_variables
from millrace.stack.home import obtain_secrets, prepare_home, with_secrets
from millrace.stack.rotation import rotate_completion_key

NOW = datetime(2026, 11, 24, 23, 5, tzinfo=UTC)
WEEK = timedelta(days=7)


@pytest.fixture
def bare(settings: Settings) -> Settings:
    """As the settings of whoever types a command: they hold no key."""
    return settings.model_copy(update={"completion_key": NO_SECRET, "pseudonym_key": NO_SECRET})


@pytest.mark.slow
def test_a_rotation_reaches_those_who_run_and_later_starts_and_is_in_the_audit_trail(bare: Settings) -> None:
    prepare_home(bare)
    running = with_secrets(bare, obtain_secrets(bare.home))
    before, pseudonyms = CompletionKeys(running.completion_key), running.pseudonym_key.get_secret_value()
    earlier = before.issue("qa", NOW)

    rotated = rotate_completion_key(bare, "a new key", overlap=WEEK, actor="ann", now=NOW)

    assert (rotated.kept, rotated.until) == (bare.home / "secrets.json", NOW + WEEK)
    again = with_secrets(bare, obtain_secrets(bare.home))
    for settings in (running, again):
        keys = read_keys(settings.completion_key.get_secret_value())
        assert [key.until for key in keys] == [None, NOW + WEEK]
        assert keys[0].key == b"a new key"
        assert settings.pseudonym_key.get_secret_value() == pseudonyms
    assert before.verify(earlier, NOW + WEEK).application == "qa"
    handed_out = list((bare.home / "run" / "secrets").iterdir())
    assert {path.name for path in handed_out} == {"completion_key", "pseudonym_key"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in handed_out} == {0o600}
    entry = search(bare)[-1]
    assert (entry["actor"], entry["resource"], entry["outcome"]) == ("person/ann", "secret/completion_key", "rotated")
    assert "a new key" not in json.dumps(entry, default=str)


@pytest.mark.slow
def test_a_second_rotation_keeps_the_end_that_was_declared_at_the_first(bare: Settings, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("first\n")
    path.chmod(0o640)
    named = bare.model_copy(update={"completion_key": SecretFile(path, "MILLRACE_COMPLETION_KEY")})
    for days, key in enumerate(("second", "third")):
        at = NOW + timedelta(days=days)
        assert rotate_completion_key(named, key, overlap=WEEK, actor="ann", now=at).kept == path
    keys = read_keys(path.read_text())
    assert [key.key for key in keys] == [b"third", b"second", b"first"]
    assert [key.until for key in keys] == [None, NOW + timedelta(days=8), NOW + WEEK]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [one.name for one in tmp_path.iterdir() if one.is_file()] == ["key"]
    assert CompletionKeys(named.completion_key).verify(issue(b"first", "qa", NOW), NOW + WEEK).at == NOW


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (SecretStr("of the environment"), "comes from the environment, which no process can change for the others"),
        (SecretVariable("a_variable", "X"), "comes from Airflow's secrets backend; rotate it there"),
        (NO_SECRET, "there is no completion key in .* yet"),
    ],
)
def test_keys_that_cannot_be_rotated_here_are_one_sentence(bare: Settings, key: SecretStr, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        rotate_completion_key(
            bare.model_copy(update={"completion_key": key}), "new", overlap=WEEK, actor="ann", now=NOW
        )
    assert "of the environment" not in str(refused.value)


@pytest.mark.slow
def test_a_person_rotates_and_sees_where_secrets_come_from(bare: Settings, tmp_path: Path) -> None:
    prepare_home(bare)
    obtain_secrets(bare.home)
    (tmp_path / "token").write_text("a-token-in-a-file")
    (tmp_path / "token").chmod(0o600)

    def millrace(*words: str) -> str:
        given = {
            "MILLRACE_API_KEY": "a key in the environment",
            "MILLRACE_SPARK_TOKEN_FILE": str(tmp_path / "token"),
            "MILLRACE_QDRANT_API_KEY_VARIABLE": "a_variable",
        }
        ran = subprocess.run(
            [str(Path(sys.executable).parent / "millrace"), "secret", *words],
            env=os.environ | settings_variables(bare, keys=False) | given,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert f"A new completion key signs, in {bare.home}/secrets.json; ids of" in millrace("rotate-completion-key")
    said = millrace("list")
    for line in (
        f"completion_key: generated, {bare.home}/secrets.json\n  a key that verifies for ever\n",
        f"\n  a key that verifies until {datetime.now(UTC) + timedelta(days=8):%Y-%m-%d} ",
        "\napi_key: environment\n",
        f"\nspark_token: file {tmp_path}/token\n",
        "\nqdrant_api_key: Airflow's Variable a_variable\n",
        "\nkeys_url: not set\n",
    ):
        assert line in f"\n{said}"
    secrets = json.loads((bare.home / "secrets.json").read_text()).values()
    lines = [line for secret in secrets for line in secret.splitlines()]
    assert not [secret for secret in (*lines, "a key in the environment", "a-token-in-a-file") if secret in said]
