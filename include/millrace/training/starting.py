"""What a fine-tune starts from: the release whose prompt and retrieval it keeps, and the weights that it changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.errors import ReleaseError, TrainingError
from millrace.lakehouse.trained import trained_sets
from millrace.releases.declare import declare_release
from millrace.releases.manifest import Manifest, Weights
from millrace.releases.package import read_release
from millrace.releases.published_split import read_split
from millrace.releases.registry import fetch_release, release_manifest, versions
from millrace.settings import Settings


@dataclass(frozen=True)
class Start:
    """The weights that a fine-tune changes."""

    version: str | None
    """The release that they are from; None: the base model."""
    weights: Path
    """A GGUF file."""
    training_sets: tuple[str, ...] = ()
    """What they were trained on, the last set first."""


def starting_manifest(settings: Settings, application: Application, *, run: str) -> Manifest:
    """Of the champion, else of the release that the declaration describes (registered if it isn't yet).

    Raises:
        ReleaseError: MLflow doesn't answer.
    """
    version = (
        champion_version(settings, application)
        or declare_release(settings, application, variant=None, run=run)["version"]
    )
    return release_manifest(settings, application, version)


def champion_version(settings: Settings, application: Application) -> str | None:
    split = read_split(settings, application.name)
    return split.champion if split else None


def required_champion(settings: Settings, application: Application) -> str:
    """Raises:
    ReleaseError: there is no champion yet.
    """
    version = champion_version(settings, application)
    if version is None:
        raise ReleaseError(f"{application.name} has no champion yet; name the version of a release")
    return version


def trained_champion(settings: Settings, application: Application) -> str | None:
    """The champion's version, if its weights were trained here; else starting from it is starting from the base."""
    version = champion_version(settings, application)
    return version if version and trained_sets(_tags(settings, application, version)) else None


def starting_weights(settings: Settings, application: Application, version: str | None) -> Start:
    """The weights of release `version`, on this machine; None: of the base model.

    Raises:
        TrainingError: a server has them.
        ReleaseError: there is no such release, or MLflow doesn't answer.
        EngineError: the base model's package isn't installed.
    """
    if version is None:
        return Start(None, base_model_path(application.generator))
    folder = fetch_release(settings, application, version)
    generator = read_release(folder).generator
    if not isinstance(generator, Weights):
        raise TrainingError(
            f"release {application.name}@{version} has no weights of its own ({generator.kind} {generator.name}), so "
            'nothing can start from them; set training.start = "base"'
        )
    return Start(version, folder / generator.name, trained_sets(_tags(settings, application, version)))


def _tags(settings: Settings, application: Application, version: str) -> Mapping[str, str]:
    return versions(settings, application).get(version, {})
