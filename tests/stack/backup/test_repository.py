from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from millrace.errors import BackupError
from millrace.stack.backup.repository import FORMAT, Blob, Manifest, Repository

MADE_AT = datetime(2026, 11, 26, 18, 31, tzinfo=UTC)


def manifest(blobs: dict[str, Blob], *, at: datetime = MADE_AT, format: int = FORMAT) -> Manifest:
    return Manifest(
        format=format,
        made_at=at,
        millrace="0.1.0",
        home_format=2,
        environment="dev",
        parts={"home": blobs},
        tables={},
    )


def test_the_same_bytes_are_kept_once_and_given_back(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "backups")
    with repository.writing():
        blobs = {"a": repository.put([b"one", b"two"]), "b": repository.put([b"onetwo"]), "empty": repository.put([])}
        name = repository.finish(manifest(blobs))
    assert repository.written == 6
    assert len(list(repository.folder.glob("objects/??/*"))) == 2
    assert repository.names() == [name]
    assert repository.read(name).parts["home"] == blobs
    assert [b"".join(repository.get(blob)) for blob in blobs.values()] == [b"onetwo", b"onetwo", b""]


def test_a_backup_that_failed_half_way_is_none(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "backups")

    def chunks():
        yield b"half"
        raise OSError(28, "No space left on device")

    def fills_the_disk() -> None:
        with repository.writing():
            repository.put([b"whole"])
            repository.put(chunks())

    with pytest.raises(OSError, match="No space left"):
        fills_the_disk()
    assert repository.names() == []
    assert len(list(repository.folder.glob("objects/??/*"))) == 1
    assert not (repository.folder / "unfinished").exists()


def test_one_writes_at_a_time_and_nowhere_else_than_among_backups(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "backups")
    with (
        repository.writing(),
        pytest.raises(BackupError, match="another backup is being written to"),
        Repository(repository.folder).writing(),
    ):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(BackupError, match="holds something else than backups"),
        Repository(tmp_path / "other").writing(),
    ):
        pass
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_backup_of_a_newer_millrace_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "backups")
    with repository.writing():
        newer = repository.finish(manifest({}, format=FORMAT + 1))
    with pytest.raises(BackupError, match=f"has format {FORMAT + 1}, and this Millrace knows up to {FORMAT}; upgrade"):
        repository.read(newer)
    with pytest.raises(BackupError, match=f"has no backup 'yesterday'; it has {newer}"):
        repository.read("yesterday")


def test_what_only_older_backups_needed_goes_with_them(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "backups")
    names = []
    with repository.writing():
        kept = repository.put([b"in all"])
        for number in range(3):
            blobs = {"all": kept, "own": repository.put([str(number).encode()])}
            names.append(repository.finish(manifest(blobs, at=MADE_AT + timedelta(milliseconds=number))))
        assert repository.prune(2) == names[:1]
    assert repository.names() == names[1:]
    assert len(list(repository.folder.glob("objects/??/*"))) == 3
    for name in names[1:]:
        repository.verify(repository.read(name))
    (repository.folder / "backups" / f"{names[1]}.json").write_text("damaged")
    with repository.writing():
        last = repository.finish(manifest({}, at=MADE_AT + timedelta(seconds=1)))
        with pytest.raises(BackupError, match="was changed after the backup"):
            repository.prune(3)
    assert repository.names() == [*names[1:], last]
    assert len(list(repository.folder.glob("objects/??/*"))) == 3
    with repository.writing():
        assert repository.prune(2) == names[1:2]
