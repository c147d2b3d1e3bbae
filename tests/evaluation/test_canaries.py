import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.environments.audit import search
from millrace.errors import CanaryError
from millrace.evaluation.canaries import choose_canaries, publish_build
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS, SILVER_EMBEDDINGS
from millrace.retrieval.builds import current
from millrace.retrieval.chunk import refresh_chunks
from millrace.retrieval.embed import lineage_id, refresh_embeddings
from millrace.retrieval.index import build_index, declared_builds
from millrace.settings import Settings
from millrace.sources.ingest import land_documents, refine_documents
from millrace.sources.questions import Question


def question(number: int, split: Any) -> Question:
    return Question(f"{number:032x}", f"Question {number}?", "answer", "document", "core", split)


def test_canaries_are_training_questions_and_always_the_same_ones() -> None:
    questions = [question(i, ("training", "evaluation", "live")[i % 3]) for i in range(30)]
    chosen = choose_canaries(questions, 4)
    assert [canary.split for canary in chosen] == ["training"] * 4
    assert chosen == choose_canaries(questions, 4)


def build(settings: Settings, application: Application) -> str:
    land_documents(settings, application, run="test")
    refine_documents(settings, application, run="test")
    refresh_chunks(settings, application, run="test")
    refresh_embeddings(settings, application, run="test")
    return build_index(settings, application, run="test")["build"]


def small(qa: Application, **changes: Any) -> Application:
    """Eleven options, all of them for training."""
    sources = [{"kind": "airflow_config", "sections": ["triggerer"]}]
    declared = qa.model_dump(mode="json") | {"sources": sources, "questions": {}}
    return Application.model_validate(declared | changes)


def spoil(lake: Lake) -> None:
    """Vectors that have nothing to do with their chunks, as a broken embedder would leave them."""
    rows = lake.read(SILVER_EMBEDDINGS, SILVER_EMBEDDINGS.rows_schema.names)
    noise = np.random.default_rng(0).normal(size=(rows.num_rows, 384)).astype(np.float32)
    column = rows.schema.get_field_index("vector")
    spoilt = rows.set_column(column, rows.schema.field(column), pa.array(list(noise), rows.schema.field(column).type))
    lake.merge(SILVER_EMBEDDINGS, rows.slice(0, 0), run="test", delete_unmatched="true")
    lake.merge(SILVER_EMBEDDINGS, spoilt, run="test")


@pytest.mark.model
def test_a_first_build_that_finds_its_canaries_is_published_and_only_once(settings: Settings, qa: Application) -> None:
    application = small(qa)
    made = build(settings, application)
    outcome = publish_build(settings, application, made, run="test")
    assert outcome["changed"]
    assert outcome["canaries"] > 20
    assert outcome["recall"] >= 0.9
    assert outcome["recall_before"] is None
    assert current(declared_builds(settings, application)) == made
    assert not publish_build(settings, application, made, run="test")["changed"]


@pytest.mark.model
def test_a_first_build_that_finds_next_to_nothing_is_refused(settings: Settings, qa: Application, lake: Lake) -> None:
    application = small(qa, sources=[{"kind": "airflow_config", "sections": ["triggerer", "smtp", "kerberos"]}])
    build(settings, application)
    spoil(lake)
    made = remade(settings, application)
    with pytest.raises(CanaryError, match=r"of \d+ canaries, 0\.500 is needed"):
        publish_build(settings, application, made, run="test")
    assert current(declared_builds(settings, application)) is None


@pytest.mark.model
def test_a_build_that_finds_less_than_the_published_one_is_refused_and_that_one_stays(
    settings: Settings, qa: Application, lake: Lake, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "note.txt").write_text("A note.")
    folder = {"kind": "text_folder", "path": str(notes)}
    application = small(qa, sources=[{"kind": "airflow_config", "sections": ["triggerer", "smtp", "kerberos"]}, folder])
    good = build(settings, application)
    publish_build(settings, application, good, run="test")
    (notes / "note.txt").write_text("Another note.")
    build(settings, application)
    spoil(lake)
    bad = remade(settings, application)
    with pytest.raises(CanaryError, match=f"published build {good} stays"):
        publish_build(settings, application, bad, run="test")
    told = [(one["outcome"], one["resource"], one["details"]["previous"]) for one in search(settings)]
    lineage = lineage_id(application)
    assert told == [("published", f"index/{lineage}/{good}", None), ("refused", f"index/{lineage}/{bad}", good)]
    assert current(declared_builds(settings, application)) == good


@pytest.mark.model
def test_a_build_that_lost_documents_is_refused_however_well_it_finds_the_rest(
    settings: Settings, qa: Application, lake: Lake
) -> None:
    application = small(qa, sources=[{"kind": "airflow_config", "sections": ["triggerer", "smtp", "kerberos"]}])
    good = build(settings, application)
    publish_build(settings, application, good, run="test")
    kept = lake.read(SILVER_CHUNKS, ["document_id", "chunk_id"]).sort_by("document_id")["chunk_id"][0].as_py()
    nothing = SILVER_CHUNKS.rows_schema.empty_table()
    lake.merge(SILVER_CHUNKS, nothing, run="test", delete_unmatched=f"target.chunk_id != '{kept}'")
    refresh_embeddings(settings, application, run="test")
    bad = build_index(settings, application, run="test")["build"]
    assert bad != good
    with pytest.raises(CanaryError, match=r"finds 0\.\d+ of \d\d canaries"):
        publish_build(settings, application, bad, run="test")
    assert current(declared_builds(settings, application)) == good


@pytest.mark.model
def test_where_every_document_is_another_one_a_build_must_reach_what_a_first_one_must(
    settings: Settings, qa: Application, lake: Lake
) -> None:
    publish_build(settings, small(qa), build(settings, small(qa)), run="test")
    others = small(qa, sources=[{"kind": "airflow_config", "sections": ["smtp", "kerberos"]}])
    good = build(settings, others)
    spoil(lake)
    with pytest.raises(CanaryError, match=r"of \d+ canaries, 0\.500 is needed"):
        publish_build(settings, others, remade(settings, others), run="test")
    assert good != current(declared_builds(settings, others))


def remade(settings: Settings, application: Application) -> str:
    """The build of the state of now, made from the vectors of now."""
    made = build_index(settings, application, run="test")["build"]
    shutil.rmtree(settings.index_builds(application.name) / lineage_id(application) / made)
    return build_index(settings, application, run="test")["build"]


@pytest.mark.model
def test_where_the_published_build_is_lost_the_next_one_need_not_wait_for_it(
    settings: Settings, qa: Application
) -> None:
    lost = build(settings, small(qa))
    publish_build(settings, small(qa), lost, run="test")
    (folder,) = settings.index_builds(qa.name).glob(f"*/{lost}")
    shutil.rmtree(folder)
    grown = small(qa, sources=[{"kind": "airflow_config", "sections": ["triggerer", "smtp"]}])
    made = build(settings, grown)
    outcome = publish_build(settings, grown, made, run="test")
    assert (outcome["changed"], outcome["recall_before"]) == (True, None)
    assert current(declared_builds(settings, grown)) == made


@pytest.mark.model
def test_documents_that_were_removed_are_no_loss(settings: Settings, qa: Application, lake: Lake) -> None:
    both = small(qa, sources=[{"kind": "airflow_config", "sections": ["triggerer", "smtp"]}])
    publish_build(settings, both, build(settings, both), run="test")
    fewer = small(qa)
    outcome = publish_build(settings, fewer, build(settings, fewer), run="test")
    assert outcome["changed"]
    assert outcome["recall"] is not None
    assert lake.read(SILVER_CHUNKS, ["section"])["section"].unique().to_pylist() == ["triggerer"]


@pytest.mark.model
def test_without_questions_a_build_is_published(settings: Settings, qa: Application) -> None:
    application = small(qa, sources=[{"kind": "python_topics", "topics": ["if"]}])
    outcome = publish_build(settings, application, build(settings, application), run="test")
    assert outcome["changed"]
    assert (outcome["canaries"], outcome["recall"]) == (0, None)
