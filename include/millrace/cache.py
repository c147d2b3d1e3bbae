"""Folders of the machine's cache (`MILLRACE_CACHE`): made once, for every process that comes later."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def made_once(ready: Path, make: Callable[[Path], None]) -> Path:
    """`ready`, filled by `make` if it isn't there yet.

    Several processes may make it at once; each renames a complete folder, and the first one stays.
    """
    if not ready.is_dir():
        ready.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=ready.parent))
        try:
            make(building)
            os.replace(building, ready)
        except OSError:
            if not ready.is_dir():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return ready
