import socket
from pathlib import Path

import pytest

from millrace.errors import StackError
from millrace.private_files import write_json
from millrace.settings import Settings
from millrace.stack import Stack, preflight
from millrace.stack.home import registry_mark
from millrace.stack.processes import part_processes


@pytest.fixture
def taken() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("field", "who"), [("airflow_port", "Airflow"), ("mlflow_port", "MLflow"), ("gateway_port", "the gateway")]
)
def test_a_port_in_use_is_one_sentence_and_nothing_starts(
    settings: Settings, free_ports: dict[str, int], taken: int, field: str, who: str
) -> None:
    busy = settings.model_copy(update=free_ports | {field: taken})
    with pytest.raises(StackError) as refused, Stack(busy):
        pass
    assert str(refused.value) == (
        f"port {taken} on 127.0.0.1 is in use and {who} needs it: free it, or set MILLRACE_{field.upper()} to another"
    )
    assert part_processes(busy.home, {}) == {}
    assert not (busy.home / "postgres").exists()


def test_every_port_in_use_is_named_at_once(settings: Settings, free_ports: dict[str, int], taken: int) -> None:
    busy = settings.model_copy(update=free_ports | {"airflow_port": taken, "mlflow_port": taken})
    with pytest.raises(StackError, match=r"Airflow needs it.*MLflow needs it.*are both"):
        preflight.check_machine(busy)


def test_a_server_elsewhere_needs_no_port_here(settings: Settings, free_ports: dict[str, int], taken: int) -> None:
    remote = settings.model_copy(
        update=free_ports
        | {"mlflow_port": taken, "mlflow_uri": "http://mlflow.example", "spark_port": taken, "spark_remote": "sc://s:1"}
    )
    preflight.check_machine(remote)


def test_too_little_disk_and_memory_are_said_before_anything_starts(
    settings: Settings, free_ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "DISK_BYTES", 2**60)
    monkeypatch.setattr(preflight, "MEMORY_BYTES", 2**60)
    with pytest.raises(StackError, match=r"GiB of free disk and .* are needed.*GiB of memory are available"):
        preflight.check_machine(settings.model_copy(update=free_ports))


def test_the_package_has_a_java_for_a_machine_without_one(
    settings: Settings, free_ports: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    preflight.check_machine(settings.model_copy(update=free_ports))


def test_the_embedded_mlflow_is_one_environments(settings: Settings, free_ports: dict[str, int]) -> None:
    dev = settings.model_copy(update=free_ports)
    mark = registry_mark(dev.home)
    preflight.check_machine(dev)
    mark.parent.mkdir(parents=True)
    write_json(mark, {"environment": "dev"})
    preflight.check_machine(dev)
    prod = dev.model_copy(update={"environment": "prod"})
    with pytest.raises(StackError, match=r"has the releases of dev, not of prod: use another MILLRACE_HOME"):
        preflight.check_machine(prod)
    preflight.check_machine(prod.model_copy(update={"mlflow_uri": "http://mlflow.example"}))
