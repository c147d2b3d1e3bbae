"""Releases from an application's declaration: the declared one (base model, declared prompt, own lineage), and
the champion with another of the declared prompts.
"""

from pathlib import Path
from typing import Any

from millrace.applications import Application
from millrace.errors import ReleaseError
from millrace.releases.generator import declared_generator
from millrace.releases.manifest import Manifest, PromptVersion, declared_manifest
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
            champion gets the declared generator.
        run: who registers.

    Returns:
        `version`, `release_id`, and `changed`: whether it was registered now.

    Raises:
        ReleaseError: the variant is unknown, its template can't be used, or MLflow doesn't answer.
        EngineError: the base model's package isn't installed, or the upstream server has no such model.
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
        manifest, files = _champion_with(settings, application, split.champion, prompt)
    else:
        generator, files = declared_generator(settings, application)
        manifest = declared_manifest(application, generator, prompt, lineage_id(application))
    return register_once(settings, application, manifest, files, run=run, tags=tags)


def _champion_with(
    settings: Settings, application: Application, champion: str, prompt: PromptVersion
) -> tuple[Manifest, Path]:
    folder = fetch_release(settings, application, champion)
    return read_release(folder).changed(prompt=prompt), folder
