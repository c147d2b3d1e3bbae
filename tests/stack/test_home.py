import json
import stat

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from millrace import FORMAT_VERSION
from millrace.errors import StackError
from millrace.settings import Settings
from millrace.stack.home import PRIVATE, HomeLock, obtain_secrets, prepare_home, with_secrets


def test_secrets_are_made_once_and_only_their_owner_can_read_them(settings: Settings) -> None:
    prepare_home(settings)
    first = obtain_secrets(settings.home)
    assert obtain_secrets(settings.home) == first
    assert stat.S_IMODE((settings.home / "secrets.json").stat().st_mode) == 0o600


def test_what_users_said_is_for_the_owner_alone_also_in_a_home_that_was_open(settings: Settings) -> None:
    (settings.home / "lake").mkdir(parents=True, mode=0o755)
    prepare_home(settings)
    assert {name: stat.S_IMODE((settings.home / name).stat().st_mode) for name in PRIVATE} == dict.fromkeys(
        PRIVATE, 0o700
    )
    assert {"lake", "events", "training", "releases", "indexes"} <= set(PRIVATE)


def test_a_secret_that_a_newer_version_needs_is_added_and_the_others_stay(settings: Settings) -> None:
    prepare_home(settings)
    (settings.home / "secrets.json").write_text('{"pseudonym_key": "kept", "of_another_version": "kept too"}')
    found = obtain_secrets(settings.home)
    assert found.pseudonym_key == "kept"
    assert found.completion_key
    assert json.loads((settings.home / "secrets.json").read_text())["of_another_version"] == "kept too"


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_secrets_that_cannot_be_understood_are_never_replaced(settings: Settings, content: str) -> None:
    prepare_home(settings)
    path = settings.home / "secrets.json"
    path.write_text(content)
    with pytest.raises(StackError, match=r"secrets\.json can't be read"):
        obtain_secrets(settings.home)
    assert path.read_text() == content


def test_a_key_from_the_environment_goes_before_the_generated_one(settings: Settings) -> None:
    prepare_home(settings)
    found = obtain_secrets(settings.home)
    chosen = with_secrets(settings.model_copy(update={"pseudonym_key": type(settings.pseudonym_key)("")}), found)
    assert chosen.completion_key.get_secret_value() == "test completion key"
    assert chosen.pseudonym_key.get_secret_value() == found.pseudonym_key


def test_a_home_of_a_newer_version_is_refused_and_left_alone(settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    (settings.home / "format.json").write_text(json.dumps({"format": FORMAT_VERSION + 1}))
    with pytest.raises(StackError, match="written by a newer Millrace"):
        prepare_home(settings)
    assert [path.name for path in settings.home.iterdir()] == ["format.json"]


@given(content=st.text(max_size=20))
@examples(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_format_file_that_says_nothing_is_one_clear_sentence(settings: Settings, content: str) -> None:
    settings.home.mkdir(parents=True, exist_ok=True)
    (settings.home / "format.json").write_text(content)
    with pytest.raises(StackError, match="restore it"):
        prepare_home(settings)


def test_a_home_that_cannot_be_made_is_one_clear_sentence(settings: Settings) -> None:
    settings.home.parent.mkdir(exist_ok=True)
    settings.home.write_text("a file is in the way")
    with pytest.raises(StackError, match="set MILLRACE_HOME"):
        prepare_home(settings)


def test_one_process_at_a_time_holds_the_lock_of_a_home(settings: Settings) -> None:
    prepare_home(settings)
    first, second = HomeLock(settings.home), HomeLock(settings.home)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
