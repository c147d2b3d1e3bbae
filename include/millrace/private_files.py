"""Files that only their owner may read, replaced in one step."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace `path` in one step; nobody but its owner may read it. A power cut leaves the old or the new one."""
    write_private(path, json.dumps(value, indent=1))


def write_private(path: Path, text: str) -> None:
    """As `write_json`."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
