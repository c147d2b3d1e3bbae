"""Versions of an application's prompt: which there are and who met them, how two differ, what one makes of a question.

Versions live in the MLflow prompt registry (`<application>.prompt`) and are made when a release is registered; who
met them is counted in `silver/exchanges`. Nothing here writes.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import unified_diff
from pathlib import Path

from millrace.applications import Application
from millrace.errors import PromptError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_EXCHANGES
from millrace.prompts.space import UNREGISTERED
from millrace.releases.embedding import release_lineage
from millrace.releases.loader import ReleaseLoader
from millrace.releases.manifest import PromptVersion
from millrace.releases.mlflow_server import found_or_none, mlflow_client
from millrace.releases.package import read_release
from millrace.releases.pipeline import Answer, AnswerPipeline, checked_question
from millrace.releases.prompt import check_template, render
from millrace.releases.published_split import read_split
from millrace.releases.registry import RUN_TAG, fetch_release, release_manifest
from millrace.retrieval.embed import declared_lineage
from millrace.retrieval.index import builds_of
from millrace.retrieval.search import Hit, Retriever
from millrace.settings import Settings


@dataclass(frozen=True)
class Version:
    """One version in the prompt registry."""

    version: int
    template: str
    registered_by: str
    created_at: datetime
    exchanges: int
    """Answered with it, as far as feedback was ingested."""


@dataclass(frozen=True)
class Tried:
    """What a template makes of a question."""

    message: str
    hits: tuple[Hit, ...]
    """The chunks that it was given."""
    answer: Answer | None


def list_versions(settings: Settings, application: Application) -> list[Version]:
    """All versions, oldest first; empty: no release was registered yet.

    Raises:
        ReleaseError: MLflow doesn't answer.
    """
    name = prompt_name(application)
    with mlflow_client(settings, f"list the versions of prompt {name}") as client:
        prompt = found_or_none(settings, lambda: client.get_prompt(name))
        found = list(client.search_prompt_versions(name)) if prompt is not None else []
    met = Counter(
        Lake.of(settings, application.name).read(SILVER_EXCHANGES, ["prompt_version"])["prompt_version"].to_pylist()
    )
    return sorted(
        (
            Version(
                version=int(one.version),
                template=one.template,
                registered_by=one.tags.get(RUN_TAG, ""),
                created_at=datetime.fromtimestamp((one.creation_timestamp or 0) / 1000, UTC),
                exchanges=met[f"{name}/{one.version}"],
            )
            for one in found
        ),
        key=lambda one: one.version,
    )


def find_version(settings: Settings, application: Application, version: int) -> Version:
    """One of them.

    Raises:
        PromptError: there is no such version.
        ReleaseError: MLflow doesn't answer.
    """
    found = {one.version: one for one in list_versions(settings, application)}
    if version not in found:
        there = ", ".join(map(str, found)) or "none; a version is made when a release is registered"
        raise PromptError(f"prompt {prompt_name(application)} has no version {version}; there are {there}")
    return found[version]


def template_of(settings: Settings, application: Application, version: int | None) -> str:
    """The template of a version; None: the champion's, or before the first champion the declared one.

    Raises:
        PromptError: there is no such version.
        ReleaseError: MLflow doesn't answer.
    """
    if version is not None:
        return find_version(settings, application, version).template
    split = read_split(settings, application.name)
    if split is None or split.champion is None:
        return application.prompt.template
    return release_manifest(settings, application, split.champion).prompt.template


def read_template(path: Path) -> str:
    """The template in a file.

    Raises:
        PromptError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path} can't be read as a template ({error}); name a text file") from None


def diff(settings: Settings, application: Application, before: int, after: int) -> str:
    """What changed from version `before` to version `after`, as a unified diff with whole templates as context; empty:
    nothing did.

    Raises:
        PromptError: there is no such version.
        ReleaseError: MLflow doesn't answer.
    """
    old, new = (find_version(settings, application, version) for version in (before, after))
    name = prompt_name(application)
    old_lines, new_lines = old.template.splitlines(), new.template.splitlines()
    lines = unified_diff(
        old_lines,
        new_lines,
        f"{name}/{before}",
        f"{name}/{after}",
        n=max(len(old_lines), len(new_lines)),
        lineterm="",
    )
    return "\n".join(lines)


def try_template(
    settings: Settings, application: Application, template: str, question: str, *, answer: bool = False
) -> Tried:
    """Render `template` on `question`, with chunks from the published index build, as the champion retrieves them
    (before the first champion: as declared); with `answer`, let the champion's generator answer it.

    Raises:
        ReleaseError: the template can't be used, the question is empty, or MLflow doesn't answer.
        RetrievalError: no index build is published.
        PromptError: an answer is wanted, and there is no champion.
        EngineError: the generator can't be loaded.
    """
    check_template(template)
    question = checked_question(question)
    split = read_split(settings, application.name)
    champion = split.champion if split else None
    if champion is None:
        if answer:
            raise PromptError(f"{application.name} has no champion whose generator could answer; admit a release first")
        lineage, chunks = declared_lineage(application), application.retrieval.chunks
    else:
        folder = fetch_release(settings, application, champion)
        manifest = read_release(folder)
        lineage, chunks = release_lineage(manifest, folder), manifest.retrieval.chunks
    if champion is None or not answer:
        builds = builds_of(settings, application.name, lineage.id)
        hits = Retriever(builds, lineage.open(settings)).search(question, chunks)
        return Tried(render(template, question, hits), tuple(hits), None)
    loader = ReleaseLoader(settings, application)
    try:
        loaded = loader.load(champion)
        tried = PromptVersion(name=prompt_name(application), version=UNREGISTERED, template=template)
        manifest = loaded.manifest.model_copy(update={"prompt": tried})
        answered = AnswerPipeline(manifest, loaded.engine, loaded.retriever).answer(question)
        return Tried(render(template, question, answered.citations), answered.citations, answered)
    finally:
        loader.close()


def prompt_name(application: Application) -> str:
    """What the application's prompt is called in the registry."""
    return f"{application.name}.prompt"
