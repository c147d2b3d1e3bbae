"""Releases from an application's declaration: the declared one (base model, declared prompt, own lineage), and
the champion with another of the declared prompts.
"""

from importlib.metadata import version as code_version
from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.engines.base_model import base_model_path
from millrace.errors import ReleaseError
from millrace.releases.manifest import Manifest, PromptVersion, declared_manifest, describe_weights
from millrace.releases.package import read_release
from millrace.releases.registry import (
    fetch_release,
    read_split,
    register_once,
    register_prompt,
    training_tags,
)
from millrace.retrieval.embed import lineage_id
from millrace.settings import Settings

DECLARED = "declared"
"""Name of the declared prompt itself, among its variants."""


def declare_release(settings: Settings, application: Application, *, variant: str | None, run: str) -> dict[str, Any]:
    """Register the declared release, or the champion's generator with another of the declared prompts.

    Args:
        variant: name in `[prompt.variants]`; None or `declared`: the declared release. A variant before the first
            champion gets the base model.
        run: who registers.

    Returns:
        `version`, `release_id`, and `changed`: whether it was registered now.

    Raises:
        ReleaseError: the variant is unknown, its template can't be used, or MLflow doesn't answer.
        EngineError: the base model's package isn't installed.
    """
    variant = variant or DECLARED
    templates = {DECLARED: application.prompt.template, **application.prompt.variants}
    if variant not in templates:
        raise ReleaseError(f"prompt variant {variant!r} is not declared; declared are {', '.join(templates)}")
    prompt = register_prompt(settings, application, templates[variant], run=run)
    split = read_split(settings, application.name) if variant != DECLARED else None
    tags = {"millrace.origin": "declaration", "millrace.variant": variant}
    if split and split.champion:
        tags |= training_tags(settings, application, split.champion)
        manifest, weights = _champion_with(settings, application, split.champion, prompt)
    else:
        weights = base_model_path(application.generator)
        manifest = declared_manifest(application, describe_weights(weights), prompt, lineage_id(application))
    return register_once(settings, application, manifest, weights, run=run, tags=tags)


def _champion_with(
    settings: Settings, application: Application, champion: str, prompt: PromptVersion
) -> tuple[Manifest, Path]:
    manifest, weights = read_release(fetch_release(settings, application, champion))
    return manifest.model_copy(update={"prompt": prompt, "code_version": code_version("millrace")}), weights
