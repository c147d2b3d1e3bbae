import pytest

from millrace.errors import SettingsError
from millrace.settings import read_settings


@pytest.mark.parametrize(
    ("variables", "required"),
    [
        ({}, False),
        ({"GATEWAY_KEYS": "off"}, False),
        ({"GATEWAY_KEYS": "off", "HOST": "localhost"}, False),
        ({"GATEWAY_KEYS": "off", "HOST": "::1"}, False),
        ({"GATEWAY_KEYS": "required"}, True),
        ({"ENVIRONMENT": "staging"}, True),
        ({"ENVIRONMENT": "prod"}, True),
        ({"BIND": "0.0.0.0"}, True),
        ({"HOST": "10.0.0.5"}, True),
        ({"HOST": "10.0.0.5", "BIND": "127.0.0.1"}, False),
        ({"HOST": "a.machine"}, True),
    ],
)
def test_whoever_could_be_reached_by_others_requires_api_keys(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], required: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"MILLRACE_{name}", value)
    assert read_settings().keys_required is required


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ENVIRONMENT": "prod"}, "this is prod on 127.0.0.1; leave it empty"),
        ({"BIND": "0.0.0.0"}, "this is dev on 0.0.0.0; leave it empty"),
    ],
)
def test_keys_cannot_be_turned_off_where_others_reach_and_no_secret_is_in_the_refusal(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in (variables | {"GATEWAY_KEYS": "off", "COMPLETION_KEY": "hidden"}).items():
        monkeypatch.setenv(f"MILLRACE_{name}", value)
    with pytest.raises(SettingsError, match=said) as refused:
        read_settings()
    assert str(refused.value).startswith("invalid settings: MILLRACE_GATEWAY_KEYS=off would let anybody ask")
    assert "hidden" not in str(refused.value)


def test_a_setting_that_cannot_be_understood_is_named_with_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_GATEWAY_PORT", "eight")
    monkeypatch.setenv("MILLRACE_GATEWAY_KEYS", "perhaps")
    with pytest.raises(SettingsError, match=r"MILLRACE_GATEWAY_PORT: .* \(got 'eight'\)") as refused:
        read_settings()
    assert "MILLRACE_GATEWAY_KEYS: Input should be '', 'required' or 'off' (got 'perhaps')" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES_URL", "postgresql://postgres:hidden@db/postgres"),
        ("LAKE_URI", "s3://key:hidden@bucket/lake"),
        ("LAKE_ENDPOINT", "https://key:hidden@host/"),
    ],
)
def test_a_login_in_an_address_that_may_have_none_is_not_said(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"MILLRACE_{name}", value)
    with pytest.raises(SettingsError, match=f"MILLRACE_{name}: ") as refused:
        read_settings()
    assert "//…@" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_who_logs_in_to_airflow_is_json_or_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for written, users in (("", {}), ('{"ann": "operator"}', {"ann": "operator"})):
        monkeypatch.setenv("MILLRACE_AIRFLOW_USERS", written)
        assert read_settings().airflow_users == users
    monkeypatch.setenv("MILLRACE_AIRFLOW_USERS", "ann:operator")
    with pytest.raises(SettingsError, match=r"MILLRACE_AIRFLOW_USERS: .*no JSON object such as"):
        read_settings()
