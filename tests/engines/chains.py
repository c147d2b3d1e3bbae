"""The example's chain, installed as packages are: a folder on the path with its module and its metadata."""

import shutil
import tomllib
from pathlib import Path

from millrace.settings import PROJECT

EXAMPLE = PROJECT / "examples" / "chain"
PACKAGE = "millrace-example-chain"


def install(folder: Path, **more: str) -> Path:
    """As `pip install --no-deps --target folder`, without building.

    Args:
        more: further entry points, name → value.
    """
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copy(EXAMPLE / "example_chain.py", folder)
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
        f"License-Expression: {project['license']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in (points | more).items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder
