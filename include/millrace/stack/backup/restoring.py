"""A backup becomes a home again, and the databases, artifacts and collections beside it.

Nothing is written before every byte of the backup was read and every place was found empty. From then on a mark in the
home says which backup it becomes, and which databases of servers are whole: nothing starts on such a home, and the same
restore, repeated, completes it.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

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
    mark = _Mark.of(settings.home)
    if mark.backup not in (None, name):
        raise BackupError(
            f"{settings.home} is half restored from backup {mark.backup}; repeat that, or remove the folder to restore "
            f"{name}"
        )
    repository.verify(manifest)
    try:
        if mark.backup is None:
            _check_empty(manifest, places)
        with only_for_its_owner():
            settings.home.mkdir(parents=True, exist_ok=True)
            mark.set(name)
            with locked(settings.home):
                _write(repository, manifest, places, mark)
            os.sync()
            (settings.home / RESTORING).unlink()
    except OSError as error:
        done = "only half" if (settings.home / RESTORING).exists() else "not"
        raise BackupError(
            f"{settings.home} is {done} restored: {error}; correct that, then repeat the same restore"
        ) from error
    return Restored(name, manifest)


@dataclass
class _Mark:
    """What is known of a restore that has begun and not ended; `backup` is None where none has."""

    path: Path
    backup: str | None = None
    databases: list[str] = field(default_factory=list)
    """Of servers, those that are whole."""

    @classmethod
    def of(cls, home: Path) -> Self:
        path = home / RESTORING
        try:
            said = json.loads(path.read_text())
            return cls(path, str(said["backup"]), list(said.get("databases", [])))
        except FileNotFoundError:
            return cls(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackupError(f"{path} can't be understood ({error}); remove {home}") from None

    def set(self, backup: str | None = None, *databases: str) -> None:
        self.backup = backup or self.backup
        self.databases += databases
        write_json(self.path, {"backup": self.backup, "databases": self.databases})


def _write(repository: Repository, manifest: Manifest, places: Places, mark: _Mark) -> None:
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
    _write_databases(repository, manifest.parts.get("databases", {}), places, mark)


def _write_databases(repository: Repository, dumps: Files, places: Places, mark: _Mark) -> None:
    with ExitStack() as held:
        postgres = None
        if dumps.keys() & set(places.embedded):
            postgres = held.enter_context(running_postgres(places.settings))
        for name, blob in dumps.items():
            if name in places.embedded and postgres is not None:
                postgres.create_database(name)
            database = places.database(name, postgres)
            if database is None or name in mark.databases:
                continue
            if database.is_empty():
                database.restore(repository.get(blob))
                if name in places.servers:
                    mark.set(None, name)
            elif name in places.servers:
                raise BackupError(
                    f"{database.where} was empty when the restore began and is not now: something uses it, or the "
                    "restore was cut off just after filling it; stop what uses it, make it empty, then repeat the same "
                    "restore"
                )
            # Else it is in the home, where nothing starts meanwhile: it has all of it, from an earlier attempt.


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
