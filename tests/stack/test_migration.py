"""A home that an older Millrace wrote: copied, brought up to date, read as before; one of a newer one is left alone.

`homes/format-1.tar.gz` was made by the code of commit 92fd2e4 (the loop as it first ran): documents, chunks, vectors,
an index build, six exchanges with feedback, and a journal.
"""

import json
import tarfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from millrace import FORMAT_VERSION
from millrace.errors import LakehouseError, StackError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.rows import FORMAT_PROPERTY
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EXCHANGES, SILVER_FEEDBACK
from millrace.rollout.decisions import fold, read_journal
from millrace.settings import Settings
from millrace.sources.feedback import refine_feedback
from millrace.stack import migration
from millrace.stack.home import bring_up_to_date, prepare_home

pytestmark = pytest.mark.slow

EVER = (datetime(2020, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))
OLD = Path(__file__).parent / "homes" / "format-1.tar.gz"


@pytest.fixture
def old(settings: Settings) -> Settings:
    """With the keys that it was written with."""
    with tarfile.open(OLD) as archive:
        archive.extractall(settings.home, filter="data")
    return Settings(**{**settings.model_dump(), "completion_key": "k" * 20, "pseudonym_key": "p" * 20})


class Later(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + timedelta(days=60)


def state(home: Path) -> dict[str, bytes]:
    """Every file of a home by its path, without its copies."""
    files = (path for path in home.rglob("*") if path.is_file())
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in files
        if path.relative_to(home).parts[0] not in ("backups", "run", "logs")
    }


def tables(home: Path) -> list[DeltaTable]:
    return [DeltaTable(str(log.parent)) for log in sorted(home.glob("lake/*/*/*/*/_delta_log"))]


def test_an_older_home_is_copied_and_says_the_new_format_everywhere(old: Settings) -> None:
    before = state(old.home)
    prepare_home(old)
    copy = bring_up_to_date(old.home)

    assert copy is not None
    assert state(copy) == before
    assert json.loads((old.home / "format.json").read_text()) == {"format": FORMAT_VERSION}
    assert len(tables(old.home)) >= 8
    assert {table.metadata().configuration[FORMAT_PROPERTY] for table in tables(old.home)} == {str(FORMAT_VERSION)}


def test_what_an_older_home_held_is_read_as_before_and_goes_on(old: Settings, qa) -> None:
    prepare_home(old)
    bring_up_to_date(old.home)
    lake = Lake.of(old, "qa")

    assert lake.read(SILVER_CHUNKS).num_rows == 12
    assert lake.read(SILVER_FEEDBACK)["rating"].to_pylist() == [0.5] * 6
    assert fold(read_journal(lake)).champion == "1"
    version = lake.version(SILVER_EXCHANGES)
    assert not refine_feedback(old, qa, *EVER, run="test")["changed"]
    assert lake.version(SILVER_EXCHANGES) == version


def test_a_migration_that_is_killed_anywhere_is_made_good_by_the_next(
    old: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(old.home)
    prepare_home(old)
    (old.home / "backups" / ".format-1.unfinished.making").mkdir(parents=True)
    (old.home / "backups" / ".format-1.unfinished.making" / "half").write_text("")
    read, looked_at = DeltaTable.metadata, []

    def dies_at_the_fourth(table: DeltaTable):
        looked_at.append(table)
        if len(looked_at) == 4:
            raise KeyboardInterrupt
        return read(table)

    with monkeypatch.context() as patched:
        patched.setattr(DeltaTable, "metadata", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            bring_up_to_date(old.home)
    assert json.loads((old.home / "format.json").read_text()) == {"format": 1}

    copy = bring_up_to_date(old.home)
    assert copy is not None
    assert state(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name], "nothing unfinished is left"
    assert {table.metadata().configuration[FORMAT_PROPERTY] for table in tables(old.home)} == {str(FORMAT_VERSION)}


def test_a_table_of_a_newer_format_is_refused_in_one_sentence(old: Settings) -> None:
    lake = Lake.of(old, "qa")
    DeltaTable(lake.uri(SILVER_CHUNKS)).alter.set_table_properties({FORMAT_PROPERTY: "99"}, raise_if_not_exists=False)
    with pytest.raises(LakehouseError, match="has format 99, written by a newer Millrace, and this one knows up to"):
        lake.read(SILVER_CHUNKS)


def test_a_step_that_fails_leaves_the_format_and_says_what_to_do(
    old: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(home: Path) -> None:
        raise OSError(28, "No space left on device")

    prepare_home(old)
    monkeypatch.setitem(migration.STEPS, 1, refuses)
    with pytest.raises(StackError, match=r"can't be brought to \d+: .*No space left on device; nothing is lost"):
        bring_up_to_date(old.home)
    assert json.loads((old.home / "format.json").read_text()) == {"format": 1}


def test_a_home_of_this_format_is_left_alone(settings: Settings) -> None:
    prepare_home(settings)
    assert bring_up_to_date(settings.home) is None
    assert not (settings.home / "backups").exists()


def test_who_went_back_and_comes_again_is_copied_again(old: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_home(old)
    first = bring_up_to_date(old.home)
    (old.home / "format.json").write_text('{"format": 1}')
    (old.home / "since.txt").write_text("two months of work")
    monkeypatch.setattr(migration, "datetime", Later)
    second = bring_up_to_date(old.home)
    assert first is not None
    assert second is not None
    assert first != second
    assert not (first / "since.txt").exists()
    assert (second / "since.txt").read_text() == "two months of work"
