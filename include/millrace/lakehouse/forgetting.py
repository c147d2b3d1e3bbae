"""Leaving nothing of rows that are no longer in a table: not in old files, change feed or log.

A deleted row lives on in the files of older versions, in the change feed, and in the log, which knows the least and the
greatest value of each column of each file, and which rows a deletion was about. No retention is soon enough for that;
and the log's entries must stay where they are: a writer that still holds an older version would otherwise commit under
a number that was taken. So files go at once, and log entries lose what they tell of content. Nothing is committed here,
so it is right for tables of either engine; older versions can't be read any more, and who is reading one at this moment
has to begin again.
"""

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from pyarrow.fs import FileSelector, FileSystem, FileType

from millrace.lakehouse.commits import open_table, refusal
from millrace.lakehouse.storage import files_for_upkeep
from millrace.lakehouse.tables import Table

LOG = "_delta_log"
UNCOMMITTED = timedelta(hours=1)
"""A file that no version names is left so long: its writer may be about to commit it."""


def forget_removed(uri: str, table: Table) -> int:
    """Remove whatever holds rows that the table at `uri` has no more; how many files went. Safe to repeat.

    Raises:
        LakehouseError: the table can't be read, or storage refused; repeating it does the rest.
    """
    opened = open_table(uri, table)
    try:
        files = files_for_upkeep(uri)
        gone = _remove_files(opened, files)
        # Whoever opens the table from now on begins here: entries before it need no statistics.
        opened.create_checkpoint()
        return gone + _scrub_log(opened.version(), files)
    except (DeltaError, OSError) as error:
        raise refusal(table, uri, error, "tidy") from error


def _remove_files(opened: DeltaTable, files: FileSystem) -> int:
    """Everything that the present version doesn't name, the change feed too, less what may yet be committed."""
    fed = _fed(opened.version(), files)
    removed = set(opened.vacuum(retention_hours=0, dry_run=True, enforce_retention_duration=False))
    current = {name.rpartition("/")[2] for name in opened.file_uris()}  # each is unique
    now = datetime.now(UTC)
    gone = 0
    for found in files.get_file_info(FileSelector("", recursive=True)):
        path = found.path
        if found.type != FileType.File or not path.endswith(".parquet") or path.startswith(LOG):
            continue
        name = path.rpartition("/")[2]
        forgotten = name not in current and found.mtime < now - UNCOMMITTED
        if path in removed or name in fed or forgotten:
            _delete(files, path)
            gone += 1
    return gone


def _fed(version: int, files: FileSystem) -> set[str]:
    """Names of the change feed's files of the versions up to `version`, as far back as the log goes."""
    named = set[str]()
    for found in files.get_file_info(FileSelector(LOG)):
        number, _, kind = found.path.rpartition("/")[2].partition(".")
        if kind != "json" or not number.isdigit() or int(number) > version:
            continue
        with files.open_input_stream(found.path) as stream:
            actions = [json.loads(line) for line in stream.read().decode().splitlines()]
        named |= {action["cdc"]["path"].rpartition("/")[2] for action in actions if "cdc" in action}
    return named


def _scrub_log(version: int, files: FileSystem) -> int:
    """Take what tells of content from the entries up to `version`; remove older checkpoints, which tell it too."""
    gone = 0
    for found in files.get_file_info(FileSelector(LOG)):
        name = found.path.rpartition("/")[2]
        number = name.partition(".")[0]
        if not number.isdigit() or int(number) > version:
            continue
        if name.endswith(".json") and ".checkpoint." not in name:
            _scrub(files, found.path)
        elif name.endswith(".crc") or int(number) < version:
            _delete(files, found.path)
            gone += 1
    return gone


def _scrub(files: FileSystem, path: str) -> None:
    with files.open_input_stream(path) as stream:
        text = stream.read().decode()
    lines = [_scrubbed(line) for line in text.splitlines()]
    scrubbed = "".join(f"{line}\n" for line in lines)
    if scrubbed.strip() == text.strip():
        return
    # Hadoop keeps a checksum beside a local file, and believes that instead of the file.
    _delete(files, f"{LOG}/.{path.rpartition('/')[2]}.crc")
    # Whole or not at all, as delta-rs writes; through Arrow it would be handed a buffer, which it doesn't take.
    with closing(files.handler._handler.open_output_stream(path)) as stream:
        stream.write(scrubbed.encode())


def _scrubbed(line: str) -> str:
    """An action without what files hold, or which rows were deleted."""
    told: dict[str, Any] = json.loads(line)
    parts = [told.get("add", {}), told.get("remove", {}), told.get("commitInfo", {}).get("operationParameters", {})]
    if not any(part.pop(name, None) is not None for part in parts for name in ("stats", "predicate")):
        return line
    return json.dumps(told, separators=(",", ":"))


def _delete(files: FileSystem, path: str) -> None:
    if files.get_file_info(path).type != FileType.NotFound:
        files.delete_file(path)
