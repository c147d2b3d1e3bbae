"""Releases in the MLflow registry: registered, found, fetched.

An application is one registered model of its name; a release is one of its versions, found by its id in a tag. What
commits a release is the creation of its version, after all bytes are there: killed before, nothing is registered and
the next attempt cleans up; killed after, the next attempt finds it. It does not know which of them users are given
(`published_split.py`).
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.trained import EMBEDDING_TAG
from millrace.releases.card import example_question, licences, model_card, training_data
from millrace.releases.manifest import RELEASE_ID, Manifest
from millrace.releases.mlflow_server import ensure_experiment, found_or_none, mlflow_client
from millrace.releases.package import DATA, EMBEDDING, install, read_release, verify_model, write_model
from millrace.releases.published_split import ensure_model
from millrace.releases.recipe import commit_tag
from millrace.settings import Settings

RELEASE_TAG = "millrace.release_id"
STATE_TAG = "millrace.state"
RUN_TAG = "millrace.registered_by"
BUILDER_TAG = "millrace.built_by"
"""The person who triggered the run that registered a release; a schedule has none."""
FILES_TAG = "millrace.files"
"""Where it is, it says when the release's files were removed (`retention.py`)."""
TRAINING_TAGS = ("training_set", "earlier_training_sets", "simulated", "teacher")
CANDIDATE = "candidate"

ABANDONED_SECONDS = 3600
"""No upload takes longer: what is older and still no version belongs to a process that is gone."""


def register_release(
    settings: Settings,
    application: Application,
    manifest: Manifest,
    files: Path,
    *,
    run: str,
    tags: dict[str, str],
    embedding: Path | None = None,
) -> str:
    """Upload a release and register it as a candidate. The same release again gives the same version.

    Args:
        files: the folder with the files of `manifest.generator`.
        run: who registers, for provenance: a run's name, with ` by <person>` if a person triggered it.
        tags: more tags of the version. A version that exists keeps its own.
        embedding: the folder with the files of a fine-tuned embedding model; None: it has none, or that of a release
            that is here.

    Returns:
        The version, digits.

    Raises:
        ReleaseError: the files are not those of the manifest, or MLflow doesn't answer.
    """
    if manifest.application != application.name:
        raise ReleaseError(f"the manifest is of application {manifest.application!r}, not {application.name!r}")
    tuned = manifest.retrieval.tuned_sha256
    if tuned:
        tags = tags | {EMBEDDING_TAG: tuned}
        embedding = embedding or embedding_folder(settings, manifest)

    def write(scratch: Path) -> Path:
        return _write(settings, application, manifest, files, embedding if tuned else None, scratch, tags)

    made = {RUN_TAG: run, **_builder(run), **commit_tag(settings)}
    return _register(settings, application, manifest, write, tags | made, run)


def register_copy(
    settings: Settings, application: Application, manifest: Manifest, model: Path, *, run: str, tags: dict[str, str]
) -> str:
    """Upload the MLflow model of a release as it is, and register it as a candidate, as `register_release` does.

    Args:
        model: the whole model, as `fetch_model` gives it.
        run: who registers here.
        tags: all of the version's, but for its state; who registered and built it first is among them.
    """
    return _register(settings, application, manifest, lambda scratch: model, tags, run)


def _register(
    settings: Settings,
    application: Application,
    manifest: Manifest,
    write: Callable[[Path], Path],
    tags: dict[str, str],
    run: str,
) -> str:
    """
    Args:
        write: gives the folder of the MLflow model; it may use the one that it is given.
    """
    release_id = manifest.release_id
    with mlflow_client(settings, f"register release {release_id}") as client:
        known = _find(client, application.name, release_id)
        if known:
            return known
        ensure_model(settings, client, application.name, application.description)
        experiment = ensure_experiment(client, f"{application.name}/releases")
        _remove_unfinished(client, experiment, release_id)
        model = client.create_logged_model(
            experiment,
            name=release_id,
            tags={RELEASE_TAG: release_id, RUN_TAG: run},
            params=_params(manifest),
            model_type="millrace.release",
        )
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=local_releases(settings)) as scratch:
            client.log_model_artifacts(model.model_id, str(write(Path(scratch))))
        client.finalize_logged_model(model.model_id, "READY")
        mine = client.create_model_version(
            application.name,
            source=f"models:/{model.model_id}",
            model_id=model.model_id,
            tags={**tags, RELEASE_TAG: release_id, STATE_TAG: CANDIDATE},
            description=f"{release_id}: {manifest.generator.name}, prompt {manifest.prompt.version}",
            await_creation_for=0,
        )
        first = _find(client, application.name, release_id) or str(mine.version)
        if first != str(mine.version):  # Somebody registered the same release meanwhile.
            client.delete_model_version(application.name, str(mine.version))
            client.delete_logged_model(model.model_id)
        return first


def register_once(
    settings: Settings,
    application: Application,
    manifest: Manifest,
    files: Path,
    *,
    run: str,
    tags: dict[str, str],
    embedding: Path | None = None,
) -> dict[str, Any]:
    """As `register_release`, for a task's result: `version`, `release_id`, and `changed`: whether it is registered now
    and was not before."""
    known = find_version(settings, application, manifest.release_id)
    version = known or register_release(settings, application, manifest, files, run=run, tags=tags, embedding=embedding)
    return {"version": version, "release_id": manifest.release_id, "changed": known is None}


def training_tags(settings: Settings, application: Application, version: str) -> dict[str, str]:
    """The tags of a release that go with its weights: what they were trained on, and whether people said it. Whatever
    has the same weights needs them, or the gate can't look for leaks."""
    tags = versions(settings, application).get(version, {})
    return {name: tags[name] for name in TRAINING_TAGS if name in tags}


def find_version(settings: Settings, application: Application, release_id: str) -> str | None:
    """The version that `release_id` is registered as; None: it isn't."""
    with mlflow_client(settings, f"look for release {release_id}") as client:
        return _find(client, application.name, release_id)


def versions(settings: Settings, application: Application) -> dict[str, dict[str, str]]:
    """Every registered release, oldest first: version → tags (with `millrace.release_id`, `millrace.state`)."""
    with mlflow_client(settings, f"list the releases of {application.name}") as client:
        found = _search(client, f"name = '{application.name}'")
        return {str(one.version): dict(one.tags) for one in found if RELEASE_TAG in one.tags}


def young_candidates(
    settings: Settings, application: Application, champion: str, since: datetime
) -> dict[str, dict[str, str]]:
    """The releases after `champion` that were registered since then, to which the gate or the rollout may still come:
    version → tags."""
    with mlflow_client(settings, f"list the releases of {application.name}") as client:
        return {
            str(one.version): dict(one.tags)
            for one in _search(client, f"name = '{application.name}'")
            if RELEASE_TAG in one.tags
            and FILES_TAG not in one.tags
            and int(one.version) > int(champion)
            and one.creation_timestamp / 1000 >= since.timestamp()
        }


def tag_release(settings: Settings, application: Application, version: str, tags: dict[str, str]) -> None:
    """Set tags of a registered release. For people and reports; nothing that acts reads them."""
    with mlflow_client(settings, f"tag release {application.name}@{version}") as client:
        for name, value in tags.items():
            client.set_model_version_tag(application.name, version, name, value)


def fetch_release(settings: Settings, application: Application, version: str) -> Path:
    """Local folder with `manifest.json` and the files of a registered release; downloaded and verified once.

    Raises:
        ReleaseError: there is no such version, its files were removed since, what was downloaded is not what was
            registered, the local folder was damaged since, or MLflow doesn't answer.
    """
    purpose = f"fetch release {application.name}@{version}"
    with mlflow_client(settings, purpose) as client:
        release_id = _release_id(settings, client, application.name, version)
        folder = local_releases(settings) / release_id
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
                model = _download(client, settings, application.name, version, "/data", Path(scratch))
                install(model / DATA, folder, release_id)
    _require_of(application, version, read_release(folder))
    os.utime(folder)  # used now: upkeep removes copies that nobody has used for long
    return folder


def fetch_model(settings: Settings, application: Application, version: str, folder: Path) -> Manifest:
    """The whole MLflow model of a registered release, downloaded, verified, then named `folder`.

    Raises:
        ReleaseError: as `fetch_release`; or the model holds more than the release and what Millrace puts around it.
    """
    with (
        mlflow_client(settings, f"fetch release {application.name}@{version}") as client,
        tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch,
    ):
        release_id = _release_id(settings, client, application.name, version)
        model = _download(client, settings, application.name, version, "", Path(scratch))
        manifest = verify_model(model, release_id)
        _require_of(application, version, manifest)
        model.rename(folder)
    return manifest


def _require_of(application: Application, version: str, manifest: Manifest) -> None:
    if manifest.application != application.name:
        raise ReleaseError(f"{application.name}@{version} is a release of {manifest.application!r}")


def embedding_folder(settings: Settings, manifest: Manifest) -> Path:
    """Local folder with the files of the manifest's fine-tuned embedding model, of whichever release has it here.

    Raises:
        ReleaseError: none has it.
    """
    wanted = manifest.retrieval.tuned
    for folder in sorted(local_releases(settings).glob("rel-*")):
        with suppress(ReleaseError):
            if read_release(folder).retrieval.tuned == wanted:
                return folder / EMBEDDING
    raise ReleaseError(
        f"no release in {local_releases(settings)} has the fine-tuned embedding model of lineage "
        f"{manifest.retrieval.lineage}; fetch the release that brought it, then try again"
    )


def release_manifest(settings: Settings, application: Application, version: str) -> Manifest:
    """The manifest of a registered release; fetches it. Raises as `fetch_release`."""
    return read_release(fetch_release(settings, application, version))


def _write(
    settings: Settings,
    application: Application,
    manifest: Manifest,
    files: Path,
    embedding: Path | None,
    scratch: Path,
    tags: dict[str, str],
) -> Path:
    """The MLflow model, with what this deployment knows of where the release is from."""
    lake = Lake.of(settings, application.name)
    trained_on = training_data(lake, tags["training_set"]) if "training_set" in tags else None
    licensed = licences(manifest, application, files)
    return write_model(
        manifest,
        files,
        scratch,
        embedding=embedding,
        card=model_card(manifest, application, licensed, tags, trained_on),
        question=example_question(lake, application),
        licences=licensed,
    )


def _builder(run: str) -> dict[str, str]:
    person = run.partition(" by ")[2]
    return {BUILDER_TAG: person} if person else {}


def local_releases(settings: Settings) -> Path:
    """Folder of the local copies of releases, by release id."""
    folder = settings.home / "releases"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _find(client: Any, application: str, release_id: str) -> str | None:
    found = _search(client, f"name = '{application}' and tags.`{RELEASE_TAG}` = '{release_id}'")
    # One whose files were removed is a record: the same release again is another version.
    return next((str(one.version) for one in found if FILES_TAG not in one.tags), None)


def _search(client: Any, where: str) -> list[Any]:
    """Versions, oldest first."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(where, max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda one: int(one.version))


def _release_id(settings: Settings, client: Any, application: str, version: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        found = found_or_none(settings, lambda: client.get_model_version(application, version))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        found = None
    if found is None:
        raise ReleaseError(f"release {application}@{version} is not registered; `millrace status` lists what is")
    release_id = str(found.tags.get(RELEASE_TAG))
    # It names a folder here, and whoever may register there may set it.
    if not RELEASE_ID.fullmatch(release_id):
        raise ReleaseError(f"model version {application}@{version} carries no release (tag {RELEASE_TAG})")
    return release_id


def _download(client: Any, settings: Settings, application: str, version: str, part: str, folder: Path) -> Path:
    """
    Raises:
        ReleaseError: the files were removed since.
    """
    from mlflow.artifacts import download_artifacts

    removed = client.get_model_version(application, version).tags.get(FILES_TAG)
    if removed:
        raise ReleaseError(
            f"the files of release {application}@{version} were {removed}, since nobody was given it any more; declare "
            "or train it again"
        )
    source = client.get_model_version_download_uri(application, version)
    return Path(
        download_artifacts(
            artifact_uri=f"{source}{part}",
            dst_path=str(folder),
            tracking_uri=settings.mlflow_url,
            registry_uri=settings.mlflow_url,
        )
    )


def _remove_unfinished(client: Any, experiment: str, release_id: str) -> None:
    """What attempts left behind that were killed before their version was created; not what may still be uploading."""
    left = client.search_logged_models([experiment], filter_string=f"tags.`{RELEASE_TAG}` = '{release_id}'")
    for model in left:
        if time.time() - model.creation_timestamp / 1000 > ABANDONED_SECONDS:
            client.delete_logged_model(model.model_id)


def _params(manifest: Manifest) -> dict[str, str]:
    """What the MLflow UI shows side by side."""
    return {
        "generator": manifest.generator.name,
        "generator_identity": manifest.generator.identity,
        "prompt": f"{manifest.prompt.name}@{manifest.prompt.version}",
        "lineage": manifest.retrieval.lineage,
        "chunks": str(manifest.retrieval.chunks),
        "max_new_tokens": str(manifest.generation.max_new_tokens),
        "temperature": str(manifest.generation.temperature),
        "code_version": manifest.code_version,
    }
