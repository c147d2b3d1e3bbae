"""A lake and artifacts in a real S3 server: saved, destroyed and restored, as whoever may and whoever may not."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from deltalake import DeltaTable
from pydantic import SecretStr

from millrace.errors import AccessRefused, BackupError
from millrace.lakehouse.commits import dataset_of
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.storage import REGION, Key, Location, ObjectStore, delta_options, own_key, store_of
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.rollout.decisions import fold, read_journal
from millrace.settings import Settings
from millrace.stack.backup import restore, save
from millrace.stack.backup.embedded import running_object_store
from millrace.stack.backup.places import places_of
from millrace.stack.backup.store import Store
from millrace.stack.versitygw import Versitygw
from tests.conftest import free_port

pytestmark = pytest.mark.long

BUCKETS = ("backed-up-lake", "backed-up-models")


@pytest.fixture
def stored(kept: Settings, object_store: Versitygw, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The home's lake and artifacts in buckets instead, with another environment's table beside."""
    key = object_store.root
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key.secret_key)
    client = ObjectStore(object_store.url, REGION, key).client()
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)
    lake, models = BUCKETS
    settings = as_(key, kept).model_copy(
        update={
            "lake_uri": f"s3://{lake}/lake",
            "lake_endpoint": object_store.url,
            "backup_artifacts": f"s3://{models}?region={REGION}&scheme=http&endpoint_override=127.0.0.1:{object_store.port}",
        }
    )
    move(kept.home / "lake", places_of(settings).tables.store)
    artifacts = places_of(settings).artifacts
    assert artifacts is not None
    move(kept.home / "mlflow" / "artifacts", artifacts)
    prod = settings.model_copy(update={"environment": "prod"})
    Lake.of(prod, "qa").merge(SILVER_CHUNKS, some_rows(settings), run="test")
    yield settings
    for bucket in BUCKETS:
        empty(client, bucket)
        client.delete_bucket(Bucket=bucket)


def as_(key: Key, settings: Settings) -> Settings:
    update = {"lake_access_key": SecretStr(key.access_key), "lake_secret_key": SecretStr(key.secret_key)}
    return settings.model_copy(update=update)


def move(folder: Path, store: Store) -> None:
    for one in Store.at(folder).files():
        store.write(one.path, Store.at(folder).read(one.path))
    shutil.rmtree(folder)


def empty(client, bucket: str) -> None:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for one in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=one["Key"])


def some_rows(settings: Settings):
    return Lake.of(settings, "qa").read(SILVER_CHUNKS).select(SILVER_CHUNKS.rows_schema.names).slice(0, 3)


def tables(settings: Settings) -> dict[str, list[list[str]]]:
    """Path → the rows of each of its versions."""
    found, store, there = {}, store_of(settings), places_of(settings).tables
    for path in there.paths(settings.environment):
        uri = Location(f"{settings.lake}/{path}", store)
        opened = [
            DeltaTable(uri, version=at, storage_options=delta_options(uri)) for at in range(there.version(path) + 1)
        ]
        found[path] = [sorted(map(repr, dataset_of(one, uri).to_table().to_pylist())) for one in opened]
    return found


def artifacts(settings: Settings) -> dict[str, bytes]:
    store = places_of(settings).artifacts
    assert store is not None
    return {one.path: b"".join(store.read(one.path)) for one in store.files()}


def test_what_is_in_an_object_store_is_saved_destroyed_and_restored(
    stored: Settings, object_store: Versitygw, tmp_path: Path
) -> None:
    before = tables(stored), artifacts(stored)
    assert len(before[0]) >= 8
    assert before[1]

    saved = save(stored, tmp_path / "backups")
    assert set(saved.manifest.tables) == set(before[0])  # not prod's
    again = save(stored, tmp_path / "backups")
    assert again.written == 0

    shutil.rmtree(stored.home)
    with pytest.raises(BackupError, match=r"table dev/.* is there already; restore to a lake that is empty"):
        restore(stored, tmp_path / "backups")
    assert not stored.home.exists()
    client = ObjectStore(object_store.url, REGION, object_store.root).client()
    for bucket in BUCKETS:
        empty(client, bucket)
    assert (tables(stored), artifacts(stored)) == ({}, {})
    restore(stored, tmp_path / "backups")

    assert (tables(stored), artifacts(stored)) == before
    lake = Lake.of(stored, "qa")
    assert fold(read_journal(lake)).champion == "1"
    version = lake.version(SILVER_CHUNKS)
    assert version is not None
    lake.merge(SILVER_CHUNKS, some_rows(stored), run="test", delete_unmatched="true")
    assert lake.changes(SILVER_CHUNKS, version)["change"].to_pylist() == ["delete"] * 9


def test_who_may_not_read_the_lake_gets_one_sentence_and_no_backup(
    stored: Settings, object_store: Versitygw, tmp_path: Path
) -> None:
    nobody = Key("backup-nobody", "a secret of nobody's")
    object_store.create_user(nobody)
    said = "the object store does not let backup-nobody list backed-up-lake/lake/dev; use a credential that may"
    for secret in (nobody.secret_key, "a guess of somebody's"):
        with pytest.raises(AccessRefused) as refused:
            save(as_(replace(nobody, secret_key=secret), stored), tmp_path / "backups")
        assert str(refused.value) == said
    assert list((tmp_path / "backups" / "backups").iterdir()) == []


def test_a_store_that_the_stack_keeps_in_its_home_is_saved_and_made_again(kept: Settings, tmp_path: Path) -> None:
    own = kept.model_copy(update={"object_store_port": int(free_port()), "lake_uri": "s3://lakehouse/lake"})
    with running_object_store(own):
        move(own.home / "lake", places_of(own).tables.store)
        before = tables(own)
    key = own_key(own, "dev")
    saved = save(own, tmp_path / "backups", secrets=True)
    assert not [what for what in saved.missing if "database" not in what]
    shutil.rmtree(own.home)
    restore(own, tmp_path / "backups")
    assert own_key(own, "dev") == key
    with running_object_store(own):
        assert tables(own) == before
    assert len(before) >= 8
