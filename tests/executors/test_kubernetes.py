"""As far as Airflow's Kubernetes executor can be tried without a cluster: its own reader takes our pod template. And
the options of Celery's that the compose file sets are the provider's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.settings import PROJECT
from tests.deploy.checks import CELERY

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

READ = """
import json, sys
from airflow.executors.executor_loader import ExecutorLoader
from airflow.providers.celery.get_provider_info import get_provider_info
from airflow.providers.cncf.kubernetes.kube_config import KubeConfig
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
executor, _ = ExecutorLoader.import_default_executor_cls()
template = KubeConfig().pod_template_file
pod = PodGenerator.serialize_pod(PodGenerator.deserialize_model_file(template))
print(json.dumps({
    "executor": executor.__name__,
    "pod": pod,
    "celery": sorted(get_provider_info()["config"]["celery"]["options"]),
}))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict:
    packages = PROJECT / ".executors"
    if not (packages / ".installed").exists():
        pytest.fail("`make test-long` installs what this test needs in .executors")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(packages),
        "AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")),
        "AIRFLOW__CORE__EXECUTOR": "KubernetesExecutor",
        "AIRFLOW__KUBERNETES_EXECUTOR__POD_TEMPLATE_FILE": str(PROJECT / "deploy" / "kubernetes" / "pod_template.yaml"),
        "AIRFLOW__KUBERNETES_EXECUTOR__NAMESPACE": "millrace",
    }
    ran = subprocess.run([sys.executable, "-c", READ], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_airflow_takes_the_pod_template_as_the_kubernetes_executors(read: dict) -> None:
    assert read["executor"] == "KubernetesExecutor"
    (container,) = read["pod"]["spec"]["containers"]
    assert container["name"] == "base"
    assert {one["name"] for one in container["env"]} >= {"MILLRACE_COMPLETION_KEY", "MILLRACE_LAKE_SECRET_KEY"}
    assert Path(container["volumeMounts"][0]["mountPath"]) == Path("/var/lib/millrace")


def test_what_the_compose_file_says_to_celery_is_said_in_the_providers_words(read: dict) -> None:
    assert {name.removeprefix("AIRFLOW__CELERY__").lower() for name in CELERY} <= set(read["celery"])
