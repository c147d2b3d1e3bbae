"""Secrets that are nowhere else, and the search for them in everything that a deployment leaves behind.

Every canary holds one mark of letters and digits that no quoting changes, so that three spellings of it (as it is, and
in base64 behind any number of other bytes) find all of them, however they are quoted, in gigabytes.
"""

import base64
import gzip
import json
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import psutil
import psycopg2
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import SecretStr

from millrace.stack import Stack
from millrace.stack.home import Secrets
from millrace.stack.postgres import Postgres

KEPT = frozenset({"secrets.json", "run/secrets/completion_key", "run/secrets/pseudonym_key", "airflow/password.json"})
"""Files of a home that hold secrets, for their owner alone."""
EMPTY = frozenset({"airflow_passwords"})
"""Secret settings that a stack may have nothing in: these are of people, and the suite's stack declares none."""
EMBEDDED = ("airflow", "mlflow", "postgres")
"""Databases of the embedded PostgreSQL that are there in any case."""
_PIECE = 32 * 2**20


class Canaries:
    """Secrets with a mark that is made once. Characters that URLs, shells and JSON quote are in each."""

    def __init__(self) -> None:
        self.mark = f"canary{secrets.token_hex(6)}"
        self._patterns: set[bytes] = set()
        self.also(self.mark)

    def also(self, secret: str) -> None:
        """Look for this one, too: letters and digits that somebody else has chosen."""
        self._patterns |= {secret.encode(), *_encoded(secret)}
        self._found = re.compile(b"|".join(map(re.escape, sorted(self._patterns))), re.IGNORECASE)
        self._longest = max(map(len, self._patterns))

    def secret(self, name: str) -> str:
        return f"{name}/{self.mark}+{secrets.token_hex(8)}=%"

    def plain(self, name: str) -> str:
        """Where an address is written by hand, and a login by a person."""
        return f"{name}-{self.mark}-{secrets.token_hex(8)}"

    def generated(self) -> dict[str, str]:
        """In the place of what a first start would generate."""
        made = {field.name: self.secret(field.name) for field in fields(Secrets)}
        # 32 bytes, in the base64 of URLs.
        fernet = f"{self.mark}{secrets.token_hex(16)}"[:42] + "A="
        assert len(base64.urlsafe_b64decode(fernet)) == 32
        return made | {"airflow_fernet_key": fernet}

    def are_in(self, content: bytes | str) -> list[str]:
        """The spellings of canaries in it, each with what is around it."""
        data = content.encode() if isinstance(content, str) else content
        around = (data[max(0, one.start() - 60) : one.end() + 40] for one in self._found.finditer(data))
        return [one.decode(errors="replace") for one in around]

    def in_files(self, folder: Path, kept: Iterable[str] = KEPT) -> list[str]:
        """Files under `folder` that hold one, each with the first place in it, but for those that are `kept`."""
        allowed = {folder / name for name in kept}
        found = []
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and path not in allowed:
                for piece in _pieces(path, self._longest):
                    if places := self.are_in(piece):
                        found.append(f"{path.relative_to(folder)}: {places[0]!r}")
                        break
        return found

    def in_databases(self, address: str, databases: Sequence[str]) -> list[str]:
        """Tables of PostgreSQL that hold one in a row.

        Args:
            address: `…/{database}…`, as libpq takes it.
        """
        found = []
        for database in databases:
            connection = psycopg2.connect(address.format(database=database))
            with connection, connection.cursor() as cursor:
                cursor.execute(
                    "select table_schema, table_name from information_schema.tables "
                    "where table_schema not in ('pg_catalog', 'information_schema')"
                )
                for schema, table in cursor.fetchall():
                    cursor.execute(f'select t::text from "{schema}"."{table}" t')
                    for (row,) in cursor.fetchall():
                        if places := self.are_in(row):
                            found.append(f"{database}.{schema}.{table}: {places[0]!r}")
                            break
            connection.close()
        return found

    def not_planted(self, stack: Stack) -> list[str]:
        """Secret settings of the stack, and what its home generated, that are no canaries."""
        secret = {name: value for name, value in stack.settings if isinstance(value, SecretStr)}
        held = {name: value.get_secret_value() for name, value in secret.items()}
        held |= json.loads((stack.settings.home / "secrets.json").read_text())
        return [name for name, value in held.items() if not self.are_in(value) and (value or name not in EMPTY)]

    def left_by(self, stack: Stack) -> list[str]:
        """Where the stack has left one but where it belongs, and kept files that others than their owner may read."""
        home = stack.settings.home
        embedded = Postgres(home / "postgres").url("{database}").replace("+psycopg2", "")
        open_to_others = [name for name in sorted(KEPT) if (home / name).stat().st_mode & 0o077]
        return [*self.in_files(home), *self.in_databases(embedded, EMBEDDED), *open_to_others]


class CommandLines:
    """Every command line that a process of this machine had inside the `with`, looked at twice a second."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            for process in psutil.process_iter(["cmdline"]):
                self.seen.add(" ".join(process.info["cmdline"] or ()))


def _encoded(text: str) -> Iterator[bytes]:
    """The part of its base64 that is the same whatever stands before and after it, for each of three beginnings."""
    for before in range(3):
        whole = base64.b64encode(b"\0" * before + text.encode()).rstrip(b"=")
        first, last = -(-before * 8 // 6), (before + len(text)) * 8 // 6
        yield whole[first:last]


def _pieces(path: Path, overlap: int) -> Iterator[bytes]:
    """The content of a file, unpacked where it is packed, in pieces that overlap."""
    if path.suffix == ".parquet":
        # Its pages are compressed.
        yield from _rows(path)
        return
    before = b""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield before + piece
                before = piece[-overlap:]
    except FileNotFoundError:  # of a process that runs
        return


def _rows(path: Path) -> Iterator[bytes]:
    with pq.ParquetFile(path) as file:
        yield repr(file.schema_arrow.metadata).encode()
        for batch in file.iter_batches():
            for name in batch.schema.names:
                column = batch.column(name)
                if not _numbers(column.type):
                    yield json.dumps(column.to_pylist(), default=str).encode()


def _numbers(kind: Any) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) else kind
    return pa.types.is_primitive(inner)
