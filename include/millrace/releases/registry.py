"""Releases and prompts in the MLflow registry. Signatures first; see below in the next commit."""

from pathlib import Path

from millrace.applications import Application
from millrace.releases.manifest import Manifest, PromptVersion
from millrace.releases.split import Split
from millrace.settings import Settings


def register_release(
    settings: Settings, application: Application, manifest: Manifest, weights: Path, *, run: str, tags: dict[str, str]
) -> str:
    """Version (as a string) of the registered release; the same release again gives the same version."""
    raise NotImplementedError


def fetch_release(settings: Settings, application: Application, version: str) -> Path:
    """Folder with `manifest.json` and the weights, verified."""
    raise NotImplementedError


def release_manifest(settings: Settings, application: Application, version: str) -> Manifest:
    raise NotImplementedError


def find_version(settings: Settings, application: Application, release_id: str) -> str | None:
    raise NotImplementedError


def versions(settings: Settings, application: Application) -> dict[str, dict[str, str]]:
    """Version → its tags, oldest first."""
    raise NotImplementedError


def tag_release(settings: Settings, application: Application, version: str, tags: dict[str, str]) -> None:
    raise NotImplementedError


def register_prompt(settings: Settings, application: Application, template: str, *, run: str) -> PromptVersion:
    raise NotImplementedError


def read_split(settings: Settings, application: str) -> Split | None:
    raise NotImplementedError


def publish_split(settings: Settings, application: str, split: Split, *, previous: str | None = None) -> None:
    raise NotImplementedError
