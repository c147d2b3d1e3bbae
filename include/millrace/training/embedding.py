"""From questions and the chunks that answer them to a candidate release with an embedding model of its own: pairs,
fine-tune, a lineage beside the others, registration. Done again, each step finds what it did.

Always from the package's model, so that what one fine-tune got wrong is not in the next. A model that finds no more of
what it has not seen than the champion's does is not registered.
"""

import json
import logging
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from millrace.applications import Application, EmbeddingTraining
from millrace.errors import TrainingError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.costs import Cost, attribute_cost, record_cost
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import (
    GOLD_TRAINING_EXAMPLES,
    SILVER_CHUNKS,
    SILVER_DOCUMENTS,
    SILVER_EXCHANGES,
    SILVER_FEEDBACK,
)
from millrace.lakehouse.trained import embedding_set
from millrace.releases.declare import declare_release
from millrace.releases.embedding import release_lineage
from millrace.releases.manifest import Manifest, describe_embedding
from millrace.releases.package import read_release
from millrace.releases.published_split import read_split
from millrace.releases.recipe import Recipe
from millrace.releases.registry import fetch_release, register_once, training_tags
from millrace.retrieval.embed import Embedder, Lineage, lineage_name, refresh_embeddings
from millrace.retrieval.embedding_model import MODEL_FILES, WEIGHTS, forget_converted, model_folder, weights_sha256
from millrace.retrieval.index import build_index, builds_of, published_build
from millrace.retrieval.search import Retriever
from millrace.settings import Settings
from millrace.sources.erased import erasures_seen, require_nobody_erased
from millrace.sources.questions import derive_questions
from millrace.training.contrastive import Embed, Found, Triple, measure, tune
from millrace.training.finetune import EMBEDDING, training_cost_id
from millrace.training.pairs import Corpus, Pair, choose_pairs, seek
from millrace.training.pool import held_out_questions
from millrace.training.sets import MINIMUM
from millrace.training.weights import require_equal

log = logging.getLogger("millrace.training")

PROGRAM = 1
"""Raise when the same pairs would give another model."""
MEASURED = 500
"""Chunks among which the right one is looked for: all, or the questions' own and a sample of the others."""
SAME = 1e-3
"""By how much the written model's measurement may differ from the trained one's: other kernels round differently."""
KEPT = 2
"""Fine-tunes of an application's embedding model whose files stay on disk."""
MEASURES = ("recall", "recall_before", "reciprocal_rank", "reciprocal_rank_before")


def tune_embedding(
    settings: Settings,
    application: Application,
    *,
    run: str,
    max_examples: int | None = None,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Fine-tune the embedding model on what is known now and, if it finds more than the champion's, build an index with
    it beside the others; it is not published yet.

    Args:
        max_examples, epochs: instead of the declared ones of `embedding_training`.

    Returns:
        `release` (version that it was compared with), `folder`, `fingerprint`, `erasures_seen`, counts `pairs`,
        `held_out`, `simulated`, `origins`, `left_out`; of the held-out questions `recall` (of the chunk, among as many
        as the prompt takes) and `reciprocal_rank`, each with `_before`; `better`, `why`, `model`, `lineage` and `build`
        (None: it isn't better).

    Raises:
        TrainingError: too few pairs, the loss is not a number, or the model that was written isn't the trained one.
        RetrievalError: the champion's lineage has no index build.
        ReleaseError: MLflow doesn't answer.
    """
    changes = {"max_examples": max_examples, "epochs": epochs}
    configuration = application.embedding_training.model_copy(
        update={name: value for name, value in changes.items() if value is not None}
    )
    split = read_split(settings, application.name)
    champion = split.champion if split else None
    version = champion or declare_release(settings, application, variant=None, run=run)["version"]
    released = fetch_release(settings, application, version)
    manifest = read_release(released)
    current = release_lineage(manifest, released)
    lake = Lake.of(settings, application.name)
    erased = erasures_seen(lake)
    corpus = Corpus(lake.read(SILVER_CHUNKS))
    embedder = current.open(settings)
    pairs, left_out = _pairs(settings, application, current, embedder, corpus, configuration.max_examples)
    folder, trained = _tune(settings, application, manifest, embedder, corpus, pairs, configuration, erased, run)
    told = {
        "release": version,
        "folder": str(folder),
        "fingerprint": folder.name,
        "erasures_seen": erased,
        "pairs": len(pairs),
        "origins": dict(sorted(Counter(pair.origin for pair in pairs).items())),
        "simulated": sum(pair.simulated for pair in pairs),
        "left_out": left_out,
        "model": manifest.retrieval.embedding_model,
        **{name: trained[name] for name in ("better", "held_out", "seconds", *MEASURES)},
        "why": (
            f"of {trained['held_out']} held-out questions it finds {trained['recall']:.3f} (before "
            f"{trained['recall_before']:.3f}), mean reciprocal rank {trained['reciprocal_rank']:.3f} (before "
            f"{trained['reciprocal_rank_before']:.3f})"
        ),
    }
    log.info("%s: embedding model %s: %s", application.name, folder.name, told["why"])
    if not trained["better"]:
        return told | {"lineage": None, "build": None}
    lineage = Lineage(lineage_name(told["model"], application.chunking, weights_sha256(folder)), told["model"], folder)
    refresh_embeddings(settings, application, run=run, lineage=lineage)
    return told | {
        "lineage": lineage.id,
        "build": build_index(settings, application, run=run, lineage=lineage.id)["build"],
    }


def release_embedding(
    settings: Settings,
    application: Application,
    *,
    tuned: dict[str, Any],
    run: str,
    form: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Register the release that the embedding model was compared with, with that model and its lineage, as a candidate.

    Args:
        tuned: as `tune_embedding` returns it, where it is better.
        form: what it was given beside the declaration; None: nothing.

    Returns:
        As `register_once`.

    Raises:
        TrainingError: the model's files are gone.
        ConflictError: a user was erased since, who may be in it; train it again.
        ReleaseError: MLflow doesn't answer.
    """
    folder = Path(tuned["folder"])
    if not folder.is_dir():
        raise TrainingError(f"{folder} is gone; clear the task that trains, it makes it again")
    released = fetch_release(settings, application, tuned["release"])
    manifest = read_release(released)
    retrieval = manifest.retrieval.model_copy(update={"lineage": tuned["lineage"], "tuned": describe_embedding(folder)})
    candidate = manifest.changed(retrieval=retrieval)
    lake = Lake.of(settings, application.name)
    require_nobody_erased(lake, tuned["erasures_seen"])
    _remember(lake, folder, embedding_set(weights_sha256(folder)), run=run)
    tags = training_tags(settings, application, tuned["release"])
    simulated = tuned["simulated"] > 0 or tags.get("simulated") == "true"
    registered = register_once(
        settings,
        application,
        candidate,
        released,
        embedding=folder,
        run=run,
        tags=tags
        | {
            "millrace.origin": "embedding",
            **Recipe.of(application, "finetune_embedding", form or {}).tags,
            "fingerprint": tuned["fingerprint"],
            "pairs": str(tuned["pairs"]),
            "simulated": str(simulated).lower(),
        }
        | {name: f"{tuned[name]:.4g}" for name in MEASURES},
    )
    cost = training_cost_id(tuned["fingerprint"], tuned["seconds"])
    attribute_cost(lake, cost, candidate.release_id, run=run)
    return registered


def _remember(lake: Lake, folder: Path, set_id: str, *, run: str) -> None:
    """What was trained on, for the gate that looks for leaks, and for whoever erases a user."""
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    # Documents and users may ask the same: then it is a user's, who may be erased.
    pairs = sorted(map(json.loads, lines), key=lambda pair: str(pair["origin"]) != "document")
    once = {content_hash(pair["question"], pair["chunk_id"]): pair for pair in pairs}
    rows = [
        {
            "training_set": set_id,
            "example_id": example_id,
            "origin": pair["origin"],
            "simulated": pair["simulated"],
            "section": None,
            "question": pair["question"],
            "answer": "",
            "chunk_ids": [pair["chunk_id"]],
            "prompt": "",
        }
        for example_id, pair in once.items()
        if not pair["held_out"]
    ]
    lake.merge(GOLD_TRAINING_EXAMPLES, pa.Table.from_pylist(rows, schema=GOLD_TRAINING_EXAMPLES.rows_schema), run=run)


def _pairs(
    settings: Settings, application: Application, current: Lineage, embedder: Embedder, corpus: Corpus, size: int
) -> tuple[list[Pair], dict[str, int]]:
    lake = Lake.of(settings, application.name)
    derived = derive_questions(lake.read(SILVER_DOCUMENTS), application)
    build = published_build(settings, application, current.id)
    retriever = Retriever(builds_of(settings, application.name, current.id), embedder)
    pairs, left_out = choose_pairs(
        seek(derived, lake.read(SILVER_FEEDBACK), lake.read(SILVER_EXCHANGES, ["completion_id", "citations"])),
        corpus,
        held_out_questions(lake, derived),
        lambda question, k: retriever.search(question, k, build),
        size,
    )
    trained, held_out = (sum(pair.held_out is kept for pair in pairs) for kept in (False, True))
    if trained < MINIMUM or not held_out:
        raise TrainingError(
            f"application {application.name!r}: {trained} questions to train the embedding model on and {held_out} to "
            f"measure it on, at least {MINIMUM} and 1 are needed (left out: {left_out or 'none'}); ingest documents "
            "that give questions outside of the evaluation and live sections, or gather feedback"
        )
    return pairs, left_out


def _tune(
    settings: Settings,
    application: Application,
    manifest: Manifest,
    before: Embedder,
    corpus: Corpus,
    pairs: Sequence[Pair],
    configuration: EmbeddingTraining,
    erased: str,
    run: str,
) -> tuple[Path, dict[str, Any]]:
    """The folder with the model, and what was measured; what is there already is used."""
    source = model_folder(manifest.retrieval.embedding_model)
    depth = manifest.retrieval.chunks
    learnt = configuration.model_dump(exclude={"max_examples"})
    told = [json.dumps(asdict(pair) | {"chunk": corpus.by_id[pair.chunk_id].text}, sort_keys=True) for pair in pairs]
    made_of = [str(PROGRAM), weights_sha256(source), json.dumps(learnt, sort_keys=True), str(depth), before.lineages]
    runs = settings.home / "training" / settings.environment / application.name
    folder = runs / f"{EMBEDDING}{content_hash(*made_of, *told)[:16]}"
    if not folder.is_dir():
        runs.mkdir(parents=True, exist_ok=True)
        for unfinished in runs.glob(f".{EMBEDDING}*"):  # of a run that was killed: there is one at a time
            shutil.rmtree(unfinished)
        with tempfile.TemporaryDirectory(prefix=f".{EMBEDDING}", dir=runs) as scratch:
            building = Path(scratch) / "model"
            building.mkdir()
            (building / "pairs.jsonl").write_text("".join(f"{line}\n" for line in told), encoding="utf-8")
            result = _train(
                settings, manifest.retrieval.embedding_model, building, before, corpus, pairs, configuration, depth
            )
            (building / "result.json").write_text(json.dumps(result, indent=1))
            require_nobody_erased(Lake.of(settings, application.name), erased)
            seconds = result["seconds"]
            cost = Cost(
                training_cost_id(folder.name, seconds),
                "training",
                folder.name,
                seconds=seconds,
                tokens=0,
                cost_usd=application.prices.machine("training", seconds),
            )
            record_cost(Lake.of(settings, application.name), cost, run=run)
            building.chmod(0o755)
            building.rename(folder)
    folder.touch()  # in use: among the last to be removed
    for old in sorted(runs.glob(f"{EMBEDDING}*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder, json.loads((folder / "result.json").read_text())


def _train(
    settings: Settings,
    model: str,
    building: Path,
    before: Embedder,
    corpus: Corpus,
    pairs: Sequence[Pair],
    configuration: EmbeddingTraining,
    depth: int,
) -> dict[str, Any]:
    from safetensors.torch import save_file

    started, source = time.perf_counter(), model_folder(model)
    held_out = [pair for pair in pairs if pair.held_out]
    triples = [
        Triple(pair.question, corpus.by_id[pair.chunk_id].text, corpus.by_id[pair.negative_id].text)
        for pair in pairs
        if not pair.held_out
    ]
    passages = _passages(corpus, held_out)
    at = {chunk_id: position for position, chunk_id in enumerate(passages)}

    def judge(embed: Embed) -> Found:
        questions, right = [pair.question for pair in held_out], [at[pair.chunk_id] for pair in held_out]
        return measure(embed, questions, right, [corpus.by_id[chunk_id].text for chunk_id in passages], depth)

    was = judge(before.embed)
    weights, curve = tune(source, triples, configuration, judge, threads=settings.threads)
    for name in MODEL_FILES:
        if name != WEIGHTS:
            shutil.copyfile(source / name, building / name)
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, building / WEIGHTS, metadata={"format": "pt"})
    require_equal(building / WEIGHTS, weights)
    # As whoever answers will open it: a model that is read otherwise than it was trained would go unnoticed.
    now = judge(Embedder(model, settings.cache, settings.threads, building).embed)
    if now <= was:
        forget_converted(weights_sha256(building), settings.cache)
    best = max(curve, key=lambda one: (one["recall"], one["reciprocal_rank"]))
    if abs(now.reciprocal_rank - best["reciprocal_rank"]) > SAME:
        raise TrainingError(
            f"the embedding model that was written has a mean reciprocal rank of {now.reciprocal_rank:.4f}, the "
            f"trained one had {best['reciprocal_rank']:.4f}; nothing of it is used: run the task again"
        )
    return {
        "held_out": len(held_out),
        "trained": len(triples),
        "better": now > was,
        "best_epoch": curve.index(best) + 1,
        "curve": curve,
        "seconds": time.perf_counter() - started,
        **{f"{name}_before": value for name, value in vars(was).items()},
        **vars(now),
    }


def _passages(corpus: Corpus, held_out: Sequence[Pair]) -> list[str]:
    """Ids of the chunks among which the right one is looked for; the same for the same chunks."""
    own = {one for pair in held_out for one in (pair.chunk_id, pair.negative_id)}
    others = sorted(corpus.by_id.keys() - own, key=lambda one: content_hash("measured", one))
    return [*sorted(own), *others[: max(MEASURED - len(own), 0)]]
