"""A home with real content: the tables, events and index build of `homes/format-1.tar.gz`, and a PostgreSQL."""

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.private_files import write_json
from millrace.settings import Settings
from millrace.stack import processes
from millrace.stack.backup.embedded import running_postgres
from millrace.stack.home import bring_up_to_date, obtain_secrets, prepare_home, registry_mark
from tests.stack.backup.reading import DATABASES, cursor_in
from tests.stack.test_migration import OLD


@pytest.fixture(scope="session")
def content(open_folder: Path) -> Path:
    """The home that each test has a copy of, without databases."""
    settings = Settings(home=open_folder / "content")
    home = settings.home
    with tarfile.open(OLD) as archive:
        archive.extractall(home, filter="data")
    prepare_home(settings)
    bring_up_to_date(home)
    shutil.rmtree(home / "backups")
    obtain_secrets(home)
    artifact = home / "mlflow" / "artifacts" / "1" / "models" / "m-1" / "model.gguf"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(bytes(range(256)) * 9000)
    write_json(registry_mark(home), {"environment": "dev"})
    return home


@pytest.fixture
def kept(content: Path, open_folder: Path, settings: Settings) -> Iterator[Settings]:
    """Settings of a home of its own with that content."""
    home = shutil.copytree(content, Path(tempfile.mkdtemp(dir=open_folder)) / "home")
    yield settings.model_copy(update={"home": home})
    if (home / "postgres").exists():
        processes.end(home, ["postgres"], seconds=10)


@pytest.fixture
def whole(kept: Settings) -> Settings:
    """The same home, and in its PostgreSQL three databases of a table each."""
    with running_postgres(kept) as postgres:
        for name in DATABASES:
            postgres.create_database(name)
            with cursor_in(postgres, name) as cursor:
                cursor.execute("create schema kept; create table kept.things (id serial primary key, told text)")
                cursor.execute("insert into kept.things (told) select %s || n from generate_series(1, 500) n", (name,))
    return kept
