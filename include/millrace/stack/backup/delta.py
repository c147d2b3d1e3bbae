"""Delta tables at a version: the files of their logs up to it and whatever these may name, while others go on writing.

Files of a table are never rewritten, and none that its newest version needs goes before its retention is over, so a
version that was read a moment ago is still whole in the listing that follows. Only an erasure
(`lakehouse/forgetting.py`) rewrites log entries and removes files at once: a backup that meets one is run again. It
does not know which tables there are.
"""

import re
from collections.abc import Iterator
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from millrace.errors import BackupError
from millrace.lakehouse.storage import Location, delta_options
from millrace.stack.backup.store import Found, Store

LOG = "_delta_log"
_DEPTH = 4
"""Tables are at `<environment>/<application>/<layer>/<table>`."""
_VERSIONS = re.compile(r"\d{20}")


def is_log(table: str, path: str) -> bool:
    """Whether the file at `path` says what the table at `table` is; checksums beside it say nothing more."""
    return path.startswith(f"{table}/{LOG}/") and not path.endswith(".crc")


class Tables:
    """The Delta tables below `root`, whose files are those of `files`."""

    def __init__(self, files: Store, root: Location) -> None:
        self.store = files
        self._root = root

    def paths(self, environment: str = "") -> list[str]:
        """Of every table of an environment, or of all of them."""
        paths = [environment] if environment else self.store.folders()
        for _ in range(_DEPTH - 1):
            paths = [below for path in paths for below in self.store.folders(path)]
        # A table begins with its first commit; a folder without one is a killed attempt at it.
        return [path for path in paths if next(self.store.files(f"{path}/{LOG}"), None)]

    def version(self, path: str) -> int:
        """
        Raises:
            BackupError: the table can't be read.
        """
        return self._open(path).version()

    def files(self, path: str, version: int) -> Iterator[Found]:
        """What the table needs at `version`, and what its past holds still; the log last, oldest commit first.

        `_last_checkpoint` is left out: it may speak of a later version, and readers do without it.
        """
        log = f"{path}/{LOG}/"
        commits = []
        for one in self.store.files(path):
            if not one.path.startswith(log):
                yield one
                continue
            name = one.path.removeprefix(log)
            numbers = [int(number) for number in _VERSIONS.findall(name)]
            if name != "_last_checkpoint" and all(number <= version for number in numbers):
                commits.append(one)
        yield from commits

    def needed(self, path: str, version: int) -> set[str]:
        """Paths, in the store, of the data files that hold the rows of `version`.

        Raises:
            BackupError: the table can't be read.
        """
        actions = self._open(path, version).get_add_actions()
        return {f"{path}/{unquote(one)}" for one in actions.column("path").to_pylist()}

    def check(self, path: str, version: int) -> None:
        """
        Raises:
            BackupError: the table is not at this version.
        """
        found = self.version(path)
        if found != version:
            raise BackupError(f"table {path} is at version {found} and was saved at {version}; restore it again")

    def _open(self, path: str, version: int | None = None) -> DeltaTable:
        try:
            return DeltaTable(f"{self._root}/{path}", version=version, storage_options=delta_options(self._root))
        except (DeltaError, OSError, ValueError) as error:
            raise BackupError(f"table {path} in {self._root} can't be read: {' '.join(str(error).split())}") from error
