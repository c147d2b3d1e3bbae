import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from millrace.errors import SettingsError
from millrace.secret_sources import SecretFile, SecretVariable, hide
from millrace.settings import Settings, read_settings
from millrace.stack.environment import OF_ADMINISTRATORS, settings_variables

SECRET = "a secret of this test"
SECRETS = sorted(name for name, field in Settings.model_fields.items() if field.annotation is SecretStr)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "secret", f"{SECRET}\n")


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    """As a rotation does it: nobody sees half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(mode)
    return new.replace(path)


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_comes_from_a_file_and_follows_it_when_it_is_rotated(
    monkeypatch: pytest.MonkeyPatch, file: Path, name: str
) -> None:
    monkeypatch.setenv(f"MILLRACE_{name.upper()}_FILE", str(file))
    monkeypatch.setenv(f"MILLRACE_{name.upper()}", "")
    if name in (pair := {"lake_access_key", "lake_secret_key"}):
        (other,) = pair - {name}
        monkeypatch.setenv(f"MILLRACE_{other.upper()}", "the other half of one credential")
    settings = read_settings()
    copied = Settings(**{**settings.model_dump(), "threads": 1}).model_copy(update={"answer_cache": False})
    assert getattr(settings, name).get_secret_value() == SECRET
    written(file, "another")
    for one in (settings, copied):
        assert getattr(one, name).get_secret_value() == "another"
    assert "another" not in f"{settings!r}{settings}{settings.model_dump_json()}"
    passed_on = settings_variables(settings, keys=True)
    to_parts = None if name in OF_ADMINISTRATORS else str(file)
    assert passed_on.get(f"MILLRACE_{name.upper()}_FILE") == to_parts
    assert "another" not in passed_on.values()
    assert f"MILLRACE_{name.upper()}" not in passed_on
    assert not [one for one in settings_variables(settings, keys=False) if one.startswith(f"MILLRACE_{name.upper()}")]


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (None, 0, "can't be read (No such file or directory); put the secret there"),
        ("", 0o600, "is empty; write the secret into it"),
        (" \n", 0o600, "is empty; write the secret into it"),
        (SECRET, 0o644, "everybody on this machine may read"),
        (b"\xff\xfe", 0o600, "is no text in UTF-8"),
    ],
)
def test_a_file_that_cannot_be_a_secret_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | bytes | None, mode: int, said: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
    monkeypatch.setenv("MILLRACE_QDRANT_API_KEY_FILE", str(path))
    with pytest.raises(SettingsError) as refused:
        read_settings()
    assert str(refused.value).startswith("MILLRACE_QDRANT_API_KEY_FILE: ")
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert SECRET not in str(refused.value)


def test_a_folder_is_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MILLRACE_QDRANT_API_KEY_FILE", str(tmp_path))
    with pytest.raises(SettingsError, match="can't be read"):
        read_settings()


@pytest.mark.parametrize("pair", [("", "_FILE"), ("", "_VARIABLE"), ("_FILE", "_VARIABLE")])
def test_a_secret_with_two_sources_is_refused(
    monkeypatch: pytest.MonkeyPatch, file: Path, pair: tuple[str, str]
) -> None:
    for source in pair:
        monkeypatch.setenv(f"MILLRACE_API_KEY{source}", str(file) if source == "_FILE" else "hidden")
    with pytest.raises(SettingsError) as refused:
        read_settings()
    assert str(refused.value) == (
        f"MILLRACE_API_KEY{pair[0]} and MILLRACE_API_KEY{pair[1]} are both set, and a secret has one source; unset all "
        "but one"
    )


def test_only_a_secret_has_a_file(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setenv("MILLRACE_THREADS_FILE", str(file))
    with pytest.raises(SettingsError, match="unknown setting MILLRACE_THREADS_FILE; known are"):
        read_settings()


def test_half_a_rotation_leaves_the_secret_what_it_was_and_is_said_once(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = SecretFile(file, "MILLRACE_API_KEY")
    steps = {
        "is empty": lambda: file.write_text(""),
        "everybody on this machine": lambda: written(file, "a new one", 0o644),
        "can't be read": file.unlink,
    }
    for said, break_it in steps.items():
        caplog.clear()
        break_it()
        assert [secret.get_secret_value() for _ in range(3)] == [SECRET] * 3
        assert [said in one.message for one in caplog.records] == [True]
        assert SECRET not in caplog.text
    caplog.set_level(logging.ERROR)
    written(file, "a new one", 0o644)
    assert secret.get_secret_value() == SECRET
    file.chmod(0o600)
    assert secret.get_secret_value() == "a new one"


def test_a_rotation_that_a_process_without_descriptors_could_not_read_is_read_by_the_next_use(file: Path) -> None:
    secret = SecretFile(file, "MILLRACE_API_KEY")
    written(file, "a new one")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        during = secret.get_secret_value()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (during, secret.get_secret_value()) == (SECRET, "a new one")


def test_a_secret_that_kubernetes_exchanges_is_followed(tmp_path: Path) -> None:
    """It writes a new folder beside the old one, and moves one link from one to the other."""
    for number, text in enumerate(("old", "new")):
        (tmp_path / f"..{number}").mkdir()
        written(tmp_path / f"..{number}" / "key", text, 0o440)
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "key").symlink_to("..data/key")
    secret = SecretFile(tmp_path / "key", "MILLRACE_API_KEY")
    assert secret.get_secret_value() == "old"
    (tmp_path / "..next").symlink_to("..1")
    (tmp_path / "..next").replace(tmp_path / "..data")
    assert secret.get_secret_value() == "new"


def test_what_a_server_says_back_is_hidden_and_nothing_else() -> None:
    said = "401: no such key 'sk-123456' in vault 1"
    assert hide(said, SecretStr("sk-123456"), SecretStr(""), SecretStr("1")) == "401: no such key '…' in vault 1"


def test_a_key_is_hidden_after_its_rotation_too(file: Path) -> None:
    secret = SecretFile(file, "MILLRACE_API_KEY")
    for new in ("another secret", "a third secret"):
        written(file, new)
        assert secret.get_secret_value() == new
    assert hide(f"no such key: {SECRET}, another secret, a third secret", secret) == "no such key: …, …, …"


@pytest.mark.parametrize(
    ("secret", "said", "shown"),
    [
        ("new-key\nold-key-1 until 2026-12-04T09:00:00+00:00", "old-key-1 until 2026-12-04", "… until 2026-12-04"),
        ("slack://a/b/c jsons://host/path", "can't reach jsons://host/path", "can't reach …"),
        ("postgresql://ann:hidden@host/keys", "ann may not, not with hidden", "ann may not, not with …"),
        ('{"postgres": {"dev": "hidden \\"1\\""}}', 'dev of postgres has hidden "1"', "dev of postgres has …"),
        ('{"lake": {"dev": "access:hidden"}}', "no such pair: access, hidden", "no such pair: …, …"),
    ],
)
def test_what_is_of_use_alone_is_hidden_alone(secret: str, said: str, shown: str) -> None:
    assert hide(said, SecretStr(secret)) == shown


def test_a_variable_of_airflow_is_not_asked_for_until_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_QDRANT_API_KEY_VARIABLE", "qdrant")
    monkeypatch.setattr(SecretVariable, "_looked_up", lambda self: pytest.fail("a vault was asked"))
    settings = read_settings()
    assert "qdrant_api_key=SecretVariable('**********')" in repr(settings)
    assert settings_variables(settings, keys=True)["MILLRACE_QDRANT_API_KEY_VARIABLE"] == "qdrant"
    assert hide("nobody says back what was not used", settings.qdrant_api_key) == "nobody says back what was not used"


def test_a_variable_of_airflow_is_hidden_once_it_was_used_and_masked_by_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masked: set[str] = set()
    monkeypatch.setattr(SecretVariable, "_looked_up", lambda self: "slack://a/b/c jsons://host/path")
    monkeypatch.setattr("airflow.sdk.log.mask_secret", masked.add)
    secret = SecretVariable("alerts", "MILLRACE_ALERT_URLS")
    assert secret.get_secret_value() == "slack://a/b/c jsons://host/path"
    assert hide("can't reach jsons://host/path", secret) == "can't reach …"
    assert masked == {"slack://a/b/c jsons://host/path", "slack://a/b/c", "jsons://host/path"}


ASKED = """
from millrace.errors import SettingsError
from millrace.settings import read_settings
settings = read_settings()
print(settings.qdrant_api_key.get_secret_value())
try:
    settings.api_key.get_secret_value()
except SettingsError as error:
    print(error)
"""


@pytest.mark.slow
def test_airflows_configured_backend_is_asked(tmp_path: Path) -> None:
    """Its file backend stands where a vault's would: both are named by the same option."""
    (tmp_path / "variables.json").write_text(json.dumps({"millrace_qdrant": SECRET}))
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__SECRETS__BACKEND": "airflow.secrets.local_filesystem.LocalFilesystemBackend",
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"variables_file_path": str(tmp_path / "variables.json")}),
        "MILLRACE_QDRANT_API_KEY_VARIABLE": "millrace_qdrant",
        "MILLRACE_API_KEY_VARIABLE": "no_such_variable",
    }
    ran = subprocess.run([sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found, refusal = ran.stdout.splitlines()[-2:]
    assert found == SECRET
    assert refusal.startswith("MILLRACE_API_KEY_VARIABLE names Airflow's Variable 'no_such_variable', and Airflow has")
