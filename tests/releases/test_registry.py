import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.releases import prompt_registry, published_split
from millrace.releases import registry as releases
from millrace.releases.manifest import describe_embedding
from millrace.releases.split import Split
from millrace.retrieval.embedding_model import MODEL_FILES
from millrace.settings import Settings
from tests.conftest import COMMIT
from tests.releases.conftest import Make


def client(settings: Settings) -> MlflowClient:
    return MlflowClient(settings.mlflow_url, settings.mlflow_url)


def register(settings: Settings, application: Application, make_release: Make, content: str = "weights") -> str:
    manifest, weights = make_release(content)
    return releases.register_release(
        settings, application, manifest, weights.parent, run="test", tags={"why": "a test"}
    )


def test_a_release_is_registered_as_a_candidate_and_comes_back_byte_for_byte(
    registry: Settings, application: Application, make_release: Make
) -> None:
    manifest, weights = make_release("weights")
    version = register(registry, application, make_release)
    assert version == "1"
    assert releases.find_version(registry, application, manifest.release_id) == "1"
    assert releases.versions(registry, application) == {
        "1": {
            "why": "a test",
            "millrace.release_id": manifest.release_id,
            "millrace.state": "candidate",
            "millrace.registered_by": "test",
            "millrace.commit": COMMIT,
        }
    }
    folder = releases.fetch_release(registry, application, version)
    assert folder == registry.home / "releases" / manifest.release_id
    assert (folder / "model.gguf").read_bytes() == weights.read_bytes()
    assert releases.release_manifest(registry, application, version) == manifest
    assert sorted(path.name for path in folder.parent.iterdir()) == [manifest.release_id]


def test_a_fine_tuned_embedding_model_goes_with_its_release_and_with_those_made_from_it(
    registry: Settings, application: Application, make_release: Make, tmp_path: Path
) -> None:
    plain, weights = make_release("weights")
    folder = tmp_path / "embedding model"
    folder.mkdir()
    for name in MODEL_FILES:
        (folder / name).write_text(name)
    retrieval = plain.retrieval.model_copy(update={"lineage": "tuned-1", "tuned": describe_embedding(folder)})
    tuned = plain.changed(retrieval=retrieval)
    with pytest.raises(ReleaseError, match=r"no release in .* has the fine-tuned embedding model of lineage tuned-1"):
        releases.register_release(registry, application, tuned, weights.parent, run="test", tags={})
    version = releases.register_release(
        registry, application, tuned, weights.parent, run="test", tags={}, embedding=folder
    )
    here = releases.fetch_release(registry, application, version)
    assert {path.name: path.read_text() for path in (here / "embedding").iterdir()} == {n: n for n in MODEL_FILES}
    assert releases.release_manifest(registry, application, version) == tuned

    other = tuned.changed(generation=tuned.generation.model_copy(update={"max_new_tokens": 7}))
    made = releases.register_release(registry, application, other, weights.parent, run="test", tags={})
    shutil.rmtree(here)
    there = releases.fetch_release(registry, application, made)
    assert (there / "embedding" / "model.safetensors").read_text() == "model.safetensors"
    (there / "embedding" / "model.safetensors").write_text("other")
    with pytest.raises(ReleaseError, match="has 5 bytes, its manifest says 17"):
        releases.fetch_release(registry, application, made)


def test_the_same_release_twice_is_one_version(
    registry: Settings, application: Application, make_release: Make
) -> None:
    assert [register(registry, application, make_release, content) for content in "aabab"] == ["1", "1", "2", "1", "2"]


def test_the_same_release_from_two_at_once_is_one_version(
    registry: Settings, application: Application, make_release: Make
) -> None:
    manifest, weights = make_release("weights")
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(
                lambda run: releases.register_release(
                    registry, application, manifest, weights.parent, run=run, tags={}
                ),
                ("one", "other"),
            )
        )
    assert len(set(found)) == 1
    assert set(found) == set(releases.versions(registry, application))
    releases.fetch_release(registry, application, found[0])


KILLED = """
import os, sys
from mlflow import MlflowClient
from tests.releases.test_registry import *
at, uri, home, weights, declaration = sys.argv[1:]
def die(*args, **kwargs): os._exit(9)
setattr(MlflowClient, at, die)
settings = Settings(home=home, mlflow_uri=uri)
application = Application.model_validate_json(declaration)
from millrace.releases.manifest import *
prompt = PromptVersion(name="p", version="1", template="{{ question }}")
manifest = declared_manifest(application, describe_weights(Path(weights)), prompt, "lineage")
releases.register_release(settings, application, manifest, Path(weights).parent, run="killed", tags={})
"""


@pytest.mark.parametrize("at", ["log_model_artifacts", "finalize_logged_model", "create_model_version"])
def test_a_registration_killed_anywhere_is_completed_by_the_next(
    registry: Settings, application: Application, make_release: Make, at: str
) -> None:
    _, weights = make_release("weights")
    arguments = (at, registry.mlflow_url, str(registry.home), str(weights), application.model_dump_json())
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == 9
    assert releases.versions(registry, application) == {}
    assert register(registry, application, make_release) == "1"
    releases.fetch_release(registry, application, "1")
    assert list(releases.versions(registry, application)) == ["1"]


def test_what_a_killed_registration_left_is_removed_once_nobody_can_be_uploading_it(
    registry: Settings, application: Application, make_release: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = make_release("weights")
    experiment = client(registry).create_experiment(f"{application.name}/releases")
    tags = {"millrace.release_id": manifest.release_id}
    left = client(registry).create_logged_model(experiment, name=manifest.release_id, tags=tags).model_id
    other = client(registry).create_logged_model(experiment, tags={"millrace.release_id": "rel-other"}).model_id
    monkeypatch.setattr(releases, "ABANDONED_SECONDS", 0)
    register(registry, application, make_release)
    models = [model.model_id for model in client(registry).search_logged_models([experiment])]
    assert len(models) == 2
    assert left not in models
    assert other in models


def test_weights_that_are_not_the_manifests_are_refused_before_anything_is_sent(
    registry: Settings, application: Application, make_release: Make
) -> None:
    manifest, weights = make_release("weights")
    weights.write_text("other")
    with pytest.raises(ReleaseError, match=f"{weights} has SHA-256"):
        releases.register_release(registry, application, manifest, weights.parent, run="test", tags={})
    assert releases.versions(registry, application) == {}


def test_bytes_changed_in_the_registry_are_found_out(
    registry: Settings, application: Application, make_release: Make, tmp_path: Path
) -> None:
    manifest, _ = make_release("weights")
    version = register(registry, application, make_release)
    model = client(registry).get_model_version(application.name, version).source.rsplit("/")[-1]
    forged = tmp_path / "forged"
    (forged / "data" / "release").mkdir(parents=True)
    (forged / "data" / "release" / "model.gguf").write_text("w3ights")
    client(registry).log_model_artifacts(model, str(forged))
    with pytest.raises(ReleaseError, match=f"other bytes .* than release {manifest.release_id} was registered with"):
        releases.fetch_release(registry, application, version)
    assert list((registry.home / "releases").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("code/evil.py", lambda text: "print('here')", "has code/evil.py, which no release has"),
        ("MLmodel", lambda text: text.replace("millrace.releases.pyfunc", "evil"), "is not loaded by millrace."),
        ("MLmodel", lambda text: text.replace("code: null", "code: code"), "is not loaded by millrace."),
        ("MLmodel", lambda text: text.replace("upstream_url: ''", "upstream_url: https://evil"), "names places of its"),
        ("MLmodel", lambda text: "no: model", "can't be read"),
        ("requirements.txt", lambda text: text + "\nevil==1", "requires other packages than millrace, mlflow, "),
        ("requirements.txt", lambda text: text.replace("jinja2==", "jinja2 @ https://evil/"), "requires other"),
        ("requirements.txt", lambda text: text + "\n--index-url https://evil", "can't be read"),
        ("conda.yaml", lambda text: text.replace("- millrace", "- evil"), "in conda.yaml or python_env.yaml than"),
        ("conda.yaml", lambda text: text.replace("conda-forge", "https://evil"), "installed with other tools than pip"),
        ("python_env.yaml", lambda text: text.replace("- wheel", "- evil"), "installed with other tools than pip"),
    ],
)  # fmt: skip
def test_code_or_packages_that_somebody_put_beside_a_release_are_not_fetched_with_it(
    registry: Settings,
    application: Application,
    make_release: Make,
    tmp_path: Path,
    name: str,
    change: Callable[[str], str],
    why: str,
) -> None:
    version = register(registry, application, make_release)
    folder = tmp_path / "model"
    releases.fetch_model(registry, application, version, folder)
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(change(path.read_text() if path.exists() else ""))
    model = client(registry).get_model_version(application.name, version).source.rsplit("/")[-1]
    client(registry).log_model_artifacts(model, str(folder))
    with pytest.raises(ReleaseError, match=why):
        releases.fetch_model(registry, application, version, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert releases.fetch_release(registry, application, version), "what loads a release's own files can go on"


def test_packages_that_only_the_sender_has_are_refused_though_the_manifest_names_them(
    registry: Settings, application: Application, make_release: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "senders" / "evil_data-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: evil-data\nVersion: 1.0\n")
    manifest, weights = make_release("weights")
    retrieval = manifest.retrieval.model_copy(update={"embedding_model": "evil-data"})
    with monkeypatch.context() as there:
        there.syspath_prepend(metadata.parents[1])
        changed = manifest.changed(retrieval=retrieval)
        version = releases.register_release(registry, application, changed, weights.parent, run="test", tags={})
        releases.fetch_model(registry, application, version, tmp_path / "there")
    with pytest.raises(ReleaseError, match="requires evil-data, not installed here, and it is not loaded"):
        releases.fetch_model(registry, application, version, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_another_applications_release_is_not_fetched(
    registry: Settings, application: Application, make_release: Make, tmp_path: Path
) -> None:
    version = register(registry, application, make_release)
    other = application.model_copy(update={"name": f"{application.name}_other"})
    manifest = releases.fetch_model(registry, application, version, tmp_path / "model")
    copied = releases.register_copy(registry, other, manifest, tmp_path / "model", run="test", tags={})
    for fetch in (
        lambda: releases.fetch_release(registry, other, copied),
        lambda: releases.fetch_model(registry, other, copied, tmp_path / "other"),
    ):
        with pytest.raises(ReleaseError, match=f"{other.name}@1 is a release of '{application.name}'"):
            fetch()
    assert not (tmp_path / "other").exists()


def test_a_release_id_that_is_no_id_is_no_path(
    registry: Settings, application: Application, make_release: Make
) -> None:
    version = register(registry, application, make_release)
    client(registry).set_model_version_tag(application.name, version, "millrace.release_id", "../events")
    with pytest.raises(ReleaseError, match=f"{application.name}@1 carries no release"):
        releases.fetch_release(registry, application, version)


def test_a_local_folder_without_weights_or_cut_off_is_named(
    registry: Settings, application: Application, make_release: Make
) -> None:
    folder = releases.fetch_release(registry, application, register(registry, application, make_release))
    (folder / "model.gguf").write_text("cut")
    with pytest.raises(ReleaseError, match=f"{folder}/model.gguf has 3 bytes, its manifest says 7; remove {folder}"):
        releases.fetch_release(registry, application, "1")
    (folder / "model.gguf").unlink()
    with pytest.raises(ReleaseError, match=f"{folder} holds no weights .model.gguf is missing."):
        releases.fetch_release(registry, application, "1")


def test_a_version_that_is_not_there_is_named(registry: Settings, application: Application) -> None:
    for version in ("12", "latest"):
        with pytest.raises(ReleaseError, match=f"{application.name}@{version} is not registered"):
            releases.fetch_release(registry, application, version)
    assert releases.versions(registry, application) == {}


def test_a_prompt_is_a_version_in_the_prompt_registry_and_the_same_template_the_same_version(
    registry: Settings, application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = ["{% for c in chunks %}{{ c.text }}{% endfor %}{{ question }}", "Briefly: {{ question }}"]
    made = [prompt_registry.register_prompt(registry, application, template, run="test") for template in templates * 2]
    assert [prompt.version for prompt in made] == ["1", "2", "1", "2"]
    search = MlflowClient.search_prompt_versions  # a page of its own holds a hundred

    def by_ones(self: MlflowClient, name: str, max_results: int | None = None, page_token: str | None = None) -> Any:
        return search(self, name, 1, page_token)

    monkeypatch.setattr(MlflowClient, "search_prompt_versions", by_ones)
    assert prompt_registry.register_prompt(registry, application, templates[0], run="test").version == "1"
    stored = client(registry).get_prompt_version(f"{application.name}.prompt", "1")
    assert stored is not None
    assert stored.template == templates[0] == made[0].template
    with pytest.raises(ReleaseError, match="does not use `question`"):
        prompt_registry.register_prompt(registry, application, "hello", run="test")


def test_a_split_is_one_tag_and_people_see_it_as_aliases(
    registry: Settings, application: Application, make_release: Make
) -> None:
    name = application.name
    assert published_split.read_split(registry, name) is None
    assert published_split.read_aliases(registry, name) == {}
    for content in "ab":
        register(registry, application, make_release, content)
    assert published_split.read_split(registry, name) is None
    first = Split(sequence=1, rollout_id="r", epoch=1, champion="1", challenger="2", share=0.25, salt="s")
    published_split.publish_split(registry, name, first)
    assert published_split.read_split(registry, name) == first
    assert published_split.read_aliases(registry, name) == {"champion": "1", "challenger": "2"}
    promoted = Split(sequence=2, champion="2")
    for _ in range(2):
        published_split.publish_split(registry, name, promoted, previous="1")
        assert published_split.read_split(registry, name) == promoted
        assert published_split.read_aliases(registry, name) == {"champion": "2", "previous": "1"}


def test_a_tag_that_is_not_a_split_is_an_error_and_never_a_guess(registry: Settings, application: Application) -> None:
    client(registry).create_registered_model(application.name)
    for wrong in ("", "nonsense", "{}", '{"sequence": 1, "champion": "1", "share": 2}'):
        client(registry).set_registered_model_tag(application.name, "millrace.split", wrong)
        with pytest.raises(ReleaseError, match=f"tag millrace.split of registered model {application.name} is not"):
            published_split.read_split(registry, application.name)


@pytest.mark.parametrize(
    ("uri", "said"), [("http://127.0.0.1:9", "refused"), ("http://no.such.host.invalid", ""), ("http://", "")]
)
def test_an_unreachable_registry_is_one_sentence(
    settings: Settings, application: Application, uri: str, said: str
) -> None:
    away = settings.model_copy(update={"mlflow_uri": uri})
    with pytest.raises(ReleaseError, match=f"MLflow at {uri} does not answer .*{said}.*MILLRACE_MLFLOW_URI"):
        published_split.read_split(away, application.name)


@pytest.mark.mlflow  # It waits as long as a server may take.
def test_a_registry_that_takes_the_call_and_says_nothing_is_given_up_within_ten_seconds(
    settings: Settings, application: Application
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        away = settings.model_copy(update={"mlflow_uri": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        started = time.monotonic()
        with pytest.raises(ReleaseError, match=r"does not answer .*timed out"):
            published_split.read_split(away, application.name)
        assert time.monotonic() - started < 10
