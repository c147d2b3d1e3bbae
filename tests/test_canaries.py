"""The search finds what it looks for, wherever and however it is written."""

import base64
import gzip
import itertools
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pytest
from cryptography.fernet import Fernet
from deltalake import write_deltalake

from millrace.private_files import write_private
from tests.canaries import Canaries, CommandLines

CANARIES = Canaries()
SECRET = CANARIES.secret("a_setting")


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        quote(SECRET, safe=""),
        SECRET.upper(),
        repr({"key": SECRET}),
        *(base64.b64encode(f"{'u' * before}:{SECRET}".encode()).decode() for before in range(3)),
        *(base64.urlsafe_b64encode(f"{'u' * before}{SECRET}".encode()).decode() for before in range(3)),
    ],
    ids=itertools.count(),  # the canary in them is another in each of pytest's processes
)
def test_every_spelling_is_found(written: str) -> None:
    assert CANARIES.are_in(f"before {written} after")
    assert not CANARIES.are_in(f"before {written[: len(written) // 4]} after")


def test_every_place_of_a_home_is_looked_at(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "lake" / "table", pa.table({"n": [1], "nested": [[{"said": SECRET}]]}))
    write_deltalake(tmp_path / "lake" / "clean", pa.table({"n": [1], "nested": [[{"said": "nothing"}]]}))
    write_deltalake(tmp_path / "lake" / "log", pa.table({"n": [1]}), description=SECRET)
    (tmp_path / "a.log").write_text(f"{'x' * 100}{SECRET}")
    (tmp_path / "a.gz").write_bytes(gzip.compress(SECRET.encode()))
    (tmp_path / "large.bin").write_bytes(b"x" * (32 * 2**20 - 9) + SECRET.encode())
    (tmp_path / "clean").write_text("a word about canaries")
    write_private(tmp_path / "secrets.json", SECRET)

    found = CANARIES.in_files(tmp_path)

    files = [one.split(":")[0] for one in found]
    assert [name for name in files if "/" not in name] == ["a.gz", "a.log", "large.bin"]
    assert {name.split("/")[1] for name in files if "/" in name} == {"log", "table"}
    assert any(name.startswith("lake/log/_delta_log/") for name in files)
    assert any(name.startswith("lake/table/") and name.endswith(".parquet") for name in files)


@pytest.mark.slow
def test_a_command_line_is_seen() -> None:
    with CommandLines() as lines:
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1.5)", SECRET], check=True)
    assert any(CANARIES.are_in(one) for one in lines.seen)


def test_a_home_takes_canaries_in_the_place_of_what_it_generates() -> None:
    made = CANARIES.generated()
    assert all(CANARIES.are_in(secret) for secret in made.values())
    Fernet(made["airflow_fernet_key"])
