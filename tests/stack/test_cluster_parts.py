"""The parts that settings add: a Spark cluster and more gateways. None of these tests starts one; the loop does."""

import socket
from pathlib import Path

import pytest
from pydantic import SecretStr

from millrace.errors import SettingsError, StackError
from millrace.settings import Settings, read_settings
from millrace.stack import preflight
from millrace.stack.home import obtain_secrets, prepare_home
from millrace.stack.part import Part
from millrace.stack.parts import all_parts


@pytest.fixture
def wide(settings: Settings) -> Settings:
    prepare_home(settings)
    return settings.model_copy(update={"spark_workers": 2, "gateways": 3, "spark_executor_memory_mb": 777})


def parts_of(settings: Settings) -> dict[str, Part]:
    return {part.name: part for part in all_parts(settings, obtain_secrets(settings.home))}


def test_settings_alone_add_a_cluster_under_spark_and_gateways_beside_the_first(wide: Settings) -> None:
    parts, narrow = parts_of(wide), parts_of(wide.model_copy(update={"spark_workers": 0, "gateways": 1}))
    assert parts.keys() - narrow.keys() == {
        "spark-master",
        "spark-worker-1",
        "spark-worker-2",
        "gateway-2",
        "gateway-3",
    }
    assert narrow.keys() <= parts.keys()
    assert parts["spark"].after == ("spark-master", "spark-worker-1", "spark-worker-2")
    assert parts["spark-worker-2"].after == ("spark-master",)
    assert "spark.master=spark://127.0.0.1:7077" in parts["spark"].command
    assert "spark.executor.memory=777m" in parts["spark"].command
    assert "777m" in parts["spark-worker-1"].command
    assert "spark.master=local[2]" in narrow["spark"].command
    ports = [parts[name].environment["MILLRACE_GATEWAY_PORT"] for name in ("gateway", "gateway-2", "gateway-3")]
    assert ports == ["8000", "8001", "8002"]
    assert [url.rpartition(":")[2] for url in wide.gateway_urls] == ports
    for part in parts.values():
        assert "0.0.0.0" not in part.command


def test_a_clusters_secret_is_of_its_home_in_files_that_nobody_else_reads_and_in_no_command(wide: Settings) -> None:
    parts = parts_of(wide)
    secret = obtain_secrets(wide.home).spark_secret
    assert len(secret) > 40
    for part in parts.values():
        assert secret not in " ".join(part.command)
    files = [
        path for path in wide.home.rglob("cluster.conf") if f"spark.authenticate.secret {secret}" in path.read_text()
    ]
    assert len(files) == 4
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    given = wide.model_copy(update={"spark_secret": SecretStr("of somebody's own")})
    parts_of(given)
    assert "spark.authenticate.secret of somebody's own" in files[0].read_text()


def test_a_cluster_elsewhere_gets_neither_workers_nor_the_options_of_small_work(wide: Settings) -> None:
    elsewhere = wide.model_copy(update={"spark_workers": 0, "spark_master": "spark://big.example:7077"})
    parts = parts_of(elsewhere)
    assert not [name for name in parts if name.startswith("spark-")]
    command = parts["spark"].command
    assert "spark.master=spark://big.example:7077" in command
    assert not [
        one for one in command if "NO_CODEGEN" in one or "TieredStopAtLevel" in one or "shuffle.partitions" in one
    ]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SPARK_MASTER": "spark://a:7077", "SPARK_WORKERS": "2"}, "MILLRACE_SPARK_MASTER and MILLRACE_SPARK_WORKERS"),
        (
            {"SPARK_REMOTE": "sc://a:1", "SPARK_WORKERS": "2"},
            "MILLRACE_SPARK_REMOTE and MILLRACE_SPARK_WORKERS say where",
        ),
        ({"SPARK_MASTER": "local[8]"}, "MILLRACE_SPARK_MASTER"),
        ({"GATEWAYS": "0"}, "MILLRACE_GATEWAYS"),
        ({"OBJECT_STORE_PORT": "7070"}, "in MILLRACE_LAKE_URI: set that"),
        (
            {"OBJECT_STORE_PORT": "7070", "LAKE_URI": "s3://lakehouse", "LAKE_ENDPOINT": "http://a:1"},
            "no MILLRACE_LAKE_ENDPOINT, which is a store elsewhere",
        ),
    ],
)
def test_settings_that_contradict_one_another_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"MILLRACE_{name}", value)
    with pytest.raises(SettingsError) as refused:
        read_settings()
    assert said in str(refused.value)


def test_every_port_of_a_cluster_is_looked_at_before_anything_starts(
    wide: Settings, free_ports: dict[str, int], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for change, who in (
            ({"gateway_port": port - 2}, "gateway 3 needs it: free it, or set MILLRACE_GATEWAY_PORT"),
            ({"spark_ui_port": port - 1}, "the page of Spark's worker 1 needs it"),
            ({"spark_master_port": port}, "Spark's master needs it"),
        ):
            with pytest.raises(StackError, match=f"port {port} on 127.0.0.1 is in use and {who}"):
                preflight.check_machine(wide.model_copy(update=free_ports | change))
