"""Releases that need no training here: the declared one (base model, declared prompt, own lineage), the champion with
another of the declared prompts, and the champion with a generator that somebody brings.
"""

from pathlib import Path
from typing import Any

from pydantic import JsonValue

from millrace.applications import Application
from millrace.engines.langchain import installed_chain
from millrace.engines.transformers import TransformersEngine
from millrace.errors import ReleaseError
from millrace.releases.generator import declared_generator, open_chain
from millrace.releases.manifest import (
    Chain,
    Generator,
    Manifest,
    PromptVersion,
    declared_manifest,
    describe_huggingface,
)
from millrace.releases.package import read_release
from millrace.releases.prompt_registry import register_prompt
from millrace.releases.published_split import read_split
from millrace.releases.registry import fetch_release, register_once, release_manifest, training_tags
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


def add_model(
    settings: Settings, application: Application, folder: Path, *, name: str | None, run: str
) -> dict[str, Any]:
    """Register the champion with the model in a Hugging Face directory as its generator; before the first champion, the
    declared release with it. The model is loaded first, so that what can't answer is never registered.

    Args:
        folder: as `save_pretrained` writes it: safetensors, configuration, tokenizer.
        name: what people call the model; None: the folder's name.
        run: who registers.

    Returns:
        As `declare_release`.

    Raises:
        EngineError: the model can't be loaded as it is, or asks for code of its own.
        SettingsError: the declaration has no price for it.
        ReleaseError: MLflow doesn't answer.
    """
    folder = folder.absolute()
    generator = describe_huggingface(folder, name or folder.name)
    application.prices.of(generator.name)
    TransformersEngine(folder, threads=settings.threads).close()
    manifest = _starting(settings, application, generator, run)
    return register_once(settings, application, manifest, folder, run=run, tags={"millrace.origin": "added"})


def add_chain(
    settings: Settings,
    application: Application,
    name: str,
    *,
    parameters: dict[str, JsonValue],
    context_tokens: int,
    run: str,
) -> dict[str, Any]:
    """The same with an installed LangChain chain as the generator. It is made first; it is not asked anything.

    Args:
        name: of its entry point.
        parameters: what its factory is given; they go into the registry, so no secrets.
        context_tokens: most that prompt and completion may have together.
        run: who registers.

    Returns:
        As `declare_release`.

    Raises:
        EngineError: it isn't installed, can't be made, or would ignore how to generate.
        SettingsError: the declaration has no price for it.
        ReleaseError: MLflow doesn't answer.
    """
    found = installed_chain(name)
    generator = Chain(
        name=name,
        package=found.package,
        package_version=found.version,
        parameters=parameters,
        context_tokens=context_tokens,
    )
    application.prices.of(generator.name)
    open_chain(generator).close()
    manifest = _starting(settings, application, generator, run)
    return register_once(settings, application, manifest, settings.home, run=run, tags={"millrace.origin": "added"})


def _starting(settings: Settings, application: Application, generator: Generator, run: str) -> Manifest:
    """The champion's manifest, or the declared one, with `generator`."""
    split = read_split(settings, application.name)
    if split and split.champion:
        return release_manifest(settings, application, split.champion).changed(generator=generator)
    prompt = register_prompt(settings, application, application.prompt.template, run=run)
    return declared_manifest(application, generator, prompt, lineage_id(application))


def _champion_with(
    settings: Settings, application: Application, champion: str, prompt: PromptVersion
) -> tuple[Manifest, Path]:
    folder = fetch_release(settings, application, champion)
    return read_release(folder).changed(prompt=prompt), folder
