"""What MLflow keeps is bounded: the files of releases that nobody is given, and traces.

A version in the registry, its tags and its evidence stay for ever; what goes is bytes.
"""

from collections.abc import Collection
from datetime import UTC, datetime
from itertools import pairwise

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_DECISIONS
from millrace.releases.mlflow_server import mlflow_client
from millrace.releases.published_split import answering_now, read_aliases
from millrace.releases.registry import FILES_TAG, versions
from millrace.settings import Settings

TOGETHER = 100
"""Traces that MLflow is asked to delete at once."""


def remove_files(settings: Settings, application: Application, *, before: datetime) -> list[str]:
    """Remove the files of releases that were registered and last answered users earlier, have no alias and answer
    nobody; their versions.

    Raises:
        ReleaseError: MLflow doesn't answer.
        LakehouseError: the journal can't be read.
    """
    until = _answered_until(Lake.of(settings, application.name))
    kept = {*read_aliases(settings, application.name).values(), *answering_now(settings, application.name)}
    gone = []
    with mlflow_client(settings, f"remove files of old releases of {application.name}") as client:
        for version, tags in versions(settings, application).items():
            if version in kept or FILES_TAG in tags:
                continue
            found = client.get_model_version(application.name, version)
            registered = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
            if max(registered, until.get(version, registered)) < before:
                _delete_artifacts(settings, client.get_model_version_download_uri(application.name, version))
                # Last: where it is missing, whoever was killed here does it again.
                client.set_model_version_tag(
                    application.name, version, FILES_TAG, f"removed {datetime.now(UTC):%Y-%m-%d}"
                )
                gone.append(version)
    return gone


def _answered_until(lake: Lake) -> dict[str, datetime]:
    """Version → when it last ceased to answer users, by the journal of decisions."""
    rows = lake.read(OPS_DECISIONS, ["sequence", "decided_at", "champion", "challenger"]).sort_by("sequence")
    found = {}
    for row, following in pairwise(rows.to_pylist()):
        for version in (row["champion"], row["challenger"]):
            if version is not None:
                found[version] = following["decided_at"]
    return found


def delete_traces(settings: Settings, application: str, *, before: datetime) -> int:
    """Delete the traces of earlier exchanges; how many.

    Raises:
        ReleaseError: MLflow doesn't answer.
    """
    with mlflow_client(settings, f"delete old traces of {application}") as client:
        experiment = client.get_experiment_by_name(f"{application}/traces")
        if experiment is None:
            return 0
        deleted: int = client.delete_traces(
            experiment.experiment_id, max_timestamp_millis=int(before.timestamp() * 1000)
        )
        return deleted


def delete_exchange_traces(settings: Settings, application: str, hashes: Collection[str]) -> int:
    """Delete the traces of the exchanges whose completion ids have these hashes (`sources/erased.py`); how many.

    Raises:
        ReleaseError: MLflow doesn't answer.
    """
    with mlflow_client(settings, f"delete traces of {application}") as client:
        experiment = client.get_experiment_by_name(f"{application}/traces")
        if experiment is None:
            return 0
        ids = [f"tr-{one}" for one in sorted(hashes)]
        batches = [ids[start : start + TOGETHER] for start in range(0, len(ids), TOGETHER)]
        return sum(client.delete_traces(experiment.experiment_id, trace_ids=batch) for batch in batches)


def _delete_artifacts(settings: Settings, location: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(location, tracking_uri=settings.mlflow_url).delete_artifacts()
