"""A release as a folder that a container engine builds an image from, and that answers without one too.

In it: the MLflow model, the index build that it answers from (unless a Qdrant server keeps it), Millrace's code, the
exact requirements, a Dockerfile. What runs in the container is `millrace.releases.serve`. Needs no container engine.
"""

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version as installed
from pathlib import Path

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.releases.manifest import Manifest, ServedModel
from millrace.releases.registry import fetch_model
from millrace.releases.requirements import locked
from millrace.releases.serve import INDEX, LOAD, MODEL
from millrace.retrieval.index import builds_of, published_build
from millrace.retrieval.library import LibraryBuilds
from millrace.settings import PACKAGE, Settings

BASE = "python:3.11-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84"
"""As the project's own Dockerfile; where another Python writes the folder, its image, without a digest."""

_DOCKERFILE = """\
# Release {release_id} of {application} (version {version}), answering from index build {build}.
# Made by `millrace release container`.
#
#   docker build --tag {application}:{release_id} .
#   docker run --rm --publish 127.0.0.1:8080:8080 {application}:{release_id}
#   curl http://127.0.0.1:8080/invocations --header 'Content-Type: application/json' \\
#       --data '{{"dataframe_records": [{{"question": "…"}}]}}'
#
# It needs no Millrace server{needs}.
FROM {base}

ENV PIP_NO_CACHE_DIR=1 \\
    UV_NO_CACHE=1 \\
    PYTHONDONTWRITEBYTECODE=1 \\
    MLFLOW_DISABLE_TELEMETRY=true \\
    HF_HUB_OFFLINE=1

RUN groupadd --gid 10001 millrace && useradd --uid 10001 --gid millrace --create-home millrace

WORKDIR /opt/release

# Changes least, takes longest: first.
COPY requirements.txt ./
RUN pip install uv==0.13.9 && uv pip install --system --compile-bytecode --no-deps -r requirements.txt
COPY code ./code
RUN uv pip install --system --no-deps ./code

# Its own: opening an index takes a lock beside it.
COPY --chown=10001:10001 {files} ./
{copies}
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/ping')"]
ENTRYPOINT ["python", "-m", "millrace.releases.serve", "/opt/release"]
CMD ["--host", "0.0.0.0", "--port", "8080"]
"""

_PROJECT = """\
[build-system]
requires = ["setuptools>=80"]
build-backend = "setuptools.build_meta"

[project]
name = "millrace"
version = "{version}"
# What it needs here is in requirements.txt, installed before.

[tool.setuptools.packages.find]
include = ["millrace*"]
"""


def write_container(
    settings: Settings, application: Application, version: str, folder: Path, *, build: str | None = None
) -> Manifest:
    """Write `folder`, whole or not at all.

    Args:
        version: of a registered release.
        folder: not there yet.
        build: the index build to answer from; None: the one that is published now.

    Returns:
        The release's manifest.

    Raises:
        ReleaseError: the folder is there, there is no such version, or what the release needs isn't installed here.
        RetrievalError: there is no such index build.
    """
    folder = folder.absolute()
    if folder.exists():
        raise ReleaseError(f"{folder} is there already; name a folder that is not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        manifest = fetch_model(settings, application, version, building / MODEL)
        lineage = manifest.retrieval.lineage
        build = build or published_build(settings, application, lineage)
        _write_index(settings, application, lineage, build, building)
        (building / "requirements.txt").write_text("\n".join(locked(manifest)) + "\n")
        _write_code(building / "code")
        (building / "Dockerfile").write_text(_dockerfile(manifest, version, build, building), encoding="utf-8")
        building.chmod(0o755)
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _write_index(settings: Settings, application: Application, lineage: str, build: str, folder: Path) -> None:
    """The build, or where it is; never a key."""
    builds = builds_of(settings, application.name, lineage)
    builds.manifest(build)
    told = {"index_build": build}
    if isinstance(builds, LibraryBuilds):
        builds.copy(build, folder / INDEX / lineage)
    else:
        told |= {"qdrant_url": settings.qdrant_url, "environment": settings.environment}
    (folder / LOAD).write_text(json.dumps(told, indent=1))


def _write_code(folder: Path) -> None:
    shutil.copytree(PACKAGE, folder / "millrace", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(_PROJECT.format(version=installed("millrace")))


def _dockerfile(manifest: Manifest, version: str, build: str, folder: Path) -> str:
    needs = []
    if not (folder / INDEX).is_dir():
        needs.append("the Qdrant server that `load.json` names (its key: qdrant_api_key)")
    if isinstance(manifest.generator, ServedModel):
        needs.append("the server that has its model (upstream_url, upstream_api_key)")
    told = f", but {' and '.join(needs)},\n# given as JSON in MLFLOW_PYFUNC_INFERENCE_CONFIG" if needs else ""
    copied = [name for name in (MODEL, INDEX) if (folder / name).is_dir()]
    # What is installed here is what runs there, and it was chosen for this Python.
    python = ".".join(map(str, sys.version_info[:2]))
    base = BASE if BASE.startswith(f"python:{python}-") else f"python:{python}-slim-bookworm"
    return _DOCKERFILE.format(
        release_id=manifest.release_id,
        application=manifest.application,
        version=version,
        build=build,
        needs=told,
        base=base,
        files=LOAD,
        copies="".join(f"COPY --chown=10001:10001 {name} ./{name}\n" for name in copied),
    )
