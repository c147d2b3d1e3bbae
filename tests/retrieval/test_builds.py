"""What index builds promise, wherever they are kept."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.lakehouse.content import content_hash
from millrace.lakehouse.lake import Lake
from millrace.lakehouse.tables import SILVER_CHUNKS
from millrace.retrieval.builds import FORMAT, PAYLOAD, BuildManifest, current
from millrace.retrieval.index import build_index, kept_lineages, publish_previous
from millrace.retrieval.search import Retriever
from millrace.settings import Settings
from tests.retrieval.conftest import chunked, vector_of, vectors_without_a_model
from tests.retrieval.places import PLACES, Kept, kept_in, write_note

pytestmark = pytest.mark.filterwarnings("ignore:.*ocal (mode|Qdrant)")


@pytest.fixture(params=PLACES)
def kept(
    request: pytest.FixtureRequest,
    settings: Settings,
    application: Application,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Kept]:
    with kept_in(request.param, settings, application, monkeypatch) as kept:
        yield kept


def built(kept: Kept) -> str:
    chunked(kept.settings, kept.application)
    vectors_without_a_model(Lake.of(kept.settings, kept.application.name), kept.application)
    return build_index(kept.settings, kept.application, run="test")["build"]


def chunks_of(kept: Kept) -> list[dict[str, object]]:
    return Lake.of(kept.settings, kept.application.name).read(SILVER_CHUNKS).to_pylist()


@pytest.mark.slow
def test_a_build_finds_each_chunk_by_its_own_vector(kept: Kept) -> None:
    opened = kept.builds.open(built(kept))
    chunks = chunks_of(kept)
    assert opened.manifest.chunks == len(chunks) == 3
    assert opened.documents() == {chunk["document_id"] for chunk in chunks}
    for chunk in chunks:
        ((score, payload),) = opened.nearest(vector_of(chunk), 1)
        assert score == pytest.approx(1, abs=1e-5)
        assert payload == {name: chunk[name] for name in PAYLOAD}
    scores = [score for score, _ in opened.nearest(vector_of(chunks[0]), 10)]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_an_unchanged_state_is_the_same_build_and_is_not_made_again(kept: Kept) -> None:
    build = built(kept)
    made = kept.builds.manifest(build)
    again = build_index(kept.settings, kept.application, run="another run")
    assert again == {"build": build, "lineage": made.lineage, "chunks": 3, "changed": False}
    assert kept.builds.manifest(build) == made
    assert kept.builds.manifests() == [made]


@pytest.mark.slow
def test_a_build_never_changes_whatever_is_built_after_it(kept: Kept, notes: Path) -> None:
    contents: dict[str, list[dict[str, object]]] = {}
    before = (notes / "bread.txt").read_text()
    for text in ("Bread falls when the oven opens.", before, "Bread is baked.", None):
        build = built(kept)
        contents.setdefault(build, chunks_of(kept))
        for known, chunks in contents.items():
            opened = kept.builds.open(known)
            assert opened.documents() == {chunk["document_id"] for chunk in chunks}
            for chunk in chunks:
                ((score, payload), *_) = opened.nearest(vector_of(chunk), 3)
                assert score == pytest.approx(1, abs=1e-5)
                assert payload["text"] == chunk["text"]
        if text is not None:
            write_note(notes, text)
    assert len(contents) == 3  # the third state was the first one again


@pytest.mark.slow
def test_a_lineage_that_is_removed_is_gone_and_can_be_built_again(kept: Kept) -> None:
    assert kept.builds.changed_at() is None
    began = datetime.now(UTC)
    build = built(kept)
    kept.builds.publish(build)
    changed = kept.builds.changed_at()
    assert changed is not None
    assert began - timedelta(seconds=1) < changed <= datetime.now(UTC)
    assert kept_lineages(kept.settings, kept.application.name) == [kept.builds.manifest(build).lineage]

    kept.builds.remove()

    assert kept.builds.changed_at() is None
    assert kept.builds.published() is None
    assert kept.builds.manifests() == []
    assert built(kept) == build
    assert kept.builds.open(build).manifest.chunks == 3


@pytest.mark.slow
def test_publishing_moves_the_pointer_once_and_remembers_the_way_back(kept: Kept, notes: Path) -> None:
    builds = kept.builds
    assert builds.published() is None
    first = built(kept)
    assert current(builds) is None
    assert builds.publish(first)
    assert not builds.publish(first)
    write_note(notes, "Bread falls when the oven opens.")
    second = built(kept)
    assert current(builds) == first
    assert builds.publish(second)
    pointer = builds.published()
    assert pointer is not None
    assert (pointer.build, pointer.previous) == (second, first)
    assert builds.publish(first)
    assert current(builds) == first


@pytest.mark.slow
def test_the_way_back_publishes_the_build_before_and_a_second_time_leads_forward_again(kept: Kept, notes: Path) -> None:
    with pytest.raises(RetrievalError, match=r"nothing is published in .*, so there is no way back"):
        publish_previous(kept.settings, kept.application, actor="person/ann")
    first = built(kept)
    kept.builds.publish(first)
    with pytest.raises(RetrievalError, match=f"only {first} was ever published"):
        publish_previous(kept.settings, kept.application, actor="person/ann")
    write_note(notes, "Bread falls when the oven opens.")
    second = built(kept)
    kept.builds.publish(second)
    for there, before in ((first, second), (second, first)):
        moved = publish_previous(kept.settings, kept.application, actor="person/ann")
        assert (moved.build, moved.previous) == (there, before)
        assert current(kept.builds) == there


@pytest.mark.slow
def test_a_build_that_is_not_there_is_neither_published_nor_opened(kept: Kept) -> None:
    for there_is_a_build in (False, True):
        if there_is_a_build:
            built(kept)
        for act in (kept.builds.publish, kept.builds.open, kept.builds.manifest):
            with pytest.raises(RetrievalError, match="no index build 'nonsense'"):
                act("nonsense")
        assert kept.builds.published() is None


@pytest.mark.slow
def test_old_builds_go_but_never_the_published_one_nor_the_one_before_it(kept: Kept) -> None:
    builds = kept.builds
    names = [f"build-{number}" for number in range(7)]
    for number, name in enumerate(names):
        builds.make(*made_of(name, {"granite": 0, "bread": number}))
        builds.collect(keep=name)
        if number < 2:
            builds.publish(name)
    left = [names[0], names[1], *names[3:]]
    assert [manifest.build for manifest in builds.manifests()] == left
    for name in left:
        assert builds.open(name).documents() == {"granite", "bread"}
        number = names.index(name)
        ((score, payload), *_) = builds.open(name).nearest(vector("bread", number), 2)
        assert score == pytest.approx(1, abs=1e-5)
        assert payload["text"] == f"bread {number}"
    with pytest.raises(RetrievalError, match="no index build"):
        builds.open(names[2])


def made_of(build: str, documents: dict[str, int]) -> tuple[BuildManifest, pa.Table]:
    """A build of documents of one chunk each, in this edition; what `build_index` gives, without Delta."""
    rows = [
        dict.fromkeys(PAYLOAD, name)
        | {
            "chunk_id": content_hash(name),
            "content_hash": content_hash(name, edition),
            "document_id": name,
            "text": f"{name} {edition}",
            "vector": vector(name, edition),
        }
        for name, edition in documents.items()
    ]
    manifest = BuildManifest(
        format=FORMAT, build=build, lineage="l", chunks_version=1, embeddings_version=1, chunks=len(rows),
        documents=len(rows), content_sha=build, built_at=datetime.now(UTC), run="test",
    )  # fmt: skip
    return manifest, pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["chunk_id"])))


def vector(name: str, edition: int) -> list[float]:
    return vector_of({"chunk_id": content_hash(name), "content_hash": content_hash(name, edition)})


class OneVector:
    """An embedder for which every question is the same chunk."""

    lineages = ""

    def __init__(self, chunk: dict[str, object]) -> None:
        self._chunk = chunk

    def embed(self, texts: list[str]) -> list[object]:
        import numpy as np

        return [np.array(vector_of(self._chunk), np.float32) for _ in texts]


@pytest.mark.slow
def test_searchers_follow_what_is_published_within_a_second_and_reach_an_older_build_by_name(
    kept: Kept, notes: Path
) -> None:
    first = built(kept)
    retriever = Retriever(kept.builds, OneVector(chunks_of(kept)[0]))  # type: ignore[arg-type]
    with pytest.raises(RetrievalError, match="no index build is published"):
        retriever.search("anything", 1)
    kept.builds.publish(first)
    assert retriever.build == first
    write_note(notes, "Bread falls when the oven opens.")
    second = built(kept)
    assert retriever.build == first
    kept.builds.publish(second)
    deadline = time.monotonic() + 3
    while retriever.build != second:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert any("oven" in hit.text for hit in retriever.search("anything", 3))
    assert not any("oven" in hit.text for hit in retriever.search("anything", 3, build=first))


@pytest.mark.slow
def test_threads_search_while_builds_are_published(kept: Kept, notes: Path) -> None:
    first = built(kept)
    kept.builds.publish(first)
    write_note(notes, "Bread falls when the oven opens.")
    both = [first, built(kept)]
    chunk = next(chunk for chunk in chunks_of(kept) if "Granite" in str(chunk["text"]))
    retriever = Retriever(kept.builds, OneVector(chunk))  # type: ignore[arg-type]
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                assert "Granite" in retriever.search("anything", 1)[0].text
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(10):
        kept.builds.publish(both[i % 2])
        time.sleep(0.02)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
