"""Where this deployment keeps what a backup holds: what its settings name, else the embedded stack's own."""

from dataclasses import dataclass
from pathlib import Path

from millrace.lakehouse.storage import Location, bucket_and_prefix, store_of
from millrace.retrieval.server import connect
from millrace.settings import Settings
from millrace.stack.backup.collections import Collections
from millrace.stack.backup.databases import Database
from millrace.stack.backup.delta import Tables
from millrace.stack.backup.store import Store
from millrace.stack.postgres import Postgres

NAMED_BY = {
    "airflow": "MILLRACE_BACKUP_AIRFLOW_URL",
    "gateway": "MILLRACE_KEYS_URL",
    "mlflow": "MILLRACE_BACKUP_MLFLOW_URL",
}
"""Database → the setting that says where it is, if it isn't the home's."""


@dataclass(frozen=True)
class Places:
    """Nothing is opened by making one."""

    settings: Settings
    servers: dict[str, str]
    """Database → its address on a server."""
    embedded: tuple[str, ...]
    """Databases that the home's own PostgreSQL has."""
    artifacts: Store | None
    """Files of MLflow's runs and models; None: they are elsewhere, and the settings don't say where."""

    @property
    def home(self) -> Path:
        return self.settings.home

    @property
    def tables(self) -> Tables:
        store, root = store_of(self.settings), self.settings.lake
        if store:
            files = Store(store.arrow(), "/".join(bucket_and_prefix(root)), store.identity)
        else:
            files = Store.at(Path(root))
        return Tables(files, Location(root, store))

    @property
    def shared_lake(self) -> bool:
        """Whether other environments' tables may be beside ours, which their own backups hold."""
        return bool(self.settings.lake_uri)

    @property
    def collections(self) -> Collections | None:
        """None: index builds are folders."""
        if not self.settings.qdrant_url:
            return None
        key = self.settings.qdrant_api_key
        return Collections(connect(self.settings.qdrant_url, key), key.get_secret_value(), self.settings.environment)

    def database(self, name: str, postgres: Postgres | None) -> Database | None:
        """
        Args:
            postgres: the home's, running.

        Returns: None if the settings name none and the home has none.
        """
        if name in self.servers:
            return Database(name, self.servers[name])
        if name in self.embedded and postgres is not None and name in postgres.databases():
            return Database(name, postgres.url(name))
        return None


def places_of(settings: Settings) -> Places:
    named = {
        "airflow": settings.backup_airflow_url,
        "gateway": settings.keys_url,
        "mlflow": settings.backup_mlflow_url,
    }
    servers = {name: address for name, secret in named.items() if (address := secret.get_secret_value())}
    elsewhere = {*servers, *(("mlflow",) if settings.mlflow_uri else ())}
    if settings.backup_artifacts:
        artifacts: Store | None = Store.at(settings.backup_artifacts)
    else:
        artifacts = None if settings.mlflow_uri else Store.at(settings.home / "mlflow" / "artifacts")
    return Places(settings, servers, tuple(name for name in NAMED_BY if name not in elsewhere), artifacts)
