"""A task of ours in the real Airflow: what its secrets backend knows reaches it, and its log shows no secret."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SECRETS = {
    "qdrant_api_key": "a key from Airflow's backend",
    "upstream_api_key": "a key from a file",
    "api_key": "a key from the environment",
}
DAG = """
import hashlib, json, logging
from airflow.sdk import task
from millrace.applications import load_applications
from millrace.settings import read_settings
from millrace_airflow import START, stage

settings = read_settings()
# `dag.test()` knows no deadlines.
options = {"tag": "t", "schedule": None, "start_date": START, "deadline": None}
with stage(load_applications(settings)[0], "ingest_documents", "…", **options) as dag:
    @task(retries=0)
    def show(names):
        secrets = {name: getattr(read_settings(), name).get_secret_value() for name in names}
        for secret in secrets.values():
            logging.getLogger("a.library").warning("it has %s", secret)
        return {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in secrets.items()}
    show(["qdrant_api_key", "upstream_api_key", "api_key"])

if __name__ == "__main__":
    from airflow.sdk.log import configure_logging

    configure_logging()  # A task's process has it; `dag.test()` has another, which masks nothing.
    run = dag.test()
    shown = run.get_task_instance("show").xcom_pull("show")
    print("ended", json.dumps([run.state, shown]))
"""


@pytest.mark.long  # It makes a database of Airflow's.
def test_a_task_has_its_secrets_from_every_source_and_its_log_has_stars_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "variables.json").write_text(json.dumps({"qdrant": SECRETS["qdrant_api_key"]}))
    (tmp_path / "upstream").write_text(SECRETS["upstream_api_key"])
    (tmp_path / "upstream").chmod(0o600)
    (tmp_path / "shown.py").write_text(DAG)
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{tmp_path}/airflow.db",
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
        "AIRFLOW__SECRETS__BACKEND": "airflow.secrets.local_filesystem.LocalFilesystemBackend",
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"variables_file_path": str(tmp_path / "variables.json")}),
        "MILLRACE_HOME": str(tmp_path / "home"),
        "MILLRACE_QDRANT_API_KEY_VARIABLE": "qdrant",
        "MILLRACE_UPSTREAM_API_KEY_FILE": str(tmp_path / "upstream"),
        "MILLRACE_API_KEY": SECRETS["api_key"],
        "PYTHONPATH": str(PROJECT / "plugins"),
    }

    def run(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout[-3000:]
        return ran.stdout

    run("-m", "airflow", "db", "migrate")
    said = run("shown.py")
    state, shown = json.loads(said.rpartition("ended ")[2].splitlines()[0])
    assert state == "success"
    assert shown == {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in SECRETS.items()}
    assert said.count("it has ***") == 3
    logs = [path.read_text() for path in (tmp_path / "logs").rglob("*.log")]
    assert [secret for secret in SECRETS.values() for text in (said, *logs) if secret in text] == []
