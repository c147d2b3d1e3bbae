"""A folder of backups. Bytes are kept once, under their SHA-256, whichever backup has them: the next one costs what
changed. A backup is its manifest, which is written last and named by its own hash, so one that was killed isn't there,
and one that was changed is noticed.
It leaves to its caller who may read what it writes.

    objects/3f/a2…                  bytes
    backups/<time>-<hash>.json      which of them are which file
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from millrace.errors import BackupError
from millrace.stack.backup.store import CHUNK

FORMAT = 1
_NAMED_PROBLEMS = 3


class Blob(BaseModel):
    """One file's bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    size: int
    modified_ns: int = 0
    """When the file was written that they came from; 0: they came from none."""


Files = dict[str, Blob]
"""Path → bytes."""


class Manifest(BaseModel):
    """What a backup holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    made_at: datetime
    millrace: str
    """Version of the code."""
    home_format: int
    environment: str
    parts: dict[str, Files]
    tables: dict[str, int]
    """Delta table, by its path in the lake → the version that it was saved at."""

    @property
    def bytes(self) -> int:
        return sum(blob.size for files in self.parts.values() for blob in files.values())


class Repository:
    """The backups in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0
        """Bytes that `put` found new."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Alone: two backups into one folder would clear away each other's unfinished files.

        Raises:
            BackupError: another backup is being written here, or the folder holds something else.
        """
        if self.folder.exists() and not self._backups.exists() and any(self.folder.iterdir()):
            raise BackupError(f"{self.folder} holds something else than backups; choose a folder that is new or empty")
        for folder in (self.folder, self._backups, self._objects):
            folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BackupError(f"another backup is being written to {self.folder}; wait for its end") from None
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished.mkdir()
            try:
                yield
            finally:
                shutil.rmtree(self._unfinished, ignore_errors=True)

    def put(self, chunks: Iterable[bytes], modified_ns: int = 0) -> Blob:
        """Keep these bytes."""
        digest, size = hashlib.sha256(), 0
        descriptor, name = tempfile.mkstemp(dir=self._unfinished)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += file.write(chunk)
        blob = Blob(sha256=digest.hexdigest(), size=size, modified_ns=modified_ns)
        path = self.path(blob)
        path.parent.mkdir(exist_ok=True)
        self.written += 0 if path.exists() else size
        # Also over one that is there: its disk may have lost a bit of it.
        os.replace(name, path)
        return blob

    def has(self, blob: Blob) -> bool:
        """Whether as many bytes are there; what they are, `verify` says."""
        path = self.path(blob)
        return path.exists() and path.stat().st_size == blob.size

    def get(self, blob: Blob) -> Iterator[bytes]:
        """
        Raises:
            BackupError: those are not the bytes that were saved.
        """
        digest, size = hashlib.sha256(), 0
        try:
            with self.path(blob).open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk
        except FileNotFoundError:
            raise BackupError(f"{self.path(blob)} is missing") from None
        if (digest.hexdigest(), size) != (blob.sha256, blob.size):
            raise BackupError(f"{self.path(blob)} holds other bytes than were saved")

    def finish(self, manifest: Manifest) -> str:
        """Make it a backup; its name."""
        text = manifest.model_dump_json().encode()
        name = f"{manifest.made_at:%Y%m%dT%H%M%S.%fZ}-{hashlib.sha256(text).hexdigest()[:16]}"
        writing = self._unfinished / name
        with writing.open("wb") as file:
            file.write(text)
        os.sync()  # the bytes before the manifest that names them
        writing.rename(self._backups / f"{name}.json")
        os.sync()
        return name

    def names(self) -> list[str]:
        """Oldest first."""
        return sorted(path.stem for path in self._backups.glob("*.json"))

    def read(self, name: str) -> Manifest:
        """
        Raises:
            BackupError: there is no such backup, it was changed, or a newer Millrace wrote it.
        """
        path = self._backups / f"{name}.json"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            known = ", ".join(self.names()) or "none"
            raise BackupError(f"{self.folder} has no backup {name!r}; it has {known}") from None
        if hashlib.sha256(text).hexdigest()[:16] != name.rpartition("-")[2]:
            raise BackupError(f"{path} was changed after the backup; use another backup of {self.folder}")
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            raise BackupError(f"{path} can't be understood ({error.errors()[0]['msg']}); upgrade Millrace") from None
        if manifest.format > FORMAT:
            raise BackupError(f"{path} has format {manifest.format}, and this Millrace knows up to {FORMAT}; upgrade")
        return manifest

    def newest(self) -> str:
        """
        Raises:
            BackupError: there is none.
        """
        if not (names := self.names()):
            raise BackupError(
                f"there is no whole backup in {self.folder}; make one with `millrace backup {self.folder}`"
            )
        return names[-1]

    def verify(self, manifest: Manifest) -> None:
        """Read every byte.

        Raises:
            BackupError: some are missing or are not what was saved; of which files.
        """
        wrong, right = [], set()
        for part, files in manifest.parts.items():
            for path, blob in files.items():
                if blob.sha256 in right:
                    continue
                try:
                    for _ in self.get(blob):
                        pass
                    right.add(blob.sha256)
                except BackupError as error:
                    wrong.append(f"{part}/{path}: {error}")
        if wrong:
            more = f"; and {len(wrong) - _NAMED_PROBLEMS} more" if len(wrong) > _NAMED_PROBLEMS else ""
            raise BackupError(
                f"the backup can't be trusted, nothing was restored: {'; '.join(wrong[:_NAMED_PROBLEMS])}{more}; "
                f"use another backup of {self.folder}, or a copy of the folder"
            )

    def prune(self, keep: int) -> list[str]:
        """Remove all but the newest backups, and what only they needed; their names. Called inside `writing`.

        Raises:
            BackupError: one that stays can't be read, so nobody knows what it needs; nothing was removed.
        """
        gone, stay = self.names()[:-keep], self.names()[-keep:]
        needed = {blob.sha256 for name in stay for files in self.read(name).parts.values() for blob in files.values()}
        for name in gone:
            (self._backups / f"{name}.json").unlink()
        for path in self._objects.glob("??/*"):
            if path.parent.name + path.name not in needed:
                path.unlink()
        return gone

    @property
    def _backups(self) -> Path:
        return self.folder / "backups"

    @property
    def _objects(self) -> Path:
        return self.folder / "objects"

    @property
    def _unfinished(self) -> Path:
        return self.folder / "unfinished"

    def path(self, blob: Blob) -> Path:
        """The file that holds these bytes."""
        return self._objects / blob.sha256[:2] / blob.sha256[2:]
