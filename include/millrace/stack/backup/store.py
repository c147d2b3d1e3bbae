"""Where files are read from and written to: a folder, or a bucket of an object store, through Arrow's file systems.

It does not know what the files are.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from millrace.errors import AccessRefused, BackupError

CHUNK = 1 << 20
"""Bytes that are in memory at once."""


_REFUSALS = ("ACCESS_DENIED", "SIGNATURE_DOES_NOT_MATCH", "INVALID_ACCESS_KEY_ID", "INVALID_CLIENT_TOKEN_ID")
"""In what Arrow says, where a store doesn't let somebody do something or doesn't know them."""


@dataclass(frozen=True)
class Found:
    """A file as a listing shows it; `path` is below the store's root."""

    path: str
    size: int
    modified_ns: int


class Store:
    """Files below `root`, a path of `filesystem` (for a bucket: its name and a prefix).

    Args:
        identity: who asks, as an object store knows them.
    """

    def __init__(self, filesystem: FileSystem, root: str, identity: str = "this machine") -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._identity = identity

    @classmethod
    def at(cls, place: Path | str) -> "Store":
        """The files in a folder, or below an address that Arrow knows (`s3://bucket/prefix?endpoint_override=…`).

        Raises:
            BackupError: Arrow doesn't know it.
        """
        if isinstance(place, Path):
            return cls(LocalFileSystem(), str(place))
        try:
            return cls(*FileSystem.from_uri(place))
        except (OSError, ValueError):  # what it says repeats the address, which may hold a key
            raise BackupError(
                f"MILLRACE_BACKUP_ARTIFACTS begins with {place[:5]!r} and is no address that Arrow knows; "
                "write s3://bucket?region=… or file:///folder"
            ) from None

    def files(self, under: str = "") -> Iterator[Found]:
        """Every file below folder `under`, in order of its path; none where there is no such folder.

        Raises:
            AccessRefused: an object store doesn't let this identity; as all that follows.
        """
        for one in self._listed(under, recursive=True):
            if one.type == FileType.File:
                yield Found(one.path.removeprefix(f"{self._root}/"), one.size, one.mtime_ns or 0)

    def folders(self, under: str = "") -> list[str]:
        """Paths of the folders in folder `under`."""
        listed = self._listed(under, recursive=False)
        return [one.path.removeprefix(f"{self._root}/") for one in listed if one.type == FileType.Directory]

    def read(self, path: str) -> Iterator[bytes]:
        """The file's bytes.

        Raises:
            FileNotFoundError: it went meanwhile.
        """
        with self._let("read", path), self._filesystem.open_input_stream(self._at(path)) as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def write(self, path: str, chunks: Iterable[bytes]) -> None:
        """Make or replace a file."""
        if isinstance(self._filesystem, LocalFileSystem):
            Path(self._at(path)).parent.mkdir(parents=True, exist_ok=True)
        with self._let("write", path), self._filesystem.open_output_stream(self._at(path)) as file:
            for chunk in chunks:
                file.write(chunk)

    def _listed(self, under: str, *, recursive: bool) -> list[FileInfo]:
        selector = FileSelector(self._at(under), allow_not_found=True, recursive=recursive)
        with self._let("list", under):
            return sorted(self._filesystem.get_file_info(selector), key=lambda info: info.path)

    @contextmanager
    def _let(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not any(sign in str(error) for sign in _REFUSALS):
                raise
            raise AccessRefused(
                f"the object store does not let {self._identity} {action} {self._at(path)}; use a credential that may"
            ) from error

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root


@contextmanager
def only_for_its_owner() -> Iterator[None]:
    """What the process writes meanwhile, nobody else may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
