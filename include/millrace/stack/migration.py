"""A home of an older format becomes one of this format: first a copy of it, then one step a format, then its number.

Killed anywhere, the next start does it again, from the copy that there is: a copy counts once it has its name, and is
called unfinished until every step is done; every step can be repeated, and the home says its new format last. It runs
before any part is started, so nobody else writes.
"""

import logging
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from millrace import FORMAT_VERSION
from millrace.errors import StackError
from millrace.lakehouse.rows import FORMAT_PROPERTY

log = logging.getLogger(__name__)

BACKUPS = "backups"
_MADE_AGAIN = (BACKUPS, "run", "logs", "spark", "training")
"""Folders of a home that a copy leaves out: nothing in them outlives the stack, or training makes it again."""
_REWRITTEN = ("postgres", "airflow")
"""Folders whose files are written in place. Files elsewhere are replaced or added, so a hard link keeps the old one."""


def migrate(home: Path, found: int) -> Path:
    """Copy `home`, of format `found`, then bring it to `FORMAT_VERSION`.

    Returns:
        The copy. To go back: end the stack, and put its files in the place of the home's.

    Raises:
        StackError: the disk refused; the home is as it was.
    """
    unfinished = home / BACKUPS / f"format-{found}.unfinished"
    copy = home / BACKUPS / f"format-{found}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    try:
        if not unfinished.exists():
            _copy(home, unfinished)
        for number in range(found, FORMAT_VERSION):
            STEPS[number](home)
        unfinished.rename(copy)
    except (OSError, DeltaError) as error:
        raise StackError(
            f"{home} has format {found} and can't be brought to {FORMAT_VERSION}: {error}; nothing is lost: "
            "free some disk, or correct what the message names, and start again"
        ) from error
    log.info("%s was brought from format %d to %d; a copy of it is in %s", home, found, FORMAT_VERSION, copy)
    return copy


def _tables_say_their_format(home: Path) -> None:
    """1 → 2: every Delta table carries the format of its rows, so that an older Millrace leaves newer ones alone."""
    for folder in sorted((home / "lake").glob("*/*/*/*/_delta_log")):
        table = DeltaTable(str(folder.parent))
        if FORMAT_PROPERTY not in table.metadata().configuration:
            # The property isn't Delta's own, which delta-rs has to be told.
            table.alter.set_table_properties({FORMAT_PROPERTY: "2"}, raise_if_not_exists=False)


STEPS: dict[int, Callable[[Path], None]] = {1: _tables_say_their_format}
"""Format → the step to the next one. A step is never changed once a release has it."""


def _copy(home: Path, copy: Path) -> None:
    making = copy.with_name(f".{copy.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True, mode=0o700)
    for path in home.iterdir():
        if path.name in _MADE_AGAIN or path.is_socket():
            continue
        if path.is_dir():
            rewritten = path.name in _REWRITTEN
            shutil.copytree(
                path, making / path.name, symlinks=True, copy_function=shutil.copy2 if rewritten else _linked
            )
        else:
            shutil.copy2(path, making / path.name)
    making.rename(copy)


def _linked(source: str, target: str) -> None:
    """A hard link, or a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
