from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.applications import Application, Chunking
from millrace.errors import RetrievalError
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_DOCUMENTS
from millrace.retrieval.chunk import chunk_documents, passages, refresh_chunks
from millrace.settings import Settings
from tests.retrieval.conftest import chunked

CHUNKINGS = st.tuples(st.integers(20, 60), st.integers(0, 19)).map(
    lambda sizes: Chunking(max_words=sizes[0], overlap_words=sizes[1])
)
WORDS = st.lists(st.text("abcå€", min_size=1, max_size=8), max_size=300)
SPACES = st.sampled_from([" ", "\n", "\n\n    "])


@given(WORDS, SPACES, CHUNKINGS)
def test_every_word_is_in_a_passage_and_neighbours_share_exactly_the_overlap(
    words: list[str], space: str, chunking: Chunking
) -> None:
    found = [passage.split() for passage in passages(space.join(words), chunking)]
    rebuilt = found[0] if found else []
    for before, after in pairwise(found):
        shared = chunking.overlap_words
        assert before[len(before) - shared :] == after[:shared]
        rebuilt = rebuilt + after[shared:]
    assert rebuilt == words
    assert all(len(passage) <= chunking.max_words for passage in found)


@given(WORDS, SPACES, CHUNKINGS)
def test_a_passage_is_a_span_of_the_text(words: list[str], space: str, chunking: Chunking) -> None:
    text = space.join(words)
    assert all(passage in text and passage for passage in passages(text, chunking))


def test_a_run_without_spaces_does_not_make_an_endless_passage() -> None:
    found = passages("x" * 1_000_000, Chunking())
    assert max(map(len, found)) <= 120 * 64


@pytest.mark.parametrize("text", ["汉字没有空格", "ひらがなとカタカナ", "ภาษาไทยไม่มีช่องว่าง"])
def test_text_of_languages_without_spaces_fits_the_embedder_too(text: str) -> None:
    found = passages(text * 100 + " and config_option=1", Chunking(max_words=120, overlap_words=20))
    assert max(map(len, found)) <= 120 + len(" and config_option=1")
    assert found[-1].endswith(" and config_option=1")
    assert all(before[-20:] == after[:20] for before, after in pairwise(found[:-1]))


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_text_without_words_has_no_passages(text: str) -> None:
    assert passages(text, Chunking()) == []


def document(**changes: Any) -> dict[str, Any]:
    whole = {
        "document_id": "d",
        "content_hash": "",
        "source": "text_folder",
        "uri": "file:///d",
        "section": None,
        "title": "A title",
        "text": " ".join(f"word{i}" for i in range(300)),
    }
    return whole | changes


def chunks(*documents: dict[str, Any]) -> list[dict[str, Any]]:
    table = pa.Table.from_pylist(list(documents), schema=SILVER_DOCUMENTS.rows_schema)
    batches = chunk_documents(iter(table.to_batches()), Chunking())
    return pa.Table.from_batches(batches, SILVER_CHUNKS.rows_schema).to_pylist()


def test_chunk_ids_come_from_document_position_and_text_alone() -> None:
    before, moved = chunks(document()), chunks(document(title="Another title", uri="file:///moved"))
    assert [chunk["chunk_id"] for chunk in before] == [chunk["chunk_id"] for chunk in moved]
    assert not {chunk["content_hash"] for chunk in before} & {chunk["content_hash"] for chunk in moved}
    assert not {c["chunk_id"] for c in before} & {c["chunk_id"] for c in chunks(document(document_id="other"))}


def test_a_change_at_the_end_leaves_the_chunks_before_it_alone() -> None:
    before = chunks(document())
    after = chunks(document(text=document()["text"] + " and more"))
    assert before[:-1] == after[:-1]
    assert before[-1]["chunk_id"] != after[-1]["chunk_id"]


@pytest.mark.slow
def test_chunks_follow_updates_and_deletions_and_a_second_run_writes_nothing(
    settings: Settings, application: Application, lake: Lake, notes: Path
) -> None:
    assert chunked(settings, application)["inserted"] == 3
    again = chunked(settings, application)
    assert not again["changed"]
    assert again["version"] == lake.version(SILVER_CHUNKS)
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    (notes / "tides.txt").unlink()
    written = chunked(settings, application)
    assert (written["inserted"], written["deleted"]) == (1, 2)  # another text is another chunk
    rows = lake.read(SILVER_CHUNKS, ["title", "text"]).to_pylist()
    assert {row["title"] for row in rows} == {"granite.txt", "bread.txt"}
    assert any("oven door" in row["text"] for row in rows)


def test_chunking_before_any_document_is_one_sentence(settings: Settings, application: Application) -> None:
    with pytest.raises(RetrievalError, match="ingest documents first"):
        refresh_chunks(settings, application, run="test")


@pytest.mark.spark
def test_spark_makes_the_same_chunks_and_the_same_second_run(
    settings: Settings, application: Application, lake: Lake, spark_url: str
) -> None:
    chunked(settings, application)
    local = lake.read(SILVER_CHUNKS, SILVER_CHUNKS.rows_schema.names).sort_by("chunk_id")
    on_spark = settings.model_copy(
        update={
            "home": settings.home / "spark",
            "spark_remote": spark_url,
            "spark_tables": frozenset({SILVER_CHUNKS.path}),
        }
    )
    assert chunked(on_spark, application)["inserted"] == 3
    assert not chunked(on_spark, application)["changed"]
    spark = Lake.of(on_spark, application.name).read(SILVER_CHUNKS, SILVER_CHUNKS.rows_schema.names)
    assert spark.sort_by("chunk_id") == local


def test_an_overlap_that_is_as_long_as_a_passage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overlap_words \(20\) must be less than max_words \(20\)"):
        Chunking(max_words=20, overlap_words=20)
