"""A backup becomes a home again, and the databases, artifacts and collections beside it.

Nothing is written before every byte of the backup was read and every place was found empty. From then on a mark in the
home says which backup it becomes: nothing starts on such a home, and the same restore, repeated, completes it.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from millrace import FORMAT_VERSION
from millrace.errors import BackupError
from millrace.private_files import write_json
from millrace.settings import Settings
from millrace.stack.backup.embedded import locked, running_object_store, running_postgres
from millrace.stack.backup.places import NAMED_BY, Places, places_of
from millrace.stack.backup.repository import Files, Manifest, Repository
from millrace.stack.backup.store import Store, only_for_its_owner
from millrace.stack.home import RESTORING


@dataclass(frozen=True)
class Restored:
    """A home that is whole again."""

    name: str
    manifest: Manifest

    @property
    def secrets(self) -> bool:
        return bool(self.manifest.parts.get("secrets"))


def verify(folder: Path, name: str = "") -> tuple[str, Manifest]:
    """Read every byte of a backup, the newest unless `name` is given; its name and what it holds.

    Raises:
        BackupError: there is no such backup, or it isn't what was saved.
    """
    repository = Repository(folder)
    name = name or repository.newest()
    manifest = repository.read(name)
    repository.verify(manifest)
    return name, manifest


def restore(settings: Settings, folder: Path, name: str = "") -> Restored:
    """Restore a backup of `folder`, the newest unless `name` is given, to the places that the settings name.

    Raises:
        BackupError: the backup can't be trusted, or a place is not empty or not known: nothing was written. Or a place
            can't be written: repeat it when that is corrected.
        StackError: the embedded PostgreSQL can't be started.
        RetrievalError: the Qdrant server refuses or doesn't answer.
    """
    repository = Repository(folder)
    name = name or repository.newest()
    manifest = repository.read(name)
    places = places_of(settings)
    _check_fits(manifest, places)
    begun = _begun(settings.home)
    if begun not in (None, name):
        raise BackupError(
            f"{settings.home} is half restored from backup {begun}; repeat that, or remove the folder to restore {name}"
        )
    repository.verify(manifest)
    try:
        if begun is None:
            _check_empty(manifest, places)
        with only_for_its_owner():
            settings.home.mkdir(parents=True, exist_ok=True)
            write_json(settings.home / RESTORING, {"backup": name})
            with locked(settings.home):
                _write(repository, manifest, places)
            os.sync()
            (settings.home / RESTORING).unlink()
    except OSError as error:
        done = "only half" if (settings.home / RESTORING).exists() else "not"
        raise BackupError(
            f"{settings.home} is {done} restored: {error}; correct that, then repeat the same restore"
        ) from error
    return Restored(name, manifest)


def _write(repository: Repository, manifest: Manifest, places: Places) -> None:
    def write(part: str, store: Store) -> None:
        for path, blob in manifest.parts.get(part, {}).items():
            store.write(path, repository.get(blob))

    write("secrets", Store.at(places.home))  # before the object store makes keys of its own
    with running_object_store(places.settings):
        tables = places.tables
        write("lake", tables.store)  # in the order of the backup: each table's log after its files
        for path, at in manifest.tables.items():
            tables.check(path, at)
    if places.artifacts is not None:
        write("artifacts", places.artifacts)
    write("home", Store.at(places.home))
    if (collections := places.collections) is not None:
        for name, blob in manifest.parts.get("collections", {}).items():
            collections.restore(name, repository.path(blob), blob.sha256)
    _write_databases(repository, manifest.parts.get("databases", {}), places)


def _write_databases(repository: Repository, dumps: Files, places: Places) -> None:
    with ExitStack() as held:
        postgres = None
        if dumps.keys() & set(places.embedded):
            postgres = held.enter_context(running_postgres(places.settings))
        for name, blob in dumps.items():
            if name in places.embedded and postgres is not None:
                postgres.create_database(name)
            database = places.database(name, postgres)
            # One that has something in it has all of it, from an earlier attempt.
            if database is not None and database.is_empty():
                database.restore(repository.get(blob))


def _check_fits(manifest: Manifest, places: Places) -> None:
    """Everything that the backup holds has a place here."""
    settings = places.settings
    if manifest.environment != settings.environment:
        raise BackupError(
            f"the backup is of {manifest.environment}, and this is {settings.environment}: set MILLRACE_ENVIRONMENT"
        )
    if manifest.home_format > FORMAT_VERSION:
        raise BackupError(
            f"the backup has homes' format {manifest.home_format}, and this Millrace knows up to {FORMAT_VERSION}; "
            f"restore it with Millrace {manifest.millrace}"
        )
    for name in manifest.parts.get("databases", {}):
        if name not in (*places.servers, *places.embedded):
            raise BackupError(
                f"the backup holds the database of {name}, and here it is elsewhere: name it in {NAMED_BY[name]}"
            )
    if manifest.parts.get("artifacts") and places.artifacts is None:
        raise BackupError(
            f"the backup holds artifacts of MLflow, and those of {settings.mlflow_uri} are elsewhere: name their place "
            "in MILLRACE_BACKUP_ARTIFACTS"
        )
    if manifest.parts.get("collections") and places.collections is None:
        raise BackupError("the backup holds collections of a Qdrant server: set MILLRACE_QDRANT_URL")


def _check_empty(manifest: Manifest, places: Places) -> None:
    found = next(Store.at(places.home).files(), None)
    if found is not None:
        raise BackupError(
            f"{places.home} is not empty (it has {found.path}), and a restore would mix two deployments; move it away, "
            "or set MILLRACE_HOME to a new folder"
        )
    # A store that the stack keeps is in the home, which is empty.
    for path in manifest.tables if not places.settings.object_store_port else ():
        if next(places.tables.store.files(path), None) is not None:
            raise BackupError(f"table {path} is there already; restore to a lake that is empty")
    if places.artifacts is not None and next(places.artifacts.files(), None) is not None:
        raise BackupError("the place of MLflow's artifacts is not empty; restore to one that is")
    for name in manifest.parts.get("databases", {}):
        database = places.database(name, None)  # the embedded ones are in the home, which is empty
        if database is not None and not database.is_empty():
            raise BackupError(f"{database.where} is not empty; restore to one that is")
    if (collections := places.collections) is not None:
        there = set(collections.names()) & manifest.parts.get("collections", {}).keys()
        if there:
            raise BackupError(f"collection {min(there)} is there already; delete it, or restore to another server")


def _begun(home: Path) -> str | None:
    """The backup whose restore to `home` has begun and not ended."""
    try:
        return str(json.loads((home / RESTORING).read_text())["backup"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BackupError(f"{home / RESTORING} can't be understood ({error}); remove {home}") from None
