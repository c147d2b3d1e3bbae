"""Which key stored pseudonyms were made with: noted once, whole, whatever the disk did."""

from pathlib import Path

import pytest

from millrace.errors import SettingsError
from millrace.sources.pseudonym import note_key, require_same_key


def test_the_first_key_is_noted_and_another_one_refused(tmp_path: Path) -> None:
    noted = tmp_path / "events" / "dev.pseudonym_key"
    require_same_key(b"one", noted)
    for key in (b"one", b"another"):
        note_key(key, noted)
    require_same_key(b"one", noted)
    with pytest.raises(SettingsError, match="another than what is stored was written with"):
        require_same_key(b"another", noted)
    assert [path.name for path in noted.parent.iterdir()] == [noted.name]


def test_a_note_that_a_full_disk_left_empty_is_written_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = tmp_path / "dev.pseudonym_key"
    noted.touch()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        note_key(b"one", noted)
    assert [path.name for path in tmp_path.iterdir()] == [noted.name]
    note_key(b"one", noted)
    with pytest.raises(SettingsError):
        require_same_key(b"another", noted)
