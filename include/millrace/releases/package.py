"""A release as files: the MLflow model that is uploaded, and the verified local folder that is loaded.

Knows the disk only. The MLflow model is `MLmodel` and `data/release/{manifest.json, <weights>}`, loaded by
`millrace.releases.pyfunc`: no pickle, no code.
"""

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from millrace.errors import ReleaseError
from millrace.releases.manifest import Manifest, file_sha256, read_manifest

MANIFEST = "manifest.json"
DATA = "release"

LOAD_CONFIG: dict[str, Any] = {
    "index_builds": "",  # folder with a folder of builds per lineage; this or the next is required
    "qdrant_url": "",  # Qdrant server that keeps the builds
    "qdrant_api_key": "",  # its API key or a JWT; empty: it asks for none
    "environment": "",  # whose builds on that server: dev, staging or prod
    "index_build": "",  # answer from this build; empty: from the published one
    "cache": "~/.cache/millrace",  # for the converted embedding model
    "threads": 0,  # 0: as many as there are processors
    "cache_gb": 1,  # of the generator
}
"""What `load_model(..., model_config=…)` may set. MLflow drops keys that the model was not saved with."""


def write_model(manifest: Manifest, weights: Path, folder: Path) -> Path:
    """The MLflow model of a release, in `folder`/model.

    Raises:
        ReleaseError: `weights` are not those that the manifest names.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    _require_bytes(manifest, weights)
    data = folder / DATA
    data.mkdir()
    (data / MANIFEST).write_text(manifest.canonical(), encoding="utf-8")
    _same_bytes(weights, data / manifest.generator.name)
    model = folder / "model"
    mlflow.pyfunc.save_model(
        model,
        loader_module="millrace.releases.pyfunc",
        data_path=str(data),
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "question")]),
            outputs=Schema(
                [
                    ColSpec(DataType.string, "answer"),
                    ColSpec(Array(DataType.string), "citations"),
                    ColSpec(DataType.long, "prompt_tokens"),
                    ColSpec(DataType.long, "completion_tokens"),
                ]
            ),
        ),
        # Named, or MLflow would load the model in another process to find out.
        pip_requirements=[f"millrace=={version('millrace')}"],
        model_config=LOAD_CONFIG,
        metadata={"release_id": manifest.release_id},
    )
    return model


def read_release(folder: Path) -> tuple[Manifest, Path]:
    """The manifest and the weights in a local release folder. Looks at sizes; `verify_release` looks at bytes.

    Raises:
        ReleaseError: there is no manifest, no weights, or weights of another size.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{folder} holds no readable {MANIFEST} ({error}); {_again(folder)}") from None
    manifest = read_manifest(text, str(folder / MANIFEST))
    weights = folder / manifest.generator.name
    if not weights.is_file():
        raise ReleaseError(f"{folder} holds no weights ({weights.name} is missing); {_again(folder)}")
    if weights.stat().st_size != manifest.generator.bytes:
        raise ReleaseError(
            f"{weights} has {weights.stat().st_size} bytes, its manifest says {manifest.generator.bytes}; "
            f"{_again(folder)}"
        )
    return manifest, weights


def verify_release(folder: Path, release_id: str) -> Manifest:
    """The manifest in `folder`, after reading every byte.

    Raises:
        ReleaseError: as `read_release`; or the bytes or the id are others than expected.
    """
    manifest, weights = read_release(folder)
    if manifest.release_id != release_id:
        raise ReleaseError(f"{folder} holds {manifest.release_id}, not {release_id}; {_again(folder)}")
    found = file_sha256(weights)
    if found != manifest.generator.sha256:
        raise ReleaseError(
            f"{weights} has other bytes (SHA-256 {found[:12]}…) than release {release_id} was registered with "
            f"({manifest.generator.sha256[:12]}…); {_again(folder)}"
        )
    return manifest


def install(downloaded: Path, folder: Path, release_id: str) -> None:
    """Verify a downloaded release, then move it to `folder` in one rename. Another process may have been first."""
    verify_release(downloaded, release_id)
    try:
        downloaded.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _require_bytes(manifest: Manifest, weights: Path) -> None:
    if not weights.is_file():
        raise ReleaseError(f"{weights} is not a file with weights; a release needs one .gguf file")
    found = file_sha256(weights)
    if found != manifest.generator.sha256:
        raise ReleaseError(
            f"{weights} has SHA-256 {found[:12]}…, the manifest says {manifest.generator.sha256[:12]}…; "
            "describe these weights again (`describe_weights`)"
        )


def _same_bytes(source: Path, target: Path) -> None:
    """A hard link where the disk allows it: 100 MB need not be written twice to be uploaded once."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _again(folder: Path) -> str:
    return f"remove {folder} and load the release again"
