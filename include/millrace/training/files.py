"""Small files that other processes read while they are written anew."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write so that a reader, or a crash, finds the old text or the new one."""
    building = path.with_name(f".{path.name}.{os.getpid()}")
    with building.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    building.replace(path)
