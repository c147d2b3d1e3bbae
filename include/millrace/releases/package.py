"""A release as files: the MLflow model that is uploaded, and the verified local folder that is loaded.

Knows the disk only. The MLflow model is `MLmodel`, requirements, an input example, a model card and
`data/release/{manifest.json, <the generator's files>}`, with a fine-tuned embedding model's files in `embedding/`,
loaded by `millrace.releases.pyfunc`: no pickle, no code.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from millrace.errors import ReleaseError
from millrace.releases.manifest import File, Manifest, file_sha256, read_manifest
from millrace.releases.requirements import is_installed, required, requirements

MANIFEST = "manifest.json"
CARD = "model_card.md"
DATA = "release"
EMBEDDING = "embedding"
"""Folder of the fine-tuned embedding model's files, beside the generator's: some have the same names."""
LOADER = "millrace.releases.pyfunc"
AROUND = (
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", CARD,
    "input_example.json", "serving_input_example.json",
)  # fmt: skip
"""The files of the MLflow model beside the release's own."""
_TOOL = re.compile(r"(python|pip|setuptools|wheel)([=<>]=?[0-9.]+)?")
"""What MLflow installs requirements with."""

LOAD_CONFIG: dict[str, Any] = {
    "index_builds": "",  # folder with a folder of builds per lineage; this or the next is required
    "qdrant_url": "",  # Qdrant server that keeps the builds
    "qdrant_api_key": "",  # its API key or a JWT; empty: it asks for none
    "environment": "",  # whose builds on that server: dev, staging or prod
    "index_build": "",  # answer from this build; empty: from the published one
    "cache": "~/.cache/millrace",  # for the converted embedding model
    "threads": 0,  # 0: as many as there are processors
    "cache_gb": 1,  # of the generator
    "upstream_url": "",  # OpenAI-compatible server (`https://host:port/v1`), for releases whose model it has
    "upstream_api_key": "",  # its key; empty: it asks for none
}
"""What `load_model(..., model_config=…)` may set; where a command leaves no room for that (`mlflow models predict`,
`mlflow models serve`), the variable `MLFLOW_PYFUNC_INFERENCE_CONFIG`, as JSON. MLflow drops keys that the model was not
saved with."""


def write_model(
    manifest: Manifest,
    files: Path,
    folder: Path,
    *,
    embedding: Path | None = None,
    card: str,
    question: str,
    licences: Mapping[str, str],
) -> Path:
    """The MLflow model of a release, in `folder`/model.

    Args:
        files: the folder with the generator's files.
        embedding: the folder with the files of its fine-tuned embedding model; None: it has none.
        card: its model card, Markdown.
        question: its input example.
        licences: part of the release → licence, for programs; the card tells people.

    Raises:
        ReleaseError: they are not those that the manifest names, or what the release needs isn't installed.
    """
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    _require_bytes(manifest.generator.files, files)
    data = folder / DATA
    data.mkdir()
    (data / MANIFEST).write_text(manifest.canonical(), encoding="utf-8")
    for file in manifest.generator.files:
        _same_bytes(files / file.name, data / file.name)
    if embedding:
        _require_bytes(manifest.retrieval.tuned, embedding)
        (data / EMBEDDING).mkdir()
        for file in manifest.retrieval.tuned:
            _same_bytes(embedding / file.name, data / EMBEDDING / file.name)
    model = folder / "model"
    mlflow.pyfunc.save_model(
        model,
        loader_module=LOADER,
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
        input_example=pd.DataFrame({"question": [question]}),
        # Named, or MLflow would load the model in another process to find out.
        pip_requirements=requirements(manifest),
        model_config=LOAD_CONFIG,
        metadata={"release_id": manifest.release_id, "licences": dict(licences)},
    )
    (model / CARD).write_text(card, encoding="utf-8")
    return model


def read_release(folder: Path) -> Manifest:
    """The manifest in a local release folder, whose files are there. Looks at sizes; `verify_release` looks at bytes.

    Raises:
        ReleaseError: there is no manifest, or a file is missing or has another size.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(f"{folder} holds no readable {MANIFEST} ({error}); {_again(folder)}") from None
    manifest = read_manifest(text, str(folder / MANIFEST))
    for file, path in _files(manifest, folder):
        if not path.is_file():
            raise ReleaseError(f"{folder} holds no weights ({path.relative_to(folder)} is missing); {_again(folder)}")
        if path.stat().st_size != file.bytes:
            raise ReleaseError(
                f"{path} has {path.stat().st_size} bytes, its manifest says {file.bytes}; {_again(folder)}"
            )
    return manifest


def verify_release(folder: Path, release_id: str) -> Manifest:
    """The manifest in `folder`, after reading every byte.

    Raises:
        ReleaseError: as `read_release`; or the bytes or the id are others than expected.
    """
    manifest = read_release(folder)
    if manifest.release_id != release_id:
        raise ReleaseError(f"{folder} holds {manifest.release_id}, not {release_id}; {_again(folder)}")
    for file, path in _files(manifest, folder):
        found = file_sha256(path)
        if found != file.sha256:
            raise ReleaseError(
                f"{path} has other bytes (SHA-256 {found[:12]}…) than release {release_id} was "
                f"registered with ({file.sha256[:12]}…); {_again(folder)}"
            )
    return manifest


def verify_model(folder: Path, release_id: str) -> Manifest:
    """The manifest of an MLflow model, which is as `write_model` writes it and has nothing else: whoever may register
    models elsewhere could bring code or packages in it that run where it is loaded.

    Raises:
        ReleaseError: as `verify_release`; or the model has another loader, another file, or asks for other packages.
    """
    data = folder / "data" / DATA
    manifest = verify_release(data, release_id)
    known = {folder / name for name in AROUND} | {data / MANIFEST} | {path for _, path in _files(manifest, data)}
    found = {path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    problem = next((f"has {path.relative_to(folder)}, which no release has" for path in sorted(found - known)), None)
    problem = problem or _said_otherwise(folder, manifest)
    if problem:
        raise ReleaseError(
            f"the MLflow model of release {release_id} {problem}, and it is not loaded; find out who made it, then "
            "register the release again"
        )
    return manifest


def _said_otherwise(folder: Path, manifest: Manifest) -> str | None:
    """What a model's description says that `write_model` doesn't."""
    import yaml
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    try:
        flavors = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))["flavors"]
        flavor = flavors["python_function"]
        packages = (folder / "requirements.txt").read_text(encoding="utf-8").splitlines()
        asked = [Requirement(line) for line in packages]
        conda = yaml.safe_load((folder / "conda.yaml").read_text(encoding="utf-8"))
        *built, pip = conda["dependencies"]
        python = yaml.safe_load((folder / "python_env.yaml").read_text(encoding="utf-8"))
        built += python["build_dependencies"]
        if list(flavors) != ["python_function"] or flavor["loader_module"] != LOADER or flavor["code"] is not None:
            return f"is not loaded by {LOADER} alone"
        if flavor["data"] != f"data/{DATA}" or flavor["config"].items() - LOAD_CONFIG.items():
            return "names places of its own to load from"
        names = {canonicalize_name(one.name) for one in asked if not one.url and str(one.specifier).startswith("==")}
        if len(names) != len(packages) or names != {canonicalize_name(name) for name in required(manifest)}:
            return f"requires other packages than {', '.join(required(manifest))}"
        # The manifest names some of them itself, and who wrote it may own such a package: one that is here is known.
        if unknown := [name for name in required(manifest) if not is_installed(name)]:
            return f"requires {', '.join(unknown)}, not installed here"
        if pip != {"pip": packages} or python["dependencies"] != ["-r requirements.txt"]:
            return "requires other packages in conda.yaml or python_env.yaml than in requirements.txt"
        if conda["channels"] != ["conda-forge"] or not all(_TOOL.fullmatch(one) for one in built):
            return "wants to be installed with other tools than pip"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError, InvalidRequirement) as error:
        return f"can't be read ({type(error).__name__}: {error})"
    return None


def install(downloaded: Path, folder: Path, release_id: str) -> None:
    """Verify a downloaded release, then move it to `folder` in one rename. Another process may have been first."""
    verify_release(downloaded, release_id)
    try:
        downloaded.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _files(manifest: Manifest, folder: Path) -> Iterator[tuple[File, Path]]:
    """Every file of a release, and where it is in a local folder."""
    yield from ((file, folder / file.name) for file in manifest.generator.files)
    yield from ((file, folder / EMBEDDING / file.name) for file in manifest.retrieval.tuned)


def _require_bytes(files: Iterable[File], folder: Path) -> None:
    for file in files:
        path = folder / file.name
        if not path.is_file():
            raise ReleaseError(f"{path} is not a file; the manifest names it as part of the release")
        found = file_sha256(path)
        if found != file.sha256:
            raise ReleaseError(
                f"{path} has SHA-256 {found[:12]}…, the manifest says {file.sha256[:12]}…; describe it again"
            )


def _same_bytes(source: Path, target: Path) -> None:
    """A hard link where the disk allows it: 100 MB need not be written twice to be uploaded once."""
    try:
        os.link(source.resolve(), target)  # Hugging Face's cache is links
    except OSError:
        shutil.copyfile(source, target)


def _again(folder: Path) -> str:
    return f"remove {folder} and load the release again"
