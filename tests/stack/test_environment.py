import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from millrace.settings import Settings
from millrace.stack.environment import part_environment, settings_variables
from millrace.stack.home import obtain_secrets, prepare_home
from millrace.stack.part import Part
from millrace.stack.parts import all_parts, with_keys_url
from millrace.stack.postgres import Postgres

ADMINISTRATORS = {"access_secrets", "airflow_passwords", "backup_airflow_url", "backup_mlflow_url"}

READ_BACK = """
from millrace.settings import read_settings
settings = read_settings()
print(settings.model_dump_json())
print(settings.completion_key.get_secret_value(), settings.pseudonym_key.get_secret_value(), sep="|")
"""


@pytest.mark.slow
def test_a_part_reads_back_the_settings_it_was_given(settings: Settings) -> None:
    given = settings.model_copy(
        update={"spark_tables": frozenset({"silver/chunks", "silver/documents"}), "answer_cache": False}
    )
    environment = part_environment(given, threads=1, keys=True)
    read = subprocess.run([sys.executable, "-c", READ_BACK], env=environment, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    dumped, keys = read.stdout.strip().split("\n")
    assert Settings.model_validate_json(dumped) == given.model_copy(
        update={
            name: Settings.model_validate_json(dumped).completion_key for name in ("completion_key", "pseudonym_key")
        }
    )
    assert keys == "test completion key|test pseudonym key"


def test_parts_that_need_no_keys_get_none(settings: Settings) -> None:
    environment = part_environment(settings, threads=1, keys=False)
    assert not [name for name, value in environment.items() if "test completion key" in value or name.endswith("_KEY")]
    assert "MILLRACE_HOME" in environment
    secret = {name for name, field in Settings.model_fields.items() if field.annotation is SecretStr}
    assert {"completion_key", "pseudonym_key", "alert_urls", "spark_token"} <= secret
    withheld = set(settings_variables(settings, keys=True)) - set(settings_variables(settings, keys=False))
    assert withheld == {f"MILLRACE_{name}".upper() for name in secret - ADMINISTRATORS}


def test_no_part_knows_what_administers_the_walls(settings: Settings) -> None:
    others = {name for name in Settings.model_fields if name.startswith(("access_", "backup_"))}
    assert others | {"airflow_passwords"} >= ADMINISTRATORS
    given = settings.model_copy(update=dict.fromkeys(ADMINISTRATORS, SecretStr("of the administrator")))
    for keys in (True, False):
        environment = part_environment(given, threads=1, keys=keys)
        assert "of the administrator" not in environment.values()
        assert not {f"MILLRACE_{name.upper()}" for name in ADMINISTRATORS} & environment.keys()


def test_the_callers_other_tools_do_not_reach_a_part(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AIRFLOW_HOME",
        "AIRFLOW__CORE__EXECUTOR",
        "MLFLOW_TRACKING_URI",
        "SPARK_HOME",
        "PYTHONPATH",
        "PGHOST",
    ):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("OPENAI_API_KEY", "needed by a release behind an API")
    environment = part_environment(settings, threads=3, keys=False)
    assert "elsewhere" not in environment.values()
    assert environment["OPENAI_API_KEY"] == "needed by a release behind an API"
    assert environment["MLFLOW_TRACKING_URI"] == settings.mlflow_url
    assert environment["OMP_NUM_THREADS"] == "3"
    assert Path(environment["PATH"].split(":")[0]) == Path(sys.executable).parent


def test_no_proxy_stands_between_the_parts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.delenv("no_proxy", raising=False)
    environment = part_environment(settings, threads=1, keys=False)
    assert environment["no_proxy"] == "intranet,127.0.0.1,localhost,127.0.0.1"


def test_a_login_for_mlflow_is_passed_on_only_to_a_server_elsewhere(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    elsewhere = settings.model_copy(update={"mlflow_uri": "https://mlflow.example"})
    assert part_environment(elsewhere, threads=1, keys=False)["MLFLOW_TRACKING_TOKEN"] == "token"
    assert "MLFLOW_TRACKING_TOKEN" not in part_environment(settings, threads=1, keys=False)


def test_servers_listen_where_they_are_told_and_are_reached_where_they_are(settings: Settings) -> None:
    prepare_home(settings)
    in_a_container = settings.model_copy(update={"bind": "0.0.0.0"})
    parts = {part.name: part for part in all_parts(in_a_container, obtain_secrets(settings.home))}
    listening = parts["mlflow"].command
    assert listening[listening.index("--host") + 1] == "0.0.0.0"
    assert parts["airflow"].environment["AIRFLOW__API__HOST"] == "0.0.0.0"
    assert "spark.connect.grpc.binding.address=0.0.0.0" in parts["spark"].command
    assert "spark.driver.host=127.0.0.1" in parts["spark"].command
    assert parts["gateway"].environment["MILLRACE_BIND"] == "0.0.0.0"
    for name in ("mlflow", "airflow", "gateway", "spark"):
        assert "//127.0.0.1:" in parts[name].url
    assert not [part for part in all_parts(settings, obtain_secrets(settings.home)) if "0.0.0.0" in part.command]


@pytest.mark.slow
def test_the_gateway_finds_its_api_keys_in_the_embedded_database_unless_another_is_named(settings: Settings) -> None:
    prepare_home(settings)

    def gateway(given: Settings) -> Part:
        return next(part for part in all_parts(given, obtain_secrets(settings.home)) if part.name == "gateway")

    url = Postgres(settings.home / "postgres").url("gateway")
    assert with_keys_url(settings).keys_url.get_secret_value() == url
    for given in (settings, with_keys_url(settings)):
        assert gateway(given).environment["MILLRACE_KEYS_URL"] == url
        assert gateway(given).after == ("mlflow", "postgres")
    named = settings.model_copy(update={"keys_url": SecretStr("postgresql://keys.example/gateway")})
    assert with_keys_url(named) is named
    assert gateway(named).environment["MILLRACE_KEYS_URL"] == "postgresql://keys.example/gateway"
    assert gateway(named).after == ("mlflow",)


def test_spark_alone_gets_the_lakes_credential_and_a_keeper_where_the_lake_is_in_an_object_store(
    settings: Settings,
) -> None:
    prepare_home(settings)
    given = settings.model_copy(
        update={
            "lake_uri": "s3://lakehouse/lake",
            "lake_endpoint": "http://127.0.0.1:9000",
            "lake_access_key": SecretStr("dev"),
            "lake_secret_key": SecretStr("the lake's secret"),
            "spark_token": SecretStr("a-token"),
        }
    )
    parts = {part.name: part for part in all_parts(given, obtain_secrets(settings.home))}
    spark = parts["spark"]
    assert spark.command == (sys.executable, "-m", "millrace.lakehouse.spark_server")
    assert spark.environment["MILLRACE_LAKE_SECRET_KEY"] == "the lake's secret"
    assert spark.environment["SPARK_CONNECT_AUTHENTICATE_TOKEN"] == "a-token"
    assert "MILLRACE_PSEUDONYM_KEY" not in spark.environment
    knowing = {name for name, part in parts.items() if "the lake's secret" in part.environment.values()}
    assert knowing == {"spark", "airflow-scheduler", "gateway"}
    assert not [part for part in parts.values() if "the lake's secret" in " ".join(part.command)]
    in_a_folder = {part.name: part for part in all_parts(settings, obtain_secrets(settings.home))}
    assert "org.apache.spark.deploy.SparkSubmit" in in_a_folder["spark"].command
    assert "hadoop-aws" not in " ".join(in_a_folder["spark"].command)
