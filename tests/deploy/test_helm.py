"""No cluster was at hand: values and manifests for Kubernetes are held against the code, the lock and each other, and
against the charts themselves where somebody has them (`TEST_HELM_CHARTS`, a folder with a folder for each chart)."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import pytest
import yaml

from millrace.settings import PROJECT, Settings, read_settings
from tests.deploy import checks

HELM = PROJECT / "deploy" / "helm"
KUBERNETES = PROJECT / "deploy" / "kubernetes"
CHARTS = Path(os.environ.get("TEST_HELM_CHARTS", ""))
LOCK = dict(re.findall(r"^([\w-]+)==([\w.]+)", (PROJECT / "requirements.txt").read_text(), re.MULTILINE))
CHART = {
    "airflow.yaml": "airflow",
    "spark-operator.yaml": "spark-kubernetes-operator",
    "qdrant.yaml": "qdrant",
}
UNNAMED = {"qdrant.yaml": {"apiKey", "config"}}
"""Values that a chart's defaults only mention in comments, and free ones."""

Container = dict[str, Any]


def manifests() -> list[dict[str, Any]]:
    return [one for path in sorted(KUBERNETES.glob("*.yaml")) for one in yaml.safe_load_all(path.read_text())]


def containers() -> Iterator[Container]:
    for one in manifests():
        pod = one["spec"] if one["kind"] == "Pod" else one.get("spec", {}).get("template", {}).get("spec", {})
        yield from pod.get("containers", ())


def config() -> dict[str, str]:
    return next(one["data"] for one in manifests() if one["kind"] == "ConfigMap")


def values(name: str) -> dict[str, Any]:
    return yaml.safe_load((HELM / name).read_text())


def settings_of(variables: list[dict[str, Any]], shared: dict[str, str]) -> Settings:
    """As a process reads them, with something in place of what the cluster fills in."""
    filled = {one["name"]: _value(one) for one in variables}
    with mock.patch.dict(os.environ, shared | filled, clear=True):
        return read_settings()


def _value(variable: dict[str, Any]) -> str:
    if "value" in variable:
        return str(variable["value"])
    if "fieldRef" in variable["valueFrom"]:
        return "10.0.0.7"
    return "postgresql://gateway:x@postgres/gateway" if variable["name"].endswith("KEYS_URL") else "from a secret"


@pytest.mark.parametrize("container", list(containers()), ids=lambda one: one["name"])
def test_a_pod_of_ours_is_told_settings_that_the_code_reads_and_runs_what_there_is(container: Container) -> None:
    settings = settings_of(container["env"], config())
    assert settings.environment == "prod"
    assert settings.keys_required
    assert container["image"].endswith(f":{version()}")
    if container["name"] != "base":
        assert checks.refused(container["command"]) is None
    mounted = {one["mountPath"] for one in container["volumeMounts"]}
    assert str(settings.home) in mounted
    for one in container["env"]:
        if re.search(r"(KEY|TOKEN|SECRET|KEYS_URL)$", one["name"]):
            assert one["valueFrom"]["secretKeyRef"]["name"] == "millrace", one["name"]


def test_who_shares_a_secret_and_who_asks_whom_is_the_same_everywhere() -> None:
    found = {one["name"]: settings_of(one["env"], config()) for one in containers()}
    assert found["spark"].spark_cluster == found["spark-worker"].spark_cluster
    assert (
        found["spark"].spark_cluster
        == f"spark://{found['spark-master'].host}:{found['spark-master'].spark_master_port}"
    )
    services = {one["metadata"]["name"]: one for one in manifests() if one["kind"] == "Service"}
    assert services["spark-master"]["spec"]["ports"][0]["port"] == found["spark-master"].spark_master_port
    assert services["gateway"]["spec"]["ports"][0]["port"] == found["gateway"].gateway_port
    assert services["spark"]["spec"]["ports"][0]["port"] == found["spark"].spark_port
    told = {one["name"]: one["value"] for one in values("airflow.yaml")["env"]}
    shared = {name: value for name, value in config().items() if name in told}
    assert shared == {name: told[name] for name in shared}
    assert told["MILLRACE_SPARK_REMOTE"] == f"sc://spark:{found['spark'].spark_port}"


def test_airflows_chart_runs_our_image_and_a_worker_for_each_queue_of_ours() -> None:
    chart = values("airflow.yaml")
    assert chart["airflowVersion"] == LOCK["apache-airflow"]
    assert chart["defaultAirflowTag"] == version()
    secret = [{"name": one["envName"], "valueFrom": {"secretKeyRef": one}} for one in chart["secret"]]
    settings = settings_of([*chart["env"], *secret], {})
    assert settings.environment == "prod"
    for one in chart["env"]:
        if one["name"].startswith("AIRFLOW__"):
            assert one["name"] in checks.known_airflow_options()
        assert not re.search(r"(KEY|TOKEN|SECRET)$", one["name"]), "secrets are named, not written"
    # The queue that tests/dags sees in the DAG files, and Airflow's own.
    assert {one["queue"] for one in chart["workers"]["celery"]["sets"]} == {"default", "heavy"}
    pod = next(one for one in manifests() if one["kind"] == "Pod")["spec"]["containers"][0]
    in_pod = {one["name"]: one["valueFrom"]["secretKeyRef"]["key"] for one in pod["env"] if "valueFrom" in one}
    assert in_pod == {one["envName"]: one["secretKey"] for one in chart["secret"]}
    # Such a pod has nothing of the chart's: what finds the DAGs, the plugin, Spark and the API server is its own.
    told = {one["name"]: one["value"] for one in pod["env"] if "value" in one}
    given = {one["name"]: one["value"] for one in chart["env"]} | {"AIRFLOW_HOME": chart["airflowHome"]}
    assert told.pop("AIRFLOW__CORE__EXECUTION_API_SERVER_URL") == "http://airflow-api-server:8080/execution/"
    assert told == {name: given[name] for name in told}
    assert {"AIRFLOW_HOME", "MILLRACE_SPARK_REMOTE"} < told.keys()
    assert {"AIRFLOW__CORE__DAGS_FOLDER", "AIRFLOW__CORE__PLUGINS_FOLDER"} < told.keys()


def test_qdrants_chart_runs_the_version_that_the_client_is_of() -> None:
    assert (
        values("qdrant.yaml")["image"]["tag"].removeprefix("v").split(".")[:2] == LOCK["qdrant-client"].split(".")[:2]
    )
    assert values("qdrant.yaml")["apiKey"]["valueFrom"]["secretKeyRef"]["name"] == "millrace"


@pytest.mark.parametrize("name", CHART)
def test_the_values_are_ones_that_the_chart_knows(name: str) -> None:
    folder = CHARTS / CHART[name]
    if not CHARTS.name or not folder.exists():
        pytest.skip("not observed: TEST_HELM_CHARTS names no folder with this chart")
    defaults = yaml.safe_load((folder / "values.yaml").read_text())
    schema = folder / "values.schema.json"
    if schema.exists():
        validator = jsonschema.validators.validator_for(found := json.loads(schema.read_text()))(found)
        merged = _merged(defaults, values(name))
        assert [error.message for error in validator.iter_errors(merged)] == []
    assert list(_unknown(values(name), defaults, UNNAMED.get(name, set()))) == []


def _merged(defaults: Any, given: Any) -> Any:
    """As Helm does it: maps are merged, all else is replaced."""
    if not isinstance(defaults, dict) or not isinstance(given, dict):
        return given
    return defaults | {key: _merged(defaults.get(key), value) for key, value in given.items()}


def _unknown(given: Any, defaults: Any, unnamed: set[str], at: str = "") -> Iterator[str]:
    if isinstance(given, dict) and isinstance(defaults, dict) and defaults:
        for key, value in given.items():
            if not at and key in unnamed:
                continue
            if key not in defaults:
                yield f"{at}{key}"
            else:
                yield from _unknown(value, defaults[key], unnamed, f"{at}{key}.")


def version() -> str:
    found = re.search(r'^version = "(.+)"', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]
