"""How long a backup and a restore take beside `tar` of the same home, whose stack is stopped for it.

    python benchmarks/backup.py [--megabytes N]

Makes a home with a Delta table of many small commits, a database, and artifacts that don't compress, as weights are;
saves it, saves it again when little has changed, reads it whole, and restores it. `tar` does the first and the last of
that without checksums, and can't leave out what it has.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from deltalake import write_deltalake

from millrace.settings import Settings
from millrace.stack.backup import restore, save, verify
from millrace.stack.backup.embedded import running_postgres
from millrace.stack.home import obtain_secrets, prepare_home

COMMITS = 300
ROWS = 200_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000, help="of artifacts")
    megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # where root runs this, PostgreSQL is another user
        work = Path(folder)
        settings = Settings(home=work / "home")
        make_home(settings, megabytes)
        print(f"{size(settings.home):,.0f} MiB in {sum(path.is_file() for path in settings.home.rglob('*'))} files")
        archive = work / "home.tar"
        taken = {
            "tar": seconds(lambda: run("tar", "--create", "--file", archive, "--directory", work, "home")),
            "backup": seconds(lambda: save(settings, work / "backups", secrets=True)),
        }
        write_deltalake(str(table(settings)), pa.table({"n": [0]}), mode="append")
        taken["backup again"] = seconds(lambda: save(settings, work / "backups", secrets=True))
        taken["check"] = seconds(lambda: verify(work / "backups"))
        shutil.rmtree(settings.home)
        taken["restore"] = seconds(lambda: restore(settings, work / "backups"))
        shutil.rmtree(settings.home)
        taken["tar, back"] = seconds(lambda: run("tar", "--extract", "--file", archive, "--directory", work))
    for name, took in taken.items():
        peer = taken["tar" if name in ("tar", "backup", "backup again") else "tar, back"]
        print(f"{name:<14}{took:>8.1f} s{took / peer:>8.2f} of tar's")


def make_home(settings: Settings, megabytes: int) -> None:
    prepare_home(settings)
    obtain_secrets(settings.home)
    artifacts = settings.home / "mlflow" / "artifacts" / "1"
    artifacts.mkdir(parents=True)
    for number in range(max(1, megabytes // 100)):
        (artifacts / f"{number}.gguf").write_bytes(os.urandom(min(100, megabytes) << 20))
    for number in range(COMMITS):
        write_deltalake(str(table(settings)), pa.table({"n": [number]}), mode="append")
    with running_postgres(settings) as postgres:
        postgres.create_database("airflow")
        statement = f"create table runs as select n, md5(n::text) as told from generate_series(1, {ROWS}) n"
        psql = Path(postgres.command()[0]).with_name("psql")
        run(psql, "--quiet", "--host", postgres.socket_folder, "--username", "postgres", "airflow", "-c", statement)


def table(settings: Settings) -> Path:
    return settings.home / "lake" / "dev" / "qa" / "bronze" / "events"


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    os.sync()  # to the disk, for each of them
    return time.monotonic() - began


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


if __name__ == "__main__":
    main()
