"""A release moves to another environment as it is ("deploy models"): bytes, what it was trained on, and its evidence.

Whoever copies has this environment's credential: it reads the other's workspace and lake, and writes here, nowhere
else. The release is a candidate here as any other: this environment's gate asks it, and its people decide.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millrace.applications import Application
from millrace.environments.access.matrix import READS
from millrace.errors import ReleaseError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES
from millrace.lakehouse.trained import all_trained_sets, trained_questions
from millrace.releases.mlflow_server import ensure_experiment, evaluations_experiment, mlflow_client
from millrace.releases.registry import (
    RELEASE_TAG,
    STATE_TAG,
    fetch_model,
    find_version,
    local_releases,
    register_copy,
    versions,
)
from millrace.settings import Settings
from millrace.sources.erased import Questions, read_erasures

COPIED_TAG = "millrace.copied_from"
"""Of a release, where it has been, oldest first: `dev/qa@7 staging/qa@3`. Of a run, the one that it is a copy of:
`dev/<run id>`."""
COPIER_TAG = "millrace.copied_by"
"""The run that copied; who registered and built a release first, its other tags go on saying."""


def copy_release(
    settings: Settings,
    application: Application,
    version: str,
    *,
    source: str,
    run: str,
    approved: str | None = None,
    agreed: Callable[[Mapping[str, str]], None] = lambda _: None,
) -> dict[str, Any]:
    """Register here what is registered in environment `source`: the same release id and the same files.

    What the release was trained on comes first, so that the gate can look for leaks, then its evaluations, to
    experiment `<application>/evidence`; the version is last. Killed anywhere, the next call does the rest, and to a
    release that is here it brings what evidence is new. No other thread of the process may talk to MLflow meanwhile.

    Args:
        version: in `source`.
        run: who copies, for provenance.
        approved: the id of the release that is meant; None: whichever it is now.
        agreed: raises if its tags in `source` are not those that are meant.

    Returns:
        `version` (here), `release_id`, `changed`: whether it was registered now, `evaluations`: how many it came with.

    Raises:
        ReleaseError: there is no such version, or it is another release now; its bytes are not those of its manifest;
            what it was trained on isn't in reach, or can't be told from what erased users asked; or a server doesn't
            answer or refuses.
    """
    origin, tags = find_release(settings, application, version, source=source)
    release_id = tags[RELEASE_TAG]
    # Tags and files there are theirs who write there: what was approved must be what comes.
    if approved not in (None, release_id):
        raise ReleaseError(
            f"{application.name}@{version} of {source} is {release_id} now, and {approved} was approved; promote it "
            "again, and find out who changed it"
        )
    agreed(tags)
    _copy_training_sets(settings, origin, application, tags, run)
    copied = _copy_evaluations(settings, origin, application, version, release_id)
    known = find_version(settings, application, release_id)
    return {
        "version": known or _copy_model(settings, origin, application, version, tags, run),
        "release_id": release_id,
        "changed": known is None,
        "evaluations": copied,
    }


def find_release(
    settings: Settings, application: Application, version: str, *, source: str
) -> tuple[Settings, dict[str, str]]:
    """The settings of environment `source` for reading it with this environment's credential, and the tags of a release
    there.

    Raises:
        ReleaseError: there is none, or the environments aren't on one MLflow server.
    """
    if not settings.mlflow_workspaces:
        raise ReleaseError(
            "releases are copied between environments of one MLflow server; set MILLRACE_MLFLOW_URI and "
            "MILLRACE_MLFLOW_WORKSPACES"
        )
    others = sorted(READS.keys() - {settings.environment})
    if source not in others:
        raise ReleaseError(f"{settings.environment} copies releases from {' or '.join(others)}, not from {source!r}")
    origin = settings.model_copy(update={"environment": source})
    tags = versions(origin, application).get(version)
    if tags is None:
        raise ReleaseError(f"{application.name}@{version} is not registered in {source}")
    return origin, tags


def evaluations(origin: Settings, application: Application, version: str, release_id: str) -> tuple[list[Any], ...]:
    """MLflow runs of the finished evaluations of a release in `origin`, and of those that it came there with; each
    oldest first.

    Raises:
        ReleaseError: MLflow doesn't answer, or refuses.
    """
    with mlflow_client(origin, f"read the evaluations of {application.name}@{version}") as client:
        its_own = _runs(client, evaluations_experiment(application.name), f"params.candidate = '{version}'")
        brought = _runs(client, _evidence(application), f"tags.`{RELEASE_TAG}` = '{release_id}'")
    return its_own, brought


def _copy_model(
    settings: Settings, origin: Settings, application: Application, version: str, tags: dict[str, str], run: str
) -> str:
    been = f"{tags.get(COPIED_TAG, '')} {origin.environment}/{application.name}@{version}".strip()
    kept = {name: value for name, value in tags.items() if name != STATE_TAG}
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=local_releases(settings)) as scratch:
        model = Path(scratch) / "model"
        manifest = fetch_model(origin, application, version, model)
        if manifest.release_id != tags[RELEASE_TAG]:
            raise ReleaseError(f"{application.name}@{version} of {origin.environment} changed meanwhile; copy it again")
        return register_copy(
            settings, application, manifest, model, run=run, tags=kept | {COPIED_TAG: been, COPIER_TAG: run}
        )


def _copy_training_sets(
    settings: Settings, origin: Settings, application: Application, tags: dict[str, str], run: str
) -> None:
    ours = Lake.of(settings, application.name)
    theirs = Lake.of(settings, application.name, environment=origin.environment)
    erased = _asked_by_erased(settings, ours)
    for training_set in all_trained_sets(tags):
        found = 0
        for table in (GOLD_TRAINING_EXAMPLES, GOLD_PREFERENCE_EXAMPLES):
            rows = theirs.read(table, table.rows_schema.names, where=pc.field("training_set") == training_set)
            found += rows.num_rows
            asked = zip(rows["origin"].to_pylist(), rows["question"].to_pylist(), strict=True)
            rows = rows.filter(pa.array([of == "document" or one not in erased for of, one in asked], pa.bool_()))
            if rows.num_rows:
                ours.merge(table, rows, run=run)
        if not found and not trained_questions(ours, training_set):
            raise ReleaseError(
                f"training set {training_set} of release {tags[RELEASE_TAG]} is not in {theirs.root}/"
                f"{origin.environment}, so nobody could tell whether it was trained on what it is asked here; the "
                "environments need one lake"
            )


def _asked_by_erased(settings: Settings, lake: Lake) -> Questions:
    """What users asked who were erased here: it doesn't come back with what was made of it elsewhere."""
    key = settings.pseudonym_key.get_secret_value().encode()
    hashes = frozenset(one for known in read_erasures(lake) for one in known.told.get("questions", ()))
    if hashes and not key:
        raise ReleaseError(
            f"users of {lake.application} were erased here, and what they asked can't be told from the rest without "
            "the key; set MILLRACE_PSEUDONYM_KEY to the gateway's"
        )
    return Questions(frozenset(), hashes, key)


def _copy_evaluations(
    settings: Settings, origin: Settings, application: Application, version: str, release_id: str
) -> int:
    """Bring the finished evaluations of a release, and those that it came to `origin` with; how many there are."""
    its_own, brought = evaluations(origin, application, version, release_id)
    with mlflow_client(settings, f"keep the evaluations of {release_id}") as client:
        experiment = ensure_experiment(client, _evidence(application)) if its_own or brought else ""
        for one in its_own:
            _copy_run(client, experiment, one, f"{origin.environment}/{one.info.run_id}", release_id)
        for one in brought:
            _copy_run(client, experiment, one, one.data.tags[COPIED_TAG], release_id)
    return len(its_own) + len(brought)


def _copy_run(client: Any, experiment: str, run: Any, copied_from: str, release_id: str) -> None:
    from mlflow.entities import Metric, Param

    found = client.search_runs([experiment], f"tags.`{COPIED_TAG}` = '{copied_from}'")
    if any(one.info.status == "FINISHED" for one in found):
        return
    said = {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")}
    # A run that a killed copy left behind is finished instead of left beside a second one.
    unfinished = found or [
        client.create_run(
            experiment,
            start_time=run.info.start_time,
            tags=said | {COPIED_TAG: copied_from, RELEASE_TAG: release_id},
            run_name=run.info.run_name,
        )
    ]
    run_id = unfinished[0].info.run_id
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, run.info.end_time, 0) for name, value in run.data.metrics.items()],
        params=[Param(name, value) for name, value in run.data.params.items()],
    )
    client.set_terminated(run_id, end_time=run.info.end_time)


def _runs(client: Any, experiment: str, where: str) -> list[Any]:
    """Finished runs, oldest first; none where there is no such experiment."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    where = f"{where} and attributes.status = 'FINISHED'"
    return list(client.search_runs([found.experiment_id], where, order_by=["attributes.start_time ASC"]))


def _evidence(application: Application) -> str:
    return f"{application.name}/evidence"
