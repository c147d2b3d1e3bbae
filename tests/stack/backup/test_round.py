"""A home saved, destroyed and restored is the same home: compared row by row and byte by byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pydantic import SecretStr
from typer.testing import CliRunner

from millrace.cli import app
from millrace.errors import BackupError, StackError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_DECISIONS, SILVER_CHUNKS
from millrace.private_files import write_json
from millrace.retrieval.index import builds_of, kept_lineages
from millrace.rollout.decisions import fold, read_journal
from millrace.settings import Settings
from millrace.stack import processes
from millrace.stack.backup import restore, save, saving
from millrace.stack.backup.databases import Database
from millrace.stack.backup.embedded import running_postgres
from millrace.stack.backup.repository import Repository
from millrace.stack.backup.store import Store
from millrace.stack.home import RESTORING, prepare_home
from tests.stack.backup.reading import cursor_in, databases, delta_tables, files

pytestmark = pytest.mark.slow


def test_a_home_that_was_destroyed_is_restored_table_by_table(whole: Settings, tmp_path: Path, qa) -> None:
    before = delta_tables(whole.home / "lake"), databases(whole), files(whole.home)
    assert len(before[0]) >= 8
    assert sum(map(len, before[1].values())) == 3 * (500 + 1)
    secrets = (whole.home / "secrets.json").read_bytes()

    saved = save(whole, tmp_path / "backups", secrets=True)
    assert saved.missing == ()
    shutil.rmtree(whole.home)
    restored = restore(whole, tmp_path / "backups")

    assert restored.name == saved.name
    assert (delta_tables(whole.home / "lake"), databases(whole), files(whole.home)) == before
    assert (whole.home / "secrets.json").read_bytes() == secrets
    assert (whole.home / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert not (whole.home / RESTORING).exists()
    # It goes on from there: as a home, as a journal, as a table that is written to, as an index that is searched.
    prepare_home(whole)
    lake = Lake.of(whole, "qa")
    assert fold(read_journal(lake)).champion == "1"
    [lineage] = kept_lineages(whole, "qa")
    builds = builds_of(whole, "qa", lineage)
    pointer = builds.published()
    assert pointer is not None
    assert builds.open(pointer.build).nearest([1.0] + [0.0] * 383, 1)
    version = lake.version(SILVER_CHUNKS)
    assert version is not None
    rows = lake.read(SILVER_CHUNKS).select(SILVER_CHUNKS.rows_schema.names).slice(0, 3)
    lake.merge(SILVER_CHUNKS, rows, run="test", delete_unmatched="true")
    assert lake.version(SILVER_CHUNKS) == version + 1
    assert lake.changes(SILVER_CHUNKS, version)["change"].to_pylist() == ["delete"] * 9


def test_no_table_is_read_after_one_that_its_rows_are_made_from(kept: Settings, tmp_path: Path) -> None:
    for path in ("_platform/ops/audit", "qa/gold/metrics"):
        write_deltalake(str(kept.home / "lake" / "dev" / path), pa.table({"n": [0]}))
    paths = list(save(kept, tmp_path / "backups").manifest.tables)
    assert paths[0] == "dev/_platform/ops/audit"
    layers = [path.split("/")[2] for path in paths]
    assert [layer for layer, _ in groupby(layers)] == ["ops", "gold", "quarantine", "silver", "bronze"]


def test_nobody_but_its_owner_reads_a_backup_and_without_being_asked_it_has_no_keys(
    kept: Settings, tmp_path: Path
) -> None:
    saved = save(kept, tmp_path / "backups")
    assert saved.missing[-1].startswith("the keys of the home, secrets.json")
    keys = json.loads((kept.home / "secrets.json").read_text()).values()
    for path in (tmp_path / "backups").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0
        assert not path.is_file() or not any(key.encode() in path.read_bytes() for key in keys)
    shutil.rmtree(kept.home)
    restore(kept, tmp_path / "backups")
    assert not (kept.home / "secrets.json").exists()


def test_a_table_is_saved_as_it_was_at_one_version_while_others_write_to_it(kept: Settings, tmp_path: Path) -> None:
    path = kept.home / "lake" / "dev" / "qa" / "gold" / "counted"
    write_deltalake(str(path), pa.table({"n": [0]}), configuration={"delta.enableChangeDataFeed": "true"})
    ending = threading.Event()

    def write() -> None:
        number = 1
        while not ending.is_set():
            write_deltalake(str(path), pa.table({"n": [number]}), mode="append")
            if number % 7 == 0:
                table = DeltaTable(str(path))
                table.create_checkpoint()
                table.optimize.compact()
                number += 1
            number += 1
            time.sleep(0.02)  # the test reads every version

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while DeltaTable(str(path)).version() < 10:
            time.sleep(0.02)
        saved = save(kept, tmp_path / "backups")
    finally:
        ending.set()
        writer.join()
    at = saved.manifest.tables["dev/qa/gold/counted"]
    assert 10 <= at < DeltaTable(str(path)).version()

    there = delta_tables(kept.home / "lake")
    shutil.rmtree(kept.home)
    restore(kept, tmp_path / "backups")
    here = delta_tables(kept.home / "lake")
    assert here.pop("dev/qa/gold/counted") == there.pop("dev/qa/gold/counted")[: at + 1]
    assert here == there


def test_a_table_whose_log_is_tidied_up_while_it_is_saved_makes_no_backup(
    kept: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Store.read

    def tidied(self: Store, path: str) -> Any:
        if path == "dev/qa/silver/documents/_delta_log/00000000000000000000.json":
            raise FileNotFoundError(path)
        return read(self, path)

    monkeypatch.setattr(Store, "read", tidied)
    with pytest.raises(
        BackupError, match=r"table dev/qa/silver/documents lost .*0\.json while version .* run the backup"
    ):
        save(kept, tmp_path / "backups")


def test_a_decision_between_tables_and_registry_makes_both_be_read_again(
    whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Lake.of(whole, "qa").uri(OPS_DECISIONS)
    rows = DeltaTable(journal).to_pyarrow_table().slice(0, 1)
    dump, dumped = Database.dump, []

    def decided_meanwhile(database: Database):
        dumped.append(database.name)
        if dumped.count("mlflow") == 1 and database.name == "mlflow":
            write_deltalake(journal, rows, mode="append")
        return dump(database)

    monkeypatch.setattr(Database, "dump", decided_meanwhile)
    monkeypatch.setattr(saving, "_PAUSE_SECONDS", 0)
    saved = save(whole, tmp_path / "backups")
    assert dumped == ["airflow", "gateway", "mlflow", "mlflow"]
    assert saved.manifest.tables["dev/qa/ops/decisions"] == DeltaTable(journal).version()


def test_the_next_backup_writes_only_what_is_new_and_each_can_be_restored(kept: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    first = save(kept, folder)
    before = files(kept.home)
    added = kept.home / "mlflow" / "artifacts" / "1" / "note.txt"
    added.write_text("a second model")
    second = save(kept, folder)
    assert first.written > 2_000_000
    assert second.written == len("a second model")

    for saved, expected in ((second, before | {"mlflow/artifacts/1/note.txt": files(kept.home)[
        "mlflow/artifacts/1/note.txt"]}), (first, before)):  # fmt: skip
        shutil.rmtree(kept.home)
        restore(kept, folder, saved.name)
        assert files(kept.home) == expected

    third = save(kept, folder, keep=1)
    assert third.removed == (first.name, second.name)
    assert Repository(folder).names() == [third.name]
    Repository(folder).verify(third.manifest)
    needed = {blob.sha256 for part in third.manifest.parts.values() for blob in part.values()}
    assert len(list((folder / "objects").glob("??/*"))) == len(needed)


def test_a_backup_that_was_damaged_is_refused_before_anything_is_written(kept: Settings, tmp_path: Path) -> None:
    saved = save(kept, folder := tmp_path / "backups")
    path = Repository(folder).path(saved.manifest.parts["artifacts"]["1/models/m-1/model.gguf"])
    intact = path.read_bytes()
    changed = bytearray(intact)
    changed[1_000_000] ^= 1
    shutil.rmtree(kept.home)
    said = r"can't be trusted, nothing was restored: artifacts/1/models/m-1/model\.gguf: .* "
    for damaged, expected in (
        (bytes(changed), "holds other bytes"),
        (intact[:-1], "holds other"),
        (None, "is missing"),
    ):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(BackupError, match=said + expected):
            restore(kept, folder)
        path.write_bytes(intact)
    manifest = folder / "backups" / f"{saved.name}.json"
    manifest.write_text(manifest.read_text().replace("model.gguf", "nodel.gguf"))
    with pytest.raises(BackupError, match="was changed after the backup"):
        restore(kept, folder)
    assert not kept.home.exists()


def test_a_backup_that_was_damaged_keeps_no_other_from_being_made_and_what_it_may_need_stays(
    kept: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backups"
    first, second = save(kept, folder), save(kept, folder)
    (folder / "backups" / f"{second.name}.json").write_text("damaged")
    third = save(kept, folder, keep=2)
    assert (third.written, third.removed) == (0, ())  # by the first, whose bytes need not be written again
    assert "was changed after the backup" in third.stayed
    assert Repository(folder).names() == [first.name, second.name, third.name]
    monkeypatch.setenv("MILLRACE_HOME", str(kept.home))
    said = CliRunner().invoke(app, ["backup", str(folder), "--keep", "2"])
    assert (said.exit_code, "Removed: " in said.output) == (0, True)


def test_an_address_that_libpq_does_not_understand_is_one_sentence_without_its_password() -> None:
    with pytest.raises(BackupError, match="the address of gateway's database is none; write") as refused:
        Database("gateway", "postgresql://ann:hidden@host/db?nosuch=1").is_empty()
    assert "hidden" not in str(refused.value)


def test_a_home_that_holds_something_is_not_restored_to(kept: Settings, tmp_path: Path) -> None:
    save(kept, tmp_path / "backups")
    before = files(kept.home)
    with pytest.raises(BackupError, match=r"home is not empty \(it has .*\), and a restore would mix two deployments"):
        restore(kept, tmp_path / "backups")
    assert files(kept.home) == before
    assert not (kept.home / RESTORING).exists()


@pytest.mark.long
def test_a_restore_that_was_killed_starts_nothing_and_is_completed_by_the_next(whole: Settings, tmp_path: Path) -> None:
    before = delta_tables(whole.home / "lake"), databases(whole), files(whole.home)
    save(whole, tmp_path / "backups")
    for seen in ("lake/dev/qa/ops", "mlflow/environment.json", "postgres/data/postmaster.pid"):
        shutil.rmtree(whole.home)
        killed(whole, ["restore", str(tmp_path / "backups")], whole.home / seen)
        with pytest.raises(StackError, match="is half restored from a backup; repeat that `millrace restore`"):
            prepare_home(whole)
        with pytest.raises(BackupError, match="is no whole home of Millrace"):
            save(whole, tmp_path / "backups")
        restore(whole, tmp_path / "backups")
        assert (
            delta_tables(whole.home / "lake"),
            databases(whole),
            files(whole.home),
        ) == before


def test_a_servers_database_that_somebody_filled_meanwhile_is_not_passed_over(
    whole: Settings, open_folder: Path, tmp_path: Path
) -> None:
    saved = save(whole, tmp_path / "backups")
    server = whole.model_copy(update={"home": Path(tempfile.mkdtemp(dir=open_folder)) / "home"})
    prepare_home(server)
    target = whole.model_copy(update={"home": server.home.parent / "restored"})
    try:
        with running_postgres(server) as postgres:
            postgres.create_database("gateway")
            target = target.model_copy(update={"keys_url": SecretStr(postgres.url("gateway"))})
            # A restore has begun, and a gateway started on the database that was empty then.
            target.home.mkdir()
            write_json(target.home / RESTORING, {"backup": saved.name})
            with cursor_in(postgres, "gateway") as cursor:
                cursor.execute("create table keys (id int)")
            with pytest.raises(BackupError, match="was empty when the restore began and is not now: something uses it"):
                restore(target, tmp_path / "backups")
            with cursor_in(postgres, "gateway") as cursor:
                cursor.execute("drop table keys")
            restore(target, tmp_path / "backups")
            with cursor_in(postgres, "gateway") as cursor:
                cursor.execute("select count(*) from kept.things")
                assert cursor.fetchone() == (500,)
            write_json(target.home / RESTORING, {"backup": saved.name, "databases": ["gateway"]})
            restore(target, tmp_path / "backups")
        assert not (target.home / RESTORING).exists()
    finally:
        for home in (server.home, target.home):
            processes.end(home, ["postgres"], seconds=10)


def test_a_backup_that_was_killed_is_none_and_the_next_one_is_whole(kept: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    killed(kept, ["backup", str(folder)], folder / "objects")
    assert Repository(folder).names() == []
    with pytest.raises(BackupError, match="there is no whole backup in"):
        restore(kept, folder)
    saved = save(kept, folder)
    assert Repository(folder).names() == [saved.name]
    Repository(folder).verify(saved.manifest)
    assert not (folder / "unfinished").exists()


def killed(settings: Settings, arguments: list[str], seen: Path) -> None:
    """`millrace` with these arguments, killed as soon as there is something at `seen`."""
    variables = {"MILLRACE_HOME": str(settings.home), "MILLRACE_SPARK_TABLES": "[]"}
    process = subprocess.Popen([sys.executable, "-m", "millrace.cli", *arguments], env=os.environ | variables)
    try:
        while not (seen.exists() and (seen.is_file() or any(seen.iterdir()))):
            assert process.poll() is None, "it ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_the_commands_say_what_was_saved_what_not_and_what_to_do_next(
    whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_HOME", str(whole.home))
    (whole.home / "notes").mkdir()
    folder = str(tmp_path / "backups")
    said = CliRunner().invoke(app, ["backup", folder])
    assert said.exit_code == 0, said.output
    assert f"of dev in {folder}" in said.output
    assert "databases airflow, gateway, mlflow." in said.output
    assert f"Not in it: notes in {whole.home}, which Millrace doesn't know." in said.output
    assert "Not in it: the keys of the home" in said.output
    checked = CliRunner().invoke(app, ["restore", folder, "--check"])
    assert "every byte read" in checked.output
    inside = CliRunner().invoke(app, ["backup", str(whole.home / "backups" / "mine")])
    assert "is in the home that it would save, and lost with it" in inside.output
    refused = CliRunner().invoke(app, ["restore", folder])
    assert refused.exit_code == 1
    assert refused.output.count("\n") == 1
    monkeypatch.setenv("MILLRACE_ENVIRONMENT", "prod")
    shutil.rmtree(whole.home)
    other = CliRunner().invoke(app, ["restore", folder])
    assert other.output == "the backup is of dev, and this is prod: set MILLRACE_ENVIRONMENT\n"
    monkeypatch.setenv("MILLRACE_ENVIRONMENT", "dev")
    restored = CliRunner().invoke(app, ["restore", folder])
    assert restored.exit_code == 0, restored.output
    assert "put the old secrets.json into" in restored.output
