"""A release's model card, for people: what it is made of, what it learnt from, where its evidence is, which licences.

The same release registered again has the same card, so it holds neither a date nor who registered it; the registry's
version says both. It does not go into the release's id.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pyarrow.compute as pc

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES, SILVER_DOCUMENTS
from millrace.releases.manifest import Chain, HuggingFaceModel, Manifest, Weights
from millrace.sources.questions import derive_questions

ANY_QUESTION = "What are these documents about?"
"""The input example where an application's documents give no question."""

_SOURCES = {
    "airflow_config": "Apache-2.0 (package apache-airflow)",
    "python_topics": "PSF License 2 (Python)",
    "text_folder": "as its owner says",
}
"""Kind of source → the licence of its documents, as docs/licences.md has it."""


@dataclass(frozen=True)
class TrainingData:
    """A training set as it is in the lake: examples by where they came from, and how many of them programs made up."""

    training_set: str
    table: str
    origins: Mapping[str, int]
    simulated: int


def training_data(lake: Lake, training_set: str) -> TrainingData:
    """What the lake has of a set of answers or of preferences; nothing where another lake has it."""
    for table in (GOLD_PREFERENCE_EXAMPLES, GOLD_TRAINING_EXAMPLES):
        rows = lake.read(table, ["origin", "simulated"], where=pc.field("training_set") == training_set)
        if rows.num_rows:
            break
    counted = rows.group_by("origin").aggregate([("simulated", "count")]).to_pylist()
    origins = {row["origin"]: row["simulated_count"] for row in sorted(counted, key=lambda row: row["origin"])}
    return TrainingData(training_set, table.path, origins, pc.sum(rows["simulated"]).as_py() or 0)


def example_question(lake: Lake, application: Application) -> str:
    """A question that the application's documents answer and the gate doesn't ask; else one that fits any."""
    documents = lake.read(SILVER_DOCUMENTS, ["document_id", "source", "section", "text"])
    asked = (one.question for one in derive_questions(documents, application) if one.split != "evaluation")
    return next(asked, ANY_QUESTION)


def licences(manifest: Manifest, application: Application, files: Path) -> dict[str, str]:
    """Part of the release → its licence, as its package or its directory says it.

    Args:
        files: the folder with the generator's files.
    """
    generator = manifest.generator
    if isinstance(generator, Weights):
        model = f"{_licence(application.generator)} (package {application.generator}; a fine-tune is a derived work)"
    elif isinstance(generator, HuggingFaceModel):
        model = _said_by_its_readme(files / "README.md")
    elif isinstance(generator, Chain):
        model = f"{_licence(generator.package)} (package {generator.package}); and the terms of the models that it asks"
    else:
        model = "the terms of the server that has it"
    embedding = manifest.retrieval.embedding_model
    derived = "; a fine-tune is a derived work" if manifest.retrieval.tuned else ""
    documents = {f"documents: {kind}": _SOURCES[kind] for kind in sorted({one.kind for one in application.sources})}
    return {
        "generator": model,
        "embedding model": f"{_licence(embedding)} (package {embedding}{derived})",
        **documents,
        "code": f"{_licence('millrace')} (package millrace)",
    }


def model_card(
    manifest: Manifest,
    application: Application,
    licensed: Mapping[str, str],
    tags: Mapping[str, str],
    trained_on: TrainingData | None,
) -> str:
    """The card as Markdown.

    Args:
        licensed: as `licences` gives it.
        tags: of the version that is to be registered; those that say where the weights are from.
        trained_on: what the generator was trained on; None: it was not trained here.
    """
    generator, release = manifest.generator, manifest.release_id
    files = [f"| `{file.name}` | {file.bytes:,} | `{file.sha256}` |" for file in generator.files]
    table = ["", "| file | bytes | SHA-256 |", "| --- | --- | --- |", *files] if files else []
    sections = ", ".join(application.questions.evaluation_sections)
    asked = f"the sections {sections}" if sections else "nothing yet: the declaration names no section"
    lines = [
        f"# Release {release} of {application.name}",
        "",
        f"{application.description}. Owner: {application.owner}. It answers from documents that are found for a "
        "question, and cites them; an index build is chosen when it is loaded.",
        "",
        "## Generator",
        "",
        f"- kind: {generator.kind}",
        f"- name: {generator.name}",
        f"- base: {_base(manifest, application)}",
        f"- origin: {tags.get('millrace.origin', 'not said')}",
        f"- generation: at most {manifest.generation.max_new_tokens} tokens, temperature "
        f"{manifest.generation.temperature}",
        *table,
        "",
        "## Training data",
        "",
        *_training(application, tags, trained_on),
        "",
        "## Prompt, retrieval, code",
        "",
        f"- prompt: {manifest.prompt.name}, version {manifest.prompt.version}",
        f"- retrieval lineage: {manifest.retrieval.lineage}, the best {manifest.retrieval.chunks} chunks",
        f"- embedding model: {manifest.retrieval.embedding_model}{_tuned(manifest)}",
        f"- code: millrace {manifest.code_version}, manifest format {manifest.format}",
        "",
        "## Evaluation",
        "",
        "The gate comes after registration. Its verdicts, with the evaluation set's id, are in the Delta table "
        f"`ops/evaluations` (`candidate_release_id = '{release}'`) and in MLflow's experiment "
        f"`{application.name}/evaluations`. It asks about {asked}.",
        "",
        "## Licences",
        "",
        "| part | licence |",
        "| --- | --- |",
        *(f"| {part} | {licence} |" for part, licence in licensed.items()),
    ]
    return "\n".join(lines) + "\n"


def _tuned(manifest: Manifest) -> str:
    sha256 = manifest.retrieval.tuned_sha256
    return f", fine-tuned on this application's questions (`embedding/`, weights {sha256})" if sha256 else ""


def _base(manifest: Manifest, application: Application) -> str:
    generator = manifest.generator
    if isinstance(generator, Weights):
        return f"the weights of package {application.generator}"
    if isinstance(generator, HuggingFaceModel):
        return "a Hugging Face directory that somebody added; all of it is in the release"
    if isinstance(generator, Chain):
        return f"the chain of package {generator.package} {generator.package_version}, which is not in the release"
    return f"the model that its server calls {generator.name}" + (", with the adapter below" if generator.files else "")


def _training(application: Application, tags: Mapping[str, str], trained_on: TrainingData | None) -> list[str]:
    if trained_on is None:
        return ["None: it was not trained here."]
    examples = sum(trained_on.origins.values())
    origins = ", ".join(f"{count} from {origin}s" for origin, count in trained_on.origins.items())
    told = (
        f"{examples} examples ({origins}), {trained_on.simulated} of them simulated" if examples else "not in this lake"
    )
    said = {
        "earlier_training_sets": "sets that the weights it started from had learnt",
        "teacher": "teacher, whose answers are used under its licence or terms",
    }
    return [
        f"- training set: `{trained_on.training_set}`, {told}; its rows: `{trained_on.table}`",
        *(f"- {name}: {tags[tag]}" for tag, name in said.items() if tag in tags),
        f"- simulated feedback in it: {tags.get('simulated', 'not said')}",
        f"- fine-tune: MLflow run `{tags.get('mlflow_run', 'not said')}` in experiment `{application.name}/finetune`",
    ]


def _licence(package: str) -> str:
    try:
        said = metadata(package)
    except PackageNotFoundError:
        return "not said: the package is not installed here"
    named = [line.rpartition(" :: ")[2] for line in said.get_all("Classifier") or () if line.startswith("License")]
    expression, whole = (next(iter(said.get_all(field) or ()), "") for field in ("License-Expression", "License"))
    # Some packages put the whole text there.
    return expression or ("" if "\n" in whole else whole) or ", ".join(named) or "not said"


def _said_by_its_readme(readme: Path) -> str:
    """What the front matter of a model's own card says, as Hugging Face writes it."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    said = re.search(r"^license:\s*(\S+)\s*$", front.group(1), re.MULTILINE) if front else None
    return f"{said.group(1)} (its README.md)" if said else "not said: its directory has no README.md that names one"
