"""What code of ours meets on a server that environments share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from millrace.applications import Application
from millrace.environments.access.mlflow_calls import Caller, Login
from millrace.errors import ReleaseError
from millrace.releases import prompt_registry, published_split, registry
from millrace.releases.manifest import PromptVersion, declared_manifest, describe_weights
from millrace.releases.split import Split
from millrace.settings import Settings
from tests.conftest import TEMPLATE, answers, free_port, running
from tests.environments.conftest import PASSWORDS, As

pytestmark = pytest.mark.long  # three environments


def register(settings: Settings, application: Application, folder: Path, content: str = "weights") -> str:
    weights = folder / "model.gguf"
    weights.write_text(content)
    prompt = PromptVersion(name="p", version="1", template="{{ question }}")
    manifest = declared_manifest(application, describe_weights(weights), prompt, "lineage")
    return registry.register_release(settings, application, manifest, folder, run="test", tags={})


def test_an_application_of_one_name_is_another_model_in_each_environment(
    ask_as: As, application: Application, tmp_path: Path
) -> None:
    for identity, contents in {"dev": "ab", "staging": "c", "prod": "d"}.items():
        for content in contents:
            register(ask_as(identity), application, tmp_path, content)
    dev = ask_as("dev")
    published_split.publish_split(dev, application.name, Split(sequence=1, champion="2"))
    assert list(registry.versions(dev, application)) == ["1", "2"]
    for identity in ("staging", "prod"):
        settings = ask_as(identity)
        assert list(registry.versions(settings, application)) == ["1"]
        assert published_split.read_split(settings, application.name) is None
    ask_as("dev")
    assert (registry.fetch_release(dev, application, "2") / "model.gguf").read_text() == "b"


def test_dev_reads_a_release_of_prod_and_is_told_that_it_can_write_nothing_there(
    ask_as: As, application: Application, tmp_path: Path
) -> None:
    register(ask_as("prod"), application, tmp_path)
    prompt_registry.register_prompt(ask_as("prod"), application, TEMPLATE, run="test")
    prod = ask_as("dev", "prod")
    name = application.name
    assert (registry.fetch_release(prod, application, "1") / "model.gguf").read_text() == "weights"
    for write, purpose in (
        (lambda: registry.tag_release(prod, application, "1", {"a": "b"}), f"tag release {name}@1"),
        (lambda: register(prod, application, tmp_path, "other"), r"register release rel-\w+"),
        (
            lambda: prompt_registry.register_prompt(prod, application, "{{ question }}", run="test"),
            f"register .* {name}.prompt",
        ),
        (
            lambda: published_split.publish_split(prod, name, Split(sequence=1, champion="1")),
            f"publish the split of {name}",
        ),
    ):
        with pytest.raises(ReleaseError, match=f"does not let dev {purpose} in prod; ask with a credential that may"):
            write()
    register(ask_as("dev"), application, tmp_path)
    dev = ask_as("prod", "dev")
    with pytest.raises(ReleaseError, match=f"does not let prod read the split of {name} in dev"):
        published_split.read_split(dev, name)


def test_the_path_of_another_environments_files_leads_nowhere(
    shared: Settings, ask_as: As, application: Application, tmp_path: Path
) -> None:
    """Artifacts are paths on one server: a path into dev, asked for in one's own workspace, is no way in."""
    register(dev := ask_as("dev"), application, tmp_path)
    folder = registry.fetch_release(dev, application, "1")
    with Caller(shared, Login("dev", PASSWORDS["dev"])) as ask:
        where = {"params": {"name": application.name, "version": "1"}}
        uri = ask("GET", "2.0/mlflow/model-versions/get-download-uri", workspace="dev", **where)["artifact_uri"]
        inside = uri.partition(":")[2].strip("/")
        path = f"2.0/mlflow-artifacts/artifacts/{inside}/data/release/model.gguf"
        assert ask.ask("GET", path, workspace="dev").content == (folder / "model.gguf").read_bytes()
    for workspace in ("prod", "dev", None):
        with Caller(shared, Login("prod", PASSWORDS["prod"])) as ask:
            assert ask.ask("GET", path, workspace=workspace).status_code == 403
            assert ask.ask("PUT", path, workspace=workspace, content=b"forged").status_code == 403
    with Caller(shared, Login("prod", PASSWORDS["prod"])) as ask:
        outside = path.replace("/workspaces/dev/", "/workspaces/prod/../dev/")
        assert ask.ask("GET", outside, workspace="prod").status_code in (400, 403, 404)


def test_who_is_not_known_is_told_so(ask_as: As, application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = ask_as("nobody", "dev")
    with pytest.raises(ReleaseError, match=r"does not know nobody with this password, so I can't list the releases"):
        registry.versions(nobody, application)
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    with pytest.raises(ReleaseError, match=r"does not know who gives no name, .*; correct MLFLOW_TRACKING_USERNAME"):
        registry.versions(nobody, application)


def test_what_a_server_had_before_it_had_environments_is_moved_into_one_of_them(
    settings: Settings, ask_as: As, application: Application, tmp_path: Path
) -> None:
    """By MLflow's own command and one move of files, as docs/mlflow.md says."""
    ask_as("nobody")
    kept = tmp_path / "server"
    uri = f"http://127.0.0.1:{(port := free_port())}"
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1",
              "--backend-store-uri", f"sqlite:///{kept}/mlflow.db", "--artifacts-destination",
              kept / "artifacts"]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    kept.mkdir()
    with running(server, environment, kept / "before.log", lambda: answers(f"{uri}/health")):
        before = settings.model_copy(update={"mlflow_uri": uri})
        register(before, application, tmp_path)
        prompt_registry.register_prompt(before, application, TEMPLATE, run="test")
        published_split.publish_split(before, application.name, split := Split(sequence=1, champion="1"))
    shutil.rmtree(settings.home)
    with running([*server, "--enable-workspaces"], environment, kept / "after.log", lambda: answers(f"{uri}/health")):
        dev = before.model_copy(update={"mlflow_workspaces": True})
        with Caller(dev, Login("nobody", "")) as ask:
            ask("POST", "3.0/mlflow/workspaces", json={"name": "dev"})
        for kind in ("registered_models", "experiments"):
            moved = ["--from", "default", "--to", "dev", "--resource-type", kind, "--yes"]
            command = [sys.executable, "-m", "mlflow", "db", "move-resources", f"sqlite:///{kept}/mlflow.db", *moved]
            subprocess.run(command, check=True)
        folders = [path for path in (kept / "artifacts").iterdir() if path.name != "workspaces"]
        (there := kept / "artifacts" / "workspaces" / "dev").mkdir(parents=True)
        for folder in folders:
            folder.rename(there / folder.name)
        assert published_split.read_split(dev, application.name) == split
        assert (registry.fetch_release(dev, application, "1") / "model.gguf").read_text() == "weights"
        assert prompt_registry.register_prompt(dev, application, TEMPLATE, run="test").version == "1"
        assert register(dev, application, tmp_path, "other") == "2"
        assert (registry.fetch_release(dev, application, "2") / "model.gguf").read_text() == "other"


def test_environments_need_a_server_that_keeps_them_apart(
    ask_as: As, settings: Settings, application: Application, mlflow_uri: str
) -> None:
    ask_as("dev")
    alone = settings.model_copy(update={"mlflow_uri": mlflow_uri, "mlflow_workspaces": True})
    with pytest.raises(ReleaseError, match=r"has no workspaces, so I can't list the releases of .*--enable-workspaces"):
        registry.versions(alone, application)
    with pytest.raises(ValidationError, match="MILLRACE_MLFLOW_WORKSPACES needs MILLRACE_MLFLOW_URI"):
        Settings(mlflow_workspaces=True)
