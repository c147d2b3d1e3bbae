"""What keeps an application's disk bounded: its tables tidied, and files that nothing needs any more removed.

Live are the releases that users can meet: those with an alias in the registry. What goes can be made or fetched
again; what can't be, an event that is in no table yet, never goes.
"""

import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from millrace.alerts import Alert, send
from millrace.applications import Application
from millrace.engines.upstream import unload_adapter
from millrace.errors import EngineError, LakehouseError, ReleaseError
from millrace.lakehouse.audit.journals import follow
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.places import SAMPLE, owner
from millrace.lakehouse.tables import (
    BRONZE_EVENTS,
    PLATFORM,
    QUARANTINE_FEEDBACK,
    SILVER_CHUNKS,
    SILVER_EMBEDDINGS,
    TABLES,
)
from millrace.lakehouse.upkeep import keep_up
from millrace.releases.generator import adapter_name, upstream_of
from millrace.releases.lineages import searched_lineages
from millrace.releases.manifest import Manifest, ServedModel
from millrace.releases.package import read_release
from millrace.releases.published_split import read_aliases
from millrace.releases.registry import RELEASE_TAG, local_releases, release_manifest, versions
from millrace.releases.retention import delete_traces, remove_files
from millrace.retrieval.embed import forget_lineage
from millrace.retrieval.index import builds_of, kept_lineages
from millrace.settings import Settings
from millrace.sources.event_log import HOUR, is_erased, segment_hour

DAY = 86_400


def tidy_tables(settings: Settings, application: Application) -> dict[str, Any]:
    """Compact every table and remove what only old versions need; not what an index build was made from. With them
    the environment's own tables, which have no stage of theirs, and in prod those of the published sample. The audit
    trail gets what it lacks of the journals.

    Returns: by table (the environment's begin with `_platform/`, the sample's with `sample/`), the fields of `Kept`.

    Raises:
        LakehouseError: some tables could not be tidied, each with its reason; the others were.
    """
    lake = Lake.of(settings, application.name)
    manifests = [
        build
        for lineage in kept_lineages(settings, application.name)
        for build in builds_of(settings, application.name, lineage).manifests()
    ]
    needed = {
        SILVER_CHUNKS.path: min((build.chunks_version for build in manifests), default=None),
        SILVER_EMBEDDINGS.path: min((build.embeddings_version for build in manifests), default=None),
    }
    platform = Lake.of(settings, PLATFORM)
    tables = {table.path: (lake, table) for table in TABLES.values()}
    tables |= {f"{PLATFORM}/{table.path}": (platform, table) for table in TABLES.values()}
    if settings.environment == owner(SAMPLE):
        sample = Lake.of(settings, application.name, environment=SAMPLE)
        tables |= {f"{SAMPLE}/{table.path}": (sample, table) for table in TABLES.values()}
    told, problems = {}, []
    for name, (where, table) in tables.items():
        try:
            if where.exists(table):
                told[name] = asdict(keep_up(where, table, needed=needed.get(name)))
        except LakehouseError as error:
            problems.append(str(error))
    try:
        follow(settings, application.name, run="upkeep", whole=True)
    except LakehouseError as error:
        problems.append(str(error))
    if problems:
        raise LakehouseError("; ".join(problems))
    return told


def remove_unused(settings: Settings, application: Application) -> dict[str, list[str]]:
    """Remove lineages of index builds and local copies of releases that no live release needs and that nothing
    touched for long, event segments that are in the tables, old task logs, and, in MLflow, old traces and the files of
    releases that have been nobody's for long.

    Returns: what went: `lineages`, `releases`, `segments`, `logs`, `files` (versions in the registry), `traces`
        (their number).

    Raises:
        ReleaseError: the registry does not answer; what it need not be asked about was removed.
        RetrievalError: the Qdrant server does not answer; the same.
        EngineError: the server that has an unused release's adapter does not answer: that release stays, the rest went.
    """
    gone = {"segments": _segments(settings, application), "logs": _logs(settings, application)}
    live = _live(settings, application)
    problems: list[str] = []
    gone |= {
        "releases": _releases(settings, application, live, problems),
        "files": remove_files(settings, application, before=_before(application.retention.release_files)),
        "traces": [str(delete_traces(settings, application.name, before=_before(application.retention.traces)))],
        "lineages": _lineages(settings, application),
    }
    if problems:
        raise EngineError("; ".join(problems))
    return gone


def _before(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


def _live(settings: Settings, application: Application) -> list[Manifest]:
    aliased = set(read_aliases(settings, application.name).values())
    return [release_manifest(settings, application, version) for version in sorted(aliased)]


def _lineages(settings: Settings, application: Application) -> list[str]:
    """With their vectors. What changed lately may be a candidate's."""
    needed = {lineage.id for lineage in searched_lineages(settings, application)}
    before = _before(application.retention.unused_releases)
    gone = []
    for lineage in kept_lineages(settings, application.name):
        builds = builds_of(settings, application.name, lineage)
        if lineage not in needed and (changed := builds.changed_at()) and changed < before:
            forget_lineage(Lake.of(settings, application.name), lineage, settings.cache, run="upkeep")
            builds.remove()
            gone.append(lineage)
    return gone


def _releases(settings: Settings, application: Application, live: list[Manifest], problems: list[str]) -> list[str]:
    """With the adapters that a server has loaded from there, which it must forget first."""
    ours = {tags[RELEASE_TAG] for tags in versions(settings, application).values()}
    unused = ours - {manifest.release_id for manifest in live}
    before = time.time() - application.retention.unused_releases * DAY
    # What is there decides what may go: a tag of the registry is no path.
    folders = (folder for folder in sorted(local_releases(settings).glob("rel-*")) if folder.name in unused)
    in_use = {manifest.generator.identity for manifest in live}
    gone = []
    for folder in folders:
        if folder.stat().st_mtime >= before:
            continue
        adapted = _adapted(folder)
        if adapted and adapted.identity in in_use:
            continue  # A server may have loaded the adapter from here, under the name that a live release asks for.
        try:
            if adapted and settings.upstream_url:
                unload_adapter(upstream_of(settings), adapter_name(adapted))
        except EngineError as error:
            problems.append(f"release {folder.name} stays: {error}")
            continue
        shutil.rmtree(folder)
        gone.append(folder.name)
    return gone


def _adapted(folder: Path) -> ServedModel | None:
    """The generator of the release in `folder`, if it is a server's model with an adapter of ours."""
    try:
        generator = read_release(folder).generator
    except ReleaseError:  # a damaged copy: it is better gone
        return None
    return generator if isinstance(generator, ServedModel) and generator.adapter else None


def _segments(settings: Settings, application: Application) -> list[str]:
    """A segment goes if each of its lines is in bronze or in quarantine; others are told."""
    lake = Lake.of(settings, application.name)
    before = time.time() - application.retention.event_segments * DAY
    gone, unread = [], []
    for path in sorted(settings.event_log(application.name).glob("*.jsonl")):
        hour = segment_hour(path)
        if hour is None or (hour + HOUR).timestamp() >= before:
            continue
        there = {
            line
            for table in (BRONZE_EVENTS, QUARANTINE_FEEDBACK)
            for line in lake.read(table, ["payload"], where=pc.field("segment") == path.name)["payload"].to_pylist()
        }
        lines = path.read_bytes().decode(errors="backslashreplace").split("\n")
        # What follows the last newline was never acknowledged.
        if there.issuperset(line for line in lines[:-1] if not is_erased(line)):
            path.unlink()
            gone.append(path.name)
        else:
            unread.append(path.name)
    if unread:
        send(
            Alert(
                title=f"{application.name}: events that no run has read",
                what=(
                    f"{', '.join(unread)} in {settings.event_log(application.name)} should have been removed, and hold "
                    f"lines that are in no table; run a backfill of {application.name}.ingest_feedback over their hours"
                ),
                source=f"{application.name}.maintain_lakehouse",
                runbook=f"{settings.airflow_url}/dags/{application.name}.ingest_feedback",
            ),
            settings,
        )
    return gone


def _logs(settings: Settings, application: Application) -> list[str]:
    before = time.time() - application.retention.task_logs * DAY
    folders = (settings.home / "logs" / "tasks").glob(f"dag_id={application.name}.*/run_id=*")
    doomed = [folder for folder in folders if _newest(folder) < before]
    for folder in doomed:
        shutil.rmtree(folder)
    return [f"{folder.parent.name}/{folder.name}" for folder in doomed]


def _newest(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
