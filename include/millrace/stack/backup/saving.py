"""What is saved, and in which order, so that everything restored fits together while others go on writing.

Each store is read so that nothing which names something is newer than what it names:

1. MLflow's artifacts, index builds and the noted ends of audit trails. (Artifacts once more after 3: of a file that
   came and one that went meanwhile, both are there.)
2. The databases of Airflow and the gateway. A run that Airflow remembers as done has its rows in the tables that
   follow; one that it doesn't is done again, which changes nothing.
3. The version of every Delta table, the audit trail's and the cursors' first, sources last: a cursor that is ahead of
   its table would pass over what is written to it next. Then the registry's database: each release that a row names is
   registered. If a decision was taken between the two, both again: the split in the registry is that of the journal.
4. The tables' files at those versions, and the gateway's event segments, which have every event that the tables have
   not.

Whatever runs may go on; what is written meanwhile is in the next backup.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from millrace import FORMAT_VERSION
from millrace.errors import BackupError
from millrace.lakehouse.tables import OPS_DECISIONS, PLATFORM
from millrace.retrieval.library import LibraryBuilds
from millrace.settings import Settings
from millrace.stack.backup.delta import is_log
from millrace.stack.backup.embedded import locked, running_object_store, running_postgres, runs
from millrace.stack.backup.places import NAMED_BY, Places, places_of
from millrace.stack.backup.repository import Blob, Files, Manifest, Repository
from millrace.stack.backup.store import Found, Store, only_for_its_owner
from millrace.stack.home import RESTORING, read_format
from millrace.stack.postgres import Postgres

NOTED = ("audit", "mlflow/environment.json", "format.json")
"""Of a home, what is read before the tables."""
SECRETS = ("secrets.json", "object-store/keys", "airflow/password.json", "airflow/airflow.cfg")
"""The home's keys; each environment's in the object store that the stack keeps; what people log in to Airflow with, and
where a vault is named."""
NOT_SAVED = frozenset(
    {"airflow", "backups", "logs", "object-store", "postgres", "releases", "report.html", "report.json", "run",
     "spark", "streams", "training"}
)  # fmt: skip
"""What a home has beside it: made again at the next start, by training or from the registry, saved through its
server (`postgres`, `object-store`), or of no use elsewhere."""
_SAVED = frozenset(
    {"audit", "events", "format.json", "indexes", "lake", "mlflow", "mlflow/artifacts", "mlflow/environment.json",
     "secrets.json"}
)  # fmt: skip
LAYERS = ("ops", "gold", "quarantine", "silver", "bronze")
CUTS = 5
"""How often databases and tables are read for a moment without a decision between them."""
_PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class Saved:
    """A backup that was made."""

    name: str
    manifest: Manifest
    written: int
    """Bytes that the folder did not have."""
    removed: tuple[str, ...]
    """Older backups that went."""
    stayed: str
    """Why more than `keep` stay; empty: they don't."""
    missing: tuple[str, ...]
    """What the deployment has and the backup has not, a sentence each."""


def save(settings: Settings, folder: Path, *, secrets: bool = False, keep: int | None = None) -> Saved:
    """Add a backup of this deployment to `folder`. Killed anywhere, there is none of it, and the next one goes on
    from the bytes that are there.

    Args:
        secrets: with the keys of the home, for whoever can read the folder.
        keep: how many backups stay, the newest; None: all.

    Raises:
        BackupError: something can't be read or written; there is no new backup.
        StackError: the embedded PostgreSQL can't be started.
        RetrievalError: the Qdrant server refuses or doesn't answer.
    """
    places = places_of(settings)
    _check_home(settings.home)
    if folder.resolve().is_relative_to(settings.home.resolve()):
        raise BackupError(f"{folder} is in the home that it would save, and lost with it; choose a folder elsewhere")
    repository = Repository(folder)
    try:
        with only_for_its_owner(), repository.writing(), _stores(places) as postgres:
            saving = _Saving(places, repository, _newest_parts(repository), postgres)
            manifest = saving.run(secrets)
            name, removed, stayed = repository.finish(manifest), list[str](), ""
            if keep:
                try:
                    removed = repository.prune(keep)
                except BackupError as error:
                    stayed = str(error)
    except OSError as error:
        raise BackupError(f"there is no new backup in {folder}: {error}; correct that, then run it again") from error
    return Saved(name, manifest, repository.written, tuple(removed), stayed, tuple(saving.missing))


def _newest_parts(repository: Repository) -> dict[str, Files]:
    """Of the newest backup that can be read: one that was damaged stops no later one."""
    for name in reversed(repository.names()):
        with suppress(BackupError):
            return repository.read(name).parts
    return {}


class _Saving:
    """One backup in the making."""

    def __init__(
        self, places: Places, repository: Repository, known: dict[str, Files], postgres: Postgres | None
    ) -> None:
        self._places = places
        self._home = Store.at(places.home)
        self._repository = repository
        self._known = known
        self._postgres = postgres
        self._parts: dict[str, Files] = {}
        self.missing: list[str] = []

    def run(self, secrets: bool) -> Manifest:
        settings, made_at = self._places.settings, datetime.now(UTC)
        self._artifacts()
        for under in NOTED:
            self._keep("home", self._home, self._below(under))
        self._index_builds()
        for name in ("airflow", "gateway"):
            self._database(name)
        tables = self._cut()
        for path, at in tables.items():
            self._table(path, at)
        self._artifacts()
        self._keep("home", self._home, self._below("events"))
        if secrets:
            for under in SECRETS:
                self._keep("secrets", self._home, self._below(under))
        self._tell_what_is_missing()
        return Manifest(
            made_at=made_at,
            millrace=version("millrace"),
            home_format=FORMAT_VERSION,
            environment=settings.environment,
            parts=self._parts,
            tables=tables,
        )

    def _artifacts(self) -> None:
        if (artifacts := self._places.artifacts) is not None:
            self._keep("artifacts", artifacts, artifacts.files())

    def _index_builds(self) -> None:
        if (collections := self._places.collections) is not None:
            for name in collections.names():
                self._files("collections")[name] = collections.save(name, self._repository.put)
            return
        for lineage in sorted(self._places.home.glob("indexes/*/*/*")):
            with LibraryBuilds(lineage).still():
                self._keep("home", self._home, self._below(str(lineage.relative_to(self._places.home))))

    def _database(self, name: str) -> None:
        if (database := self._places.database(name, self._postgres)) is not None:
            self._files("databases")[name] = self._repository.put(database.dump())

    def _cut(self) -> dict[str, int]:
        """Versions of the tables, and the registry's database, between which no decision was taken."""
        tables = self._places.tables
        environment = self._places.settings.environment if self._places.shared_lake else ""
        for _ in range(CUTS):
            versions = {path: tables.version(path) for path in sorted(tables.paths(environment), key=_reading_order)}
            self._database("mlflow")
            if all(tables.version(path) == at for path, at in versions.items() if _is_journal(path)):
                return versions
            time.sleep(_PAUSE_SECONDS)
        raise BackupError(
            f"decisions were taken in each of {CUTS} attempts to read the registry beside them; run the backup again, "
            "or pause the rollouts meanwhile"
        )

    def _table(self, path: str, at: int) -> None:
        tables = self._places.tables
        found = list(tables.files(path, at))
        self._keep("lake", tables.store, found)
        # Of the log all: a clean-up that came meanwhile has replaced what is gone by what wasn't listed.
        log = {one.path for one in found if is_log(path, one.path)}
        lost = (tables.needed(path, at) | log) - self._files("lake").keys()
        if lost:
            raise BackupError(
                f"table {path} lost {sorted(lost)[0]} while version {at} was saved; run the backup again, and if it "
                "says so again, the table is damaged"
            )

    def _keep(self, part: str, store: Store, files: Iterable[Found]) -> None:
        """A file that goes meanwhile is left out: nothing that is saved needs it."""
        known = self._known.get(part, {})
        kept = self._files(part)
        for one in files:
            before = kept.get(one.path) or known.get(one.path)
            if before and (before.size, before.modified_ns) == (one.size, one.modified_ns) and self._has(before):
                kept[one.path] = before
                continue
            try:
                kept[one.path] = self._repository.put(store.read(one.path), one.modified_ns)
            except FileNotFoundError:
                continue

    def _has(self, blob: Blob) -> bool:
        return self._repository.has(blob)

    def _below(self, under: str) -> Iterator[Found]:
        """Files of the home at or below a path: without locks and what is being written."""
        path = self._places.home / under
        if path.is_file():
            stat = path.stat()
            yield Found(under, stat.st_size, stat.st_mtime_ns)
            return
        for one in self._home.files(under):
            name = Path(one.path).name
            if not name.startswith(".") and not name.endswith((".lock", ".writing")):
                yield one

    def _files(self, part: str) -> Files:
        return self._parts.setdefault(part, {})

    def _tell_what_is_missing(self) -> None:
        for name, setting in NAMED_BY.items():
            if name not in self._files("databases"):
                self.missing.append(f"the database of {name}, which this home has not: name it in {setting}")
        if self._places.artifacts is None:
            self.missing.append(
                f"the artifacts of MLflow at {self._places.settings.mlflow_uri}: name their place in "
                "MILLRACE_BACKUP_ARTIFACTS"
            )
        if "secrets" not in self._parts and (self._places.home / "secrets.json").exists():
            self.missing.append("the keys of the home, secrets.json: keep a copy of it elsewhere, or use --secrets")
        home = self._places.home
        unknown = {path.name for path in home.iterdir()} - NOT_SAVED - _SAVED
        unknown |= {f"mlflow/{path.name}" for path in home.glob("mlflow/*")} - _SAVED
        if unknown:
            self.missing.append(f"{', '.join(sorted(unknown))} in {home}, which Millrace doesn't know")


def _is_journal(path: str) -> bool:
    return path.endswith(f"/{OPS_DECISIONS.path}")


def _reading_order(path: str) -> tuple[bool, int, str]:
    """The audit trail, then each layer before those that it is made from or points into."""
    _, application, layer, _ = path.split("/")
    return application != PLATFORM, LAYERS.index(layer) if layer in LAYERS else len(LAYERS), path


def _check_home(home: Path) -> None:
    found = None if (home / RESTORING).exists() else read_format(home)
    if found is None:
        raise BackupError(f"{home} is no whole home of Millrace, so there is nothing to save; correct MILLRACE_HOME")
    if found != FORMAT_VERSION:
        raise BackupError(
            f"{home} has format {found} and this Millrace saves {FORMAT_VERSION}; bring it up to date: millrace up"
        )


@contextmanager
def _stores(places: Places) -> Iterator[Postgres | None]:
    """The home's stores, running; its PostgreSQL, or None where it has none."""
    databases = bool(places.embedded) and (places.home / "postgres" / "data").exists()
    with ExitStack() as held:
        if not runs(places.settings, databases=databases):
            held.enter_context(locked(places.home))
        held.enter_context(running_object_store(places.settings))
        yield held.enter_context(running_postgres(places.settings)) if databases else None
